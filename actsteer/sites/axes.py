"""Which axis of an activation holds the features, and which one the rows of the batch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from torch import nn

from actsteer.errors import ShapeError, SiteNotFoundError, close_names
from actsteer.sites.features import sizes
from actsteer.sites.place import Place
from actsteer.sites.resolve import Modules, hook_points, named_sites, path_to, runs_torch_code
from actsteer.sites.tap import plain_class
from actsteer.sites.wrappers import named_modules, unwrapped

Axes: TypeAlias = int | Mapping[str, int]
"""The axis of every site, or site -> axis; a site that is not named has its own."""
RowsBy: TypeAlias = Literal["told", "first", "open"]
"""Whether the axis of the rows is told by a class or the user; is the first, as nearly everywhere; or may be another,
for modules of the model have the positions first."""

_SPATIAL = {"1d": -2, "2d": -3, "3d": -4}
_CHANNEL_SECOND = (nn.GroupNorm, nn.BatchNorm1d, nn.SyncBatchNorm, nn.Upsample, nn.LocalResponseNorm)
_FEATURES_LAST = (
    *(nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, nn.RNNCellBase),
    *(nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
_KEEPS_LAYOUT = ("activation", "dropout")  # the modules of torch.nn whose outputs lie as their inputs do


@dataclass(frozen=True)
class Layout:
    """How the activations at a site lie.

    Args:
        axis: the feature axis; None where the module's class leaves it open.
        evidence: for an open one, (axis, size) of the modules in it, or of those around it, that have an axis.
        inside: whether the evidence is of modules in it.
        row_axis: the axis of the batch.
        token_axis: that of the tokens; None: the one that remains.
        rows_by: who says which the axis of the batch is.
        is_step: whether each activation is one step of a sequence, as a recurrent cell in a loop gives it.
    """

    axis: int | None
    evidence: tuple[tuple[int, int], ...] = ()
    inside: bool = True
    row_axis: int = 0
    token_axis: int | None = None
    rows_by: RowsBy = "first"
    is_step: bool = False

    def rows_and_tokens(self, shape: tuple[int, ...], axis: int, *, site: str) -> tuple[int, int | None]:
        """The axes of the rows and of the tokens, counted from the front; None for tokens that cannot be told.

        Raises:
            ShapeError: two of the three are one.
        """
        rank = len(shape)
        if rank <= 2:
            return 0, None
        rows = self.row_axis % rank if -rank <= self.row_axis < rank else rank
        rest = [own for own in range(rank) if own not in (axis, rows)]
        tokens = rest[0] if rank == 3 and rest else None
        if self.token_axis is not None:
            tokens = self.token_axis % rank if -rank <= self.token_axis < rank else rank
        if rank in (rows, tokens) or tokens in (axis, rows) or (self.rows_by == "told" and rows == axis):
            raise ShapeError(
                f"site {site!r}: the activation has shape {shape}, and its features, rows and tokens cannot lie on "
                f"axes {axis}, {self.row_axis} and {self.token_axis}; pass other row_axis= or token_axis="
            )
        return rows, tokens

    def feature_axis(self, shape: tuple[int, ...], *, size: int | None, site: str) -> int:
        """The feature axis counted from the front, once it is certain that there are `size` features on it.

        An open axis is the one where a module inside, or around, has as many features, if no other axis has; failing
        that the last, if there are at most three axes.

        Raises:
            ShapeError: another size there, or an axis that cannot be known.
        """
        axis = self._inferred(shape, size, site) if self.axis is None else self.axis
        if not -len(shape) <= axis < len(shape):
            raise ShapeError(f"site {site!r}: expected an activation with a feature axis {axis}, got shape {shape}")
        if size not in (None, shape[axis]):
            other = next((own for own in range(1, len(shape)) if shape[own] == size), None)
            raise ShapeError(
                f"site {site!r}: the activation has {shape[axis]} features (axis {axis} of shape {shape}), the vector "
                f"{size}; was it fitted on another model?"
                + ("" if other is None else f" If the features lie on axis {other}, pass axis={{{site!r}: {other}}}")
            )
        return axis % len(shape)

    def _inferred(self, shape: tuple[int, ...], size: int | None, site: str) -> int:
        last = len(shape) - 1
        fitting = sorted({axis for own, number in self.evidence for axis in self._fitting(own, number, shape)})
        if size is not None:
            fitting = [axis for axis in fitting if shape[axis] == size] or fitting
        if not shape:
            return -1
        if self.inside and (-1, shape[-1]) in self.evidence:  # then the first axis is the rows, however many there are
            fitting = [axis for axis in fitting if axis]
        if fitting in ([], [last]) and len(shape) <= 3:
            return -1
        if len(fitting) == 1:
            return fitting[0]
        which = f"axes {fitting} would all do" if fitting else "its module does not tell which axis holds the features"
        raise ShapeError(
            f"site {site!r}: the activation has shape {shape}, and {which}; pass axis={{{site!r}: 1}} or another one, "
            "or choose a convolution, norm or linear module beside it"
        )

    def _fitting(self, axis: int, size: int, shape: tuple[int, ...]) -> list[int]:
        """The axes that one module's axis and size speak for; several where sizes are equal by accident."""
        rank = len(shape)
        if axis == -1:
            return [rank - 1] if shape[-1] == size and (self.inside or rank <= 3) else []
        if axis == 1:  # of any rank
            found = [1] if rank > 1 and shape[1] == size else []
        elif rank == -axis + 1:
            found = [1] if shape[1] == size else []
        elif rank == -axis and shape[0] == size:  # channels of one image alone, or the rows of something else
            return [0, rank - 1]
        else:
            found = []
        also_last = found and rank > 2 and shape[-1] == size  # they could as well lie last
        return [*found, rank - 1] if also_last else found


