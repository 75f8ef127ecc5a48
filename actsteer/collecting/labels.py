"""Labels: the class of every row of every batch, for statistics by class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

from actsteer.collecting.batches import rows_in
from actsteer.collecting.classes import Label
from actsteer.errors import BatchError

Labels: TypeAlias = Tensor | Iterable[Any] | Callable[[Any], Any] | int | str
"""One label per row, for one tensor; the labels of each batch, for an iterable; or, where the batches carry them, the
position in a tuple or the key in a mapping, which the model is then not given, or a function of the batch."""

_missing: Any = object()


def labelled(batches: Iterable[Any], by: Labels) -> Iterator[tuple[Any, list[Label]]]:
    """The batches as the model is given them, each with the labels of its rows.

    Raises:
        BatchError: labels that do not fit.
    """
    if isinstance(by, bool):
        raise BatchError("by: expected labels, the place where they are, or a function, got a bool")
    if isinstance(by, int | str) or callable(by):
        for batch in batches:
            yield _taken_out(batch, by)
        return
    start = 0
    flat = _per_row(by)
    each = iter(() if flat is not None else by)
    for batch in batches:
        if flat is None:
            labels = next(each, _missing)
            if labels is _missing:
                raise BatchError("by: there are fewer labels than batches; give each batch its own")
            yield batch, _listed(labels)
        else:
            yield batch, flat[start : start + (rows := rows_in(batch))]
            start += rows
    if (flat is not None and start != len(flat)) or next(each, _missing) is not _missing:
        raise BatchError(f"by: there are more labels than {'rows' if flat is not None else 'batches'}")


def _taken_out(batch: Any, by: Any) -> tuple[Any, list[Label]]:
    if callable(by):
        return batch, _listed(by(batch))
    try:
        labels = None if isinstance(batch, Tensor) else batch[by]
    except (KeyError, IndexError, TypeError) as error:
        raise BatchError(f"by: a batch of type {type(batch).__name__} has no part {by!r} with labels") from error
    if labels is None:
        raise BatchError(f"by: a batch that is one tensor has no part {by!r} with labels; give labels of their own")
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != by}, _listed(labels)
    kept = [member for index, member in enumerate(batch) if index != by % len(batch)]
    return tuple(kept), _listed(labels)


def _per_row(by: Any) -> list[Label] | None:
    """The labels of all rows, one after the other; None if they come batch by batch."""
    if isinstance(by, Tensor) or hasattr(by, "__array__"):
        return _listed(by)
    if isinstance(by, Sequence) and all(isinstance(label, Integral | str) for label in by):
        return _listed(by)
    return None


def _listed(labels: Any) -> list[Label]:
    if isinstance(labels, int | str):
        raise BatchError(f"by: expected one label per row, got {labels!r}")
    if isinstance(labels, Tensor) or hasattr(labels, "__array__"):
        found = torch.as_tensor(labels) if not isinstance(labels, Tensor) and labels.dtype.kind in "iub" else labels
        if isinstance(found, Tensor) and (found.ndim != 1 or found.is_floating_point()):
            raise BatchError(f"by: expected integers or words of shape (B,), got {found.dtype}, {tuple(found.shape)}")
        labels = found.tolist()
    listed = [int(label) if isinstance(label, Integral) else label for label in labels]
    if wrong := [label for label in listed if not isinstance(label, int | str)]:
        raise BatchError(f"by: a label is an integer or a word, got {wrong[0]!r}")
    return listed
