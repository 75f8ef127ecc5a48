"""Calibrated: what the page needs of a calibration, whoever made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from actsteer.steering.steering import Steering


@runtime_checkable
class Calibrated(Protocol):
    """Points that were measured, and the steering that was chosen among them."""

    @property
    def table(self) -> Sequence[Mapping[str, Any]]:
        """One row for each point: "sites" (names), "dose" (in typical norms), "c", "effect", "cost" (KL in nats) and
        "feasible"."""
        ...

    @property
    def best(self) -> Steering:
        """The steering at the best of them."""
        ...


def points_of(calibration: Calibrated) -> list[dict[str, Any]]:
    """Its points, each with "best": whether it is the chosen one, of its strength and at its sites."""
    best = calibration.best
    sites = best.sites if isinstance(best.sites, tuple) else best.vectors.sites
    chosen = best.c if isinstance(best.c, int | float) else None
    return [{**row, "best": row["c"] == chosen and set(row["sites"]) == set(sites)} for row in calibration.table]
