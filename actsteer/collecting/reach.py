"""Reach: what code may use without coming to one of the sites' modules; what nobody can vouch for may come to one."""

from __future__ import annotations

import functools
import inspect
import sysconfig
import weakref
from collections import deque
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, final

import torch
from torch import Tensor, nn

from actsteer.collecting.source import mentioned_in, stored_in

DYNAMIC = {"forward", "__call__", "children", "named_children", "modules", "named_modules", "_modules", "get_submodule"}
DYNAMIC |= {"getattr", "setattr", "vars", "globals", "locals", "eval", "exec", "super", "__dict__", "__import__"}
_LIBRARIES = {"torch", "torchvision", "transformers", "huggingface_hub", "einops", "actsteer"}
_LIBRARIES |= {"numpy", "packaging", "math", "typing", "inspect", "logging", "enum", "warnings", "contextlib"}
_LIBRARIES |= {"functools", "abc", "contextvars", "_contextvars"}
_INSTALLED = tuple(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib", "stdlib"))
_PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, range, torch.dtype, torch.device, torch.Size)
_MANY = (list, tuple, set, frozenset, deque)
_OWN = set(vars(nn.Module()))


def is_of_library(name: object) -> bool:
    """Whether a Python module of this name belongs to a library that keeps to what is registered."""
    return str(name).partition(".")[0] in _LIBRARIES


