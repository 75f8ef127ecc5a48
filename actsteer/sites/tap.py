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
from collections import OrderedDict
from collections.abc import Callable
from threading import RLock
from types import FunctionType, MethodType
from typing import Any, Literal, NamedTuple, TypeAlias, final

import torch
from torch import nn

from actsteer.errors import UnsupportedModelError

When: TypeAlias = Literal["before", "after", "around"]
"""Of `forward`: `before(module, args, kwargs)` gives None or other (args, kwargs); `after(module, args, output)` gives
None or another output; `around(module, forward, args, kwargs)` gives the output, and encloses the other two."""
By: TypeAlias = Literal["tap", "hook"]

lock = RLock()  # of whoever changes what is attached to modules
METHODS = ("generate", "generate_stream", "prepare_inputs_for_generation")
"""The other methods that can be tapped, all of them around: `callback(module, method, args, kwargs)`."""
_MARK, _PLAIN = "_actsteer_tap", "_actsteer_plain"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


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

    __slots__ = ("after", "around", "before", "entries", "hooks", "methods", "on_instance", "only")

    def __init__(self) -> None:
        self.entries: tuple[Entry, ...] = ()
        self.hooks: dict[int, Any] = {}  # id(entry) -> the handle of its hook
        self.on_instance = False  # whether they are called around a forward that lies on the instance
        self.set(())

    def set(self, entries: tuple[Entry, ...]) -> None:
        """Have these called, in this order; wherever an interrupt comes, what is called is listed."""
        if len(entries) > len(self.entries):
            self.entries = entries
        called: dict[str, tuple[Callable[..., Any], ...]] = {}
        for entry in entries:
            if entry.by == "tap":
                called[entry.when] = (*called.get(entry.when, ()), entry.callback)
        self.before, self.after, self.around = (called.pop(when, ()) for when in ("before", "after", "around"))
        self.methods = called
        single = len(self.after) == 1 and not (self.before or self.around or self.on_instance)
        self.only = self.after[0] if single else None  # the callback on the output, where there is no other at all
        self.entries = entries

    def call(
        self,
        module: nn.Module,
        name: str,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The module's forward, or another method, with all that is called before, after and around it."""
        if name != "forward":
            return _around(self.methods.get(name, ()), module, method, args, kwargs)
        before, after = self.before, self.after
        if not (before or after):
            return _around(self.around, module, method, args, kwargs)

        def inside(*args: Any, **kwargs: Any) -> Any:
            for callback in before:
                changed = callback(module, args, kwargs)
                if changed is not None:
                    args, kwargs = changed
            output = method(*args, **kwargs)
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
        _settle(module, (*entries_of(module), Entry(when, callback, owner, by)))


def take_off(module: nn.Module, when: str, callback: Callable[..., Any]) -> bool:
    """Have it called no more; with the last callback the module is what it was. It may be tried again, in any order.

    Returns:
        Whether another forward came to lie on the instance, over this callback, which may not have been called since.
    """
    with lock:
        entries = entries_of(module)
        present = module.__dict__.get("forward")
        is_covered = present is not None and not isinstance(present, _OnInstance) and not _is_of_a_tap(present)
        mine = next((e for e in reversed(entries) if e.when == when and e.callback == callback), None)
        _settle(module, tuple(entry for entry in entries if entry is not mine))
    return is_covered and mine is not None and mine.by == "tap" and when not in METHODS


def tidy(module: nn.Module) -> None:
    """Finish what an interrupt has left undone, where nothing is called any more."""
    with lock:
        if _MARK in module.__dict__ and not entries_of(module):
            _settle(module, ())


def entries_of(module: nn.Module) -> tuple[Entry, ...]:
    """What is called at a module, in the order in which it was put there."""
    tap = module.__dict__.get(_MARK)
    return () if tap is None else tap.entries


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, tapped or not."""
    kind = type(module)
    plain: type[nn.Module] = kind.__dict__.get(_PLAIN, kind)
    return plain


def _settle(module: nn.Module, entries: tuple[Entry, ...]) -> None:
    """Bring the module to what its callbacks ask for, from whatever an interrupt has left."""
    values = module.__dict__
    tap = values.get(_MARK) or values.setdefault(_MARK, Tap())
    hooks, wanted = tap.hooks, {id(entry): entry for entry in entries if entry.by == "hook"}
    for key in [key for key in hooks if key not in wanted]:  # what still does something is still listed
        hooks[key].remove()
        del hooks[key]
    tap.on_instance = tap.on_instance or "forward" in values
    tap.set(entries)
    for key, entry in wanted.items():
        if key not in hooks and entry.when == "before":
            hooks[key] = module.register_forward_pre_hook(_pre_hook(entry.callback), with_kwargs=True)
        elif key not in hooks:
            hooks[key] = module.register_forward_hook(entry.callback)
    names = {"forward", *tap.methods} if tap.entries else set()
    for name in ("forward", *METHODS):
        present = values.get(name)
        if _is_of_a_tap(present):  # accelerate puts back what it found
            del values[name]
        elif name in names and present is not None and not isinstance(present, _OnInstance):
            values[name] = _OnInstance(module, name, present)
        elif name not in names and isinstance(present, _OnInstance):
            values[name] = present.previous
    kind = type(module)
    if not tap.entries:
        object.__setattr__(module, "__class__", plain_class(module))
        values.pop(_MARK, None)
    elif kind is not plain_class(module) or not any(_PLAIN in base.__dict__ for base in kind.__mro__):
        if any(entry.by == "hook" and entry.callback is not idle for entry in tap.entries):
            has_methods = any(entry.by == "tap" for entry in tap.entries)
            made = _made(plain_class(module), has_methods=has_methods)  # for compiled code, which sees no hooks
        else:
            made = _tapped(plain_class(module))  # type: ignore[arg-type]
        object.__setattr__(module, "__class__", made)


def _pre_hook(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Not for a pass of another thread that began before torch had noted that the hook takes keywords, or after."""
    return lambda module, args, *kwargs: callback(module, args, *kwargs) if kwargs else None


@functools.lru_cache(maxsize=1024)
def _tapped(kind: type[nn.Module]) -> type[nn.Module]:
    """The same subclass each time, for compiled code guards on it."""
    return _made(kind)


def _made(kind: type[nn.Module], *, has_methods: bool = True) -> type[nn.Module]:
    """A subclass whose instances call what is put on them, and which passes for the class itself.

    Raises:
        UnsupportedModelError: the class, or its metaclass, has no such subclasses.
    """
    body: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduced,
        "__prepare_scriptable__": _refuse_scripting,
        _PLAIN: kind,
    }
    if issubclass(kind, torch.fx.GraphModule):
        body["recompile"] = _recompiled
    if has_methods:
        body["forward"] = _forward_of(kind)
        body |= {name: _method_of(kind, name) for name in METHODS if callable(getattr(kind, name, None))}
    try:
        made: type[nn.Module] = type.__call__(type(kind), kind.__name__, (kind,), body)
    except Exception as error:
        raise UnsupportedModelError(
            f"a {kind.__name__} is steered by a subclass in the place of its class, and the class lets none be made "
            f"({error}); steer a module inside or around it, or use backend='fold'"
        ) from error
    if not has_methods and "forward" in vars(made):
        del made.forward  # of an `__init_subclass__`: transformers wraps what is checkpointed, once for each class
    return made


