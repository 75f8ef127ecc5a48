"""PerThread: a value for each thread, and one for compiled code, which one thread at a time runs."""

from __future__ import annotations

from threading import local
from typing import Generic, TypeVar, final

import torch

T = TypeVar("T")


@final
class PerThread(Generic[T]):
    """A value that is None until it is set.

    >>> kept: PerThread[int] = PerThread()
    >>> kept.set(3)
    >>> kept.get()
    3
    """

    __slots__ = ("_compiled", "_own")

    def __init__(self) -> None:
        self._compiled: T | None = None
        self._own = local()

    def get(self) -> T | None:
        """This thread's value."""
        return self._compiled if torch.compiler.is_compiling() else getattr(self._own, "value", None)

    def set(self, value: T | None) -> None:
        """From now on, in this thread."""
        self._compiled = value
        if not torch.compiler.is_compiling():
            self._own.value = value
