"""Stream: batches with their targets, repeated for as long as a training runs, and the loss on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, is_one_call, iterate
from actsteer.errors import BatchError, LossError

Loss: TypeAlias = Callable[..., Tensor]
"""`loss(output)` or `loss(output, target)`, 0-dim."""
Targets: TypeAlias = Tensor | Iterable[Any]
"""One for each row of a tensor, for each batch of an iterable, or for the one call that a mapping or a tuple is."""


def endless(
    batches: Batches, targets: Targets | None, *, batch_size: int, generator: torch.Generator | None
) -> Iterator[tuple[Any, Any]]:
    """Pairs (batch, target) without end; one tensor is shuffled anew in every epoch, an iterable keeps its order."""
    check_pairing(batches, targets)
    while True:
        if isinstance(batches, Tensor):
            order = torch.randperm(len(batches), generator=generator)
            for rows in iterate(order, batch_size=batch_size, progress=False, label=""):
                batch = batches[rows.to(batches.device)]
                yield batch, targets[rows.to(targets.device)] if isinstance(targets, Tensor) else batch
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
    wanted = torch.split(targets, batch_size) if isinstance(targets, Tensor) else targets
    for batch, target in zip_longest(whole, wanted, fillvalue=missing):
        if batch is missing or target is missing:
            raise BatchError("targets: expected one for each batch in every epoch; pass lists, not generators")
        yield batch, target


def check_pairing(batches: Batches, targets: Targets | None) -> None:
    """Raise BatchError unless the targets are of the batches' kind and number."""
    if is_one_call(batches):
        return
    if isinstance(batches, Tensor) != isinstance(targets, Tensor) and targets is not None:
        raise BatchError("targets: expected a tensor for batches in one tensor, and an iterable for an iterable")
    if isinstance(batches, Tensor) and isinstance(targets, Tensor) and len(batches) != len(targets):
        raise BatchError(f"targets: expected one for each of the {len(batches)} rows, got {len(targets)}")


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
    """Whether the loss cannot be called with the output alone."""
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except ValueError:  # a builtin such as torch.mean
        return False
    parameters = signature.parameters.values()
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters) > 1
