"""Stream: batches with their targets, repeated for as long as a training runs, and the loss on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, is_one_call, iterate
from actsteer.errors import BatchError, LossError

Loss: TypeAlias = Callable[..., Tensor]
"""`loss(output)` or `loss(output, target)`, 0-dim; with parameters `c` and `plain`, if it asks for these by name."""
TOLD = frozenset({"c", "plain"})
"""What a loss is told if it has a parameter of this name: the strength, and what the unsteered model gives."""
Targets: TypeAlias = Tensor | Mapping[str, Tensor] | Iterable[Any]
"""One for each row of a tensor, in a tensor or in a mapping of tensors; for each batch of an iterable; or for the one
call that a mapping or a tuple is."""


def endless(
    batches: Batches, targets: Targets | None, *, batch_size: int, generator: torch.Generator | None
) -> Iterator[tuple[Any, Any]]:
    """Pairs (batch, target) without end; one tensor is shuffled anew in every epoch, an iterable keeps its order."""
    check_pairing(batches, targets)
    while True:
        if isinstance(batches, Tensor):
            order = torch.randperm(len(batches), generator=generator)
            for rows in iterate(order, batch_size=batch_size, progress=False, label=""):
                batch = _rows_of(batches, rows)
                yield batch, batch if targets is None else _rows_of(targets, rows)
        else:
            yield from once(batches, targets, batch_size=batch_size)


def once(batches: Batches, targets: Targets | None, *, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """Pairs (batch, target), in their order; without targets, the batch is the target."""
    whole = iterate(batches, batch_size=batch_size, progress=False, label="")
    if is_one_call(batches) and targets is not None:  # and this is what goes with it
        targets = [targets]
    if targets is None:
        yield from ((batch, batch) for batch in whole)
        return
    missing: Any = object()
    wanted: Iterable[Any] = targets
    if isinstance(batches, Tensor):
        wanted = [_rows_of(targets, rows) for rows in torch.arange(len(batches)).split(batch_size)]
    for batch, target in zip_longest(whole, wanted, fillvalue=missing):
        if batch is missing or target is missing:
            raise BatchError("targets: expected one for each batch in every epoch; pass lists, not generators")
        yield batch, target


def check_pairing(batches: Batches, targets: Targets | None) -> None:
    """Raise BatchError unless the targets are of the batches' kind and number."""
    if is_one_call(batches) or targets is None:
        return
    tensors = list(targets.values()) if isinstance(targets, Mapping) else [targets]
    if isinstance(batches, Tensor) != all(isinstance(own, Tensor) for own in tensors):
        raise BatchError("targets: expected a tensor for batches in one tensor, and an iterable for an iterable")
    for own in tensors:
        if isinstance(batches, Tensor) and isinstance(own, Tensor) and len(batches) != len(own):
            raise BatchError(f"targets: expected one for each of the {len(batches)} rows, got {len(own)}")


def _rows_of(targets: Any, rows: Tensor) -> Any:
    """Some rows of a tensor, or of each tensor of a mapping."""
    if isinstance(targets, Mapping):
        return {name: own[rows.to(own.device)] for name, own in targets.items()}
    return targets[rows.to(targets.device)]


def check_loss(value: Any) -> None:
    """Raise LossError unless this can be minimised."""
    if not isinstance(value, Tensor):
        got = type(value).__name__
    elif value.ndim or not value.requires_grad:
        got = f"shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
    else:
        return
    raise LossError(f"loss: expected a 0-dim tensor that depends on the output, got {got}")


def takes_target(loss: Loss) -> bool:
    """Whether the loss cannot be called with the output alone, but for what it asks for by name."""
    parameters = _needed(loss)
    return sum(p.kind is not p.KEYWORD_ONLY and p.name not in TOLD for p in parameters) > 1


def asked_for(loss: Loss) -> frozenset[str]:
    """Which of `TOLD` the loss has as parameters without a default."""
    return frozenset(p.name for p in _needed(loss)) & TOLD


def _needed(loss: Loss) -> list[inspect.Parameter]:
    """The parameters that have no default."""
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except ValueError:  # a builtin such as torch.mean
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in signature.parameters.values() if p.kind not in several and p.default is p.empty]
