"""Numbers: all that was measured, as the page keeps it, in four digits, and what a colour is relative to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actsteer.looking.meter import Measured
from actsteer.looking.subjects import Runs

_DIGITS, _FULL = 4, 2.0  # a colour is full at twice the median


def document(runs: Sequence[Runs], *, sites: Sequence[str], concepts: Sequence[str]) -> dict[str, Any]:
    """What the page's script reads: for each item the plain run and the steered one, site by site.

    "along" and "gate" are lists [site][concept][token]; None where a concept does not steer at a site or has no gate.
    """
    places = range(len(concepts))
    items = [[_run(seen[site] for site in sites) for seen in both] for both in runs]
    for both in items:
        for run in both:
            for name in ("along", "gate"):
                run[name] = [[own.get(place) for place in places] for own in run[name]]
    alongs = [
        [[part[site].along[place] for pair in runs for part in pair if place in part[site].along] for place in places]
        for site in sites
    ]
    addeds = [[added for _, steered in runs if (added := steered[site].added) is not None] for site in sites]
    scale = {"along": [[_scale(own) for own in each] for each in alongs], "added": [_scale(own) for own in addeds]}
    has_gate = any(own is not None for _, steered in items for each in steered["gate"] for own in each)
    names = {"sites": list(sites), "short": shortened(sites)[1], "concepts": list(concepts)}
    return {**names, "scale": scale, "items": items, "gated": has_gate}


def shortened(sites: Sequence[str]) -> tuple[str, list[str]]:
    """What all names begin with, and the rest of each.

    >>> shortened(["h.1.mlp", "h.2.mlp"]), shortened(["h.1"])
    (('h', ['1.mlp', '2.mlp']), ('', ['h.1']))
    """
    parts = [site.split(".") for site in sites]
    count = 0
    while len(parts) > 1 and all(len(own) > count + 1 and own[count] == parts[0][count] for own in parts):
        count += 1
    return ".".join(parts[0][:count]), [".".join(own[count:]) for own in parts]


def rounded(number: float) -> float | None:
    """A number in four digits; None if it is not finite.

    >>> rounded(1234.56), rounded(0.000123456), rounded(float("nan"))
    (1235.0, 0.0001235, None)
    """
    return float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else None


def median(values: Tensor) -> float | None:
    """The middle one of those that are finite."""
    finite = values[values.isfinite()]
    return rounded(float(finite.median())) if len(finite) else None


def _run(seen: Any) -> dict[str, Any]:
    each: list[Measured] = list(seen)
    return {
        "along": [{place: _listed(own) for place, own in site.along.items()} for site in each],
        "added": [None if site.added is None else _listed(site.added) for site in each],
        "gate": [{place: _listed(own) for place, own in site.gates.items()} for site in each],
    }


def _listed(values: Tensor) -> list[float | int | None]:
    found = map(rounded, values.tolist())
    return [int(own) if own is not None and own == int(own) else own for own in found]  # 3 is shorter than 3.0


def _scale(parts: Sequence[Tensor]) -> float | None:
    """Twice the median size, which a few outliers, as the first token is one, do not move; else the largest."""
    sizes = torch.cat(list(parts)).abs() if parts else torch.zeros(0)
    sizes = sizes[sizes.isfinite()]
    if not len(sizes) or not sizes.max():
        return None
    return rounded(float(_FULL * sizes.median() or sizes.max()))
