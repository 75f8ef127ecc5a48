"""Add: move along the direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.steering.norms import nonzero_unit, norms, unit
from actsteer.steering.numbers import check_flag


@final
@dataclass(frozen=True, kw_only=True)
class Add:
    """Move along the direction: h + c · v, in the activation's units.

    Args:
        relative: h + c · ‖h‖ · v/‖v‖ instead: c in units of the activation's norm.

    Source: activation addition (ActAdd), Turner et al. 2023; contrastive activation addition (CAA), Rimsky et al. 2023.

    >>> import torch
    >>> h, v = torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 0.0])
    >>> Add()(h, v, torch.tensor(0.5)), Add(relative=True)(h, v, torch.tensor(0.5))
    (tensor([[4., 4.]]), tensor([[5.5000, 4.0000]]))
    """

    relative: bool = False

    def __post_init__(self) -> None:
        check_flag(self.relative, "relative")

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """h + c · v."""
        if not self.relative:
            return activation + c * direction
        return torch.addcmul(activation, c * norms(activation).to(activation.dtype), unit(direction))

    def prepare(
        self, direction: Float[Tensor, " d"], c: Float[Tensor, ""]
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
        """h + (c v), or h + ‖h‖ (c u), with what is in brackets computed here."""
        if not self.relative:
            shift = c * direction
            return lambda activation: activation + shift
        change = c * nonzero_unit(direction, by=self)
        return lambda activation: torch.addcmul(activation, norms(activation).to(activation.dtype), change)
