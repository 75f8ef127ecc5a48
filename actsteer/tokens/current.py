"""Current: a value of this context (a thread or a coroutine), and one for compiled code, which has no contexts."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Generic, TypeVar, final

import torch

T = TypeVar("T")


@final
class Current(Generic[T]):
    """A value that is None but between `set` and `reset`.

    >>> current: Current[int] = Current()
    >>> before = current.set(3)
    >>> current.get()
    3
    >>> current.reset(before)
    """

    __slots__ = ("_traced", "_var")

    def __init__(self) -> None:
        self._traced: T | None = None
        self._var: ContextVar[T | None] = ContextVar("current", default=None)

    def get(self) -> T | None:
        """The value in this context."""
        return self._traced if torch.compiler.is_compiling() else self._var.get()

    def set(self, value: T | None) -> Any:
        """Until `reset` is given what this returns."""
        before, self._traced = self._traced, value
        return before, None if torch.compiler.is_compiling() else self._var.set(value)

    def reset(self, before: Any) -> None:
        """The value that there was before."""
        self._traced, token = before
        if token is not None:
            self._var.reset(token)
            self._traced = self._var.get()  # and not that of another thread, which came in between
