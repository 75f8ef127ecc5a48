"""Batches: what a user may give as data, turned into calls of the model."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from copy import deepcopy
from itertools import islice
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from actsteer.errors import ActsteerError, BatchError, InputError
from actsteer.sites.resolve import runs_torch_code
from actsteer.sites.wrappers import class_name, named_modules
from actsteer.tokens.inputs import cache_in

Batches: TypeAlias = Tensor | Mapping[str, Any] | Iterable[Any]
"""What a model is fed, everywhere: a tensor, which is split by `batch_size`; a mapping of keyword arguments such as a
tokenizer's output, or a tuple of positional arguments, which are one call; or an iterable of these, a call each. What
`split` or `chunk` makes of one tensor is an iterable, though it is a tuple."""


def inputs(batches: Batches, *, batch_size: int, are_labelled: bool = False) -> Iterable[Any]:
    """The calls that are meant, each a tensor, a tuple or a mapping; of an iterable each is checked as it comes.

    Args:
        are_labelled: whether the labels are still to be taken out of the batches.

    Raises:
        BatchError: what cannot be fed to a model, with what to give instead.
    """
    if batch_size < 1:
        raise BatchError(f"batch_size: expected 1 or more, got {batch_size}")
    if isinstance(batches, Tensor):
        return torch.split(batches, batch_size) if batches.ndim and len(batches) else ()
    if is_one_call(batches):
        return [batches]
    _check_kind(batches, "batches", "a tensor, a mapping, a tuple or an iterable of inputs")
    if not isinstance(batches, Iterable):
        raise BatchError(f"batches: expected a tensor or an iterable of inputs, got {type(batches).__name__}")
    return batches if are_labelled or not isinstance(batches, DataLoader) else map(_alone, batches)


def is_one_call(batches: Batches) -> bool:
    """Whether these are the arguments of one call: a mapping, or a tuple that is not the parts of one tensor."""
    return isinstance(batches, Mapping) or (isinstance(batches, tuple) and not _are_parts(batches))


def _are_parts(batches: tuple[Any, ...]) -> bool:
    """Whether these are several parts of one tensor, as `split` and `chunk` give them."""
    if len(batches) < 2 or not all(type(own) is Tensor and own.layout is torch.strided for own in batches):
        return False
    if any(own.is_meta or own.is_nested for own in batches):
        return False
    places = {(own.untyped_storage().data_ptr(), own.storage_offset()) for own in batches}
    return len({storage for storage, _ in places}) == 1 and len(places) == len(batches)


def _alone(batch: Any) -> Any:
    """A batch of a DataLoader, unchanged.

    Raises:
        BatchError: it has several parts. A model is called with all parts of a batch, and y of (x, y) is no argument.
    """
    if isinstance(batch, tuple | list) and len(batch) > 1:
        kinds = ", ".join(type(part).__name__ for part in batch)
        raise BatchError(
            f"batches: the DataLoader gives {len(batch)} things for each batch ({kinds}), and the model would be "
            "called with all of them. Give the inputs alone, [x for x, y in loader], and labels as by= or targets=; if "
            "all are arguments, say so with tuples, [tuple(own) for own in loader], or a mapping from its collate_fn"
        )
    return batch


def _check_kind(batch: Any, what: str, expected: str) -> None:
    """Raise BatchError for what looks like an input and is none."""
    if isinstance(batch, str):
        raise BatchError(
            f"{what}: expected {expected}, got the text {batch[:40]!r}; for texts there are text_batches(tokenizer, "
            "texts) and fit_pairs(model, tokenizer, pairs) in actsteer.integrations.transformers"
        )
    if hasattr(batch, "__array__") and not isinstance(batch, Tensor):
        raise BatchError(f"{what}: expected {expected}, got a {type(batch).__name__}; give torch.as_tensor of it")
    if hasattr(batch, "apply_chat_template"):
        raise BatchError(f"{what}: expected {expected}, got a tokenizer; give what it makes of texts")


def iterate(
    batches: Batches,
    *,
    batch_size: int,
    progress: bool,
    label: str,
    may_be_empty: bool = False,
    are_labelled: bool = False,
) -> Iterator[Any]:
    """The calls one by one, behind a progress bar that shows the rows per second; see `inputs`.

    Raises:
        BatchError: no batches, or what `inputs` refuses.
    """
    calls = inputs(batches, batch_size=batch_size, are_labelled=are_labelled)
    known = batches if isinstance(calls, map) else calls
    rows, empty = 0, True
    total = None
    with suppress(TypeError):  # a DataLoader has a length, and none where its dataset has not
        total = len(known) if isinstance(known, Sized) else None
    with tqdm(total=total, desc=label, unit="batch", disable=not progress, delay=2.0) as bar:
        for batch in calls:
            empty = False
            yield batch
            rows += rows_in(batch)
            bar.update()
            if elapsed := bar.format_dict["elapsed"] or 0:
                bar.set_postfix_str(f"{rate(rows / elapsed)} rows/s", refresh=False)
    if empty and not may_be_empty:
        raise BatchError("batches: there are none; is the generator used up, or the tensor empty?")


def rate(per_second: float) -> str:
    """How many in a second, with a decimal where there are few.

    >>> rate(12345.6), rate(3.25), rate(0.04)
    ('12,346', '3.2', '0.04')
    """
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}" if per_second >= 1 else f"{per_second:.2g}"


@runtime_checkable
class Shares(Protocol):
    """Batches that give one of n parts of themselves without going over the others."""

    def share(self, number: int, of: int) -> Batches:
        """The part of this number, from 0."""
        ...


def share(batches: Batches, shard: tuple[int, int], *, batch_size: int, are_labelled: bool = False) -> Batches:
    """The i-th of n parts of the batches, for shard = (i, n): every n-th from the i-th, unless they are `Shares`.

    Raises:
        BatchError: no such part.
    """
    number, of = shard
    if not 0 <= number < of:
        raise BatchError(f"shard: expected (i, n) with i from 0 to n - 1, got {shard}")
    if isinstance(batches, Shares):
        return batches.share(number, of)
    calls = inputs(batches, batch_size=batch_size, are_labelled=are_labelled)
    return list(calls[number::of]) if isinstance(calls, list | tuple) else islice(calls, number, None, of)


def arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The positional and the keyword arguments that a batch is.

    Raises:
        BatchError: it is none.
    """
    _check_kind(batch, "a batch", "a tensor, a tuple of positional or a mapping of keyword arguments")
    if not isinstance(batch, Tensor | tuple | list | Mapping):
        raise BatchError(
            f"expected a tensor, a tuple of positional or a mapping of keyword arguments, got {type(batch).__name__}"
        )
    if isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), list):
        raise BatchError(f"a batch: input_ids is a list of {len(ids)}; call the tokenizer with return_tensors='pt'")
    positional = () if isinstance(batch, Mapping) else (batch,) if isinstance(batch, Tensor) else batch
    return positional, batch if isinstance(batch, Mapping) else {}


