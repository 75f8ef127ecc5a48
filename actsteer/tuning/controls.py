"""Controls: directions that mean nothing, which go through the same search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from actsteer.collecting.moments import Moments
from actsteer.collecting.pairs import JOINT, beside
from actsteer.collecting.statistics import Statistics
from actsteer.errors import BatchError, SiteNotFoundError
from actsteer.estimators.estimator import COVARIANCE, Estimator, check_estimator
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector

Side: TypeAlias = Mapping[str, Tensor]
"""Site -> (n, d), as `record` gives it."""
Labelled: TypeAlias = tuple[Side, Side]
"""The rows of the positive side, and those of the negative one."""


def random_banks(bank: VectorBank, drawn: Mapping[str, Tensor], count: int) -> Iterator[VectorBank]:
    """Banks whose directions are drawn like activations, at the norms of those of the bank.

    Args:
        drawn: site -> (count * concepts, d).
    """
    for index in range(count):
        yield VectorBank(
            {
                concept: _like(vector, {site: drawn[site][index * len(bank) + place] for site in vector})
                for place, (concept, vector) in enumerate(bank.items())
            }
        )


def shuffled_banks(
    bank: VectorBank,
    rows: Mapping[str, Labelled],
    estimator: Estimator[Any],
    *,
    count: int,
    generator: torch.Generator,
) -> Iterator[VectorBank]:
    """Banks that the estimator makes of the same rows with their labels shuffled.

    Of pairs the two sides of each are swapped by chance.
    """
    for _ in range(count):
        made = {concept: _refitted(rows[concept], estimator, generator) for concept in bank}
        yield VectorBank(
            {c: SteeringVector({site: made[c][site] for site in v}, metadata=_axes(v)) for c, v in bank.items()}
        )


def check_rows(
    bank: VectorBank, rows: Labelled | Mapping[str, Labelled], estimator: Estimator[Any]
) -> dict[str, Labelled]:
    """Concept -> its rows.

    Raises:
        SiteNotFoundError, BatchError: rows of other sites; sides whose sites have other numbers of rows.
        ValueError: the estimator does not make the vector of them.
    """
    check_estimator(estimator)
    named = dict(rows) if isinstance(rows, Mapping) else dict.fromkeys(bank.concepts, rows)
    if missing := [concept for concept in bank if concept not in named]:
        raise SiteNotFoundError(f"rows: none for {missing}; give {{concept: (positive, negative)}}")
    for concept, vector in bank.items():
        for side, own in zip(("positive", "negative"), named[concept], strict=True):
            if lacking := [site for site in vector if site not in own]:
                raise SiteNotFoundError(
                    f"rows: the {side} side of {concept!r} has none at {lacking}; record them there"
                )
            if len({len(own[site]) for site in vector}) > 1:
                raise BatchError(f"rows: the {side} side of {concept!r} has other numbers of rows at other sites")
        made = _fitted(estimator, *named[concept])
        chosen = SteeringVector({site: made[site] for site in vector})
        if float(vector.to(dtype=torch.float64).cosine(chosen.to(dtype=torch.float64))) < 0.99:
            raise ValueError(
                f"rows: {type(estimator).__name__} makes another vector of them than {concept!r} is; give the rows of "
                "which it was made, and the estimator"
            )
    return named


def _refitted(rows: Labelled, estimator: Estimator[Any], generator: torch.Generator) -> SteeringVector:
    positive, negative = rows
    first, other = (len(next(iter(side.values()))) for side in rows)
    if estimator.reads in ("pairs", "joint"):
        swap = torch.rand(first, generator=generator) < 0.5
        toward = {s: torch.where(swap.to(own.device)[:, None], negative[s], own) for s, own in positive.items()}
        away = {s: torch.where(swap.to(own.device)[:, None], own, negative[s]) for s, own in positive.items()}
        return _fitted(estimator, toward, away)
    order = torch.randperm(first + other, generator=generator)
    both = {site: torch.cat([positive[site], negative[site]])[order.to(positive[site].device)] for site in positive}
    return _fitted(estimator, {s: own[:first] for s, own in both.items()}, {s: own[first:] for s, own in both.items()})


def _fitted(estimator: Estimator[Any], positive: Side, negative: Side) -> SteeringVector:
    if estimator.reads == "rows":
        found = estimator(positive=dict(positive), negative=dict(negative))
    elif estimator.reads == "pairs":
        apart = Statistics({s: Moments.of(positive[s] - negative[s], covariance=True) for s in positive})
        found = estimator(positive=apart, negative=-apart)
    elif estimator.reads == "joint":
        moments = {s: Moments.of(beside(positive[s], negative[s]), covariance=True) for s in positive}
        joint = Statistics(moments, metadata=JOINT)
        found = estimator(positive=joint, negative=joint)
    else:
        toward, away = (
            Statistics({s: Moments.of(own, covariance=COVARIANCE[estimator.reads]) for s, own in side.items()})
            for side in (positive, negative)
        )
        found = estimator(positive=toward, negative=away)
    if not isinstance(found, SteeringVector):
        raise TypeError(f"estimator: expected one that makes a SteeringVector, got {type(found).__name__}")
    return found


def _like(vector: SteeringVector, directions: Mapping[str, Tensor]) -> SteeringVector:
    """These directions, each at the norm, in the dtype and on the device of the vector's."""
    made: dict[str, Tensor] = {}
    for site, own in directions.items():
        meant = vector[site]
        made[site] = (own * (meant.double().norm() / own.norm().clamp(min=1e-300)).to(own)).to(meant)
    return SteeringVector(made, metadata=_axes(vector))


def _axes(vector: SteeringVector) -> dict[str, str]:
    return {key: text for key, text in vector.metadata.items() if key.startswith("axis ")}
