"""Layers into whose parameters an affine map can be written: at their output, or at their input."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from actsteer.folding.affine import AffineMap
from actsteer.sites.features import is_conv1d
from actsteer.sites.shards import is_sharded
from actsteer.sites.tap import plain_class

Kind: TypeAlias = Literal["linear", "transposed linear", "conv", "transposed conv", "norm", "embedding"]
_KINDS: dict[Kind, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "transposed conv": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    "norm": (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm),
    "embedding": (nn.Embedding,),
}


def kind_of(module: nn.Module) -> Kind | None:
    """How the module's parameters make its output; None if its code is not torch's own, or transformers' Conv1D."""
    if "forward" in module.__dict__:
        return None
    if is_conv1d(module):
        return "transposed linear"
    for kind, classes in _KINDS.items():
        if any(isinstance(module, own) and plain_class(module).forward is own.forward for own in classes):
            return kind
    return None


def changed_by(edit: AffineMap, module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters into which the map is written."""
    return ("weight",) if kind_of(module) == "embedding" else ("weight", "bias") if edit.mixes else ("bias",)


def obstacle(module: nn.Module, edit: AffineMap, *, at: Literal["input", "output"]) -> str | None:
    """Why the module's parameters cannot carry the map, if nothing else has them too; None if they can."""
    kind = kind_of(module)
    weight = module._parameters.get("weight")
    if kind is None:
        return "its forward is its own"
    changed = [own for key in changed_by(edit, module) if (own := module._parameters.get(key)) is not None]
    if is_sharded(module):
        return "its parameters are sharded"
    if any(parameter.is_meta for parameter in module._parameters.values() if parameter is not None):
        return "its parameters are not on this device"
    if any(type(own) not in (nn.Parameter, Tensor) or type(own.data) is not Tensor for own in changed):
        return "its parameters are quantised, or of another class than torch's"
    if weight is not None and (not weight.is_floating_point() or weight.dtype.itemsize < 2):
        return f"its weight is quantised, {weight.dtype}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, which may change what it gives"
    for name in getattr(module, "parametrizations", ()):
        if name == "bias" or edit.mixes or at == "input":
            return f"its {name} is parametrised"
    if kind == "embedding":
        return (
            "it scales its rows to max_norm"
            if module.max_norm is not None
            else _misfit(int(module.embedding_dim), edit)
        )
    if at == "input":
        return _input_obstacle(module, kind, edit)
    if "bias" not in module._parameters:
        return "its class has no bias"
    if kind == "norm" and edit.mixes:
        return "a norm scales each feature by itself, and the edit mixes them"
    if edit.mixes and int(getattr(module, "groups", 1)) > 1:
        return "its groups of channels cannot be mixed"
    return _misfit(_outputs(module, kind), edit)


def _input_obstacle(module: nn.Module, kind: Kind, edit: AffineMap) -> str | None:
    if kind not in ("linear", "transposed linear", "conv"):
        return "it is not a linear map of its input alone"
    if kind == "conv" and getattr(module, "padding_mode", "") == "zeros" and any(_padding(module)):
        return "it pads with zeros, which are not steered"
    if kind == "conv" and edit.mixes and int(getattr(module, "groups", 1)) > 1:
        return "its groups of channels cannot be mixed"
    return None


def write_output(module: nn.Module, edit: AffineMap, *, bias: bool = True) -> None:
    """W -> M W and b -> M b + m, or M b alone; the parameters change in place, a missing bias is created."""
    kind = kind_of(module)
    weight = module._parameters.get("weight")
    added = edit.bias if bias else torch.zeros_like(edit.bias)
    if kind == "embedding":
        assert weight is not None
        _set(weight, edit.after(weight.detach().double(), axis=1) + added.to(weight.device))
        return
    if edit.mixes:
        assert weight is not None
        axis = 1 if kind in ("transposed linear", "transposed conv") else 0
        _set(weight, edit.after(weight.detach().double(), axis=axis))
    old = module._parameters["bias"]
    if old is None and not bool(added.any()):
        return
    before = added.new_zeros(len(added)) if old is None else old.detach().double().to(added.device)
    _set(made_bias(module, len(added)), edit.after(before, axis=0) + added)


def write_input(module: nn.Module, edit: AffineMap, constant: Tensor) -> None:
    """b -> b + W m and W -> W M, where `constant` is m as it comes to the module: without its rows, float64."""
    kind = kind_of(module)
    weight = module._parameters["weight"]
    assert weight is not None
    wide = weight.detach().double()
    if kind == "linear":
        moved = wide @ constant.to(wide)
    elif kind == "transposed linear":
        moved = constant.to(wide) @ wide
    else:
        groups = len(constant) // wide.shape[1]
        per_group = constant.to(wide).reshape(groups, 1, -1)
        taps = wide.reshape(groups, -1, wide.shape[1], wide[0, 0].numel()).sum(dim=-1)
        moved = (taps * per_group).sum(dim=-1).reshape(-1)
    if edit.mixes:
        _set(weight, edit.before(wide, axis=0 if kind == "transposed linear" else 1))
    if bool(moved.any()):
        bias = made_bias(module, len(moved))
        _set(bias, bias.detach().double() + moved.to(bias.device))


def made_bias(module: nn.Module, size: int) -> Tensor:
    """The module's bias, made of zeros where it had none."""
    bias = module._parameters["bias"]
    if bias is None:
        known = (*module.parameters(), *module.buffers(), torch.empty(0))  # of a norm without a weight, the statistics
        like = next(own for own in known if own.is_floating_point())
        bias = nn.Parameter(like.new_zeros(size), requires_grad=like.requires_grad)
        module._parameters["bias"] = bias
    return bias


@torch.no_grad()
def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


def _outputs(module: nn.Module, kind: Kind) -> int | None:
    """How many features its bias has; None where it is not one row."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if kind == "norm":
        found = bias if bias is not None else weight
        if found is None:
            return int(getattr(module, "num_features", getattr(module, "num_channels", 0))) or None
        return len(found) if found.ndim == 1 else None
    names = {"linear": "out_features", "transposed linear": "nf"}
    return int(getattr(module, names.get(kind, "out_channels")))


def _misfit(size: int | None, edit: AffineMap) -> str | None:
    return None if size == len(edit.bias) else f"it makes {size} features, the vector has {len(edit.bias)}"


def _padding(module: nn.Module) -> tuple[int, ...]:
    padding: Any = getattr(module, "padding", 0)
    if isinstance(padding, str):
        return () if padding == "valid" else tuple(size - 1 for size in getattr(module, "kernel_size", ()))
    return tuple(padding)
