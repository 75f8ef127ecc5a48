"""Stop: end a forward pass once every site has run, where it is certain that none of them runs again.

A module may run several times in one pass: a siamese branch, a cell in a loop, an activation function that a block
uses twice. What comes after the last site is therefore skipped only where the functions that are still running show
that they have no way left to call a site: each of them is at its one call of the module further in, outside of loops
or in one that goes over different modules, and names nothing behind it that leads to a site. Otherwise, or where there
is no source to read, the pass runs to its end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType, MethodType, ModuleType
from typing import Any, final

from torch import Tensor, nn

from actsteer.collecting.reach import Reach
from actsteer.collecting.source import call_at

_THROUGH = ("torch.nn.modules.module", "torch._dynamo.", "torch.compiler", "actsteer.")  # they pass a call on, once


class Stop(BaseException):
    """Nothing is left to be seen in this forward pass."""


@final
class Stopper:
    """Ends a forward pass by raising `Stop` when the last of several sites has run.

    Args:
        model: the model, with which `caller` calls it.
        sites: site -> its module.
        caller: the function from whose frame the forward pass is started, and which catches `Stop`.
    """

    def __init__(self, model: nn.Module, sites: dict[str, nn.Module], caller: Callable[..., Any]) -> None:
        self._sites, self._caller = sites, caller.__code__
        self._reach = Reach(model, sites.values())
        self._is_clear = self._reach.is_clear and not _has_torn_hooks(model, self._reach)
        self._left: set[str] = set()

    def begin(self) -> None:
        """A new forward pass."""
        self._left = set(self._sites)

    def ran(self, site: str) -> None:
        """This site has run, and been seen; raises `Stop` if it was the last one for certain."""
        self._left.discard(site)
        if not self._left and self._is_clear and self._nothing_follows(self._sites[site]):
            raise Stop

    def _nothing_follows(self, called: nn.Module | CodeType) -> bool:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code is self._caller:
                return True
            if _passes_on(frame):
                owner = frame.f_locals.get("self")
                if frame.f_globals.get("__name__") == _THROUGH[0] and isinstance(owner, nn.Module):
                    called = owner
            elif not self._is_done_after(frame, called):
                return False
            else:
                called = frame.f_code
            frame = frame.f_back
        return False

    def _is_done_after(self, frame: FrameType, called: nn.Module | CodeType) -> bool:
        """Whether a function that is at a call of `called` cannot run a site once that has returned."""
        call = call_at(frame.f_code, frame.f_lasti)
        if call is None:
            return False
        try:
            callee = call.callee(frame)
            if not _is(callee, called) or not all(self._are_distinct(v, callee) for v in call.looped(frame)):
                return False
        except (LookupError, AttributeError, TypeError):
            return False
        bases = [_variable(frame, name) for name in call.bases_after]
        values = [_variable(frame, name) for name in call.names_after]
        for base in bases:
            if isinstance(base, ModuleType):
                values += self._reach.members(base, call.attributes_after)
            elif not isinstance(base, nn.Module):
                values.append(base)
        owners = [value for value in (*frame.f_locals.values(), *bases) if isinstance(value, nn.Module)]
        return not any(map(self._reach.of, values)) and not any(
            self._reach.by_name(owner, call.attributes_after) for owner in owners
        )

    def _are_distinct(self, values: Any, callee: Any) -> bool:
        """Whether a loop over this comes to no module twice, and by nothing else than `callee` to a site."""
        if isinstance(values, nn.Module):
            return getattr(type(values), "__iter__", None) in _ONCE
        if not isinstance(values, list | tuple | dict):
            return isinstance(values, Tensor)
        members = list(values.values() if isinstance(values, dict) else values)
        same = [member for member in members if member is callee or _is_method(member, callee)]
        return len(same) < 2 and not any(self._reach.of(member) for member in members if member is not callee)


_ONCE: list[Any] = [kind.__iter__ for kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict)]


def _is_method(member: Any, callee: Any) -> bool:
    return isinstance(member, MethodType) and isinstance(callee, MethodType) and member == callee


def _passes_on(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(_THROUGH)


def _is(callee: Any, called: nn.Module | CodeType) -> bool:
    if isinstance(called, nn.Module):
        return callee is called
    return getattr(getattr(callee, "__func__", callee), "__code__", None) is called


def _variable(frame: FrameType, name: str) -> Any:
    """What a variable of a running function stands for now; None if it has no value yet."""
    return frame.f_locals[name] if name in frame.f_locals else frame.f_globals.get(name)


def _has_torn_hooks(model: nn.Module, reach: Reach) -> bool:
    """Whether a module around a site does something after it that what it did before relies on."""
    return any(
        (_foreign(module._forward_pre_hooks) and _foreign(module._forward_hooks))
        or hasattr(module, "_hf_hook")
        or type(module).__module__.startswith("torch.distributed.")
        for module in model.modules()
        if reach.of(module)
    )


def _foreign(hooks: Any) -> bool:
    return any(not type(hook).__module__.startswith("actsteer.") for hook in hooks.values())
