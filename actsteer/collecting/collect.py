"""collect: one pass over the data, keeping sums and not activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, call, iterate, undisturbed
from actsteer.collecting.moments import Moments, Statistics
from actsteer.errors import StatisticsError
from actsteer.sites.axes import feature_axis
from actsteer.sites.outputs import positive_axis, read_activation
from actsteer.sites.resolve import Sites, find_sites, fingerprint, resolve


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    covariance: bool = False,
    batch_size: int = 256,
    progress: bool = True,
) -> Statistics:
    """Count, mean and, when asked for, covariance of the activations at each site, in one pass and float64.

    Every position of a sequence or an image counts as a row. The model runs in evaluation mode and inference mode,
    and is left as it was found. Inside a `with Steerer(...)` block the steered activations are collected.

    Args:
        batches: an iterable of model inputs, or one tensor that is split by `batch_size`.
        sites: names, globs or a predicate, as for `find_sites`.
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
    names = find_sites(model, sites)
    moments: dict[str, Moments] = {}

    def keep(site: str, rows: Tensor) -> None:
        if len(rows) == 0:
            return
        seen = Moments.of(rows, covariance=covariance)
        moments[site] = moments[site].merge(seen) if site in moments else seen

    observe(model, batches, names, keep, batch_size=batch_size, progress=progress, label="collect")
    if empty := [site for site in names if site not in moments]:
        raise StatisticsError(f"sites {empty} saw no rows; is every batch empty?")
    for site, seen in moments.items():
        if not bool(torch.isfinite(seen.mean).all()):
            raise StatisticsError(f"site {site!r}: the activations are not finite; look for inf or nan in the data")
    axes = {s: feature_axis(model, s, module) for s, module in resolve(model, names).items()}
    described = {f"axis {site}": str(axis) for site, axis in axes.items() if axis not in (None, -1)}
    return Statistics({site: moments[site] for site in names}, metadata={"model": fingerprint(model)} | described)


def observe(
    model: nn.Module,
    batches: Batches,
    names: tuple[str, ...],
    keep: Callable[[str, Tensor], None],
    *,
    batch_size: int,
    progress: bool,
    label: str,
) -> None:
    """Run every batch once, and give `keep` each site's activations as rows of shape (n, d)."""
    modules = resolve(model, names)
    ran: set[str] = set()

    def keep_and_note(site: str, rows: Tensor) -> None:
        ran.add(site)
        keep(site, rows)

    with undisturbed(model), _listening(model, modules, keep_and_note):
        for batch in iterate(batches, batch_size=batch_size, progress=progress, label=label):
            with torch.no_grad():  # not inference mode: what the model caches meanwhile must work in autograd later
                call(model, batch)
    silent = [site for site in names if site not in ran]
    if silent:
        raise StatisticsError(f"sites {silent} never ran; does the model call these modules?")


@contextmanager
def _listening(model: nn.Module, modules: dict[str, nn.Module], keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    with ExitStack() as handles:
        for site, module in modules.items():
            hook = _listener(site, feature_axis(model, site, module), keep)
            handles.callback(module.register_forward_hook(hook).remove)
        yield


def _listener(site: str, axis: int | None, keep: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        activation = read_activation(output, site=site)
        positive = positive_axis(activation, axis=axis, size=None, site=site)
        with torch.inference_mode(mode=False):  # what is kept must work in autograd later
            keep(site, rearrange(activation.movedim(positive, -1), "... d -> (...) d"))

    return hook
