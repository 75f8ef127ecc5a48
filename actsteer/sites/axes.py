"""Which axis of an activation holds the features, and which one the rows of the batch."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from actsteer.sites.resolve import hook_points

_SPATIAL = {"1d": -2, "2d": -3, "3d": -4}
_CHANNEL_SECOND = (nn.GroupNorm, nn.BatchNorm1d, nn.SyncBatchNorm, nn.Upsample, nn.LocalResponseNorm)
_FEATURES_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
_KEEPS_LAYOUT = ("activation", "dropout")  # the modules of torch.nn whose outputs lie as their inputs do


def feature_axis(model: nn.Module, site: str, module: nn.Module) -> int | None:
    """The axis of the features at `site`, or None if the module's class leaves it open.

    Convolutions, pools, paddings and 1d-3d norms keep the channels before the spatial axes (counted from the end, so
    that unbatched inputs work too); linear maps, layer norms, embeddings and recurrent cells have them last, and so
    do TransformerLens hook points. A pointwise module inside an `nn.Sequential` takes the axis of what runs before it.
    """
    if site in hook_points(model):
        return -1
    return _axis_after([module, *_earlier_siblings(model, site)])


def row_axis(model: nn.Module, site: str, module: nn.Module) -> int:
    """The axis of the batch: 0, or 1 where the module or one around it says `batch_first=False`."""
    path = [model]
    for part in site.split("."):
        child = path[-1]._modules.get(part)
        if child is None:
            break
        path.append(child)
    return 1 if any(_sequence_first(outer) for outer in (*path, module)) else 0


def known_size(module: nn.Module) -> int | None:
    """The number of features that the module puts out, where its class tells before it has run."""
    match module:
        case nn.Linear():
            return module.out_features
        case nn.LayerNorm():
            return module.normalized_shape[-1]
        case nn.Embedding():
            return module.embedding_dim
        case nn.modules.conv._ConvNd():
            return module.out_channels
        case _:
            return None


def _axis_after(modules: Iterable[nn.Module]) -> int | None:
    """The feature axis that the last-run of these modules leaves, nearest first."""
    for module in modules:
        axis = _own_axis(module)
        if axis is not None or not _keeps_layout(module):
            return axis
    return None


def _keeps_layout(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return all(map(_keeps_layout, module))
    home = type(module).__module__
    return isinstance(module, nn.Identity) or home in {f"torch.nn.modules.{part}" for part in _KEEPS_LAYOUT}


def _own_axis(module: nn.Module) -> int | None:
    if isinstance(module, _FEATURES_LAST):
        return -1
    if isinstance(module, _CHANNEL_SECOND):
        return 1
    if isinstance(module, nn.Sequential):
        return _axis_after(reversed(list(module)))
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn.") and kind.__name__[-2:] in _SPATIAL:
            return _SPATIAL[kind.__name__[-2:]]
    return None


def _sequence_first(module: nn.Module) -> bool:
    """Whether it says so itself or, as torch's transformers do, by the attention inside its first layer."""
    layer = module.layers[0] if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder) else module
    return getattr(getattr(layer, "self_attn", layer), "batch_first", None) is False


def _earlier_siblings(model: nn.Module, site: str) -> list[nn.Module]:
    """What runs before a member of an `nn.Sequential`, and of those around it, nearest first."""
    modules = dict(model.named_modules(remove_duplicate=False))
    earlier: list[nn.Module] = []
    while site:
        parent_name, _, own = site.rpartition(".")
        parent = modules.get(parent_name)
        if not isinstance(parent, nn.Sequential) or own not in parent._modules:
            break
        earlier += list(parent)[: list(parent._modules).index(own)][::-1]
        site = parent_name
    return earlier
