"""Doses: a model on batches at several strengths, as many of them in one forward pass as fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, call, iterate, rows_in
from actsteer.sites.axes import sequence_first
from actsteer.sites.wrappers import unwrapped
from actsteer.steering.steerer import Steerer


class Run(NamedTuple):
    """One forward pass."""

    which: range
    """The places of the strengths at which it ran, for each of them all rows of the batch."""
    number: int
    """The batch's number."""
    first: int
    """The number of its first row among the rows of all batches."""
    rows: int
    """How many rows the batch has."""
    output: Any
    """What the model returned."""


@final
class Doses:
    """Runs a model at several strengths of a Steerer that is attached to it.

    Several go in one pass, a strength for every row, where a batch is a tensor, or a tokenizer's mapping with
    "input_ids", and the model has its rows on axis 0. Any other batch runs once for every strength. A pass has at most
    `batch_size` rows, or is one batch.

    Args:
        steerer: None for the model as it is, with a single strength that is not set.
        one_by_one: a pass for every strength.
    """

    def __init__(
        self, model: nn.Module, steerer: Steerer | None = None, *, batch_size: int, one_by_one: bool = False
    ) -> None:
        self.model, self._steerer, self._batch_size = model, steerer, batch_size
        self._one_by_one = one_by_one or steerer is None or sequence_first(unwrapped(model))

    def runs(self, batches: Batches, strengths: Sequence[float]) -> Iterator[Run]:
        """Every batch at every strength, which stays set as it was last."""
        first = 0
        for number, batch in enumerate(iterate(batches, batch_size=self._batch_size, progress=False, label="")):
            rows = rows_in(batch)
            alone = self._one_by_one or not _is_repeatable(batch, rows)
            together = 1 if alone else max(1, self._batch_size // max(1, rows))
            for start in range(0, len(strengths), together):
                which = range(start, min(start + together, len(strengths)))
                own = [strengths[place] for place in which]
                if self._steerer is not None:
                    by_row = torch.tensor(own, dtype=torch.float64).repeat_interleave(rows)
                    self._steerer.c = by_row if len(own) > 1 else own[0]
                yield Run(which, number, first, rows, call(self.model, _repeated(batch, len(own))))
            first += rows


def _is_repeatable(batch: Any, rows: int) -> bool:
    parts = batch.values() if isinstance(batch, Mapping) else [batch]
    known = isinstance(batch, Tensor) or (isinstance(batch, Mapping) and "input_ids" in batch)
    return known and all(isinstance(own, Tensor) and not own.is_nested and rows_in(own) == rows for own in parts)


def _repeated(batch: Any, count: int) -> Any:
    """A batch whose rows come several times, all of them one after another."""
    if count == 1:
        return batch
    if isinstance(batch, Tensor):
        return torch.cat([batch] * count)
    return {name: torch.cat([own] * count) for name, own in batch.items()}
