"""Doses: a model on batches at several strengths, as many of them in one forward pass as fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, call, first_shape, iterate, rows_in
from actsteer.collecting.eval_mode import buffers_kept, eval_mode
from actsteer.sites.axes import sequence_first
from actsteer.sites.containers import is_opaque, tensors_in
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
    "input_ids", and `together` says so. Any other batch runs once for every strength. A pass has at most `batch_size`
    rows, or is one batch.

    Args:
        steerer: None for the model as it is, with a single strength that is not set.
        together: whether several may go in one pass; see `has_independent_rows`.
        row_axis: where tensors have their rows.
    """

    def __init__(
        self,
        model: nn.Module,
        steerer: Steerer | None = None,
        *,
        batch_size: int,
        together: bool = False,
        row_axis: int = 0,
    ) -> None:
        self.model, self._steerer, self._batch_size = model, steerer, batch_size
        self._together, self._row_axis = together and steerer is not None, row_axis

    def runs(self, batches: Batches, strengths: Sequence[float]) -> Iterator[Run]:
        """Every batch at every strength, which stays set as it was last."""
        first = 0
        for number, batch in enumerate(iterate(batches, batch_size=self._batch_size, progress=False, label="")):
            rows = (*first_shape(batch), 1, 1)[self._row_axis]
            several = self._together and _is_repeatable(batch, rows)
            together = max(1, self._batch_size // max(1, rows)) if several else 1
            for start in range(0, len(strengths), together):
                which = range(start, min(start + together, len(strengths)))
                own = [strengths[place] for place in which]
                if self._steerer is not None:
                    by_row = torch.tensor(own, dtype=torch.float64).repeat_interleave(rows)
                    self._steerer.c = by_row if len(own) > 1 else own[0]
                yield Run(which, number, first, rows, call(self.model, _repeated(batch, len(own))))
            first += rows


def has_independent_rows(model: nn.Module, batches: Batches, *, batch_size: int) -> bool:
    """Whether a row's outputs are the same whatever other rows there are: tried with the first batch, among others.

    So a model is known whose rows are not on axis 0 of what it takes and gives, or that looks at a batch as a whole.
    """
    batch = next(iter(iterate(batches, batch_size=batch_size, progress=False, label="")))
    rows = rows_in(batch)
    if sequence_first(unwrapped(model)) or not _is_repeatable(batch, rows):
        return False
    with eval_mode(model), buffers_kept(model), torch.no_grad():
        alone, among = (call(model, own) for own in (batch, _among_others(batch)))
    if is_opaque(alone) or is_opaque(among):
        return False
    for one, three in zip(tensors_in(alone), tensors_in(among), strict=False):
        if not one.is_floating_point():
            continue
        if not one.ndim or one.is_nested or three.shape != (3 * len(one), *one.shape[1:]) or len(one) != rows:
            return False
        same, own = three[rows : 2 * rows].double(), one.double()
        if not torch.allclose(same.nan_to_num(), own.nan_to_num(), rtol=1e-2, atol=1e-3 * _size(own)):
            return False
    return True


def _size(own: Tensor) -> float:
    finite = own[own.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _among_others(batch: Any) -> Any:
    """A batch in the midst of other rows, which are its own otherwise: in the order of the tokens, or half as large."""
    if isinstance(batch, Tensor):
        other = batch * 0.5 + 0.25 if batch.is_floating_point() else batch.flip(-1)
        return torch.cat([other, batch, other])
    return {
        name: torch.cat([own.flip(-1), own, own.flip(-1)] if name == "input_ids" else [own] * 3)
        for name, own in batch.items()
    }


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
