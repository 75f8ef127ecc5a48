"""Affine: an affine map of the activation, another one at every site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from actsteer.collecting.statistics import Statistics
from actsteer.errors import ShapeError, SiteNotFoundError, StatisticsError, close_names
from actsteer.steering.interventions.intervention import settled
from actsteer.vectors.vector import SteeringVector


@final
@dataclass(frozen=True)
class AffineAt:
    """The edit of one site, h + c · (W h + b - h)."""

    weight: Float[Tensor, "d d"]
    bias: Float[Tensor, " d"]
    keep_norm: bool = False

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """The activation on its way to W h + b, which it is at c = 1; where c is 0, h itself."""
        goal = linear(activation, self.weight.to(activation), self.bias.to(activation))
        return settled(activation, torch.lerp(activation, goal, c.to(activation)), c, keep_norm=self.keep_norm)


@final
class Affine:
    """An affine map at every site: h + c · (W h + b - h), which at c = 1 is W h + b.

    `Steerer(model, Affine(maps))` takes it in the place of vectors. `Affine.matching` fits one; `LowRank` is the same
    with a few numbers where W - 1 is of low rank. A value: it copies what comes in.

    Args:
        maps: site -> (W, b), of shapes (d, d) and (d,).
        keep_norm: scale the result to the norm of h.
        concept: a name for it.

    Raises:
        ShapeError: shapes that do not fit, or numbers that are not finite.

    >>> from torch import nn
    >>> from actsteer import Steerer
    >>> model, mirror = nn.Sequential(nn.Identity()), Affine({"0": (-torch.eye(2), torch.ones(2))})
    >>> with Steerer(model, mirror):
    ...     model(torch.tensor([[3.0, 0.0]]))
    tensor([[-2.,  1.]])
    """

    def __init__(
        self, maps: Mapping[str, tuple[Tensor, Tensor]], *, keep_norm: bool = False, concept: str | None = None
    ) -> None:
        if not maps:
            raise ShapeError("expected one site or more, got none")
        self._parts = {site: AffineAt(*_owned(site, *parts), keep_norm) for site, parts in maps.items()}
        self._concept = concept

    @classmethod
    def matching(
        cls, *, positive: Statistics, negative: Statistics, covariance: bool = True, concept: str | None = None
    ) -> Affine:
        """The map that gives the negative side's activations the positive side's mean and, if asked, covariance.

        b = μ₊ - W μ₋ with W = Σ₋^-½ (Σ₋^½ Σ₊ Σ₋^½)^½ Σ₋^-½, the map that moves Gaussian rows least; W = 1 without the
        covariance. Directions in which the negative side does not vary stay as they are.

        Raises:
            StatisticsError: the statistics have no covariance, or other sites.

        Source: MiMiC, Singh et al. 2024 (mean matching, and mean and covariance matching).
        """
        if set(positive.sites) != set(negative.sites):
            raise StatisticsError(f"positive has the sites {positive.sites}, negative {negative.sites}; collect alike")
        maps = {}
        for site in positive.sites:
            high, low = positive[site], negative[site]
            weight = torch.eye(high.d, dtype=torch.float64, device=high.mean.device)
            if covariance:
                weight = _transport(low.covariance, high.covariance)
            maps[site] = (weight, high.mean - weight @ low.mean)
        return cls(maps, concept=concept)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites, in the order given."""
        return tuple(self._parts)

    @property
    def constant(self) -> SteeringVector:
        """What an activation of zero becomes: b."""
        return SteeringVector({site: part.bias for site, part in self._parts.items()}, concept=self._concept)

    def at(self, site: str) -> AffineAt:
        """The edit of one site."""
        if site not in self._parts:
            raise SiteNotFoundError(f"no edit at site {site!r}. {close_names(site, self._parts)}")
        return self._parts[site]

    def __getitem__(self, site: str) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
        """Copies of (W, b) at a site."""
        part = self.at(site)
        return part.weight.clone(), part.bias.clone()

    def __repr__(self) -> str:
        return f"Affine(sites={self.sites}, concept={self._concept!r})"


def _transport(source: Tensor, target: Tensor) -> Tensor:
    """The symmetric map from one covariance to another; 1 where the source does not vary."""
    values, vectors = torch.linalg.eigh(source)
    varies = values > values.max().clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    basis, deviations = vectors[:, varies], values[varies].sqrt()
    scaled = deviations[:, None] * (basis.T @ target @ basis) * deviations
    within, turns = torch.linalg.eigh(scaled)
    root = (turns * within.clamp(min=0).sqrt()) @ turns.T
    still = torch.eye(len(values)).to(source) - basis @ basis.T
    moved: Tensor = still + basis @ (root / deviations[:, None] / deviations) @ basis.T
    return moved


def _owned(site: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shapes = tuple(weight.shape), tuple(bias.shape)
    if bias.ndim != 1 or shapes[0] != (len(bias), len(bias)):
        raise ShapeError(f"site {site!r}: expected W (d, d) and b (d,), got shapes {shapes}")
    if not all(part.is_floating_point() and bool(part.isfinite().all()) for part in (weight, bias)):
        raise ShapeError(f"site {site!r}: expected finite floating tensors")
    with torch.inference_mode(mode=False):  # so that they work in autograd later
        return weight.detach().clone(), bias.detach().clone()
