"""Trained: what gradient descent moves: a direction at every site, or a low-rank edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.steering.interventions.intervention import Intervention
from actsteer.steering.interventions.low_rank import LowRank, LowRankAt
from actsteer.steering.steerer import Steerer
from actsteer.vectors.vector import SteeringVector


@runtime_checkable
class Trained(Protocol):
    """Leaf tensors, in float32 at least, and what they amount to."""

    leaves: list[Tensor]

    def penalty(self) -> Tensor:
        """The squared norm of what is added, or of what decides it."""
        ...

    def confine(self, max_norm: float) -> None:
        """Scale what is longer down to this norm, site by site."""
        ...

    def slide(self, max_norm: float) -> None:
        """Take out of the gradients what points out of the ball of this radius, where the direction lies on it."""
        ...

    def result(self, *, concept: str | None, metadata: Mapping[str, str]) -> SteeringVector | LowRank:
        """The vector or edit as it is now."""
        ...


@final
class TrainedVector:
    """A direction at every site, those of an attached Steerer."""

    def __init__(self, steerer: Steerer, like: SteeringVector) -> None:
        self._like = like
        self._rows = steerer.requires_grad_()  # one row each
        self.leaves = list(self._rows.values())

    def penalty(self) -> Tensor:
        return torch.stack([leaf.square().sum() for leaf in self.leaves]).sum()

    @torch.no_grad()
    def confine(self, max_norm: float) -> None:
        for leaf in self.leaves:
            leaf.mul_((max_norm / leaf.norm()).clamp(max=1.0).nan_to_num(1.0))

    @torch.no_grad()
    def slide(self, max_norm: float) -> None:
        for leaf in self.leaves:
            if leaf.grad is not None:
                out = -(leaf.grad * leaf).sum()
                held = (out > 0) & (leaf.norm() >= max_norm * (1 - 1e-6))
                leaf.grad += torch.where(held, out / leaf.square().sum().clamp(min=1e-30), 0.0) * leaf

    def result(self, *, concept: str | None, metadata: Mapping[str, str]) -> SteeringVector:
        directions = {site: rows.detach()[0].to(self._like[site].dtype) for site, rows in self._rows.items()}
        return SteeringVector(directions, concept=concept, metadata=metadata)


@final
class TrainedLowRank:
    """ReFT's h + Rᵀ(W h + b - R h) at every site, with orthonormal rows of R; it starts where it changes nothing.

    Moves A = W - R, b, and a matrix whose orthonormal factor is R.
    """

    def __init__(self, like: SteeringVector, rank: int, generator: torch.Generator | None) -> None:
        self._like = like
        self._sites: dict[str, _Moving] = {}
        for site in like:
            direction = like[site]
            kind = torch.promote_types(direction.dtype, torch.float32)
            start = torch.randn(min(rank, len(direction)), len(direction), generator=generator).to(
                direction.device, kind
            )
            self._sites[site] = _Moving(torch.zeros_like(start), start, start.new_zeros(len(start)))
        self.leaves = [leaf for own in self._sites.values() for leaf in (own.reads, own.basis, own.offsets)]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def at(self, site: str) -> Intervention:
        """The edit of one site, as it moves."""
        return self._sites[site]

    def penalty(self) -> Tensor:
        return torch.stack(
            [own.reads.square().sum() + own.offsets.square().sum() for own in self._sites.values()]
        ).sum()

    def confine(self, max_norm: float) -> None:
        raise ValueError("max_norm: what a low-rank edit adds depends on the activation; limit it by l2=")

    def slide(self, max_norm: float) -> None:
        self.confine(max_norm)

    @torch.no_grad()
    def result(self, *, concept: str | None, metadata: Mapping[str, str]) -> LowRank:
        kinds = {site: self._like[site].dtype for site in self._sites}
        sites = {
            site: (own.reads.to(kinds[site]), own.adds.to(kinds[site]), own.offsets.to(kinds[site]))
            for site, own in self._sites.items()
        }
        edit = LowRank(sites, concept=concept, metadata=metadata)
        return edit.described(edit.metadata | {"rank": str(edit.rank)})


@final
class _Moving:
    """The edit of one site in the making."""

    def __init__(self, reads: Tensor, basis: Tensor, offsets: Tensor) -> None:
        self.reads, self.basis, self.offsets = reads, basis, offsets

    @property
    def adds(self) -> Float[Tensor, "r d"]:
        """Orthonormal rows."""
        q, r = torch.linalg.qr(self.basis.T)
        rows: Tensor = (q * r.diagonal().sign()).T
        return rows

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        return LowRankAt(self.reads, self.adds, self.offsets)(activation, direction, c)
