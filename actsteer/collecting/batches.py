"""Batches: what a user may give as data, turned into calls of the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from actsteer.errors import BatchError

Batches: TypeAlias = Tensor | Iterable[Any]
"""One tensor, split by `batch_size`; or an iterable of model inputs: a tensor, a tuple of positional arguments, or a
mapping of keyword arguments such as a tokenizer's output."""


def iterate(
    batches: Batches, *, batch_size: int, progress: bool, label: str, may_be_empty: bool = False
) -> Iterator[Any]:
    """The batches one by one, behind a progress bar that shows the rows per second.

    Raises:
        BatchError: no batches, a batch size below 1, or one batch where several are expected.
    """
    if batch_size < 1:
        raise BatchError(f"batch_size: expected 1 or more, got {batch_size}")
    if isinstance(batches, Mapping):
        raise BatchError("batches: expected an iterable of inputs, got one mapping; wrap it in a list: [batch]")
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise BatchError(f"batches: expected a tensor or an iterable of inputs, got {type(batches).__name__}")
    if isinstance(batches, Tensor):
        batches = torch.split(batches, batch_size) if batches.ndim and len(batches) else ()
    total = len(batches) if isinstance(batches, Sized) else None
    rows, empty = 0, True
    with tqdm(total=total, desc=label, unit="batch", disable=not progress, delay=2.0) as bar:
        for batch in batches:
            empty = False
            yield batch
            rows += rows_in(batch)
            bar.update()
            if elapsed := bar.format_dict["elapsed"] or 0:
                bar.set_postfix_str(f"{rows / elapsed:,.0f} rows/s", refresh=False)
    if empty and not may_be_empty:
        raise BatchError("batches: there are none; is the generator used up, or the tensor empty?")


@runtime_checkable
class Shares(Protocol):
    """Batches that give one of n parts of themselves without going over the others."""

    def share(self, number: int, of: int) -> Batches:
        """The part of this number, from 0."""
        ...


def share(batches: Batches, shard: tuple[int, int], *, batch_size: int) -> Batches:
    """The i-th of n parts of the batches, for shard = (i, n): every n-th from the i-th, unless they are `Shares`.

    Raises:
        BatchError: no such part.
    """
    number, of = shard
    if not 0 <= number < of:
        raise BatchError(f"shard: expected (i, n) with i from 0 to n - 1, got {shard}")
    if isinstance(batches, Shares):
        return batches.share(number, of)
    if isinstance(batches, Tensor):
        return torch.split(batches, batch_size)[number::of] if len(batches) else ()
    return list(batches[number::of]) if isinstance(batches, list | tuple) else islice(batches, number, None, of)


def arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The positional and the keyword arguments that a batch is.

    Raises:
        BatchError: it is none.
    """
    if not isinstance(batch, Tensor | tuple | list | Mapping):
        raise BatchError(
            f"expected a tensor, a tuple of positional or a mapping of keyword arguments, got {type(batch).__name__}"
        )
    positional = () if isinstance(batch, Mapping) else (batch,) if isinstance(batch, Tensor) else batch
    return positional, batch if isinstance(batch, Mapping) else {}


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output on one batch: a tensor, positional arguments in a tuple, or keyword arguments in a mapping.

    Raises:
        BatchError: the batch is none of these, or does not fit what the model's forward takes.
    """
    positional, keywords = arguments(batch)
    try:
        return model(*positional, **keywords)
    except TypeError:
        _check_fits(model, positional, keywords)
        raise


def _check_fits(model: nn.Module, positional: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(*positional, **keywords)
    except TypeError as error:
        raise BatchError(
            f"a batch of {len(positional)} positional and {sorted(keywords)} keyword arguments does not fit "
            f"{type(model).__name__}.forward: {error}; feed the inputs alone, and give labels as targets= to optimize"
        ) from error


def first_shape(batch: Any) -> tuple[int, ...]:
    """The shape of a batch's first tensor; of a nested one, the number of rows alone."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    first = next((part for part in parts if isinstance(part, Tensor) and part.ndim), None)
    return () if first is None else (first.size(0),) if first.is_nested else tuple(first.shape)


def rows_in(batch: Any) -> int:
    """How many rows a batch has: the length of its first tensor."""
    return (*first_shape(batch), 1)[0]
