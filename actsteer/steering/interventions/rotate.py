"""Rotate: turn an activation toward the direction, or to an angle in a fixed plane."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ZeroDirectionError
from actsteer.steering.interventions.site_tensors import SiteTensors, fitting, one_of, owned
from actsteer.steering.norms import nonzero_unit, norms, unit
from actsteer.steering.numbers import finite


@final
@dataclass(frozen=True, eq=False)
class Rotate:
    """Turn by an angle toward the direction, or to an angle in a fixed plane; the norm is kept.

    Without `plane`, by the angle c · a in the plane that the direction spans with h. With u = v/‖v‖, w the unit vector
    across it, h = ‖h‖ (cos φ · u + sin φ · w), the result is ‖h‖ (cos φ' · u + sin φ' · w) with φ' = φ - c · a, between
    0 and π: no further than the direction itself, and with a negative c no further than its opposite. Where h lies
    along v no plane is spanned, and nothing turns.

    With `plane` p, in the plane of v and p, the same for every h: u as above, w = (p - (p·u) u) / ‖p - (p·u) u‖, and
    the part r (cos φ · u + sin φ · w) of h in that plane, which becomes r (cos φ' · u + sin φ' · w) with
    φ' = φ + c · δ, δ = a - φ in [-π, π). So at c = 1 every row stands at the angle a, 0 being the direction, π/2 the
    second one and π the opposite of the direction; between 0 and 1 it goes part of the way, the shorter one.

    Args:
        angle: a, in radians.
        plane: a second direction, a tensor (d,) or site -> one, such as a SteeringVector.

    Raises:
        ValueError: an angle that is not finite.
        SiteNotFoundError: `plane` has no direction for a site.
        ShapeError: it has another size than the direction.
        ZeroDirectionError: it lies along the direction, so that they span no plane.

    Source: angular steering, Vu & Nguyen 2025 (arXiv 2510.26243), with `plane`; its adaptive kind is that with a gate
    `ProjectionAbove(v, threshold=0, per="token")`. Without `plane`, the same in the plane of each activation.

    >>> import torch
    >>> turned = Rotate(torch.pi / 2)(torch.tensor([[0.0, 5.0]]), torch.tensor([2.0, 0.0]), torch.tensor(1.0))
    >>> turned.round(decimals=4)
    tensor([[5., 0.]])
    >>> fixed = Rotate(torch.pi / 2, plane=torch.tensor([1.0, 1.0, 0.0]))
    >>> fixed(torch.tensor([[-3.0, -4.0, 7.0]]), torch.tensor([1.0, 0.0, 0.0]), torch.tensor(1.0)).round(decimals=4)
    tensor([[0., 5., 7.]])
    """

    angle: float
    plane: SiteTensors | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "angle", finite(self.angle, "angle"))
        if self.plane is not None:
            object.__setattr__(self, "plane", owned(self.plane, "plane"))

    def at(self, site: str) -> Rotate:
        """The intervention of one site, in the plane there."""
        if not isinstance(self.plane, dict):
            return self
        return Rotate(self.angle, plane=one_of(self.plane, site, "plane"))

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """The activation, turned."""
        along = unit(direction)
        if self.plane is None:
            return _turned(activation, along, c * self.angle)
        return _turned_to(activation, self._axes(along), self.angle, c)

    def prepare(
        self, direction: Float[Tensor, " d"], c: Float[Tensor, ""]
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
        """The turn, with u and c · a computed here, or u and w."""
        along, angle = nonzero_unit(direction, by=self), self.angle
        if self.plane is None:
            turn = c * angle
            return lambda activation: _turned(activation, along, turn)
        axes = self._axes(along)
        if axes.device.type == "cpu" and not bool(axes[1].any()):  # no other device is waited for
            raise ZeroDirectionError("plane: it lies along the direction, and spans no plane with it; give another one")
        return lambda activation: _turned_to(activation, axes, angle, c)

    def _axes(self, along: Float[Tensor, " d"]) -> Float[Tensor, "2 d"]:
        """u and w; w is zero where there is no plane."""
        second = unit(fitting(self.plane, along, "plane"))
        across = second - (second @ along) * along
        across = across - (across @ along) * along  # twice, for accuracy
        spans = across.abs().amax() > 8 * torch.finfo(along.dtype).eps  # below it, it is rounding
        return torch.stack([along, torch.where(spans & along.any(), unit(across), 0)])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rotate) or self.plane is not None or other.plane is not None:
            return self is other  # tensors have no useful ==
        return self.angle == other.angle

    def __hash__(self) -> int:
        return hash((self.angle, self.plane is None))


def _turned(h: Float[Tensor, "*batch d"], along: Float[Tensor, " d"], angle: Tensor) -> Float[Tensor, "*batch d"]:
    component = h @ along[:, None]
    rest = torch.addcmul(h, component, along, value=-1)
    across, norm = norms(rest), norms(h)
    spans = (across > 8 * torch.finfo(h.dtype).eps * norm) & along.any()  # below it, `rest` is rounding
    turned = (torch.atan2(across, component) - angle).clamp(0, torch.pi)
    toward, away = (norm * turned.cos()).to(h.dtype), (norm * turned.sin()).to(h.dtype)
    edited = toward * along + away * (rest / torch.where(spans, across, 1).to(h.dtype))
    return torch.where(spans, edited, h)


def _turned_to(
    h: Float[Tensor, "*batch d"], axes: Float[Tensor, "2 d"], angle: float, c: Float[Tensor, ...]
) -> Float[Tensor, "*batch d"]:
    first, second = (h @ axes.T).split(1, dim=-1)
    turn = (c * ((angle - torch.atan2(second, first) + torch.pi).remainder(2 * torch.pi) - torch.pi)).to(h.dtype)
    cosine, sine = turn.cos() - 1, turn.sin()
    change = torch.cat([cosine * first - sine * second, sine * first + cosine * second], dim=-1)
    return torch.where(axes[1].any(), h + change @ axes, h)
