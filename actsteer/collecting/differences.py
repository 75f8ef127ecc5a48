"""Differences: the statistics of what distinguishes two inputs of a pair, pair by pair."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.collect import described_axes
from actsteer.collecting.moments import Covariance, Moments
from actsteer.collecting.observe import Observation
from actsteer.collecting.positions import Positions, described
from actsteer.collecting.statistics import Statistics
from actsteer.errors import BatchError
from actsteer.sites import fingerprint
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites, find_sites


def collect_differences(
    model: nn.Module,
    positive: Batches,
    negative: Batches,
    *,
    sites: Sites,
    covariance: Covariance = True,
    positions: Positions = "all",
    axis: Axes | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> Statistics:
    """The statistics of x₊ - x₋ over pairs of rows: the first of `positive` with the first of `negative`, and so on.

    Args: as for `collect`; both sides have the same number of batches, and each two of them as many rows.

    Raises:
        BatchError: the sides do not pair up; else as `collect`.

    >>> model = nn.Sequential(nn.Identity())
    >>> collect_differences(model, torch.ones(4, 2), torch.zeros(4, 2), sites="0")["0"].mean
    tensor([1., 1.], dtype=torch.float64)
    """
    names = find_sites(model, sites)
    rows: dict[str, list[torch.Tensor]] = {}
    rows_of: dict[str, list[torch.Tensor]] = {}

    def keep(site: str, seen: torch.Tensor, owners: torch.Tensor) -> None:
        rows.setdefault(site, []).append(seen.double())
        rows_of.setdefault(site, []).append(owners.cpu())

    observation = Observation(model, names, keep, axis=axis, positions=positions)
    sums: dict[str, Moments] = {}
    missing: Any = object()
    sides = (
        iterate(positive, batch_size=batch_size, progress=progress, label="collect pairs"),
        iterate(negative, batch_size=batch_size, progress=False, label=""),
    )
    for toward, away in zip_longest(*sides, fillvalue=missing):
        if toward is missing or away is missing:
            raise BatchError("one side has more batches than the other; give every positive row its negative one")
        seen: list[dict[str, torch.Tensor]] = []
        owners: list[dict[str, torch.Tensor]] = []
        for batch in (toward, away):
            rows.clear()
            rows_of.clear()
            observation.run([batch])
            seen.append({site: torch.cat(parts) for site, parts in rows.items()})
            owners.append({site: torch.cat(parts) for site, parts in rows_of.items()})
        for site in names:
            one, other = seen[0][site], seen[1][site]
            if one.shape != other.shape or not torch.equal(owners[0][site], owners[1][site]):
                raise BatchError(
                    f"site {site!r}: {len(one)} activations on the positive side and {len(other)} on the negative one, "
                    "not the same number from each row; pair them up, with positions='last' or 'mean' if the "
                    "sequences differ in length"
                )
            if site not in sums:
                sums[site] = Moments.empty(one.shape[1], covariance=covariance, device=one.device)
            sums[site].update(one - other)
    metadata = fingerprint.described(model) | described(positions) | described_axes(observation.axes, axis)
    return Statistics({site: sums[site] for site in names}, metadata=metadata)
