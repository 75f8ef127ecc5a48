"""actsteer: a `Steerer` around a `SteeringVector`, as the README shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from actsteer import Steerer, SteeringVector


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[nn.Module]:
    """With all defaults."""
    with Steerer(model, SteeringVector(directions), c=c):
        yield model
