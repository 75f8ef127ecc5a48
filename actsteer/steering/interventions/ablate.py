"""Ablate: take the direction out of an activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError, SiteNotFoundError, close_names
from actsteer.sites.device import brought
from actsteer.steering.norms import nonzero_unit, unit
from actsteer.steering.numbers import check_flag
from actsteer.vectors.vector import SteeringVector


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Ablate:
    """Remove the component along the direction: h - c · (h·u) u, with u = v/‖v‖.

    At c = 1 nothing is left of it; c = 2 mirrors it; a negative c makes it larger.

    Args:
        one_sided: remove only what points along v, max(h·u, 0), and leave what points away from it.
        around: μ, of which nothing is removed: h - c · ((h - μ)·u) u, so that at c = 1 every row projects on v as μ
            does; a tensor (d,), or site -> one, such as a SteeringVector or {site: stats[site].mean}. For activations
            that lie far from 0 along v, of which 0 would be as strange as the concept.

    Raises:
        SiteNotFoundError: `around` has no mean for a site.
        ShapeError: a mean of another size than the direction.

    Source: directional ablation, Arditi et al. 2024 (refusal); one-sided, as in angular and conditional steering;
    around a mean, mean ablation, Wang et al. 2022.

    >>> import torch
    >>> h, v = torch.tensor([[3.0, 4.0], [-3.0, 4.0]]), torch.tensor([2.0, 0.0])
    >>> Ablate()(h, v, torch.tensor(1.0)).tolist(), Ablate(one_sided=True)(h, v, torch.tensor(1.0)).tolist()
    ([[0.0, 4.0], [0.0, 4.0]], [[0.0, 4.0], [-3.0, 4.0]])
    >>> Ablate(around=torch.tensor([2.0, 9.0]))(h, v, torch.tensor(1.0)).tolist()
    [[2.0, 4.0], [2.0, 4.0]]
    """

    one_sided: bool = False
    around: Mapping[str, Tensor] | SteeringVector | Tensor | None = None

    def __post_init__(self) -> None:
        check_flag(self.one_sided, "one_sided")
        own = self.around
        if isinstance(own, Mapping | SteeringVector):
            object.__setattr__(self, "around", {site: _owned(own[site]) for site in own})
        elif own is not None:
            object.__setattr__(self, "around", _owned(own))

    def at(self, site: str) -> Ablate:
        """The intervention of one site, around the mean there."""
        if not isinstance(self.around, dict):
            return self
        if site not in self.around:
            raise SiteNotFoundError(f"around has no mean for site {site!r}. {close_names(site, self.around)}")
        return Ablate(one_sided=self.one_sided, around=self.around[site])

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """h - c · ((h - μ)·u) u, with μ = 0 unless `around` gives it."""
        along = unit(direction)
        component = activation @ along[:, None]
        if self.around is not None:
            component = component - self.middle(along)
        if self.one_sided:
            component = component.clamp(min=0)
        return torch.addcmul(activation, c * component, along, value=-1)

    def prepare(
        self, direction: Float[Tensor, " d"], c: Float[Tensor, ""]
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
        """h + ((h - μ)·u) (-c u), with u, μ·u and -c u computed here."""
        along = nonzero_unit(direction, by=self)
        column, change = along[:, None], -c * along
        if self.around is not None:
            middle, lowest = self.middle(along), 0.0 if self.one_sided else -math.inf
            return lambda activation: torch.addcmul(activation, (activation @ column - middle).clamp(lowest), change)
        if self.one_sided:
            return lambda activation: torch.addcmul(activation, (activation @ column).clamp(min=0), change)
        return lambda activation: torch.addcmul(activation, activation @ column, change)

    def middle(self, along: Float[Tensor, " d"]) -> Float[Tensor, ""]:
        """μ·u, how far the mean lies along the direction."""
        if not isinstance(self.around, Tensor):
            raise TypeError("around: it has a mean for each site; take that of one with .at(site)")
        if len(self.around) != len(along):
            raise ShapeError(f"around: the mean has {len(self.around)} features, the direction {len(along)}")
        middle: Tensor = brought(self.around, along.device, along.dtype) @ along
        return middle

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ablate) or self.around is not None or other.around is not None:
            return self is other  # tensors have no useful ==
        return self.one_sided == other.one_sided

    def __hash__(self) -> int:
        return hash((self.one_sided, self.around is None))


def _owned(mean: Tensor) -> Tensor:
    if not isinstance(mean, Tensor):
        raise TypeError(f"around: expected a tensor (d,), or a mapping site -> one, got {type(mean).__name__}")
    if mean.ndim != 1 or not mean.is_floating_point() or not bool(mean.isfinite().all()):
        raise ShapeError(
            f"around: expected a finite floating tensor (d,), got {mean.dtype} of shape {tuple(mean.shape)}"
        )
    with torch.inference_mode(mode=False):  # so that it works in autograd later
        return mean.detach().clone()
