"""In training: what gradient descent moves, a direction at every site or a low-rank edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError
from actsteer.steering.interventions.intervention import Intervention
from actsteer.steering.interventions.low_rank import LowRank, LowRankAt
from actsteer.steering.steerer import Steerer
from actsteer.vectors.vector import SteeringVector


class InTraining(Protocol):
    """A vector or an edit whose numbers are leaf tensors, in float32 at least."""

    leaves: list[Tensor]

    def penalty(self) -> Tensor:
        """The squared norm of the directions; of an edit, of A and b."""
        ...

    def result(self, metadata: Mapping[str, str]) -> SteeringVector | LowRank:
        """The vector or edit as it is now."""
        ...


@final
class VectorInTraining:
    """A direction at every site, those of an attached Steerer."""

    def __init__(self, steerer: Steerer, like: SteeringVector) -> None:
        self._like = like
        self._rows = steerer.requires_grad_()  # one row each
        self.leaves = list(self._rows.values())

    def penalty(self) -> Tensor:
        return torch.stack([leaf.square().sum() for leaf in self.leaves]).sum()

    def result(self, metadata: Mapping[str, str]) -> SteeringVector:
        directions = {site: rows.detach()[0].to(self._like[site].dtype) for site, rows in self._rows.items()}
        return SteeringVector(directions, metadata=metadata)


@final
class Ball:
    """Keeps directions inside the ball of a radius, site by site, by projected gradient descent."""

    def __init__(self, leaves: Sequence[Tensor], radius: float) -> None:
        self._leaves, self._radius = leaves, radius
        self.confine()

    @torch.no_grad()
    def confine(self) -> None:
        """Scale what is longer down to the radius."""
        for leaf in self._leaves:
            leaf.mul_((self._radius / leaf.norm()).clamp(max=1.0).nan_to_num(1.0))

    @torch.no_grad()
    def slide(self) -> None:
        """Take out of the gradients what points out of the ball, where the direction lies on its surface."""
        for leaf in self._leaves:
            if leaf.grad is not None:
                out = -(leaf.grad * leaf).sum()
                held = (out > 0) & (leaf.norm() >= self._radius * (1 - 1e-6))
                leaf.grad += torch.where(held, out / leaf.square().sum().clamp(min=1e-30), 0.0) * leaf


@final
class LowRankInTraining:
    """ReFT's h + Rᵀ(W h + b - R h) at every site, with orthonormal rows of R.

    Moves A = W - R, b, and a matrix whose orthonormal factor is R. A site that the edit has starts as the edit is
    there, h + Uᵀ(A h + b) with Uᵀ = Q T: R = Qᵀ, and T A and T b. Another starts where it changes nothing.
    """

    def __init__(self, edit: LowRank, like: SteeringVector, generator: torch.Generator | None) -> None:
        self._like = like
        self._sites: dict[str, _Moving] = {}
        for site in like:
            direction = like[site]
            kind = torch.promote_types(direction.dtype, torch.float32)
            if site in edit.sites:
                reads, adds, offsets = (part.to(direction.device, kind) for part in edit[site])
                if reads.shape[1] != len(direction):
                    raise ShapeError(
                        f"site {site!r}: the activation has {len(direction)} features, the edit {reads.shape[1]}; was "
                        "it trained on another model?"
                    )
                q, t = torch.linalg.qr(adds.T)
                self._sites[site] = _Moving(t @ reads, q.T.contiguous(), t @ offsets)
            else:
                size = (min(edit.rank, len(direction)), len(direction))
                start = torch.randn(size, generator=generator).to(direction.device, kind)
                self._sites[site] = _Moving(torch.zeros_like(start), start, start.new_zeros(len(start)))
        self.leaves = [leaf for moving in self._sites.values() for leaf in (moving.reads, moving.basis, moving.offsets)]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def at(self, site: str) -> Intervention:
        """The edit of one site, as it moves."""
        return self._sites[site]

    def penalty(self) -> Tensor:
        parts = [moving.reads.square().sum() + moving.offsets.square().sum() for moving in self._sites.values()]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def result(self, metadata: Mapping[str, str]) -> LowRank:
        sites: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for site, moving in self._sites.items():
            kind = self._like[site].dtype
            sites[site] = (moving.reads.to(kind), moving.adds.to(kind), moving.offsets.to(kind))
        edit = LowRank(sites, metadata=metadata)
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
