"""Rotate: turn an activation toward the direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.steering.interventions.intervention import unit


@final
@dataclass(frozen=True)
class Rotate:
    """Turn toward the direction, in the plane that it spans with h, by the angle c · a; the norm is kept.

    With u = v/‖v‖, w the unit vector across it, h = ‖h‖ (cos φ · u + sin φ · w), the result is
    ‖h‖ (cos φ' · u + sin φ' · w) with φ' = φ - c · a, between 0 and π: no further than the direction itself, and with a
    negative c no further than its opposite. Where h lies along v no plane is spanned, and nothing turns.

    Args:
        angle: a, in radians.

    Source: angular steering, Vu and Nguyen 2025, in the plane of each activation.

    >>> import torch
    >>> turned = Rotate(torch.pi / 2)(torch.tensor([[0.0, 5.0]]), torch.tensor([2.0, 0.0]), torch.tensor(1.0))
    >>> turned.round(decimals=4)
    tensor([[5., 0.]])
    """

    angle: float

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """The activation, turned."""
        along = unit(direction)
        component = (activation @ along)[..., None]
        rest = activation - component * along
        across = rest.norm(dim=-1, keepdim=True)
        turned = (torch.atan2(across, component) - c * self.angle).clamp(0, torch.pi)
        norm = activation.norm(dim=-1, keepdim=True)
        spans = (across > torch.finfo(across.dtype).eps * norm) & along.any()
        edited = norm * (turned.cos() * along + turned.sin() * (rest / torch.where(spans, across, 1)))
        return torch.where(spans, edited, activation)