def layout(
    model: nn.Module,
    place: Place,
    *,
    axis: int | None = None,
    row_axis: int | None = None,
    token_axis: int | None = None,
    modules: Modules | None = None,
    is_open: bool | None = None,
) -> Layout:
    """The layout of the activations at a place; `axis`, `row_axis` and `token_axis` are said by the
    user.

    Convolutions, pools, paddings and 1d-3d norms keep the channels before the spatial axes (counted from the end, so
    that unbatched inputs work too); linear maps, layer norms, embeddings and recurrent cells have them last, and so
    do TransformerLens hook points. A pointwise module inside an `nn.Sequential` takes the axis of what runs before it.
    A class with a forward of its own leaves the axis open. `modules` is `named_sites(model)`, and
    `is_open` is `sequence_first(model)`, if that is known.
    """
    rows, tokens = _axes_known(model, place)
    said = rows if row_axis is None else row_axis
    by: RowsBy = "told"
    if said is None:
        by = "open" if (sequence_first(model) if is_open is None else is_open) else "first"
    found = Layout(
        axis,
        row_axis=said or 0,
        token_axis=tokens if token_axis is None else token_axis,
        rows_by=by,
        is_step=isinstance(unwrapped(place.module), nn.RNNCellBase),
    )
    if axis is not None or place.name in hook_points(model):
        return replace(found, axis=-1 if axis is None else axis)
    modules = named_sites(model) if modules is None else modules
    names = modules.names_of(place.module) or [place.name]
    known = {_known_axis(modules, name, place) for name in names}  # one module may stand at several places
    if len(known) == 1 and None not in known:
        return replace(found, axis=known.pop())
    evidence, inside = _evidence(model, place)
    return replace(found, evidence=evidence, inside=inside)


def _known_axis(modules: Mapping[str, nn.Module], name: str, place: Place) -> int | None:
    module, earlier = unwrapped(place.module), _earlier_siblings(modules, name)
    while place.side == "in" and _is_chain(module) and len(list(module.children())):
        module = unwrapped(next(module.children()))
    known = _axis_after([module, *earlier])
    return _axis_after(earlier) if known is None and place.side == "in" else known


