"""collect: one pass over the data, keeping sums and not activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from os import PathLike
from typing import Any, final, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, iterate, share
from actsteer.collecting.classes import ClassStatistics, Label
from actsteer.collecting.labels import Labels, labelled
from actsteer.collecting.moments import Covariance, Moments, absorb
from actsteer.collecting.observe import Observation, Step
from actsteer.collecting.processes import announced, in_step
from actsteer.collecting.resume import Checkpoint, code_of, weights
from actsteer.collecting.statistics import Statistics
from actsteer.errors import StatisticsError
from actsteer.sites import fingerprint
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites, find_sites
from actsteer.sites.shards import is_alone, replicas
from actsteer.tokens.positions import Positions, described
from actsteer.tokens.whose import Masks


@overload
def collect(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    covariance: Covariance = ...,
    by: None = ...,
    positions: Positions = ...,
    axis: Axes | None = ...,
    row_axis: Axes | None = ...,
    token_axis: Axes | None = ...,
    mask: Masks | None = ...,
    batch_size: int = ...,
    stop: bool = ...,
    shard: tuple[int, int] | None = ...,
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
    covariance: Covariance = ...,
    by: Labels,
    positions: Positions = ...,
    axis: Axes | None = ...,
    row_axis: Axes | None = ...,
    token_axis: Axes | None = ...,
    mask: Masks | None = ...,
    batch_size: int = ...,
    stop: bool = ...,
    shard: tuple[int, int] | None = ...,
    checkpoint: str | PathLike[str] | None = ...,
    every: int = ...,
    progress: bool = ...,
) -> ClassStatistics: ...


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    covariance: Covariance = False,
    by: Labels | None = None,
    positions: Positions = "all",
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    batch_size: int = 256,
    stop: bool = True,
    shard: tuple[int, int] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 100,
    progress: bool = True,
) -> Statistics | ClassStatistics:
    """Count, mean and, when asked for, variance or covariance of the activations at each site, in one pass and float64.

    The model runs in evaluation mode and without gradients, each batch once, and is left as it was found. The first
    batch runs whole. Where each site ran exactly once in it, later passes end when all of them have: what lies behind
    the last one, hooks included, is not called then. Every 32nd pass runs whole again, and raises if a site ran more
    often; a model that FSDP shards always runs whole. What a model writes behind its last site and reads at its next
    batch is the user's to declare, with `stop=False`: such passes have to run whole.

    Inside a `with Steerer(...)` block the steered activations are collected. Under torch.distributed each process
    collects its own share, which may be empty, and `all_reduce` brings them together.

    Args:
        batches: one tensor, which is split by `batch_size`; a mapping of keyword arguments, such as a tokenizer's
            output, or a tuple of positional ones, which are one call; or an iterable of these, a call each, as what
            `split` makes of a tensor.
        sites: names, globs or a predicate, as for `find_sites`.
        covariance: also keep the (d, d) scatter: O(d^2) memory instead of O(d); with "diagonal" the variance of each
            feature alone, in O(d).
        by: the class of every row, for statistics by class: one label per row for one tensor; an iterable with the
            labels of each batch; the place where the batches carry them (a position in a tuple or a key in a mapping,
            which the model is then not given); or a function of the batch.
        positions: which positions of a sequence count as rows: "all", "last", an index or several, a list of them for
            each row, a slice, a bool mask (S,) or (B, S), a callable that makes one from the inputs by name, or "mean",
            their mean. Where the batch has an attention mask, pads do not count, and positions are counted among the
            real tokens; where position_ids start anew, in each of the texts that a row is packed with.
        axis: the feature axis, of every site or site -> axis, where it is not the one that the module's class tells.
        row_axis, token_axis, mask: the axes of rows and tokens, and where the batch has its token mask, as for
            `Steerer`.
        stop: False runs every pass whole.
        shard: (i, n) collects the i-th of n parts of the batches alone, counted from 0: every n-th one, or, of a
            streamed dataset, what it gives to the i-th of n processes. A part may be empty. The parts, each
            collected in a separate process and saved, `merge` to what one pass gives.
        checkpoint: a `.safetensors` file in which the sums are kept, after `every` batches and at the end. If it is
            there already, the batches that it has seen are skipped, and the statistics are bit for bit those of an
            uninterrupted pass.
        progress: show a bar, with the rows per second, when the work takes over two seconds.

    Returns:
        Statistics, or with `by` ClassStatistics: label -> Statistics.

    Raises:
        SiteNotFoundError, BatchError: the model lacks a site; batches, labels or positions do not fit.
        StatisticsError: a site never ran, or ran more than once where passes ended early; its activations are not
            finite; or the checkpoint is of another pass.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> stats = collect(model, torch.zeros(5, 2), sites="1")
    >>> stats["1"].count, stats["1"].mean.shape
    (5, torch.Size([2]))
    >>> collect(model, torch.zeros(3, 2), by=torch.tensor([7, 7, 8]), sites="1")[7]["1"].count
    2
    """
    with announced():
        names = find_sites(model, sites)
        sums = _Sums(covariance=covariance)
        where: dict[str, Any] = {"axis": axis, "row_axis": row_axis, "token_axis": token_axis, "mask": mask}
        observation = Observation(model, names, **where, positions=positions, stop=stop)
        is_share = shard is not None or not is_alone()  # which may be empty
        takes_out = isinstance(by, int | str)  # the labels, of what a loader gives
        own = batches if shard is None else share(batches, shard, batch_size=batch_size, are_labelled=takes_out)
        stream = iterate(
            own,
            batch_size=batch_size,
            progress=progress,
            label="collect",
            may_be_empty=is_share,
            are_labelled=takes_out,
        )
        pairs: Iterable[tuple[Any, Any]] = ((batch, None) for batch in stream) if by is None else labelled(stream, by)
        if checkpoint is not None:
            job: dict[str, Any] = fingerprint.described(model) | described(positions)
            job |= {
                "sites": list(names),
                "covariance": covariance,
                "by": by is not None,
                "axis": repr(axis),
            }
            said = {name: repr(own) for name, own in where.items() if own is not None and name != "axis"}
            job |= said | ({"mask": code_of(mask)} if callable(mask) else {})
            job |= {"weights": weights(model), "rank": 0 if is_alone() else dist.get_rank()}
            job |= {"batch_size": batch_size} if isinstance(batches, Tensor) else {}
            job |= {"shard": list(shard)} if shard is not None else {}
            job |= {"positions code": code_of(positions)} if callable(positions) else {}
            saved = Checkpoint(checkpoint, every, job)
            sums.classes = saved.classes
            observation.axes.update(saved.axes)
            saved.axes = observation.axes
            pairs = saved.unseen(pairs)
        observation.run(sums.steps(in_step(pairs, model)))
        sums.check(names, may_be_empty=is_share)
    metadata = fingerprint.described(model) | described(positions)  # now that lazy modules have their shapes
    described_by, same = metadata | described_axes(observation.axes, axis), replicas(model)

    def made(moments: Mapping[str, Moments]) -> Statistics:
        return Statistics({site: moments[site] for site in names}, metadata=described_by, replicas=same)

    nothing = {site: Moments.empty(0, covariance=covariance) for site in names}
    if by is None:
        return made(sums.classes.get(None, nothing))
    classes = {label: made(own) for label, own in sums.classes.items() if label is not None}
    return ClassStatistics(classes, nothing=made(nothing))


def described_axes(axes: Mapping[str, int], given: Axes | None) -> dict[str, str]:
    """Metadata for vectors: the axes that are not the last one, and those that were given."""
    asked = set(axes) if isinstance(given, int) else set(given or {})
    return {f"axis {site}": str(axis) for site, axis in axes.items() if axis != -1 or site in asked}


@final
class _Sums:
    """The moments of every class at every site, as they grow."""

    def __init__(self, *, covariance: Covariance) -> None:
        self.classes: dict[Label | None, dict[str, Moments]] = {}
        self._covariance = covariance

    def steps(self, pairs: Iterable[tuple[Any, list[Label] | None]]) -> Iterator[Step]:
        """What is to run for the batches, each with the labels of its rows."""
        for batch, labels in pairs:
            if labels is None:
                yield Step(batch, self._keep_all)
            else:
                yield Step(batch, partial(self._keep, *_coded(labels)), len(labels))

    def _keep_all(self, site: str, rows: Tensor, owners: Tensor) -> None:
        """Take in rows of a site that belong to no class."""
        self._add(None, site, rows)

    def _keep(self, labels: list[Label], codes: Tensor, site: str, rows: Tensor, owners: Tensor) -> None:
        """Take in rows of a site: `owners` has the batch's row that each is from, `codes` the class of that row."""
        own = codes[owners.cpu()]
        order = own.argsort(stable=True)
        parts = rows[order.to(rows.device)].split(torch.bincount(own, minlength=len(labels)).tolist())
        for label, part in zip(labels, parts, strict=True):
            self._add(label, site, part)

    def check(self, names: Iterable[str], *, may_be_empty: bool) -> None:
        """Raise StatisticsError unless every class has finite moments at every site."""
        classes = self.classes or ({} if may_be_empty else {None: {}})
        for moments in classes.values():
            if empty := [site for site in names if site not in moments]:
                raise StatisticsError(f"sites {empty} saw no rows; is every batch empty?")
            for site, seen in moments.items():
                if not seen.is_finite:
                    raise StatisticsError(
                        f"site {site!r}: the activations are not finite; look for inf or nan in the data, or for "
                        "numbers of which the squares are too large for float64"
                    )

    def _add(self, label: Label | None, site: str, rows: Tensor) -> None:
        if rows.shape[0]:
            absorb(self.classes.setdefault(label, {}), site, rows, covariance=self._covariance)


def _coded(labels: list[Label]) -> tuple[list[Label], Tensor]:
    """Each label once, and for each row the index of its label."""
    codes = {label: code for code, label in enumerate(dict.fromkeys(labels))}
    return list(codes), torch.tensor([codes[label] for label in labels], dtype=torch.long)