def call(model: nn.Module, batch: Any, *, fills_cache: bool = False) -> Any:
    """The model's output on one batch: a tensor, positional arguments in a tuple, or keyword arguments in a mapping.

    A cache among these stays as it is: the model writes into a copy, unless it `fills_cache`.

    Raises:
        BatchError: the batch is none of these, or does not fit what the model's forward takes; a cache with gradients.
        InputError: a module of the model refuses what comes to it, for its width or dtype.
    """
    positional, keywords = arguments(batch)
    name, cache = cache_in(keywords)
    if not fills_cache and not isinstance(cache, Tensor | tuple | list | None):
        try:
            keywords = {**keywords, name: deepcopy(cache)}
        except RuntimeError as error:
            raise BatchError(f"{name}: expected a cache without gradients; make it under torch.no_grad()") from error
    try:
        return model(*positional, **keywords)
    except TypeError:
        _check_fits(model, positional, keywords)
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if isinstance(error, ActsteerError) or (where := _refused_by(model, error)) is None:
            raise
        raise InputError(f"a batch does not fit the model: {where}: {error}") from error


def _refused_by(model: nn.Module, error: Exception) -> str | None:
    """Which layer of the model raised this, and what it was given; None unless its input has a wrong width or dtype.

    Only a layer whose `forward` is torch's own is named: what others take cannot be known.
    """
    module, given = None, None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        own = frame.f_locals.get("self")
        if not frame.f_globals.get("__name__", "").startswith("torch."):  # a callback there, not the module itself
            module = None
        if isinstance(own, nn.Module):
            module = own
            if frame.f_code.co_name == "forward":
                names = frame.f_code.co_varnames[1 : frame.f_code.co_argcount]
                found = (frame.f_locals.get(name) for name in names)
                given = next((value for value in found if isinstance(value, Tensor)), None)
    name = next((name for name, own in named_modules(model) if own is module), None)
    if module is None or name is None or given is None or not runs_torch_code(module) or _fits(module, given):
        return None
    kind = next((f"{str(own.dtype)[6:]} " for own in module.parameters(recurse=False)), "")
    shown = f"{class_name(module)}({module.extra_repr()})"
    return f"site {name!r}, a {kind}{shown}, was given {str(given.dtype)[6:]} of shape {tuple(given.shape)}"


def _fits(module: nn.Module, given: Tensor) -> bool:
    """Whether a tensor has the width and the dtype that a module takes, as far as its class tells."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if given.dtype not in (torch.int32, torch.int64) or not given.numel():
            return given.dtype in (torch.int32, torch.int64)
        return int(given.min()) >= 0 and int(given.max()) < module.num_embeddings
    weight = getattr(module, "weight", next(module.parameters(), None))
    casts = torch.is_autocast_enabled(given.device.type)
    if isinstance(weight, Tensor) and weight.dtype != given.dtype and not casts:
        return False
    match module:
        case nn.Linear():
            width, axis = module.in_features, -1
        case nn.RNNBase() | nn.RNNCellBase():
            width, axis = module.input_size, -1
        case nn.LayerNorm() | nn.RMSNorm():
            return given.shape[-len(module.normalized_shape) :] == tuple(module.normalized_shape)
        case nn.modules.conv._ConvNd():
            width, axis = module.in_channels, -len(module.kernel_size) - 1
        case nn.modules.batchnorm._NormBase():
            width, axis = module.num_features, 1
        case nn.GroupNorm():
            width, axis = module.num_channels, 1
        case nn.MultiheadAttention():
            width, axis = module.embed_dim, -1
        case _:
            return True
    return -given.ndim <= axis < given.ndim and given.shape[axis] == width


def _check_fits(model: nn.Module, positional: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(*positional, **keywords)
    except TypeError as error:
        raise BatchError(
            f"a batch of {len(positional)} positional and {sorted(keywords)} keyword arguments does not fit "
            f"{type(model).__name__}.forward: {error}; feed the inputs alone, and give labels as targets= to optimize. "
            "A tuple is the arguments of one call; for several calls give a list"
        ) from error


def first_shape(batch: Any) -> tuple[int, ...]:
    """The shape of a batch's first tensor; of a nested one, the number of rows alone."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    first = next((part for part in parts if isinstance(part, Tensor) and part.ndim), None)
    return () if first is None else (first.size(0),) if first.is_nested else tuple(first.shape)


def rows_in(batch: Any) -> int:
    """How many rows a batch has: the length of its first tensor."""
    return (*first_shape(batch), 1)[0]