@final
class Reach:
    """What leads to some modules of a model, the targets."""

    def __init__(self, model: nn.Module, targets: Iterable[nn.Module]) -> None:
        self._targets = {id(module) for module in targets}
        self._functions: dict[int, bool] = {}
        self._looking_at: set[int] = set()  # modules
        self._kinds = {type(module) for module in model.modules()}
        self._elsewhere: dict[type[nn.Module], set[str]] = {}

    def holds(self, module: nn.Module) -> bool:
        """Whether it is or contains a target."""
        return any(id(part) in self._targets for part in module.modules())

    def is_clear(self, value: Any, depth: int = 4) -> bool:
        """Whether no use of this value comes to a target."""
        match value:
            case Tensor():
                return all(self.is_clear(own, depth - 1) for own in getattr(value, "__dict__", {}).values())
            case nn.Module():
                return self.is_clear_module(value)
            case MethodType():
                return self.is_clear(value.__self__, depth) and self.is_clear(value.__func__, depth)
            case FunctionType():
                return self._is_clear_function(value)
            case functools.partial():
                return all(self.is_clear(v, depth - 1) for v in (value.func, *value.args, *value.keywords.values()))
            case weakref.ref():
                return self.is_clear(value(), depth)
            case BuiltinFunctionType():
                return isinstance(value.__self__, ModuleType | None) or self.is_clear(value.__self__, depth)
            case ModuleType():
                return is_of_library(value.__name__)
            case type():
                return is_of_library(value.__module__) or value.__module__ == "builtins"
            case dict():
                return depth > 0 and all(self.is_clear(own, depth - 1) for own in value.values())
        if isinstance(value, _MANY):
            return depth > 0 and all(self.is_clear(own, depth - 1) for own in value)
        return isinstance(value, _PLAIN) or is_of_library(type(value).__module__)

    def is_clear_module(self, module: nn.Module, *, but: nn.Module | None = None) -> bool:
        """Whether a call of this module comes to no target, unless it is `but` itself."""
        if id(module) in self._looking_at:
            return True
        self._looking_at.add(id(module))
        try:
            return all(
                (part is but or id(part) not in self._targets)
                and all(map(self.is_clear_hook, (*part._forward_pre_hooks.values(), *part._forward_hooks.values())))
                and all(self.is_clear(own) for key, own in vars(part).items() if key not in _OWN)
                and (is_of_library(type(part).__module__) or self._is_clear_class(part))
                for part in module.modules()
            )
        finally:
            self._looking_at.discard(id(module))

    def is_clear_by_name(self, owner: nn.Module, names: Iterable[str], seen: set[str] | None = None) -> bool:
        """Whether no attribute of these names, of this module, leads to a target."""
        seen = set() if seen is None else seen
        kind = type(owner)
        foreign = kind.__getattr__ is not nn.Module.__getattr__ or kind.__setattr__ is not nn.Module.__setattr__
        for name in set(names) - seen:
            seen.add(name)
            own = inspect.getattr_static(kind, name, None)
            if name in DYNAMIC or (own is None and foreign and not hasattr(Tensor, name)):
                return False
            for value in (vars(owner).get(name), owner._modules.get(name)):
                if not self.is_clear(value):
                    return False
            if own is None or own is getattr(nn.Module, name, None):
                continue
            functions = _functions_in(own)
            if hasattr(nn.Module, name) and functions and all(map(_is_from_library, functions)):
                continue  # such as `to`, which is more often a tensor's
            if not functions and not self.is_clear(own):
                return False
            for function in functions:
                if not self.is_clear_by_name(owner, mentioned_in(function.__code__), seen):
                    return False
                if not _is_from_library(function) and not self._are_clear_globals(function):
                    return False
        return True

    def members(self, module: ModuleType, names: Iterable[str]) -> list[Any]:
        """What a Python module has under these names; nothing of a library."""
        if is_of_library(module.__name__) or _is_installed(getattr(module, "__file__", None)):
            return []
        return [vars(module)[name] for name in names if name in vars(module)]

    def _is_innocent(self, value: Any) -> bool:
        """Whether what a library's function holds is clear; what is neither called nor gone through may be anything."""
        kinds = (nn.Module, FunctionType, MethodType, functools.partial, dict, *_MANY)
        asked = isinstance(value, kinds)
        return not asked or self.is_clear(value)

    def _is_clear_class(self, module: nn.Module) -> bool:
        """Whether the code of a user's own class is clear, with what its forward uses."""
        kind: Any = type(module)
        forward = kind.forward
        if kind.__call__ is not nn.Module.__call__ or not isinstance(forward, FunctionType):
            return False
        if _is_from_library(forward):
            return True
        kept = stored_in(forward.__code__) | module._buffers.keys()  # what the next pass may begin with
        return (
            not kept & self._mentioned_elsewhere(kind)
            and self._is_clear_function(forward)
            and self.is_clear_by_name(module, mentioned_in(forward.__code__))
        )

    def _mentioned_elsewhere(self, kind: type[nn.Module]) -> set[str]:
        """The names that the code of other classes of the model looks up."""
        if kind not in self._elsewhere:
            forwards = [getattr(other, "forward", None) for other in self._kinds if other is not kind]
            codes = [f.__code__ for f in forwards if isinstance(f, FunctionType) and not _is_from_library(f)]
            self._elsewhere[kind] = {name for code in codes for name in mentioned_in(code)}
        return self._elsewhere[kind]

    def _is_clear_function(self, function: FunctionType) -> bool:
        if id(function) not in self._functions:
            self._functions[id(function)] = True  # while it is being looked at
            cells = [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]
            held = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            if _is_from_library(function) or _is_installed(function.__code__.co_filename):
                clear = all(map(self._is_innocent, held))
            else:
                clear = all(map(self.is_clear, held)) and self._are_clear_globals(function)
            self._functions[id(function)] = clear
        return self._functions[id(function)]

    def _are_clear_globals(self, function: FunctionType) -> bool:
        mentioned = mentioned_in(function.__code__)
        if mentioned & DYNAMIC:
            return False
        for name in mentioned & function.__globals__.keys():
            value = function.__globals__[name]
            used = self.members(value, mentioned) if isinstance(value, ModuleType) else [value]
            if not all(map(self.is_clear, used)):
                return False
        return True

    def is_clear_hook(self, hook: Any) -> bool:
        """Whether a hook is clear; it may not use the module that it is given."""
        if is_of_library(type(hook).__module__) and not isinstance(hook, functools.partial):
            return True
        function = getattr(hook, "__func__", hook)
        if not isinstance(function, FunctionType) or not self.is_clear(hook):
            return False
        given = function.__code__.co_varnames[function is not hook :][:1]
        return not mentioned_in(function.__code__) & {*given, *DYNAMIC}


def _is_from_library(function: FunctionType) -> bool:
    return is_of_library(function.__globals__.get("__name__"))


def _is_installed(file: str | None) -> bool:
    """Whether this file belongs to an installed package, whose functions know of a model what they are given."""
    return file is not None and file.startswith(_INSTALLED)


def _functions_in(value: Any) -> list[FunctionType]:
    """The functions of an attribute of a class, and those around which a decorator has put them."""
    match value:
        case property():
            return [function for part in (value.fget, value.fset) for function in _functions_in(part)]
        case functools.cached_property() | functools.partialmethod():
            return _functions_in(value.func)
        case staticmethod() | classmethod():
            return _functions_in(value.__func__)
        case FunctionType():
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
            return [value, *(f for cell in cells if isinstance(cell, FunctionType) for f in _functions_in(cell))]
    return []


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
