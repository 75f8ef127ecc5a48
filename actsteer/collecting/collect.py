"""collect: one pass over the data, keeping sums and not activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, final, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.classes import ClassStatistics, Label
from actsteer.collecting.labels import Labels, labelled
from actsteer.collecting.meeting import announced, is_alone
from actsteer.collecting.moments import Moments
from actsteer.collecting.observe import Observation
from actsteer.collecting.peers import in_step, replicas
from actsteer.collecting.positions import Positions, described
from actsteer.collecting.resume import Checkpoint, code_of, weights
from actsteer.collecting.statistics import Statistics
from actsteer.errors import StatisticsError
from actsteer.sites import fingerprint
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites, find_sites


@overload
def collect(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    covariance: bool = ...,
    by: None = ...,
    positions: Positions = ...,
    axis: Axes | None = ...,
    batch_size: int = ...,
    checkpoint: str | PathLike[str] | None = ...,
    every: int = ...,
    progress: bool = ...,
) -> Statistics: ...


@overload
def collect(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    covariance: bool = ...,
    by: Labels,
    positions: Positions = ...,
    axis: Axes | None = ...,
    batch_size: int = ...,
    checkpoint: str | PathLike[str] | None = ...,
    every: int = ...,
    progress: bool = ...,
) -> ClassStatistics: ...


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    covariance: bool = False,
    by: Labels | None = None,
    positions: Positions = "all",
    axis: Axes | None = None,
    batch_size: int = 256,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 100,
    progress: bool = True,
) -> Statistics | ClassStatistics:
    """Count, mean and, when asked for, covariance of the activations at each site, in one pass and float64.

    The model runs in evaluation mode and inference mode, each batch once, and is left as it was found. A pass ends at
    the deepest site where it is certain that no site would run again; what lies behind it, hooks included, is not
    called then, and keeps no state. Inside a `with Steerer(...)` block the steered activations are collected. Under
    torch.distributed each process collects its own share, and `all_reduce` brings them together.

    Args:
        batches: an iterable of model inputs, or one tensor that is split by `batch_size`.
        sites: names, globs or a predicate, as for `find_sites`.
        covariance: also keep the (d, d) scatter: O(d^2) memory instead of O(d).
        by: the class of every row, for statistics by class: one label per row for one tensor; an iterable with the
            labels of each batch; the place where the batches carry them (a position in a tuple or a key in a mapping,
            which the model is then not given); or a function of the batch.
        positions: which positions of a sequence count as rows: "all", "last", an index or several, a slice, a bool mask
            (S,) or (B, S), a function that makes one from the batch, or "mean", their mean. Where the batch has an
            attention mask, pads do not count, and positions are counted among the real tokens.
        axis: the feature axis, of every site or site -> axis, where it is not the one that the module's class tells.
        checkpoint: a `.safetensors` file in which the sums are kept, after `every` batches and at the end. If it is
            there already, the batches that it has seen are skipped, and the statistics are bit for bit those of an
            uninterrupted pass.
        progress: show a bar, with the rows per second, when the work takes over two seconds.

    Returns:
        Statistics, or with `by` ClassStatistics: label -> Statistics.

    Raises:
        SiteNotFoundError, BatchError: the model lacks a site; batches, labels or positions do not fit.
        StatisticsError: a site never ran, its activations are not finite, or the checkpoint is of another pass.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> stats = collect(model, torch.zeros(5, 2), sites="1")
    >>> stats["1"].count, stats["1"].mean.shape
    (5, torch.Size([2]))
    >>> collect(model, torch.zeros(3, 2), by=torch.tensor([7, 7, 8]), sites="1")[7]["1"].count
    2
    """
    with announced():
        names = find_sites(model, sites)
        metadata = fingerprint.described(model) | described(positions)
        sums = _Sums(covariance=covariance)
        rows = None if by is None else sums.rows
        observation = Observation(model, names, sums.keep, axis=axis, positions=positions, rows=rows)
        stream = iterate(batches, batch_size=batch_size, progress=progress, label="collect")
        pairs: Iterable[tuple[Any, Any]] = ((batch, None) for batch in stream) if by is None else labelled(stream, by)
        if checkpoint is not None:
            job = metadata | {"sites": list(names), "covariance": covariance, "by": by is not None, "axis": repr(axis)}
            job |= {"weights": weights(model), "rank": 0 if is_alone() else dist.get_rank()}
            job |= {"batch_size": batch_size} if isinstance(batches, Tensor) else {}
            job |= {"positions code": code_of(positions)} if callable(positions) else {}
            saved = Checkpoint(checkpoint, every, job)
            sums.classes = saved.classes
            observation.axes.update(saved.axes)
            saved.axes = observation.axes
            pairs = saved.unseen(pairs)
        observation.run(sums.inputs(in_step(pairs, model)))
        sums.check(names)
    described_by = metadata | described_axes(observation.axes, axis)
    same = replicas(model)
    made = {
        label: Statistics({site: own[site] for site in names}, metadata=described_by, replicas=same)
        for label, own in sums.classes.items()
    }
    return made[None] if by is None else ClassStatistics({key: own for key, own in made.items() if key is not None})


def described_axes(axes: Mapping[str, int], given: Axes | None) -> dict[str, str]:
    """Metadata for vectors: the axes that are not the last one, and those that were given."""
    asked = set(axes) if isinstance(given, int) else set(given or {})
    return {f"axis {site}": str(axis) for site, axis in axes.items() if axis != -1 or site in asked}


@final
class _Sums:
    """The moments of every class at every site, as they grow."""

    def __init__(self, *, covariance: bool) -> None:
        self.classes: dict[Label | None, dict[str, Moments]] = {}
        self._covariance = covariance
        self._labels: list[Label] | None = None

    def rows(self) -> int:
        """How many rows the batch has, by its labels."""
        return len(self._labels or ())

    def inputs(self, pairs: Iterable[tuple[Any, list[Label] | None]]) -> Iterator[Any]:
        """The batches as the model is to see them, without their labels."""
        for batch, labels in pairs:
            self._labels = labels
            yield batch

    def keep(self, site: str, rows: Tensor, owners: Tensor) -> None:
        """Take in rows of a site; `owners` tells of which row of the batch each of them is."""
        if self._labels is None:
            self._add(None, site, rows)
            return
        codes = {label: code for code, label in enumerate(dict.fromkeys(self._labels))}
        own = torch.tensor([codes[label] for label in self._labels])[owners.cpu()]
        order = own.argsort(stable=True)
        parts = rows[order.to(rows.device)].split(torch.bincount(own, minlength=len(codes)).tolist())
        for label, part in zip(codes, parts, strict=True):
            self._add(label, site, part)

    def check(self, names: Iterable[str]) -> None:
        """Raise StatisticsError unless every class has finite moments at every site."""
        classes = self.classes or {None: {}}
        for moments in classes.values():
            if empty := [site for site in names if site not in moments]:
                raise StatisticsError(f"sites {empty} saw no rows; is every batch empty?")
            for site, seen in moments.items():
                if not bool(torch.isfinite(seen.mean).all()):
                    raise StatisticsError(
                        f"site {site!r}: the activations are not finite; look for inf or nan in the data"
                    )

    def _add(self, label: Label | None, site: str, rows: Tensor) -> None:
        if len(rows):
            moments = self.classes.setdefault(label, {})
            if site not in moments:
                moments[site] = Moments.of(rows, covariance=self._covariance)
            else:
                moments[site].update(rows)
