"""Search: coarse strengths first, then a golden section where the best of them lie, within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

from actsteer.steering.steering import Steering
from actsteer.tuning.candidates import Candidate, candidate, grown
from actsteer.tuning.metrics import Figures
from actsteer.vectors.bank import VectorBank

_GOLDEN = (math.sqrt(5) - 1) / 2


@final
@dataclass(frozen=True)
class Point:
    """One candidate at one strength, and what was measured there.

    Args:
        effect: of the half by which it is chosen; minus infinity where it was not measured, over the budget.
        cost: the largest share of a bound that is used up, of the same half: at most 1 within the budget.
        figures: what the metrics gave, and under "kl" what was lost.
    """

    candidate: Candidate
    dose: float
    effect: float
    cost: float
    figures: Figures

    @property
    def feasible(self) -> bool:
        """Whether it is within the budget."""
        return self.cost <= 1.0

    @property
    def rank(self) -> tuple[bool, float, float]:
        """The better point has the higher one: within the budget, the larger effect, the lower cost."""
        return (True, self.effect, -self.cost) if self.feasible else (False, -self.cost, 0.0)


Measure: TypeAlias = Callable[[Candidate, Sequence[float]], list[Point]]
"""A candidate at several strengths, measured."""


def search(
    steerings: Sequence[Steering],
    measure: Measure,
    *,
    sites: Sequence[str],
    groups: Sequence[Sequence[str]] | None,
    units: VectorBank,
    norms: Mapping[str, float],
    doses: Sequence[float] | None,
    refine: int,
    steps: int,
) -> list[Point]:
    """Every point that was measured: each group of sites at the coarse strengths, and the best ones between them.

    Without groups: each site; then groups of 2, 4, 8 ... neighbours around the best one; then all.
    """
    points: list[Point] = []
    for number, steering in enumerate(steerings):

        def coarse(group: Sequence[str], number: int = number, steering: Steering = steering) -> list[Point]:
            own = candidate(number, steering, group, units=units, norms=norms, doses=doses)
            return measure(own, own.doses)

        singles = [point for group in groups or [[site] for site in sites] for point in coarse(group)]
        points += singles
        if groups is None:
            best = max(singles, key=lambda point: point.rank).candidate.sites[0]
            points += [point for group in grown(sites, best) for point in coarse(group)]
    best_of: dict[int, Point] = {}
    for point in sorted(points, key=lambda point: point.rank, reverse=True):
        best_of.setdefault(id(point.candidate), point)
    for point in [*best_of.values()][:refine]:
        if point.feasible:
            points += _refined(point, measure, steps)
    return points


def _refined(start: Point, measure: Measure, steps: int) -> list[Point]:
    """A golden section between the strengths that are next to the best of the coarse ones (Kiefer 1953).

    A strength over the budget is worse than any within it, so that the section ends on the feasible side.
    """
    sign = math.copysign(1.0, start.dose)
    sizes = sorted({0.0, *(abs(own) for own in start.candidate.doses if own * sign > 0)})
    place = sizes.index(abs(start.dose))
    low, high = sizes[max(0, place - 1)], sizes[min(place + 1, len(sizes) - 1)]
    if high <= low:
        return []

    def at(size: float) -> Point:
        return measure(start.candidate, [sign * size])[0]

    left, right = at(high - _GOLDEN * (high - low)), at(low + _GOLDEN * (high - low))
    found = [left, right]
    for _ in range(max(0, steps - 2)):
        if left.rank >= right.rank:
            high, right = abs(right.dose), left
            left = at(high - _GOLDEN * (high - low))
            found.append(left)
        else:
            low, left = abs(left.dose), right
            right = at(low + _GOLDEN * (high - low))
            found.append(right)
    return found
