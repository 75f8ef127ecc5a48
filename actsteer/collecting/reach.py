"""Reach: whether a value that code may use leads to one of the sites' modules."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any, final

from torch import Tensor, nn

from actsteer.collecting.source import mentioned_in
from actsteer.sites.wrappers import slot

_DYNAMIC = {"forward", "__call__", "children", "named_children", "modules", "named_modules", "_modules"}
_DYNAMIC |= {"get_submodule", "getattr", "vars", "globals", "locals", "eval", "super", "__dict__", "attrgetter"}
_DYNAMIC |= {"methodcaller"}
_HARMLESS = {*vars(nn.Module), "device", "dtype"} - _DYNAMIC  # as a tensor has them too
_OWN = set(vars(nn.Module()))
_TRUSTED = ("torch", "numpy", "math", "functools", "itertools", "typing", "collections", "builtins", "actsteer")


@final
class Reach:
    """What leads to some modules, the targets, in a model.

    Registered modules lead where they contain a target; so do methods of what leads, functions whose closures, defaults
    or globals lead, and containers and objects that hold what leads.
    """

    def __init__(self, model: nn.Module, targets: Iterable[nn.Module]) -> None:
        self._targets = {id(module) for module in targets}
        self._functions: dict[int, bool] = {}
        modules = list(model.modules())
        holders = [(m, key) for m in modules for key, child in m._modules.items() if self.of(child)]
        wrapped = [slot(module) == key for module, key in holders]
        self.names = {key for (_, key), inner in zip(holders, wrapped, strict=True) if not inner} | _DYNAMIC
        """Attributes by which code may come to a target."""
        held = [id(module._modules[key]) for module, key in holders]
        owners = {id(module) for module, _ in holders}
        self.is_clear = len(held) == len(set(held)) and not any(
            self._is_hidden_in(module, holds=id(module) in owners) for module in modules
        )
        """Whether the model's own structure shows all ways to the targets: none of them is held twice, or by a hook or
        an attribute of a module that does not contain it."""

    def of(self, value: Any, depth: int = 3) -> bool:
        """Whether this value leads to a target, as far as that can be seen."""
        match value:
            case None | str() | int() | float() | bytes() | Tensor() | type():
                return False
            case nn.Module():
                return any(id(module) in self._targets for module in value.modules())
            case MethodType():
                return self.of(value.__self__) or self.of(value.__func__)
            case BuiltinMethodType():
                return not isinstance(value.__self__, ModuleType) and self._any([value.__self__], depth)
            case FunctionType():
                return self._of_function(value)
            case functools.partial():
                return self._any([value.func, *value.args, *value.keywords.values()], depth)
            case list() | tuple() | set():
                return self._any(value, depth)
            case dict():
                return self._any(value.values(), depth)
            case ModuleType():
                return False
        return self._any(getattr(value, "__dict__", {}).values(), depth)

    def by_name(self, owner: nn.Module, names: Collection[str]) -> bool:
        """Whether some attribute of these names, of this module, leads to a target."""
        if set(names) & self.names:
            return True
        kind = type(owner)
        foreign = kind.__getattr__ is not nn.Module.__getattr__ or kind.__setattr__ is not nn.Module.__setattr__
        return self._by_name(owner, set(names), set()) or (
            foreign and any(not hasattr(Tensor, name) and name not in vars(kind) for name in names)
        )

    def _by_name(self, owner: nn.Module, names: Iterable[str], seen: set[str]) -> bool:
        for name in set(names) - seen - _HARMLESS:
            seen.add(name)
            value = vars(owner).get(name, getattr(type(owner), name, None))
            for function in _functions_in(value):
                mentioned = mentioned_in(function.__code__)
                if mentioned & self.names or self._by_name(owner, mentioned, seen):
                    return True
            if self.of(value):
                return True
        return False

    def _any(self, values: Iterable[Any], depth: int) -> bool:
        return depth > 0 and any(self.of(value, depth - 1) for value in values)

    def _of_function(self, function: FunctionType) -> bool:
        if (function.__module__ or "").partition(".")[0] in _TRUSTED:
            return False
        if id(function) not in self._functions:
            self._functions[id(function)] = False  # while it is being looked at
            cells = [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]
            used = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            mentioned = mentioned_in(function.__code__)
            for name in mentioned & function.__globals__.keys():
                value = function.__globals__[name]
                used += self.members(value, mentioned) if isinstance(value, ModuleType) else [value]
            self._functions[id(function)] = any(map(self.of, used))
        return self._functions[id(function)]

    @staticmethod
    def members(module: ModuleType, names: Iterable[str]) -> list[Any]:
        """What a Python module has under these names, but for libraries that know nothing of this model."""
        trusted = module.__name__.partition(".")[0] in _TRUSTED
        return [] if trusted else [vars(module)[name] for name in names if name in vars(module)]

    def _is_hidden_in(self, module: nn.Module, *, holds: bool) -> bool:
        """Whether a hook, or an attribute that is not a submodule, of this module leads to a target."""
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for hook in hooks:
            if not type(hook).__module__.startswith("actsteer.") and (self.of(hook) or self._uses_its_module(hook)):
                return True
        own: dict[str, Any] = {key: value for key, value in vars(module).items() if key not in _OWN}
        if not holds:
            return any(map(self.of, own.values())) or self.of(getattr(type(module), "forward", None))
        return self.of(own.get("forward"))

    def _uses_its_module(self, hook: Any) -> bool:
        """Whether a hook does anything with the module that it is given."""
        function = getattr(hook, "__func__", hook)
        if not isinstance(function, FunctionType):
            return False
        code = function.__code__
        first = code.co_varnames[function is not hook :][:1]
        return bool(mentioned_in(code) & (self.names | set(first)))


def _functions_in(value: Any) -> list[FunctionType]:
    """A function, and those around which a decorator has put it; the functions of a property."""
    if isinstance(value, property):
        return [function for part in (value.fget, value.fset) for function in _functions_in(part)]
    if not isinstance(value, FunctionType):
        return []
    cells = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
    return [value, *(f for cell in cells if isinstance(cell, FunctionType) for f in _functions_in(cell))]


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
