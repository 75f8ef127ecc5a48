"""What is attached to the model itself: it notes that the model ran, and keeps the passes apart."""

from __future__ import annotations

from collections.abc import Callable
from threading import local
from typing import Any, final

import torch
from torch import nn

from actsteer.steering.copies import Uncopied
from actsteer.steering.passes import Passes


@final
class Watch(Uncopied):
    """A hook at the model itself, which notes that it ran."""

    def __init__(self) -> None:
        self.ran = False
        self.leaves: list[Callable[[], None]] = []  # one completed pass is proof enough; the others need not pay

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        """After the model's forward pass."""
        self.ran = True
        if not torch.compiler.is_compiling():
            for leave in self.leaves:
                leave()


@final
class Begin(Uncopied):
    """A hook before a forward pass, which may follow one that failed halfway."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Find out about the pass."""
        self._passes.begin(args, kwargs)


@final
class End(Uncopied):
    """A hook after a forward pass."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def __call__(self, *_: Any) -> None:
        """Forget about the pass."""
        self._passes.end()


@final
class InThread(Uncopied):
    """A callback for the thread that attached it alone."""

    def __init__(self, callback: Callable[..., Any]) -> None:
        self.callback = callback
        self._mine = local()
        self._mine.here = True

    def __call__(self, module: nn.Module, *rest: Any) -> Any:
        """What the callback says, or None in another thread."""
        return self.callback(module, *rest) if hasattr(self._mine, "here") else None
