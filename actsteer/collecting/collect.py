"""collect: one pass over the data, keeping sums and not activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, final

import torch
from einops import rearrange
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, call, iterate, undisturbed
from actsteer.collecting.moments import Moments, Statistics
from actsteer.errors import StatisticsError
from actsteer.sites.axes import Axes, Layout, layouts
from actsteer.sites.listen import likely_cause, listen
from actsteer.sites.outputs import Arguments, get, locate, members
from actsteer.sites.place import Place
from actsteer.sites.resolve import Sites, find_sites, fingerprint, resolve
from actsteer.sites.shards import full


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    covariance: bool = False,
    axis: Axes | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> Statistics:
    """Count, mean and, when asked for, covariance of the activations at each site, in one pass and float64.

    Every position of a sequence or an image counts as a row. The model runs in evaluation mode and inference mode,
    and is left as it was found. Inside a `with Steerer(...)` block the steered activations are collected.

    Args:
        batches: an iterable of model inputs, or one tensor that is split by `batch_size`.
        sites: names, globs or a predicate, as for `find_sites`.
        axis: the feature axis, of every site or site -> axis, where it is not the one that the module's class tells.
        covariance: also keep the (d, d) scatter: O(d^2) memory instead of O(d).
        progress: show a bar when the work takes over two seconds.

    Raises:
        SiteNotFoundError, BatchError: the model lacks a site; the batches cannot be fed.
        StatisticsError: a site never ran, or its activations are not finite.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> stats = collect(model, torch.zeros(5, 2), sites="1")
    >>> stats["1"].count, stats["1"].mean.shape
    (5, torch.Size([2]))
    """
    moments: dict[str, Moments] = {}

    def keep(site: str, rows: Tensor) -> None:
        if len(rows) == 0:
            return
        seen = Moments.of(rows, covariance=covariance)
        moments[site] = moments[site].merge(seen) if site in moments else seen

    names = find_sites(model, sites)
    axes = observe(model, batches, names, keep, axis=axis, batch_size=batch_size, progress=progress, label="collect")
    if empty := [site for site in names if site not in moments]:
        raise StatisticsError(f"sites {empty} saw no rows; is every batch empty?")
    for site, seen in moments.items():
        if not bool(torch.isfinite(seen.mean).all()):
            raise StatisticsError(f"site {site!r}: the activations are not finite; look for inf or nan in the data")
    described = described_axes(axes, axis)
    return Statistics({site: moments[site] for site in names}, metadata={"model": fingerprint(model)} | described)


def described_axes(axes: Mapping[str, int], given: Axes | None) -> dict[str, str]:
    """Metadata for vectors: the axes that are not the last one, and those that were given."""
    asked = set(axes) if isinstance(given, int) else set(given or {})
    return {f"axis {site}": str(axis) for site, axis in axes.items() if axis != -1 or site in asked}


def observe(
    model: nn.Module,
    batches: Batches,
    names: tuple[str, ...],
    keep: Callable[[str, Tensor], None],
    *,
    axis: Axes | None,
    batch_size: int,
    progress: bool,
    label: str,
) -> dict[str, int]:
    """Run every batch once, and give `keep` each site's activations as rows (n, d); returns the feature axes."""
    places = resolve(model, names)
    lies = layouts(model, places, axis=axis)
    axes: dict[str, int] = {}
    with undisturbed(model), ExitStack() as handles:
        for site, place in places.items():
            handles.callback(listen(place, _Listener(place, lies[site], keep, axes)))
        for batch in iterate(batches, batch_size=batch_size, progress=progress, label=label):
            with torch.no_grad():  # not inference mode: what the model caches meanwhile must work in autograd later
                call(model, batch)
    silent = [f"{site!r} ({likely_cause(model, places[site])})" for site in names if site not in axes]
    if silent:
        raise StatisticsError(f"these sites never ran: {'; '.join(silent)}")
    return axes


@final
class _Listener:
    """A hook that hands the activations of a site on, as rows."""

    def __init__(self, place: Place, layout: Layout, keep: Callable[[str, Tensor], None], axes: dict[str, int]) -> None:
        self._place, self._layout, self._keep, self._axes = place, layout, keep, axes

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        """`last` is the output or, at an input, the keyword arguments."""
        place = self._place
        value = Arguments(args, last) if place.side == "in" else last
        activation = get(value, locate(place, value))
        for part in members(activation):
            whole = full(part, module, site=place.site)
            if (conversion := getattr(module, "hook_conversion", None)) is not None:
                whole = conversion.convert(whole)
            axis = self._layout.feature_axis(tuple(whole.shape), size=None, site=place.site)
            last_one = axis == whole.ndim - 1 and self._layout.axis is None
            self._axes[place.site] = -1 if last_one else axis if self._layout.axis is None else self._layout.axis
            with torch.inference_mode(mode=False):  # what is kept must work in autograd later
                self._keep(place.site, rearrange(whole.movedim(axis, -1), "... d -> (...) d"))
