"""Interventions: how a direction edits an activation, as pure functions of plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Intervention(Protocol):
    """An edit of activations `(*batch, d)` by one direction `(d,)`; `c = 0` leaves them bit for bit alone."""

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """The edited activation; `c` is 0-dim, or has one value per row and broadcasts against the activation."""
        ...


@runtime_checkable
class PerSite(Protocol):
    """An intervention that is another one at each of its sites."""

    def at(self, site: str) -> Intervention:
        """The intervention of one site."""
        ...


@final
@dataclass(frozen=True)
class Add:
    """Move along the direction: h + c · v, in the activation's own units.

    Source: activation addition (ActAdd), Turner et al. 2023; contrastive activation addition (CAA), Rimsky et al. 2023.

    >>> Add()(torch.zeros(1, 2), torch.tensor([1.0, 2.0]), torch.tensor(3.0))
    tensor([[3., 6.]])
    """

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """h + c · v; where c is 0, h itself."""
        return torch.where(c == 0, activation, activation + c * direction)
