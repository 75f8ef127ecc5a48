"""Pairs: what two models make of the same inputs, and what one model makes of the two inputs of a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.collect import described_axes
from actsteer.collecting.moments import Covariance, Moments, absorb, exact
from actsteer.collecting.observe import Observation, Step
from actsteer.collecting.processes import announced, in_step
from actsteer.collecting.statistics import Statistics
from actsteer.errors import BatchError, ShapeError, StatisticsError
from actsteer.sites import fingerprint
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites, find_sites
from actsteer.sites.shards import is_alone, replicas
from actsteer.tokens.positions import Positions, described
from actsteer.tokens.whose import Masks

JOINT = {"pairs": "side by side"}
"""What the metadata of joint statistics say, so that no others are taken for them."""


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
    stop: bool = True,
    progress: bool = True,
) -> dict[tuple[str, str], CrossMoments]:
    """What two models make of the same inputs: (site of A, site of B) -> cross moments, in one pass.

    Args:
        sites: site of A -> site of B.
        batches, positions, stop: as for `collect`; both models are given the same batches.

    Raises:
        BatchError: the models give different numbers of rows; else as `collect`.

    >>> model = nn.Sequential(nn.Identity())
    >>> collect_pairs(model, model, torch.randn(4, 2), sites={"0": "0"})["0", "0"].count
    4
    """
    for site in sites:
        find_sites(model_a, site), find_sites(model_b, sites[site])
    one = Observation(model_a, sites, axis=axis_a, positions=positions, stop=stop)
    other = Observation(model_b, dict.fromkeys(sites.values()), axis=axis_b, positions=positions, stop=stop)
    made: dict[tuple[str, str], CrossMoments] = {}

    def steps() -> Iterator[Step]:
        for batch in iterate(batches, batch_size=batch_size, progress=progress, label="collect pairs"):
            seen, facing = _Seen(), _Seen()
            yield Step(batch, seen.keep)
            other.run([Step(batch, facing.keep)])
            for site, opposite in sites.items():
                a, b = seen.rows(site), facing.rows(opposite)
                if len(a) != len(b):
                    raise BatchError(
                        f"site {site!r} gives {len(a)} rows, {opposite!r} {len(b)}; choose sites that pair up"
                    )
                if (site, opposite) not in made:
                    made[site, opposite] = CrossMoments(a.shape[1], b.shape[1], device=a.device)
                made[site, opposite].update(a, b)

    one.run(steps())
    return made


def collect_differences(
    model: nn.Module,
    positive: Batches,
    negative: Batches,
    *,
    sites: Sites,
    covariance: Covariance = True,
    positions: Positions = "all",
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    batch_size: int = 256,
    stop: bool = True,
    progress: bool = True,
) -> Statistics:
    """The statistics of x₊ - x₋ over pairs of rows: the first of `positive` with the first of `negative`, and so on.

    The arguments are those of `collect`; both sides have the same number of batches, and each two of them as many rows.

    Raises:
        BatchError: the sides do not pair up; else as `collect`.

    >>> model = nn.Sequential(nn.Identity())
    >>> collect_differences(model, torch.ones(4, 2), torch.zeros(4, 2), sites="0")["0"].mean
    tensor([1., 1.], dtype=torch.float64)
    """
    where: dict[str, Any] = {"axis": axis, "row_axis": row_axis, "token_axis": token_axis, "mask": mask}
    observation = Observation(model, find_sites(model, sites), **where, positions=positions, stop=stop)
    pairs = paired(positive, negative, batch_size=batch_size, progress=progress)
    moments = _collected(observation, pairs, _difference, covariance=covariance)
    metadata = fingerprint.described(model) | described(positions) | described_axes(observation.axes, axis)
    return Statistics(moments, metadata=metadata, replicas=replicas(model))


def collect_joint(
    model: nn.Module,
    positive: Batches,
    negative: Batches,
    *,
    sites: Sites,
    positions: Positions = "all",
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    batch_size: int = 256,
    stop: bool = True,
    progress: bool = True,
) -> Statistics:
    """The statistics, with covariance, of (x₊, x₋) side by side over pairs of rows: 2d features at a site of d.

    Their covariance has that of each side and, off the diagonal, the one across. They merge, travel and are saved as
    any others.

    The arguments are those of `collect_differences`. The positions are those of each side's own texts, which may differ
    in length, as with a prompt and without one, as long as they choose as many tokens of both.

    Raises:
        BatchError: the sides do not pair up; else as `collect`.

    >>> model = nn.Sequential(nn.Identity())
    >>> collect_joint(model, torch.ones(4, 2), torch.zeros(4, 2), sites="0")["0"].mean
    tensor([1., 1., 0., 0.], dtype=torch.float64)
    """
    where: dict[str, Any] = {"axis": axis, "row_axis": row_axis, "token_axis": token_axis, "mask": mask}
    observation = Observation(model, find_sites(model, sites), **where, positions=positions, stop=stop)
    pairs = paired(positive, negative, batch_size=batch_size, progress=progress)
    moments = _collected(observation, pairs, beside, covariance=True)
    metadata = fingerprint.described(model) | described(positions) | described_axes(observation.axes, axis)
    return Statistics(moments, metadata=metadata | JOINT, replicas=replicas(model))


def beside(positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"]) -> Float[Tensor, "n twice"]:
    """Both rows of each pair as one."""
    return torch.cat([positive, negative], dim=1)


def _difference(positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Of both rows of each pair, in float64."""
    return exact(positive) - exact(negative)