def _forward_of(kind: type[nn.Module]) -> Callable[..., Any]:
    plain = inspect.getattr_static(kind, "forward")
    if not isinstance(plain, FunctionType):  # a static method, or a builtin
        return _method_of(kind, "forward")

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tap = self.__dict__.get(_MARK)
        if tap is None:
            return kind.forward(self, *args, **kwargs)
        only = tap.only
        if only is not None:
            output = kind.forward(self, *args, **kwargs)
            edited = only(self, args, output)
            return output if edited is None else edited
        return _called(self, "forward", functools.partial(kind.forward, self), args, kwargs)

    return _passing_for(forward, plain)


def _refuse_scripting(self: nn.Module) -> nn.Module:
    if _MARK in self.__dict__:
        raise UnsupportedModelError(
            f"a steered {type(self).__name__} cannot be scripted, for a scripted module calls no Python; script it "
            "after the block, or trace it, which keeps the steering"
        )
    return self


def _recompiled(self: nn.Module) -> Any:
    """A graph module writes its code into its class, which is to be the plain one."""
    with lock:
        object.__setattr__(self, "__class__", plain_class(self))
        try:
            return self.recompile()  # type: ignore[operator]
        finally:
            _settle(self, entries_of(self))


def _method_of(kind: type[nn.Module], name: str) -> Callable[..., Any]:
    plain = inspect.getattr_static(kind, name)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = plain.__get__(self, kind) if hasattr(plain, "__get__") else plain
        return _called(self, name, bound, args, kwargs)

    return _passing_for(method, plain)


