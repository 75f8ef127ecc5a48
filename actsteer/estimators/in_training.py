"""In training: what gradient descent moves, a direction at every site or a low-rank edit, and perhaps its gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError
from actsteer.steering.gates.at_sites import AtSites
from actsteer.steering.gates.gate import AnyGate, Gate
from actsteer.steering.gates.probe_above import ProbeAbove
from actsteer.steering.gates.soft import Soft
from actsteer.steering.interventions.intervention import Intervention
from actsteer.steering.interventions.low_rank import LowRank, LowRankAt
from actsteer.steering.plan import gates_of
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import Steering
from actsteer.tokens.positions import Positions
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.described import with_offsets
from actsteer.vectors.vector import SteeringVector


@runtime_checkable
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


@final
class SteeringInTraining:
    """A steering by one vector or edit, with the soft gate that decides how much of it there is.

    Raises:
        TypeError: several concepts, another intervention than a LowRank, sites, or a gate that cannot be trained.
    """

    def __init__(self, steering: Steering) -> None:
        edit = steering.intervention
        if len(steering.vectors) != 1 or not isinstance(edit, LowRank | None) or steering.sites is not None:
            raise TypeError(
                "train: expected a Steering by one vector, which is added, or by one LowRank, with sites= left to "
                f"optimize, got {steering!r}"
            )
        ((self._concept, vector),) = steering.vectors.items()
        self.starts: SteeringVector | LowRank = vector if edit is None else edit
        self._steering = steering
        self._given = gates_of(steering.vectors, steering.gate).get(self._concept)
        given = self._given
        each = [given.at(site) for site in given.sites] if isinstance(given, AtSites) else [given]
        self._softs = {id(own): _SoftInTraining(own) for own in each if own is not None}
        self._inner: InTraining

    def options(
        self, *, gate: AnyGate | None, positions: Positions | None, concept: str | None
    ) -> tuple[AnyGate | None, Positions | None]:
        """The gate and the positions to steer with.

        Raises:
            TypeError: they are given here too.
        """
        if any(given is not None for given in (gate, positions, concept)):
            raise TypeError("gate, positions and concept: the Steering that is trained has them; leave them out")
        chosen = self._steering.positions
        return self._gate(self._softs), chosen.get(self._concept) if isinstance(chosen, Mapping) else chosen

    @property
    def c(self) -> float:
        """The strength to steer with.

        Raises:
            TypeError: it is not one number.
        """
        if not isinstance(self._steering.c, int | float):
            raise TypeError(f"c: expected a Steering with one number to train at, got {self._steering.c!r}; give c=")
        return self._steering.c

    def around(self, inner: InTraining) -> SteeringInTraining:
        """Itself, with the vector or edit whose numbers move too."""
        self._inner = inner
        self.leaves = inner.leaves + [leaf for own in self._softs.values() for leaf in own.leaves]
        return self

    def penalty(self) -> Tensor:
        """That of the vector or edit."""
        return self._inner.penalty()

    def result(self, metadata: Mapping[str, str]) -> Steering:
        """The steering as it is now."""
        found, softs = self._inner.result(metadata), {key: own.result(metadata) for key, own in self._softs.items()}
        vectors: Any = found if isinstance(found, LowRank) else VectorBank({self._concept: found})
        return replace(self._steering, vectors=vectors, intervention=None, gate=self._gate(softs))

    def _gate(self, instead: Mapping[int, Gate]) -> AnyGate | None:
        """The steering's gate, with these in the places of the soft ones."""
        given = self._given
        if isinstance(given, AtSites):
            return AtSites({site: instead[id(given.at(site))] for site in given.sites})
        return None if given is None else instead[id(given)]


@final
class _SoftInTraining:
    """The weight σ(h · w + b), whose numbers move."""

    def __init__(self, gate: Any) -> None:
        if not isinstance(gate, Soft) or not isinstance(probe := gate.gate, ProbeAbove):
            raise TypeError(
                "train: expected the gate AtSites.soft(w), Soft(ProbeAbove(w)) or AtSites of such, got one with "
                f"{gate!r}; a gate that is not to be trained goes into gate= of optimize, with train=vector"
            )
        self.site, self.per, self.metadata = gate.site, gate.per, probe.metadata
        weights = probe.direction
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32)) / gate.width
        self.leaves = [weights.requires_grad_(), weights.new_tensor((probe.offset - probe.threshold) / gate.width)]
        self.leaves[1].requires_grad_()

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        weights, offset = (leaf.to(rows) for leaf in self.leaves)
        return torch.sigmoid(rows @ weights + offset)

    @torch.no_grad()
    def result(self, metadata: Mapping[str, str]) -> Soft:
        """The gate as it is now."""
        known = with_offsets(self.metadata | dict(metadata), {self.site: float(self.leaves[1])})
        vector = SteeringVector({self.site: self.leaves[0]}, metadata=known)
        return Soft(ProbeAbove(vector, per=self.per))
