"""Cross: how the activations of two models vary together on the same inputs, in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.observe import Observation
from actsteer.collecting.positions import Positions
from actsteer.errors import BatchError, ShapeError, StatisticsError
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import find_sites


@final
class CrossMoments:
    """Count, both means, and Σ (a - μ_a)(b - μ_b)ᵀ over pairs of rows a and b, in float64; updated block by block.

    >>> cross = CrossMoments(1, 1)
    >>> cross.update(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [4.0]])).covariance
    tensor([[3.]], dtype=torch.float64)
    """

    __slots__ = ("_scatter", "_shift", "_sums", "count")

    def __init__(self, d_a: int, d_b: int, *, device: torch.device | str | None = None) -> None:
        self.count = 0
        self._shift: list[Tensor] = []  # a row of each: what lies far from zero is exact relative to it
        self._sums = [torch.zeros(d, dtype=torch.float64, device=device) for d in (d_a, d_b)]
        self._scatter = torch.zeros(d_a, d_b, dtype=torch.float64, device=device)

    def update(self, rows_a: Float[Tensor, "n d_a"], rows_b: Float[Tensor, "n d_b"]) -> CrossMoments:
        """Take in more pairs of rows, in place; returns itself."""
        if len(rows_a) != len(rows_b) or rows_a.shape[1:] + rows_b.shape[1:] != self._scatter.shape:
            raise ShapeError(
                f"expected as many rows on both sides, of {tuple(self._scatter.shape)} features, got "
                f"{tuple(rows_a.shape)} and {tuple(rows_b.shape)}"
            )
        pair = [rows.detach().to(self._scatter) for rows in (rows_a, rows_b)]
        if not len(rows_a):
            return self
        self._shift = self._shift or [rows[0].clone() for rows in pair]
        pair = [rows - shift for rows, shift in zip(pair, self._shift, strict=True)]
        count, new = self.count + len(rows_a), len(rows_a)
        means = [rows.mean(dim=0) for rows in pair]
        moved = [mean - sums for mean, sums in zip(means, self._sums, strict=True)]  # the sums hold the running means
        centred = [rows - mean for rows, mean in zip(pair, means, strict=True)]
        self._scatter.addmm_(centred[0].T, centred[1]).addr_(moved[0], moved[1], alpha=self.count * new / count)
        self._sums = [sums + delta * (new / count) for sums, delta in zip(self._sums, moved, strict=True)]
        self.count = count
        return self

    @property
    def covariance(self) -> Float[Tensor, "d_a d_b"]:
        """The unbiased cross-covariance; StatisticsError of fewer than two pairs."""
        if self.count < 2:
            raise StatisticsError("the covariance of a single pair is not defined; collect at least two")
        return self._scatter / (self.count - 1)


def collect_pairs(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Batches,
    *,
    sites: Mapping[str, str],
    positions: Positions = "all",
    axis_a: Axes | None = None,
    axis_b: Axes | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[tuple[str, str], CrossMoments]:
    """What two models make of the same inputs: (site of A, site of B) -> cross moments, in one pass.

    Args:
        sites: site of A -> site of B.
        batches, positions: as for `collect`; both models are given the same batches.

    Raises:
        BatchError: the models give different numbers of rows; else as `collect`.

    >>> model = nn.Sequential(nn.Identity())
    >>> collect_pairs(model, model, torch.randn(4, 2), sites={"0": "0"})["0", "0"].count
    4
    """
    for site in sites:
        find_sites(model_a, site), find_sites(model_b, sites[site])
    seen: list[dict[str, list[Tensor]]] = [{}, {}]

    def keeper(index: int) -> Observation:
        def keep(site: str, rows: Tensor, owners: Tensor) -> None:
            seen[index].setdefault(site, []).append(rows.clone())

        model, axis = (model_a, axis_a) if index == 0 else (model_b, axis_b)
        names = list(sites) if index == 0 else list(dict.fromkeys(sites.values()))
        return Observation(model, names, keep, axis=axis, positions=positions)

    observations = [keeper(0), keeper(1)]
    made: dict[tuple[str, str], CrossMoments] = {}
    for batch in iterate(batches, batch_size=batch_size, progress=progress, label="collect pairs"):
        for index, observation in enumerate(observations):
            seen[index].clear()
            observation.run([batch])
        for site, other in sites.items():
            a, b = torch.cat(seen[0][site]), torch.cat(seen[1][other])
            if len(a) != len(b):
                raise BatchError(f"site {site!r} gives {len(a)} rows, {other!r} {len(b)}; choose sites that pair up")
            cross = made.setdefault((site, other), CrossMoments(a.shape[1], b.shape[1], device=a.device))
            cross.update(a, b)
    return made
