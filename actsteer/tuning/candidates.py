"""Candidates: at which sites, how and where a steering may act, and in which units its strength is searched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from torch import nn

from actsteer.errors import ZeroDirectionError
from actsteer.steering.interventions.add import Add
from actsteer.steering.interventions.intervention import Intervention, PerSite, Placed
from actsteer.steering.interventions.keep_norm import KeepNorm
from actsteer.steering.plan import interventions_of
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import AllPositions, Steering
from actsteer.tokens.positions import Positions, are_of_rows
from actsteer.vectors.bank import VectorBank

DOSES = tuple(0.05 * 2.0**power for power in range(7))
"""Of what is added: in units of the activation's typical norm."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of any other intervention: c itself, of which 1 is the whole edit."""


@final
@dataclass(frozen=True)
class Candidate:
    """One place and way to steer.

    Args:
        number: of the steering, among those that are tried.
        steering: what it does, but for the strength.
        sites: where.
        unit: how many units a strength of 1 is.
        doses: the coarse strengths, in units.
    """

    number: int
    steering: Steering
    sites: tuple[str, ...]
    unit: float
    doses: tuple[float, ...]

    @property
    def name(self) -> str:
        """What tells it from others of the same vectors."""
        return f"{self.number} {' '.join(self.sites)}"

    @property
    def is_of_a_batch(self) -> bool:
        """Whether it has something for each row of one batch: masks, indices, or values of single tokens."""
        given, bank = self.steering.positions, self.steering.vectors
        every = interventions_of(bank, self.steering.intervention)
        found = (
            own.at(site) if isinstance(own, PerSite) else own
            for own, (_, vector) in zip(every, bank.items(), strict=True)
            for site in self.sites
            if site in vector
        )
        at = given.values() if isinstance(given, Mapping) else [given]
        return any(map(are_of_rows, at)) or any(isinstance(own, Placed) for own in found)

    @property
    def steers_alike_on_texts(self) -> bool:
        """Whether `on_texts` makes no difference."""
        return as_read(self.steering.positions) is self.steering.positions

    def c(self, dose: float) -> float:
        """The raw strength of a Steerer."""
        return dose / self.unit

    def steerer(self, model: nn.Module, where: Mapping[str, Any], *, on_texts: bool = False) -> Steerer:
        """What steers the model so.

        Args:
            on_texts: for text that is there already: what is steered as it is generated is every token but the first.
        """
        steering = replace(self.steering, positions=as_read(self.steering.positions)) if on_texts else self.steering
        return Steerer(model, steering, c=0.0, sites=list(self.sites), **where)


def settings(
    steering: Steering,
    *,
    interventions: Sequence[Intervention | PerSite] | None,
    positions: Sequence[Positions] | None,
) -> list[Steering]:
    """The steering in each way that is asked for."""
    found = [steering]
    if interventions is not None:
        found = [replace(own, intervention=one) for own in found for one in interventions]
    if positions is not None:
        found = [replace(own, positions=one) for own in found for one in positions]
    return found


def candidate(
    number: int,
    steering: Steering,
    sites: Sequence[str],
    *,
    units: VectorBank,
    norms: Mapping[str, float],
    doses: Sequence[float] | None,
) -> Candidate:
    """The candidate at these sites.

    What is added is searched in units of the typical ‖h‖: at c = 1 it moves the activations by
    unit = sqrt(mean over sites and concepts of (‖v‖ / ‖h‖)²), with v of `units`: those that are calibrated, of which
    controls have the same strengths. Any other intervention is searched in c itself.
    """
    if not all(map(adds, interventions_of(steering.vectors, steering.intervention))):
        return Candidate(number, steering, tuple(sites), 1.0, tuple(SHARES if doses is None else doses))
    ratios = [
        float(vector[site].double().norm()) / norms[site]
        for _, vector in units.items()
        for site in sites
        if site in vector and norms[site] > 0
    ]
    unit = math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios)) if ratios else 0.0
    if not unit > 0:
        raise ZeroDirectionError(
            f"sites {list(sites)}: the vectors are zero there, or the activations are; leave them out"
        )
    return Candidate(number, steering, tuple(sites), unit, tuple(DOSES if doses is None else doses))


def adds(intervention: Any) -> bool:
    """Whether it adds c · v, in the activation's units."""
    if isinstance(intervention, KeepNorm):
        return adds(intervention.intervention)
    return isinstance(intervention, Add) and not intervention.relative


def grown(sites: Sequence[str], best: str) -> Iterator[tuple[str, ...]]:
    """Groups of 2, 4, 8 ... neighbours around the best site, and then all.

    >>> [*grown("abcdef", "e")]
    [('d', 'e'), ('c', 'd', 'e', 'f'), ('a', 'b', 'c', 'd', 'e', 'f')]
    """
    place, size = list(sites).index(best), 2
    while size < len(sites):
        start = min(max(0, place - size // 2), len(sites) - size)
        yield tuple(sites[start : start + size])
        size *= 2
    if len(sites) > 1:
        yield tuple(sites)


def as_read(positions: AllPositions | None) -> AllPositions | None:
    """Positions in a text that is there already: what would be generated is all but the first token."""
    if isinstance(positions, Mapping):
        if not any(map(_is_generated, positions.values())):
            return positions
        return {concept: slice(1, None) if _is_generated(own) else own for concept, own in positions.items()}
    return slice(1, None) if _is_generated(positions) else positions


def _is_generated(positions: Positions | None) -> bool:
    return isinstance(positions, str) and positions == "generated"
