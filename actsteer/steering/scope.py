"""Scope: who is steered, every thread or only the context that attached: its thread, or its asyncio task."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from itertools import count
from typing import Any, Literal, TypeAlias, final

Scope: TypeAlias = Literal["process", "context"]

_active: ContextVar[frozenset[int]] = ContextVar("actsteer_active", default=frozenset())
_numbers = count()


@final
class Presence:
    """A steering that is there in one context alone."""

    def __init__(self) -> None:
        self._number = next(_numbers)

    def begin(self) -> None:
        """From now on, in this context and in those that are copied from it."""
        _active.set(_active.get() | {self._number})

    def end(self) -> None:
        """No more, in this context."""
        _active.set(_active.get() - {self._number})

    @property
    def is_here(self) -> bool:
        """Whether this context is steered."""
        return self._number in _active.get()

    def only(self, callback: Callable[..., Any], *, around: bool) -> Callable[..., Any]:
        """A callback of a tap that does nothing in other contexts."""
        number = self._number
        if around:

            def enclosing(module: Any, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                if number in _active.get():
                    return callback(module, method, args, kwargs)
                return method(*args, **kwargs)

            return enclosing

        def here(module: Any, args: Any, last: Any) -> Any:
            return callback(module, args, last) if number in _active.get() else None

        return here