def layouts(
    model: nn.Module,
    places: Mapping[str, Place],
    *,
    axis: Axes | None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    modules: Modules | None = None,
) -> dict[str, Layout]:
    """The layout at every place; each axis is said for all of them, or site -> axis for some.

    `modules` is `named_sites(model)`, if that is known.

    Raises:
        SiteNotFoundError: an axis is said of another site.
    """
    given = {"axis": axis, "row_axis": row_axis, "token_axis": token_axis}
    said = {word: _by_site(word, own, places) for word, own in given.items()}
    modules = named_sites(model) if modules is None else modules
    is_open = sequence_first(model)
    return {
        site: layout(
            model, place, modules=modules, is_open=is_open, **{word: own.get(site) for word, own in said.items()}
        )
        for site, place in places.items()
    }


def _by_site(word: str, axis: Axes | None, places: Mapping[str, Place]) -> Mapping[str, int]:
    """Site -> axis, checked."""
    if isinstance(axis, int) and not isinstance(axis, bool):
        return dict.fromkeys(places, axis)
    if axis is not None and not isinstance(axis, Mapping):
        raise TypeError(f"{word}: expected an int or a mapping site -> int, got {axis!r}")
    for site, chosen in (axis or {}).items():
        if site not in places:
            raise SiteNotFoundError(f"{word} names no site in use: {site!r}. {close_names(site, places)}")
        if not isinstance(chosen, int) or isinstance(chosen, bool):
            raise TypeError(f"{word}: expected an int for site {site!r}, got {chosen!r}")
    return axis or {}


def said_at(said: Any, sites: Container[str]) -> Any:
    """What is said of all sites, or site -> what is said of it, as far as it is of these sites."""
    return {site: own for site, own in said.items() if site in sites} if isinstance(said, Mapping) else said


def _evidence(model: nn.Module, place: Place) -> tuple[tuple[tuple[int, int], ...], bool]:
    """(axis, size) of the modules inside; of the nearest module around that has some, if there are none inside."""
    for outer in (place.module, *reversed(path_to(model, place.name)[:-1])):
        found: dict[tuple[int, int], None] = {}
        for _, module in named_modules(outer):
            axis = _class_axis(module)
            known = None if axis is None else sizes(module)
            if axis is not None and known is not None:
                found[axis, known[0]] = found[axis, known[1]] = None
        if found:
            return tuple(found), outer is place.module
    return (), True


def _axis_after(modules: Iterable[nn.Module]) -> int | None:
    """The feature axis that the last-run of these modules leaves, nearest first."""
    for module in modules:
        axis = _own_axis(module)
        if axis is not None or not _keeps_layout(module):
            return axis
    return None


def _is_chain(module: nn.Module) -> bool:
    """Whether it is an `nn.Sequential`, and runs as one."""
    return isinstance(module, nn.Sequential) and plain_class(module).forward is nn.Sequential.forward


def _keeps_layout(module: nn.Module) -> bool:
    module = unwrapped(module)
    if _is_chain(module):
        return all(map(_keeps_layout, module.children()))
    home = type(module).__module__
    pointwise = isinstance(module, nn.Identity) or home in {f"torch.nn.modules.{part}" for part in _KEEPS_LAYOUT}
    return pointwise or plain_class(module) in (nn.LayerNorm, nn.RMSNorm)


def _own_axis(module: nn.Module) -> int | None:
    """The feature axis of what a module gives, whatever it takes; None where its class leaves that open."""
    module = unwrapped(module)
    if _is_chain(module):
        return _axis_after(reversed(list(module.children())))
    known = _class_axis(module)
    spatial_norm = known not in (None, -1) and isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return known if runs_torch_code(module) or spatial_norm else None


