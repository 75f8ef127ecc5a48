"""Tap: have a method of one module call something before it, after it or around it, and leave nothing behind.

A tapped module has a subclass of its class in the place of the class, as FSDP2 and torch's parametrizations do, and one
mark in its `__dict__`: the callbacks. Compiled code guards on the class, so that it is right both ways with one
compilation; a copy is rebuilt by `__reduce_ex__` as a plain module; a replica of DataParallel, which shares the mark,
runs the callbacks with its own weights. A method that lies on the instance is wrapped there.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable
from threading import RLock
from types import FunctionType
from typing import Any, Literal, NamedTuple, TypeAlias, final

from torch import nn

When: TypeAlias = Literal["before", "after", "around"]
"""Of `forward`: `before(module, args, kwargs)` gives None or other (args, kwargs); `after(module, args, output)` gives
None or another output; `around(module, forward, args, kwargs)` gives the output, and encloses the other two."""
By: TypeAlias = Literal["tap", "hook"]

lock = RLock()  # of whoever changes what is attached to modules
METHODS = ("generate", "generate_stream", "prepare_inputs_for_generation")
"""The other methods that can be tapped, all of them around: `callback(module, method, args, kwargs)`."""
_MARK, _PLAIN = "_actsteer_tap", "_actsteer_plain"


class Entry(NamedTuple):
    """One callback.

    Args:
        when: before, after or around `forward`; or the name of the method that it goes around.
        owner: for whom it is called.
        by: how it is called; by a hook where it has to come after the module's other hooks.
    """

    when: str
    callback: Callable[..., Any]
    owner: Any
    by: By


@final
class Tap:
    """The callbacks of one module; the tuples are replaced and never changed, for a pass may be going over them."""

    __slots__ = ("after", "around", "before", "entries", "hooks", "methods", "only")

    def __init__(self) -> None:
        self.hooks: dict[int, Any] = {}  # id(entry) -> the handle of its hook
        self.set(())

    def set(self, entries: tuple[Entry, ...]) -> None:
        """Have these called, in this order."""
        self.entries = entries
        tapped = [entry for entry in entries if entry.by == "tap"]
        self.before = tuple(entry.callback for entry in tapped if entry.when == "before")
        self.after = tuple(entry.callback for entry in tapped if entry.when == "after")
        self.around = tuple(entry.callback for entry in tapped if entry.when == "around")
        self.methods = {
            name: tuple(entry.callback for entry in tapped if entry.when == name)
            for name in METHODS
            if any(entry.when == name for entry in tapped)
        }
        single = len(self.after) == 1 and not (self.before or self.around)
        self.only = self.after[0] if single else None  # the callback on the output, where there is no other at all

    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward, with all that is called before, after and around it."""
        before, after = self.before, self.after

        def inside(*args: Any, **kwargs: Any) -> Any:
            for callback in before:
                changed = callback(module, args, kwargs)
                if changed is not None:
                    args, kwargs = changed
            output = forward(*args, **kwargs)
            for callback in after:
                edited = callback(module, args, output)
                if edited is not None:
                    output = edited
            return output

        return _around(self.around, module, inside, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        return Tap()

    def __reduce__(self) -> tuple[type[Tap], tuple[()]]:
        return Tap, ()


def put(module: nn.Module, when: str, callback: Callable[..., Any], *, owner: Any, by: By = "tap") -> None:
    """Have the module call `callback`, after those that are there; `take_off` undoes it, and may be called before."""
    with lock:
        tap = module.__dict__.get(_MARK)
        if tap is None:
            tap = module.__dict__[_MARK] = Tap()
        tap.set((*tap.entries, Entry(when, callback, owner, by)))
        _settle(module, tap)


def take_off(module: nn.Module, when: str, callback: Callable[..., Any]) -> None:
    """Have it called no more; with the last callback the module is what it was. It may be tried again, in any order."""
    with lock:
        tap = module.__dict__.get(_MARK) or Tap()
        present = module.__dict__.get("forward")
        given = present.previous if isinstance(present, _OnInstance) else None
        mine = next((e for e in reversed(tap.entries) if e.when == when and e.callback == callback), None)
        tap.set(tuple(entry for entry in tap.entries if entry is not mine))
        _settle(module, tap)
        covered = module.__dict__.get("forward") if mine is not None and not tap.entries else None
    if covered is not None and not isinstance(covered, _OnInstance) and covered is not given:
        warnings.warn(
            f"the forward of {type(module).__name__} was replaced while it was steered, and what lies there now may "
            "not have been",
            UserWarning,
            stacklevel=5,
        )


def entries_of(module: nn.Module) -> tuple[Entry, ...]:
    """What is called at a module, in the order in which it was put there."""
    tap = module.__dict__.get(_MARK)
    return () if tap is None else tap.entries


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, tapped or not."""
    kind: type[nn.Module] = type(module)  # type: ignore[assignment]
    return kind.__dict__.get(_PLAIN, kind)


def _settle(module: nn.Module, tap: Tap) -> None:
    """Bring the module to what its callbacks ask for, from whatever an interrupt has left."""
    _settle_hooks(module, tap)
    values = module.__dict__
    names = {"forward", *tap.methods} if tap.entries else set()
    for name in ("forward", *METHODS):
        present = values.get(name)
        if name in names and present is not None and not isinstance(present, _OnInstance):
            values[name] = _OnInstance(module, name, present)
        elif name not in names and isinstance(present, _OnInstance):
            values[name] = present.previous
    kind = type(module)
    if not tap.entries:
        object.__setattr__(module, "__class__", plain_class(module))
        values.pop(_MARK, None)
    elif kind is not plain_class(module) or not any(_PLAIN in base.__dict__ for base in kind.__mro__):
        hooked = any(entry.by == "hook" and entry.callback is not idle for entry in tap.entries)
        made = _made if hooked else _tapped  # compiled code takes no notice of hooks, and is to be compiled anew
        object.__setattr__(module, "__class__", made(plain_class(module)))


def _settle_hooks(module: nn.Module, tap: Tap) -> None:
    wanted = {id(entry): entry for entry in tap.entries if entry.by == "hook"}
    for key in [key for key in tap.hooks if key not in wanted]:
        tap.hooks[key].remove()
        del tap.hooks[key]
    for key, entry in wanted.items():
        if key not in tap.hooks:
            if entry.when == "before":
                tap.hooks[key] = module.register_forward_pre_hook(entry.callback, with_kwargs=True)
            else:
                tap.hooks[key] = module.register_forward_hook(entry.callback)


def _tapped(kind: type[nn.Module]) -> type[nn.Module]:
    """The same subclass each time, for compiled code guards on it; another once the class's forward is replaced."""
    return _made_once(kind, inspect.getattr_static(kind, "forward"))


@functools.lru_cache(maxsize=1024)
def _made_once(kind: type[nn.Module], plain: Any) -> type[nn.Module]:
    return _made(kind)


def _made(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose instances call what is put on them, and which passes for the class itself."""
    body: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduced,
        _PLAIN: kind,
        "forward": _forward_of(kind),
    }
    body |= {name: _method_of(kind, name) for name in METHODS if callable(getattr(kind, name, None))}
    return type(kind)(kind.__name__, (kind,), body)


def _forward_of(kind: type[nn.Module]) -> Callable[..., Any]:
    plain = inspect.getattr_static(kind, "forward")
    if not isinstance(plain, FunctionType):  # a static method, or a builtin
        return _method_of(kind, "forward")

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tap = self.__dict__.get(_MARK)
        if tap is None:
            return plain(self, *args, **kwargs)
        only = tap.only
        if only is not None:
            output = plain(self, *args, **kwargs)
            edited = only(self, args, output)
            return output if edited is None else edited
        return tap.run(self, functools.partial(plain, self), args, kwargs)

    return _passing_for(forward, plain)


def _method_of(kind: type[nn.Module], name: str) -> Callable[..., Any]:
    plain = inspect.getattr_static(kind, name)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = plain.__get__(self, kind) if hasattr(plain, "__get__") else plain
        return _called(self, name, bound, args, kwargs)

    return _passing_for(method, plain)


def _called(module: nn.Module, name: str, method: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """What a method gives, with all that is called before, after and around it."""
    tap = module.__dict__.get(_MARK)
    if tap is None:
        return method(*args, **kwargs)
    if name == "forward":
        return tap.run(module, method, args, kwargs)
    return _around(tap.methods.get(name, ()), module, method, args, kwargs)


def _around(
    callbacks: tuple[Callable[..., Any], ...],
    module: nn.Module,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The method with callbacks around it, the last of them outermost."""
    for callback in callbacks:
        method = _enclosed(callback, module, method)
    return method(*args, **kwargs)


def _enclosed(callback: Callable[..., Any], module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: callback(module, method, args, kwargs)


def _passing_for(function: FunctionType, plain: Any) -> Callable[..., Any]:
    """The function with the name and the signature of another, for transformers reads there what a model takes.

    Of torch's own classes it has the file too, for torch.compile treats the code there in another way.
    """
    if isinstance(plain, FunctionType) and (plain.__module__ or "").startswith("torch.nn."):
        function.__code__ = function.__code__.replace(co_filename=plain.__code__.co_filename)
    return functools.wraps(plain)(function)


def _reduced(self: nn.Module, protocol: Any) -> Any:
    """What rebuilds the module as a plain one, without the mark, the hooks and the wrappers of a tap."""
    kind, tap = plain_class(self), self.__dict__.get(_MARK)
    function, args, *rest = kind.__reduce_ex__(self, protocol)
    if function is copyreg.__newobj__:  # which pickle lets make nothing but the class that it sees
        function = kind.__new__
    args = tuple(kind if arg is type(self) else arg for arg in args)
    if rest and isinstance(rest[0], dict):
        mine = {handle.id for handle in ({} if tap is None else tap.hooks).values()}
        state: dict[str, Any] = {}
        for name, value in rest[0].items():
            if isinstance(value, _OnInstance):
                value = value.previous
            elif type(value) in (dict, OrderedDict):  # a shallow copy has parameters and hooks of its own too
                value = type(value)((k, v) for k, v in value.items() if not (k in mine and name.startswith("_forward")))
            state[name] = value
        state.pop(_MARK, None)
        rest[0] = state
    return function, args, *rest


@final
class _OnInstance:
    """Stands on the instance in the place of a method that lay there, as accelerate and peft put it."""

    def __init__(self, module: nn.Module, name: str, previous: Callable[..., Any]) -> None:
        self.module, self.name, self.previous = module, name, previous
        self.__signature__ = inspect.signature(previous)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _called(self.module, self.name, self.previous, args, kwargs)


def idle(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that does nothing; its presence keeps the modules around it from their fused kernels."""
