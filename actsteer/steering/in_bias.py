"""The backend "fold": c · v written into the bias that the module adds at its output, and the bias put back by copy."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, final
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from actsteer.errors import UnsupportedModelError
from actsteer.private_names import has_frozen_weights
from actsteer.sites import fingerprint
from actsteer.sites.features import is_conv1d
from actsteer.sites.shards import is_sharded
from actsteer.sites.tap import lock, plain_class
from actsteer.steering.edit import Fired, SiteEdit
from actsteer.steering.limits import check_sum

_ADD_A_BIAS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm),
)
_HELD = "_actsteer_fold"
_folds: WeakValueDictionary[int, _Fold] = WeakValueDictionary()  # id(module) -> its fold, which holds the module


def put(edit: SiteEdit, model: nn.Module, *, owner: Any) -> None:
    """Fold the edit into its module's bias, again at every change of strength; `take_off` takes it out.

    Raises:
        UnsupportedModelError: an edit, or a module, for which adding to the bias is not the same.
    """
    if (reason := obstacle(edit, model)) is not None:
        raise UnsupportedModelError(f"site {edit.place.site!r} cannot be folded: {reason}; use another backend")
    with lock:
        fold = _folds.setdefault(id(edit.place.module), _Fold(edit.place.module))
        edit.fired = Fired.UNKNOWN
        edit.changed = partial(fold.write, edit, owner)
        edit.changed()


def take_off(edit: SiteEdit) -> None:
    """Take the edit out of the bias, in any order with others; it may be tried again."""
    with lock:
        fold = _folds.get(id(edit.place.module))
        if fold is not None:
            fold.remove(edit)
        edit.changed = None
    if fold is not None and has_frozen_weights():
        warnings.warn(
            f"code was compiled with frozen weights while site {edit.place.site!r} was folded into them, and stays "
            "steered; call torch.compiler.reset()",
            UserWarning,
            stacklevel=5,
        )


def obstacle(edit: SiteEdit, model: nn.Module) -> str | None:
    """Why adding to the bias would not be this edit; None if it would."""
    place = edit.place
    module = place.module
    bias = module._parameters.get("bias")
    if edit.is_trained:
        return "its directions are trained"
    if not edit.is_constant:
        return "only an ungated Add with one strength for all rows is the same for every input"
    if place.side == "in" or place.path or place.features is not None:
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


def owners_at(module: nn.Module) -> list[Any]:
    """For whom edits are folded into this module now."""
    fold = _folds.get(id(module))
    return [] if fold is None else fold.owners


def is_folded(module: nn.Module) -> bool:
    """Whether an edit is folded into this module now."""
    return id(module) in _folds and bool(owners_at(module))


@final
class _Fold:
    """A module's bias as it was, and what is folded into it."""

    def __init__(self, module: nn.Module) -> None:
        self.edits: dict[SiteEdit, Any] = {}  # and their owners
        self._module = module
        bias = module._parameters["bias"]
        self._original: Tensor | None = None if bias is None else bias.detach().clone()
        self._is_first = fingerprint.remember(module, "bias")
        self._written: dict[SiteEdit, Any] = {}  # those that may be in the bias still
        self._holder: Tensor | None = None  # the bias that was written into
        self._is_lost = False  # whether somebody else has written into it
        self._ours: list[Tensor] = []  # what was written last, and what is being written

    @property
    def owners(self) -> list[Any]:
        """For whom something is in the bias, or may be."""
        return list((self._written | self.edits).values())

    def write(self, edit: SiteEdit, owner: Any) -> None:
        """The edit with its present strength; StrengthError if c · v is beyond the range of the bias."""
        held = self._module._parameters["weight"] if self._original is None else self._original
        if edit.constant is not None and held is not None:
            check_sum(edit.constant, held.dtype, site=edit.place.site)
        with lock:
            self.edits[edit] = owner
            self._write()

    def remove(self, edit: SiteEdit) -> None:
        """Without the edit."""
        self.edits.pop(edit, None)
        self._write()
        self._written = dict(self.edits)
        if not self.edits and self._is_first:
            fingerprint.forget(self._module, "bias")
        if not self.edits and self._holder is not None:
            self._holder.__dict__.pop(_HELD, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied bias holds nothing."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @torch.no_grad()
    def _write(self) -> None:
        parameters = self._module._parameters
        bias = parameters["bias"]
        if self._is_of_another(bias):
            return
        if self._original is None and not self.edits:
            parameters["bias"] = None
            self._ours = []
            return
        if bias is None:
            weight = parameters["weight"]
            assert weight is not None
            bias = nn.Parameter(weight.new_zeros(next(iter(self.edits)).size), requires_grad=False)
            self._ours = [bias.detach().clone()]
            parameters["bias"] = bias
        total = torch.zeros_like(bias) if self._original is None else self._original.to(bias)
        self._written |= self.edits
        for edit in self.edits:
            assert edit.constant is not None
            total = (total + edit.constant.to(total.device)).to(bias.dtype)
        self._ours = [*self._ours[-1:], total]
        self._holder = bias
        bias.__dict__[_HELD] = self  # who steers it may be asked for when all names of the Steerer are lost
        bias.copy_(total)

    def _is_of_another(self, bias: Tensor | None) -> bool:
        """Whether the bias has other numbers than were written into it, which are kept."""
        known = [*self._ours, *([] if self._original is None else [self._original])]
        if self._is_lost:
            return True
        if self._original is None if bias is None else any(_equal(own, bias) for own in known):
            return False
        warnings.warn(
            f"the bias of a {plain_class(self._module).__name__} was changed while a steering was folded into it, by "
            "an optimizer or load_state_dict perhaps; the new numbers stay, and are neither steered nor put back",
            UserWarning,
            stacklevel=7,
        )
        self._is_lost = True
        return True


def _equal(own: Tensor, bias: Tensor) -> bool:
    """Whether the bias has these numbers, on whatever device it is by now, and whatever dtypes it has gone through."""
    through = (bias.dtype, torch.float32, torch.bfloat16, torch.float16)
    return own.shape == bias.shape and any(torch.equal(own.to(dtype).to(bias), bias) for dtype in through)


def _same(one: Tensor | None, other: Tensor) -> bool:
    """Whether what is written into one shows in the other."""
    if one is None or one is other or one.is_meta or one.device != other.device:
        return one is other
    return one.data_ptr() == other.data_ptr() != 0


def _adds_its_bias(module: nn.Module) -> bool:
    if "forward" in module.__dict__:
        return False  # a wrapper's
    if is_conv1d(module):
        return True
    kind = plain_class(module)
    return any(kind.forward is own.forward for own in _ADD_A_BIAS if isinstance(module, own))