def _class_axis(module: nn.Module) -> int | None:
    """The feature axis that torch.nn promises for the module's class, or for one that it is a subclass of."""
    axis = _axis_of(type(module))  # type: ignore[arg-type]
    if axis is not None and isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1:
        return None  # over channels and space together
    return axis


@lru_cache(maxsize=4096)
def _axis_of(kind: type[Any]) -> int | None:
    if issubclass(kind, _CHANNEL_SECOND):
        return 1
    for own in kind.__mro__:  # a LayerNorm2d is a layer norm over channels, whoever wrote it
        norm = issubclass(own, nn.LayerNorm | nn.RMSNorm)
        if own.__name__[-2:] in _SPATIAL and (norm or own.__module__.startswith("torch.nn.")):
            return _SPATIAL[own.__name__[-2:]]
    return -1 if issubclass(kind, _FEATURES_LAST) else None


def _axes_known(model: nn.Module, place: Place) -> tuple[int | None, int | None]:
    """The axes of the batch and of the tokens, where a class tells; None where none does.

    That of the batch is 1 where the module or one around it says `batch_first=False`, and 0 where it says True.
    """
    module = unwrapped(place.module)
    if isinstance(module, nn.RNNBase) and place.side == "out" and place.path[:1] == ("1",):
        return 1, None  # the last states: (layers, rows, features), always
    known = _BY_CLASS.get(plain_class(module).__name__)
    if known is not None and place.path in ((), ("0",), ("hidden_states",)):
        return known
    around = [outer for outer in path_to(model, place.name) if outer is not place.module]
    if any(plain_class(unwrapped(outer)).__name__ in _ROWS_SECOND for outer in around):
        return 1, None
    said = [_batch_first(outer) for outer in (*around, place.module)]
    if False in said:
        return 1, None
    if place.name in hook_points(model):
        return 0, _BY_HOOK.get(place.name.rpartition(".")[2])
    return 0 if said[-1] else None, None


_BY_CLASS = {  # transformers' and others' blocks of several streams -> the axes of rows and tokens
    "Gemma3nTextDecoderLayer": (1, 2),  # (4, B, S, D)
    **dict.fromkeys(  # (B, S, n, D), hyper connections
        ("DeepseekV4DecoderLayer", "Glm5NextTextDecoderLayer", "HYV4DecoderLayer", "HYV4VLDecoderLayer"), (0, 1)
    ),
}
_ROWS_SECOND = {"XLNetModel"}  # everything inside has (S, B, D)
_BY_HOOK = dict.fromkeys(  # of TransformerLens: (B, S, heads, d)
    ("hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k", "hook_result", "hook_q_input"), 1
) | dict.fromkeys(("hook_k_input", "hook_v_input"), 1)


def _batch_first(module: nn.Module) -> bool | None:
    """What it says itself or, as torch's transformers and CLIP's blocks do, by the attention inside its first layer."""
    layer = module.layers[0] if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder) else module
    if plain_class(module).__name__ in ("ResidualAttentionBlock", "CustomResidualAttentionBlock"):
        layer = getattr(module, "attn", module)
    return getattr(getattr(layer, "self_attn", layer), "batch_first", None)


def sequence_first(model: nn.Module) -> bool:
    """Whether some module of the model has the positions on the first axis, and the rows on the second."""
    modules = list(model.modules())
    said = [getattr(kind, "batch_first", None) for kind in {type(module) for module in modules}]
    return False in said or False in [vars(module).get("batch_first") for module in modules]


def _earlier_siblings(modules: Mapping[str, nn.Module], site: str) -> list[nn.Module]:
    """What runs before a member of an `nn.Sequential`, and of those around it, nearest first."""
    earlier: list[nn.Module] = []
    while site:
        parent_name, _, own = site.rpartition(".")
        parent = unwrapped(modules[parent_name]) if parent_name in modules else None
        if parent is None or not _is_chain(parent) or own not in parent._modules:
            break
        earlier += list(parent.children())[: list(parent._modules).index(own)][::-1]
        site = parent_name
    return earlier
