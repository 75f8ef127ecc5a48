"""Controls: what directions are compared with, others as long as they that mean nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from actsteer import SteeringVector, VectorBank


def beside(bank: VectorBank, shuffled: VectorBank, *, seed: int = 0) -> dict[str, VectorBank]:
    """Random directions, and those of shuffled labels, at every site as long as the bank's."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "random": VectorBank({concept: as_long_as(_random(v, generator), v) for concept, v in bank.items()}),
        "shuffled": VectorBank({concept: as_long_as(shuffled[concept], v) for concept, v in bank.items()}),
    }


def dealt(positive: Tensor, negative: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Both sides shuffled together and dealt again: labels that mean nothing."""
    both = torch.cat([positive, negative])
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))
    return both[order[: len(positive)]], both[order[len(positive) :]]


def _random(v: SteeringVector, generator: torch.Generator) -> SteeringVector:
    return SteeringVector(
        {site: torch.randn(len(v[site]), generator=generator) for site in v.sites}, metadata=v.metadata
    )


def as_long_as(w: SteeringVector, v: SteeringVector) -> SteeringVector:
    """The directions of w, at every site as long as those of v."""
    unit = w.unit()
    return SteeringVector({site: unit[site] * v[site].norm() for site in v.sites}, metadata=w.metadata)
