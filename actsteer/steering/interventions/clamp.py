"""Clamp: set how far an activation goes along the direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from actsteer.steering.interventions.intervention import unit


@final
@dataclass(frozen=True)
class Clamp:
    """Set the projection on the direction: h + c · (t - h·u) u, with u = v/‖v‖.

    At c = 1 every row projects to t, whatever it did before; between 0 and 1 it goes part of the way.

    Args:
        target: t, in the activation's units.

    Source: feature clamping, Templeton et al. 2024 (scaling monosemanticity), on a direction.

    >>> import torch
    >>> Clamp(7.0)(torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 0.0]), torch.tensor(1.0))
    tensor([[7., 4.]])
    """

    target: float

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """h + c · (t - h·u) u."""
        along = unit(direction)
        return activation + c * ((self.target - activation @ along)[..., None] * along)
