"""The backend "fold": c · v written into the bias that the module adds at its output, and the bias put back by copy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, final
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from actsteer.errors import UnsupportedModelError
from actsteer.private_names import has_frozen_weights
from actsteer.sites.shards import is_sharded
from actsteer.steering.backends.patch import Patch
from actsteer.steering.edit import Fired, SiteEdit
from actsteer.steering.limits import check_sum

_ADD_A_BIAS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm),
)
_folds: WeakValueDictionary[int, _Fold] = WeakValueDictionary()  # id(module) -> its fold, which holds the module


def attach(edit: SiteEdit, model: nn.Module) -> Callable[[], None]:
    """Fold the edit into its module's bias, again at every change of strength; returns what takes it out, in any order.

    Raises:
        UnsupportedModelError: an edit, or a module, for which adding to the bias is not the same.
    """
    if (reason := obstacle(edit, model)) is not None:
        raise UnsupportedModelError(f"site {edit.place.site!r} cannot be folded: {reason}; use another backend")
    module = edit.place.module
    fold = _folds.setdefault(id(module), _Fold(module))
    edit.fired = Fired.UNKNOWN
    fold.write(edit)
    edit.changed = lambda: fold.write(edit)

    def remove() -> None:
        edit.changed = None
        fold.remove(edit)
        if has_frozen_weights():
            warnings.warn(
                f"code was compiled with frozen weights while site {edit.place.site!r} was folded into them, and stays "
                "steered; call torch.compiler.reset()",
                UserWarning,
                stacklevel=5,
            )

    return remove


def obstacle(edit: SiteEdit, model: nn.Module) -> str | None:
    """Why adding to the bias would not be this edit; None if it would."""
    place = edit.place
    module = place.module
    bias = module._parameters.get("bias")
    if edit.is_trained:
        return "its directions are trained"
    if not edit.is_constant:
        return "only an ungated Add with one strength for all rows is the same for every input"
    if place.side == "in" or place.path:
        return "it is not the whole output of its module"
    if is_sharded(module) or any(p is not None and p.is_meta for p in module._parameters.values()):
        return "its parameters are sharded, or not on this device"
    if bias is not None and bias.shape != (edit.size,):
        return f"its bias has shape {tuple(bias.shape)}, the vector {edit.size} features"
    if "bias" not in module._parameters or not _adds_its_bias(module):
        return f"a {type(module).__name__} does not add a bias to its output, or its forward was replaced"
    if bias is not None and sum(_same(other, bias) for m in model.modules() for other in m._parameters.values()) > 1:
        return "its bias is shared with another module"
    if module.training and bias is not None and bias.requires_grad:
        return "its bias is being trained; call model.eval() first"
    if has_frozen_weights():
        return "code in this process was compiled with frozen weights, which would not see it"
    return None


def is_folded(module: nn.Module) -> bool:
    """Whether an edit is folded into this module now."""
    return id(module) in _folds


@final
class _Fold:
    """A module's bias as it was, and what is folded into it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        bias = module._parameters["bias"]
        self._original: Tensor | None = None if bias is None else bias.detach().clone()
        self._edits: list[SiteEdit] = []

    def write(self, edit: SiteEdit) -> None:
        assert edit.constant is not None
        held = self._module._parameters["weight"] if self._original is None else self._original
        if held is not None:
            check_sum(edit.constant, held.dtype, site=edit.place.site)
        if edit not in self._edits:
            self._edits.append(edit)
        self._write()

    def remove(self, edit: SiteEdit) -> None:
        self._edits.remove(edit)
        self._write()
        if not self._edits:
            del _folds[id(self._module)]

    @torch.no_grad()
    def _write(self) -> None:
        parameters = self._module._parameters
        if self._original is None and not self._edits:
            parameters["bias"] = None
            return
        bias = parameters["bias"]
        if bias is None:
            weight = parameters["weight"]
            assert weight is not None
            size = self._edits[0].size
            bias = nn.Parameter(weight.new_zeros(size), requires_grad=False)
            parameters["bias"] = bias
        total: Any = torch.zeros_like(bias) if self._original is None else self._original
        for edit in self._edits:
            assert edit.constant is not None
            total = (total + edit.constant.to(total.device)).to(bias.dtype)
        bias.copy_(total)


def _same(one: Tensor | None, other: Tensor) -> bool:
    """Whether what is written into one shows in the other."""
    if one is None or one is other or one.is_meta or one.device != other.device:
        return one is other
    return one.data_ptr() == other.data_ptr() != 0


def _adds_its_bias(module: nn.Module) -> bool:
    present = module.forward
    if not isinstance(getattr(present, "__self__", None), Patch) and (
        getattr(present, "__func__", None) is not type(module).forward
    ):
        return False  # a wrapper's
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return True
    return any(type(module).forward is kind.forward for kind in _ADD_A_BIAS if isinstance(module, kind))