def paired(
    positive: Batches, negative: Batches, *, batch_size: int, progress: bool = False
) -> Iterator[tuple[Any, Any]]:
    """Each batch of one side with that of the other.

    Raises:
        BatchError: one side has more.
    """
    missing: Any = object()
    options: dict[str, Any] = {"batch_size": batch_size, "may_be_empty": not is_alone()}  # a share of nothing
    sides = (
        iterate(positive, progress=progress, label="collect pairs", **options),
        iterate(negative, progress=False, label="", **options),
    )
    for toward, away in zip_longest(*sides, fillvalue=missing):
        if toward is missing or away is missing:
            raise BatchError("one side has more batches than the other; give every positive row its negative one")
        yield toward, away


def _collected(
    observation: Observation,
    pairs: Iterable[tuple[Any, Any]],
    combine: Callable[[Tensor, Tensor], Tensor],
    *,
    covariance: Covariance,
) -> dict[str, Moments]:
    """The moments of what `combine` makes of the rows of both sides."""
    sums: dict[str, Moments] = {}

    def steps() -> Iterator[Step]:
        for toward, away in in_step(pairs, observation.model):
            one, other = _Seen(), _Seen()
            yield Step(toward, one.keep)
            yield Step(away, other.keep)
            for site in observation.sites:
                absorb(sums, site, combine(*_facing(site, one, other)), covariance=covariance)

    with announced():
        observation.run(steps())
    nothing = Moments.empty(0, covariance=covariance)
    return {site: sums.get(site, nothing) for site in observation.sites}


def differences(observation: Observation, toward: Any, away: Any) -> dict[str, Float[Tensor, "n d"]]:
    """Site -> the rows of one batch less those of another, in float64.

    Raises:
        BatchError: they do not pair up.
    """
    one, other = _Seen(), _Seen()
    observation.run([Step(toward, one.keep), Step(away, other.keep)])
    return {site: _difference(*_facing(site, one, other)) for site in observation.sites}


def _facing(site: str, one: _Seen, other: _Seen) -> tuple[Tensor, Tensor]:
    """The rows of both sides."""
    rows, facing = one.rows(site), other.rows(site)
    if rows.shape != facing.shape or not torch.equal(one.owners(site), other.owners(site)):
        raise BatchError(
            f"site {site!r}: {len(rows)} activations on the positive side and {len(facing)} on the negative one, "
            "not the same number from each row; pair them up, with positions='last', 'mean' or slice(-n, None) if the "
            "sequences differ in length"
        )
    return rows, facing


@final
class _Seen:
    """What is seen in one forward pass, site by site, and of which row of the batch each activation is."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(self, site: str, rows: Tensor, owners: Tensor) -> None:
        """Take in rows of a site."""
        self._parts.setdefault(site, []).append((rows.clone(), owners.cpu()))

    def rows(self, site: str) -> Tensor:
        """All rows of a site, in the order in which they were seen; BatchError where there are none."""
        if site not in self._parts:
            raise BatchError(f"site {site!r} saw no rows of a batch; does it run, and do the positions choose a token?")
        return torch.cat([rows for rows, _ in self._parts[site]])

    def owners(self, site: str) -> Tensor:
        """For each of them the row of the batch."""
        return torch.cat([owners for _, owners in self._parts[site]])
