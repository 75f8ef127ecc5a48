"""The patch backend: the instance's own `forward`. Code that is compiled already notices it, unlike a late hook."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType, MethodType
from typing import Any, final

import torch
from torch import nn

from actsteer.sites.place import Place, Side
from actsteer.steering.backends.mark import is_marked, one_at_a_time, remark
from actsteer.steering.copies import Uncopied
from actsteer.steering.edit import SiteEdit

_FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # run a fused kernel unless a module in them has a hook


def attach(place: Place, callback: Callable[..., Any], *, around: list[nn.Module]) -> Callable[[], None]:
    """Have the module's `forward` call `callback`; returns what removes it again, in any order.

    Where a module around this one would run a fused kernel and skip it, a hook that does nothing keeps it from that.
    """
    module = place.module
    with ExitStack() as handles:
        if any(isinstance(outer, _FUSED) for outer in around):
            handles.callback(module.register_forward_hook(_Keeper()).remove)
        with one_at_a_time:
            patch = Patch.of(module)
            handles.callback(patch.leave_if_empty)
            patch.add(place.side, callback)
            handles.callback(patch.remove, place.side, callback)
        return handles.pop_all().close  # which may be called twice
    raise AssertionError  # for the type checker, to whom an ExitStack might swallow an exception


@final
class Patch:
    """One module's patched `forward`: callbacks on its arguments, the forward that was there, callbacks on its output.

    The module holds the bound method `patch.forward`, which compiled code can guard without a compilation per patch.
    """

    __slots__ = ("_after", "_before", "_only", "_owned", "callbacks", "module", "previous")

    def __init__(self, module: nn.Module, previous: Callable[..., Any], *, owned: bool) -> None:
        self.module = module
        self.previous = previous
        self.callbacks: dict[Side, list[Callable[..., Any]]] = {"in": [], "out": []}
        self._before, self._after = self.callbacks["in"], self.callbacks["out"]
        self._only: Callable[..., Any] | None = None  # the callback on the output, if there is no other
        self._owned = owned  # whether `previous` lay on the instance, where it is put back

    @classmethod
    def of(cls, module: nn.Module) -> Patch:
        """The module's patch; a new one in its place if it has none."""
        present = module.__dict__.get("forward")
        holder = getattr(present, "__self__", None)
        if isinstance(holder, Patch):
            return holder
        previous = module.forward
        if is_marked(module):
            del module.__dict__["forward"]
        patch = cls(module, previous, owned="forward" in module.__dict__)
        module.__dict__["forward"] = patch._method(Patch.forward)
        return patch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module runs in the place of its own forward."""
        for callback in tuple(self._before):  # one may detach itself
            changed = callback(self.module, args, kwargs)
            if changed is not None:
                args, kwargs = changed
        return self._edited(args, self.previous(*args, **kwargs))

    def forward_with_one(self, *args: Any, **kwargs: Any) -> Any:
        """The same for a single callback on the output, which is most often all there is."""
        output = self.previous(*args, **kwargs)
        only = self._only
        if only is None:  # another thread has changed that meanwhile
            return self._edited(args, output)
        edited = only(self.module, args, output)
        return output if edited is None else edited

    def _edited(self, args: tuple[Any, ...], output: Any) -> Any:
        for callback in tuple(self._after):
            edited = callback(self.module, args, output)
            if edited is not None:
                output = edited
        self.leave_if_empty()
        return output

    def add(self, side: Side, callback: Callable[..., Any]) -> None:
        """Have `forward` call this too, after the others."""
        self.callbacks[side].append(callback)
        self._settle()

    def remove(self, side: Side, callback: Callable[..., Any]) -> None:
        """Have it called no more; with the last one the patch leaves, or warns if another forward has covered it."""
        with one_at_a_time:
            self.callbacks[side].remove(callback)
            self._settle()
            covered = not (self._before or self._after or self._leave())
        if covered and isinstance(getattr(callback, "__self__", None), SiteEdit):
            warnings.warn(
                f"the forward of {type(self.module).__name__} was replaced while it was steered; what lies there now "
                "may call through to the steering's, which does nothing any more",
                UserWarning,
                stacklevel=5,
            )

    def _settle(self) -> None:
        """Put the forward that suits the callbacks on the module, unless another one is there."""
        single = len(self._after) == 1 and not self._before
        self._only = self._after[0] if single else None
        if self._in_place():
            self.module.__dict__["forward"] = self._method(Patch.forward_with_one if single else Patch.forward)

    def _method(self, function: Callable[..., Any]) -> MethodType:
        """A method of this patch that shows the signature of the forward in whose place it stands."""
        own = getattr(self.previous, "__func__", None)
        if own is None:
            return MethodType(_showing(function, self.previous, bound=True), self)
        return MethodType(_showing_cached(function, own), self)

    def leave_if_empty(self) -> None:
        """Leave a module that it has no callbacks for: a copy, made while the module was steered."""
        if torch.compiler.is_compiling():
            return
        with one_at_a_time:
            if not (self._before or self._after):
                self._leave()

    def _in_place(self) -> bool:
        return getattr(self.module.__dict__.get("forward"), "__self__", None) is self

    def _leave(self) -> bool:
        if not self._in_place():
            return False
        if self._owned:
            self.module.__dict__["forward"] = self.previous
        else:
            del self.module.__dict__["forward"]
            remark(self.module)
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        previous = copy.deepcopy(self.previous, memo)
        return Patch(copy.deepcopy(self.module, memo), previous, owned=self._owned)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self.module, self.previous if self._owned else None)


@final
class _Keeper(Uncopied):
    """A hook that does nothing; its presence keeps the modules around it from their fused kernels."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pass


def _showing(function: Callable[..., Any], forward: Callable[..., Any], *, bound: bool = False) -> Callable[..., Any]:
    """A copy of a method's function that passes for a forward.

    It has its signature, for transformers reads there what a model takes; and, for a class of torch's own, its file,
    for torch.compile treats the code there in another way, and compiled code outlives the patch.
    """
    try:
        signature = inspect.signature(forward)
    except ValueError:  # a builtin, which has none to show
        return function
    own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)] if bound else []
    assert isinstance(function, FunctionType)
    code = function.__code__
    if isinstance(forward, FunctionType) and (forward.__module__ or "").startswith("torch.nn."):
        code = code.replace(co_filename=forward.__code__.co_filename)
    copied = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    copied.__dict__["__signature__"] = signature.replace(parameters=[*own, *signature.parameters.values()])
    return copied


_showing_cached = functools.cache(_showing)  # one function for one class, or compiled code would see another each time


def _copied(module: nn.Module, previous: Callable[..., Any] | None) -> Patch:
    """The patch of an unpickled module, which leaves it at the first call."""
    return Patch(module, previous or MethodType(type(module).forward, module), owned=previous is not None)
