"""Rows: the activations of one side, at once or block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.observe import Observation
from actsteer.collecting.pairs import differences, paired
from actsteer.collecting.record import record, recorded
from actsteer.sites.resolve import find_sites


@final
class Rows(Mapping[str, Tensor]):
    """Site -> (n, d), what an estimator with `reads = "rows"` is given of each side.

    The first look at a site records the activations of all of them, in memory that grows with the rows. `blocks`
    gives them batch by batch instead: the model runs anew each time that they are gone over, and nothing is kept.

    Args:
        options: as for `record`: `sites`, `positions`, `axis`, `batch_size`, `stop`.

    >>> import torch
    >>> from actsteer import SteeringVector, fit
    >>> class MedianDifference:
    ...     reads = "rows"
    ...
    ...     def __call__(self, *, positive, negative):
    ...         return SteeringVector({
    ...             site: positive[site].median(dim=0).values - negative[site].median(dim=0).values for site in positive
    ...         })
    >>> high, low = torch.tensor([[1.0], [2.0], [90.0]]), torch.zeros(3, 1)
    >>> fit(nn.Sequential(nn.Identity()), positive=high, negative=low, sites="0", estimator=MedianDifference())["0"]
    tensor([2.])
    """

    def __init__(self, model: nn.Module, batches: Batches, *, progress: bool, options: Mapping[str, Any]) -> None:
        self._model, self._batches = model, batches
        self._progress, self._options = progress, options

    def __getitem__(self, site: str) -> Float[Tensor, "n d"]:
        return self._recorded[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._recorded)

    def __len__(self) -> int:
        return len(self._recorded)

    @property
    def blocks(self) -> Iterable[Mapping[str, Float[Tensor, "n d"]]]:
        """The rows of each batch, site -> (n, d); as often as they are asked for."""
        return _Blocks(self._model, self._batches, self._options)

    def less(self, other: Rows) -> Iterable[Mapping[str, Float[Tensor, "n d"]]]:
        """The rows of each batch less those of the other side's, which pair up, in float64; as often as asked for."""
        return _Differences(self._model, self._batches, other._batches, self._options)

    @cached_property
    def _recorded(self) -> dict[str, Float[Tensor, "n d"]]:
        return record(self._model, self._batches, progress=self._progress, **self._options)


@final
class _Blocks:
    def __init__(self, model: nn.Module, batches: Batches, options: Mapping[str, Any]) -> None:
        self._batches, self._batch_size = batches, options["batch_size"]
        self._observation = _observation(model, options)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for batch in iterate(self._batches, batch_size=self._batch_size, progress=False, label=""):
            yield recorded(self._observation, [batch])


@final
class _Differences:
    def __init__(self, model: nn.Module, positive: Batches, negative: Batches, options: Mapping[str, Any]) -> None:
        self._sides, self._batch_size = (positive, negative), options["batch_size"]
        self._observation = _observation(model, options)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for toward, away in paired(*self._sides, batch_size=self._batch_size):
            yield differences(self._observation, toward, away)


def _observation(model: nn.Module, options: Mapping[str, Any]) -> Observation:
    names = ("positions", "axis", "row_axis", "token_axis", "mask", "stop")
    asked = {name: options[name] for name in names if name in options}
    return Observation(model, find_sites(model, options["sites"]), **asked)
