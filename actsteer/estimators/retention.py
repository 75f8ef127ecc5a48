"""Retention: how far a steered model's answers on other data have moved from those of the unsteered model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from actsteer.collecting.batches import Batches, arguments, call
from actsteer.errors import LossError
from actsteer.steering.gates.gate import wide
from actsteer.steering.steerer import Steerer
from actsteer.tokens.passes import real_of
from actsteer.tokens.whose import Masks


@final
@dataclass(frozen=True, eq=False)
class Retain:
    """Other data, on which the answers are to stay: adds weight · KL(unsteered ‖ steered) to the loss of `optimize`.

    Args:
        batches: as for `collect`; each step takes one batch.
        weight: against the loss, per nat.

    Source: learning without forgetting, Li & Hoiem 2016.

    >>> from actsteer import optimize
    >>> model, x = nn.Sequential(nn.Identity()), torch.zeros(4, 2)
    >>> def first(output):
    ...     return -output[:, 0].mean()
    >>> options = {"sites": "0", "loss": first, "lr": 0.1, "steps": 50}
    >>> free, held = (optimize(model, x, retain=kept, **options)["0"] for kept in (None, Retain(x, weight=100.0)))
    >>> bool(free[0] - free[1] > 2), bool(held[0] - held[1] < 0.1)  # the answer is the softmax of both
    (True, True)
    """

    batches: Batches
    weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight: expected a number >= 0, got {self.weight}")


def divergence(model: nn.Module, steerer: Steerer, batch: Any, *, mask: Masks | None = None) -> Tensor:
    """The mean KL divergence KL(unsteered ‖ steered) of the answers to one batch, in nats; pads do not count.

    The answers are the softmax of the output's last axis: of a tensor, of `.logits`, or of the first of several.

    Raises:
        LossError: the output holds no such tensor.
    """
    with unsteered(steerer):
        plain = log_softmax(logits_of(call(model, batch)), dim=-1)
    steered = log_softmax(logits_of(call(model, batch)), dim=-1)
    apart = kl_div(steered, plain, reduction="none", log_target=True).sum(dim=-1)
    args, kwargs = arguments(batch)
    real = real_of(model, args, kwargs, mask=None if isinstance(mask, Mapping) else mask)
    if real is not None and real.shape == apart.shape:
        return (apart * real.to(apart.device)).sum() / real.sum()
    return apart.mean()


@contextmanager
def unsteered(steerer: Steerer) -> Iterator[None]:
    """A block in which the strength is 0, and no gradient is recorded."""
    strength, steerer.c = steerer.c, 0.0
    try:
        with torch.no_grad():
            yield
    finally:
        steerer.c = strength


def logits_of(output: Any) -> Tensor:
    """The output itself, its `.logits`, or the first of several; in float32 at least.

    Raises:
        LossError: it is none of these.
    """
    found = getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor) or not found.ndim:
        raise LossError(
            f"expected an output with logits, got {type(output).__name__}; put a term of your own into the loss instead"
        )
    return wide(found)
