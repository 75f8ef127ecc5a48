"""Checkpointing: notices activations that autograd will compute again, and whether it did so while steered."""

from __future__ import annotations

import sys
import warnings
from types import CodeType, FrameType
from typing import final
from weakref import WeakSet

import torch.utils.checkpoint
from torch import Tensor, nn

from actsteer.errors import UnsupportedModelError
from actsteer.private_names import is_outside_of_functions, leave_untraced, saves_otherwise

_FILE = torch.utils.checkpoint.__file__
_RECOMPUTES = {"unpack_hook", "recompute_fn"}  # see actsteer.private_names


@final
class Checkpointing:
    """Counts the checkpointed forward passes whose backward pass has not come yet.

    Gradient checkpointing (Chen et al. 2016) runs a part of the model again during the backward pass. If the steering
    is gone by then, the gradients are those of another function, and nothing fails.
    """

    def __init__(self, model: nn.Module, *, one_context: bool) -> None:
        self._model = model
        self._one_context = one_context
        self._is_first = True  # whether nothing was edited yet
        self._was_noted = False  # whether a checkpointed forward pass was
        self._waiting: list[_Pass] = []
        self._graphs: WeakSet[_Pass] = (
            WeakSet()
        )  # those whose backward pass may never come, for the graph may be dropped
        leave_untraced(Checkpointing.notice)  # torch.compile would warn of what it cannot trace there

    def notice(self, edited: Tensor) -> bool:
        """Whether this edit runs inside a checkpoint, whose backward pass is waited for, or while one is waited for.

        Raises:
            UnsupportedModelError: only one thread is steered, and another may run the backward pass.
        """
        is_first, self._is_first = self._is_first, False
        if edited.is_inference() or not (
            is_first or self._waiting or saves_otherwise(True) or not is_outside_of_functions()
        ):
            return False
        frame = _checkpoint_frame()
        if frame is None:
            return bool(self._waiting)  # what is waited for must come all the way here
        if self._one_context:
            raise UnsupportedModelError(
                "gradient checkpointing may recompute in a thread of autograd's own, which scope='context' would not "
                "steer; use scope='process'"
            )
        caller = frame.f_code.co_name
        is_again = caller == "backward" or (caller in _RECOMPUTES)
        if is_again and not self._was_noted:
            warnings.warn(
                "a forward pass was checkpointed before this steering was attached, and its backward pass recomputes "
                "the activations with it, and gives wrong gradients; call backward() before the block",
                UserWarning,
                stacklevel=2,
            )
        self._was_noted = True
        if caller == "backward" or (caller in _RECOMPUTES and not edited.requires_grad):
            self._waiting = self._waiting[:-1]  # computed again, and steered
        elif caller == "forward" and frame.f_locals["ctx"].next_functions:  # reentrant, and gradients are wanted
            self._waiting.append(_Pass())
        elif caller not in _RECOMPUTES and caller != "forward" and torch.is_grad_enabled() and self._trains(edited):
            waiting = _Pass()
            if edited.requires_grad:  # the recomputation may stop before it comes here; the gradient passes
                self._graphs.add(waiting)
                edited.register_hook(lambda _: self._graphs.discard(waiting))
            else:
                self._waiting.append(waiting)
        return True

    @property
    def runs_inside(self) -> bool:
        """Whether a checkpoint is running."""
        return _checkpoint_frame() is not None

    def leave(self, after: str = "without the steering", before: str = "inside the block") -> None:
        """Warn if a checkpointed forward pass was steered and its backward pass is still to come.

        Args:
            after: how it would compute the activations again.
            before: when `backward` is to be called.
        """
        if self._waiting or self._graphs:
            warnings.warn(
                "a steered forward pass was checkpointed, and its backward pass has not run yet: it would recompute "
                f"the activations {after}, and give wrong gradients; call backward() {before}",
                UserWarning,
                stacklevel=4,
            )
        self._waiting = []
        self._graphs = WeakSet()

    def forget(self) -> None:
        """Begin anew."""
        self._is_first, self._was_noted, self._waiting = True, False, []
        self._graphs = WeakSet()

    def _trains(self, edited: Tensor) -> bool:
        """Whether a gradient can be asked for: of what comes before the edit, or of the model's parameters after it."""
        return edited.requires_grad or any(parameter.requires_grad for parameter in self._model.parameters())


class _Pass:
    """One checkpointed forward pass through an edit."""


def _checkpoint_frame() -> FrameType | None:
    """The innermost running function of torch.utils.checkpoint; None outside of a checkpoint."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not _is_of_a_checkpoint(frame.f_code):
        frame = frame.f_back
    return frame


def _is_of_a_checkpoint(code: CodeType) -> bool:
    """Of `checkpoint_sequential` and its `forward` alone, nothing runs again: each part has a checkpoint of its own."""
    is_forward = code.co_name == "forward" and "ctx" not in code.co_varnames
    return code.co_filename == _FILE and not is_forward and code.co_name != "checkpoint_sequential"
