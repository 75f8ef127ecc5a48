"""Threshold: where the scores of two sides are best told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.statistics import Statistics
from actsteer.errors import SiteNotFoundError, StatisticsError, close_names
from actsteer.steering.gates.gate import ScoredGate

Evidence: TypeAlias = Statistics | Mapping[str, Tensor] | Tensor
"""What a threshold is chosen from: statistics, recorded activations (site -> (n, d)), or scores (n,)."""


def best_split(gate: ScoredGate, *, positive: Evidence, negative: Evidence) -> float:
    """The midpoint between the two neighbouring scores at which the balanced accuracy is largest.

    Raises:
        StatisticsError: no threshold tells the sides apart, or a side is empty.
    """
    threshold, accuracy = split(*(_scores(gate, side) for side in (positive, negative)))
    if accuracy <= 0.5:
        raise StatisticsError("no threshold separates the positive side from the negative; is the sign reversed?")
    return threshold


def split(high: Float[Tensor, " n"], low: Float[Tensor, " m"]) -> tuple[float, float]:
    """The threshold, midway between neighbouring scores, at which the balanced accuracy is largest; and that accuracy.

    >>> split(torch.tensor([2.0, 3.0, 4.0, 0.0]), torch.tensor([0.0, 1.0, -1.0, -2.0]))
    (1.5, 0.875)
    """
    values = torch.unique(torch.cat([high, low]))
    above = 1 - torch.searchsorted(high.sort().values, values, right=True) / len(high)
    below = torch.searchsorted(low.sort().values, values, right=True) / len(low)
    best = int((above + below).argmax())
    threshold = float(values[best] + values[min(best + 1, len(values) - 1)]) / 2
    return threshold, float(above[best] + below[best]) / 2


def _scores(gate: ScoredGate, evidence: Evidence) -> Tensor:
    if isinstance(evidence, Statistics):
        raise StatisticsError(
            f"gate at site {gate.site!r}: expected recorded activations, or scores, of both sides; for "
            "ProjectionAbove, both sides as statistics, or neither"
        )
    if isinstance(evidence, Mapping):
        if gate.site not in evidence:
            raise SiteNotFoundError(f"nothing recorded at site {gate.site!r}. {close_names(gate.site, evidence)}")
        evidence = gate.score(evidence[gate.site])
    if evidence.ndim != 1 or len(evidence) == 0:
        raise StatisticsError(f"expected scores of shape (n,) with n >= 1, got shape {tuple(evidence.shape)}")
    return evidence.detach().double()
