"""Stop: end a forward pass once every site has run, where it is certain that none of them runs again.

A module may run several times in one pass: a siamese branch, a cell in a loop, an activation function that a block
uses twice. What comes after the last site is therefore skipped only where the functions that are still running show
that they have no way left to call a site: each of them is at its one call of the module further in, outside of loops
or in one that goes over different modules, and names nothing behind it that leads to a site. Otherwise, or where there
is no source to read, the pass runs to its end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any, final

from torch import Tensor, nn

from actsteer.collecting.source import call_at, mentioned_in
from actsteer.sites.wrappers import slot

_THROUGH = ("torch.nn.modules.module", "torch._dynamo.", "torch.compiler", "actsteer.")  # they pass a call on, once
_DYNAMIC = {"forward", "__call__", "children", "named_children", "modules", "named_modules", "_modules"}
_DYNAMIC |= {"get_submodule", "getattr", "vars", "globals", "locals", "eval", "super", "__dict__"}
_HARMLESS = {*vars(nn.Module), "device", "dtype"} - _DYNAMIC  # as a tensor has them too


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
        self._targets = {id(module) for module in sites.values()}
        holders = [(m, key) for m in model.modules() for key, child in m._modules.items() if self._leads(child)]
        wrapped = [slot(module) == key for module, key in holders]
        self._names = {key for (_, key), inner in zip(holders, wrapped, strict=True) if not inner} | _DYNAMIC
        held = [id(module._modules[key]) for module, key in holders]
        self._shared = len(held) != len(set(held)) or _has_torn_hooks(model, self._leads)
        self._left: set[str] = set()

    def begin(self) -> None:
        """A new forward pass."""
        self._left = set(self._sites)

    def ran(self, site: str) -> None:
        """This site has run, and been seen; raises `Stop` if it was the last one for certain."""
        self._left.discard(site)
        if not self._left and not self._shared and self._nothing_follows(self._sites[site]):
            raise Stop

    def _leads(self, value: Any, depth: int = 3) -> bool:
        """Whether a call of this may run a site, as far as that can be seen."""
        match value:
            case nn.Module():
                return any(id(module) in self._targets for module in value.modules())
            case MethodType():
                return self._leads(value.__self__) or self._leads(value.__func__)
            case FunctionType():
                cells = (cell.cell_contents for cell in value.__closure__ or () if _is_full(cell))
                return bool(mentioned_in(value.__code__) & self._names) or any(map(self._leads_further(depth), cells))
            case list() | tuple() | set():
                return depth > 0 and any(map(self._leads_further(depth), value))
            case dict():
                return depth > 0 and any(map(self._leads_further(depth), value.values()))
        return False

    def _leads_further(self, depth: int) -> Callable[[Any], bool]:
        return lambda value: depth > 0 and self._leads(value, depth - 1)

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
            if not _is(callee, called) or not all(_are_distinct(values) for values in call.looped(frame)):
                return False
        except (LookupError, AttributeError, TypeError):
            return False
        names = set(call.attributes_after)
        if names & self._names or any(self._leads(_variable(frame, name)) for name in call.names_after):
            return False
        return not any(self._leads_by_name(owner, names, set()) for owner in _owners(frame))

    def _leads_by_name(self, owner: Any, names: Iterable[str], seen: set[str]) -> bool:
        """Whether some attribute of these names, of the function's own object, leads to a site."""
        for name in set(names) - seen - _HARMLESS:
            seen.add(name)
            value = vars(owner).get(name, getattr(type(owner), name, None))
            function = value.fget if isinstance(value, property) else value
            if self._leads(function):
                return True
            if isinstance(function, FunctionType) and self._leads_by_name(owner, mentioned_in(function.__code__), seen):
                return True
        return False


def _passes_on(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(_THROUGH)


def _is(callee: Any, called: nn.Module | CodeType) -> bool:
    if isinstance(called, nn.Module):
        return callee is called
    return getattr(getattr(callee, "__func__", callee), "__code__", None) is called


def _are_distinct(values: Any) -> bool:
    """Whether a loop over this comes to no module twice."""
    if isinstance(values, nn.Module):
        return isinstance(values, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    if not isinstance(values, list | tuple | dict):
        return isinstance(values, Tensor)
    members = list(values.values() if isinstance(values, dict) else values)
    modules = [id(member) for member in members if isinstance(member, nn.Module | MethodType | FunctionType)]
    return len(modules) == len(set(modules)) and not any(isinstance(m, list | tuple | dict) for m in members if modules)


def _variable(frame: FrameType, name: str) -> Any:
    """What a variable of a running function stands for now; None if it has no value yet."""
    return frame.f_locals[name] if name in frame.f_locals else frame.f_globals.get(name)


def _owners(frame: FrameType) -> list[nn.Module]:
    return [value for value in frame.f_locals.values() if isinstance(value, nn.Module)]


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _has_torn_hooks(model: nn.Module, leads: Callable[[nn.Module], bool]) -> bool:
    """Whether a module around a site does something after it that what it did before relies on."""
    return any(
        (_foreign(module._forward_pre_hooks) and _foreign(module._forward_hooks))
        or hasattr(module, "_hf_hook")
        or type(module).__module__.startswith("torch.distributed.")
        for module in model.modules()
        if leads(module)
    )


def _foreign(hooks: Any) -> bool:
    return any(not type(hook).__module__.startswith("actsteer.") for hook in hooks.values())
