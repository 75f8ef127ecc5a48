"""Ablate: take the direction out of an activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.steering.norms import nonzero_unit, unit


@final
@dataclass(frozen=True, kw_only=True)
class Ablate:
    """Remove the component along the direction: h - c · (h·u) u, with u = v/‖v‖.

    At c = 1 nothing is left of it; c = 2 mirrors it; a negative c makes it larger.

    Args:
        one_sided: remove only what points along v, max(h·u, 0), and leave what points away from it.

    Source: directional ablation, Arditi et al. 2024 (refusal); one-sided, as in angular and conditional steering.

    >>> import torch
    >>> h, v = torch.tensor([[3.0, 4.0], [-3.0, 4.0]]), torch.tensor([2.0, 0.0])
    >>> Ablate()(h, v, torch.tensor(1.0)).tolist(), Ablate(one_sided=True)(h, v, torch.tensor(1.0)).tolist()
    ([[0.0, 4.0], [0.0, 4.0]], [[0.0, 4.0], [-3.0, 4.0]])
    """

    one_sided: bool = False

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """h - c · (h·u) u."""
        along = unit(direction)
        component = activation @ along[:, None]
        if self.one_sided:
            component = component.clamp(min=0)
        return torch.addcmul(activation, c * component, along, value=-1)

    def prepare(
        self, direction: Float[Tensor, " d"], c: Float[Tensor, ""]
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
        """h + (h·u) (-c u), with u and -c u computed here."""
        along = nonzero_unit(direction, by=self)
        column, change = along[:, None], -c * along
        if self.one_sided:
            return lambda activation: torch.addcmul(activation, (activation @ column).clamp(min=0), change)
        return lambda activation: torch.addcmul(activation, activation @ column, change)