def _called(module: nn.Module, name: str, method: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """What a method gives, with all that is called before, after and around it, unless that is done on the instance."""
    tap = module.__dict__.get(_MARK)
    if tap is None or isinstance(module.__dict__.get(name), _OnInstance):
        return method(*args, **kwargs)
    return tap.call(module, name, method, args, kwargs)


def _around(
    callbacks: tuple[Callable[..., Any], ...],
    module: nn.Module,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The method with callbacks around it, the last of them outermost."""
    for callback in callbacks[:-1]:
        method = _enclosed(callback, module, method)
    return callbacks[-1](module, method, args, kwargs) if callbacks else method(*args, **kwargs)


def _enclosed(callback: Callable[..., Any], module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: callback(module, method, args, kwargs)


def _passing_for(function: Any, plain: Any) -> Callable[..., Any]:
    """The function with the name and the signature of another, for transformers reads there what a model takes.

    Of torch's own classes it has the file too, for torch.compile treats the code there in another way.
    """
    if isinstance(plain, FunctionType) and (plain.__module__ or "").startswith("torch.nn."):
        function.__code__ = function.__code__.replace(co_filename=plain.__code__.co_filename)
    passing: Callable[..., Any] = functools.wraps(plain)(function)
    setattr(passing, _PLAIN, True)
    return passing


def _is_of_a_tap(method: Any) -> bool:
    """Whether it is a method of a class that `_made` made, and does what the plain one does where nothing is tapped."""
    return isinstance(method, MethodType) and hasattr(method, _PLAIN)


def _reduced(self: nn.Module, protocol: Any) -> Any:
    """What rebuilds the module as a plain one, without the mark, the hooks and the wrappers of a tap."""
    kind, tap = plain_class(self), self.__dict__.get(_MARK)
    reduced: Any = kind.__reduce_ex__(self, protocol)
    function, args, *rest = reduced
    if function is getattr(copyreg, "__newobj__", None):  # which pickle lets make nothing but the class that it sees
        function = kind.__new__
    args = tuple(kind if arg is type(self) else arg for arg in args)
    if rest and isinstance(rest[0], dict):
        mine = {handle.id for handle in ({} if tap is None else tap.hooks).values()}
        state: dict[str, Any] = {}
        for name, value in rest[0].items():
            if isinstance(value, _OnInstance):
                value = value.previous
            elif type(value) in (dict, OrderedDict):  # a shallow copy has parameters and hooks of its own too
                value = type(value)((k, v) for k, v in value.items() if k not in mine or name not in _HOOKS)
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
        tap = self.module.__dict__.get(_MARK) or Tap()
        return tap.call(self.module, self.name, self.previous, args, kwargs)


def idle(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that does nothing; its presence keeps the modules around it from their fused kernels."""
