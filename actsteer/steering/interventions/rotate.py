"""Rotate: turn an activation toward the direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.steering.norms import nonzero_unit, norms, unit
from actsteer.steering.numbers import finite


@final
@dataclass(frozen=True)
class Rotate:
    """Turn toward the direction, in the plane that it spans with h, by the angle c · a; the norm is kept.

    With u = v/‖v‖, w the unit vector across it, h = ‖h‖ (cos φ · u + sin φ · w), the result is
    ‖h‖ (cos φ' · u + sin φ' · w) with φ' = φ - c · a, between 0 and π: no further than the direction itself, and with a
    negative c no further than its opposite. Where h lies along v no plane is spanned, and nothing turns.

    Args:
        angle: a, in radians.

    Raises:
        ValueError: an angle that is not finite.

    Source: angular steering, Vu and Nguyen 2025, in the plane of each activation.

    >>> import torch
    >>> turned = Rotate(torch.pi / 2)(torch.tensor([[0.0, 5.0]]), torch.tensor([2.0, 0.0]), torch.tensor(1.0))
    >>> turned.round(decimals=4)
    tensor([[5., 0.]])
    """

    angle: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "angle", finite(self.angle, "angle"))

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """The activation, turned."""
        return _turned(activation, unit(direction), c * self.angle)

    def prepare(
        self, direction: Float[Tensor, " d"], c: Float[Tensor, ""]
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
        """The turn by c · a, with u and c · a computed here."""
        along, angle = nonzero_unit(direction, by=self), c * self.angle
        return lambda activation: _turned(activation, along, angle)


def _turned(h: Float[Tensor, "*batch d"], along: Float[Tensor, " d"], angle: Tensor) -> Float[Tensor, "*batch d"]:
    component = h @ along[:, None]
    rest = torch.addcmul(h, component, along, value=-1)
    across, norm = norms(rest), norms(h)
    spans = (across > 8 * torch.finfo(h.dtype).eps * norm) & along.any()  # below it, `rest` is rounding
    turned = (torch.atan2(across, component) - angle).clamp(0, torch.pi)
    toward, away = (norm * turned.cos()).to(h.dtype), (norm * turned.sin()).to(h.dtype)
    edited = toward * along + away * (rest / torch.where(spans, across, 1).to(h.dtype))
    return torch.where(spans, edited, h)
