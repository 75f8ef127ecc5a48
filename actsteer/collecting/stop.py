"""Stop: end a forward pass once every site has run, where it is certain that none of them runs again.

A module may run several times in one pass: a siamese branch, a cell in a loop, an activation function that a block
uses twice. What comes after the last site is therefore skipped only where the functions that are still running show
that they have no way left to call a site: each of them is at its one call of the module further in, outside of loops
or in one that goes over different modules, and whatever it names behind it is known to lead to none. Otherwise, or
where there is no source to read, the pass runs to its end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType, MethodType, ModuleType
from typing import Any, final

from torch import nn

from actsteer.collecting.reach import DYNAMIC, Reach, is_of_library
from actsteer.collecting.source import Call, call_at

_MODULE = "torch.nn.modules.module"
_THROUGH = (_MODULE, "torch._dynamo.", "torch.compiler", "actsteer.")  # they pass a call on, once
_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")


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
        self._model, self._sites, self._caller = model, sites, caller.__code__
        self._targets = {id(module) for module in sites.values()}
        self._reach = Reach(model, sites.values())
        self._left: set[str] = set()

    def begin(self) -> None:
        """A new forward pass."""
        self._left = set(self._sites)

    def ran(self, site: str, *, has_begun: bool = False) -> None:
        """This site has run, or `has_begun` to, and been seen; raises `Stop` if it was the last one for certain."""
        self._left.discard(site)
        if self._left or any(getattr(sys.modules[_MODULE], name) for name in _HOOKS):
            return
        module = self._sites[site]
        if has_begun and not (
            is_of_library(type(module).__module__) and self._reach.is_clear_module(module, but=module)
        ):
            return  # it may call itself
        if self._each_is_held_once() and self._nothing_follows(module):
            raise Stop

    def _each_is_held_once(self) -> bool:
        """Whether what contains a site is registered once, and nothing around a site undoes what it did before it."""
        around = [module for module in self._model.modules() if self._reach.holds(module)]
        children = [child for module in around for child in module._modules.values() if child is not None]
        held = [id(child) for child in children if self._reach.holds(child)]
        return len(held) == len(set(held)) and not any(
            (_foreign(module._forward_pre_hooks) and _foreign(module._forward_hooks))
            or hasattr(module, "_hf_hook")
            or type(module).__module__.startswith("torch.distributed.")
            or not all(map(self._reach.is_clear_hook, module._forward_hooks.values()))
            for module in around
        )

    def _nothing_follows(self, called: nn.Module | CodeType) -> bool:
        frame: FrameType | None = sys._getframe(2)
        inside = True  # of the call of the site itself
        while frame is not None:
            if frame.f_code is self._caller:
                return True
            name = str(frame.f_globals.get("__name__", ""))
            if name.startswith(_THROUGH):
                owner = frame.f_locals.get("self")
                if name == _MODULE and isinstance(owner, nn.Module):
                    if not inside and (id(owner) in self._targets or not _is_forward(owner, called)):
                        return False
                    called = owner
            elif not self._is_done_after(frame, called):
                return False
            else:
                called, inside = frame.f_code, False
            frame = frame.f_back
        return False

    def _is_done_after(self, frame: FrameType, called: nn.Module | CodeType) -> bool:
        """Whether a function that is at a call of `called` cannot run a site once that has returned."""
        call = call_at(frame.f_code, frame.f_lasti)
        known = is_of_library(frame.f_globals.get("__name__"))
        if (
            call is None
            or call.attributes_after & DYNAMIC
            or (not known and (call.changes or call.names_after & DYNAMIC))
        ):
            return False
        try:
            callee = call.callee(frame)
            if not _is(callee, called) or not self._is_last_of_its_loop(call, frame, callee):
                return False
        except (LookupError, AttributeError, TypeError):
            return False
        bases = [_variable(frame, name) for name in call.bases_after]
        values = [_variable(frame, name) for name in call.names_after]
        for base in bases:
            values += self._reach.members(base, call.attributes_after) if isinstance(base, ModuleType) else []
        values += [base for base in bases if not isinstance(base, nn.Module | ModuleType)]
        owners = {id(v): v for v in (*frame.f_locals.values(), *bases) if isinstance(v, nn.Module)}.values()
        return all(map(self._reach.is_clear, values)) and all(
            self._reach.is_clear_by_name(owner, call.attributes_after) for owner in owners
        )

    def _is_last_of_its_loop(self, call: Call, frame: FrameType, callee: Any) -> bool:
        """Whether what the loop around a call comes to later is clear."""
        found = False
        for values in call.looped(frame):
            if isinstance(values, nn.Module):
                if type(values).__module__ != "torch.nn.modules.container":
                    return False
                values = list(values._modules.values())
            members = list(values.values()) if type(values) is dict else values
            if type(members) in (list, tuple):
                where = [index for index, member in enumerate(members) if _is_same(member, callee)]
                if len(where) > 1 or (found and where):
                    return False
                members = members[where[0] + 1 :] if where else members
                found |= bool(where)
            if not self._reach.is_clear(members):
                return False
        return True


def _is_same(member: Any, callee: Any) -> bool:
    both = isinstance(member, MethodType) and isinstance(callee, MethodType)
    return member is callee or (both and member.__self__ is callee.__self__ and member.__func__ is callee.__func__)


def _is(callee: Any, called: nn.Module | CodeType) -> bool:
    if isinstance(called, nn.Module):
        return callee is called
    return getattr(getattr(callee, "__func__", callee), "__code__", None) is called


def _is_forward(module: nn.Module, called: nn.Module | CodeType) -> bool:
    """Whether what a module is calling is its forward, and not one of its hooks, after which its forward would run."""
    forward: Any = module.forward
    while hasattr(forward, "__self__") and hasattr(forward.__self__, "previous"):  # a patch of ours
        forward = forward.__self__.previous
    return isinstance(called, nn.Module) or getattr(forward, "__code__", None) is called


def _variable(frame: FrameType, name: str) -> Any:
    """What a variable of a running function stands for now; None if it has no value yet."""
    return frame.f_locals[name] if name in frame.f_locals else frame.f_globals.get(name)


def _foreign(hooks: Any) -> bool:
    return any(not type(hook).__module__.startswith("actsteer.") for hook in hooks.values())
