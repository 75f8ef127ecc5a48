"""Validation: the loss on other data while training, by which the best is kept and training ends early."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from actsteer.collecting.batches import Batches, rows_in
from actsteer.estimators.stream import Targets, check_pairing, once


@final
@dataclass(frozen=True, eq=False)
class Validation:
    """Data on which `optimize` looks at the loss, at the start and 20 times in a run, and keeps what was best.

    Args:
        batches: as for `collect`; the loss, a mean over the rows of a batch, is weighed by their number.
        targets: what the loss compares with, as for `optimize`.
        patience: training ends when so many looks in a row were not better.

    >>> from torch import nn
    >>> from actsteer import optimize
    >>> contrary = Validation(torch.zeros(4, 2), targets=-torch.ones(4, 2))
    >>> loss, goal = nn.functional.mse_loss, torch.ones(4, 2)
    >>> data = {"batches": torch.zeros(4, 2), "targets": goal, "validation": contrary}
    >>> optimize(nn.Sequential(nn.Identity()), sites="0", loss=loss, steps=20, **data)["0"]  # the start is best
    tensor([0., 0.])
    """

    batches: Batches
    targets: Targets | None = field(default=None, kw_only=True)
    patience: int = field(default=5, kw_only=True)

    def __post_init__(self) -> None:
        check_pairing(self.batches, self.targets)
        if self.patience < 1:
            raise ValueError(f"patience: expected 1 or more, got {self.patience}")


@final
class Best:
    """What was best on the validation data so far."""

    def __init__(self, validation: Validation, leaves: Sequence[Tensor], batch_size: int) -> None:
        self._validation, self._leaves, self._batch_size = validation, leaves, batch_size
        self._loss, self._since = math.inf, 0
        self._kept = [leaf.detach().clone() for leaf in leaves]

    @torch.no_grad()
    def has_passed(self, measured: Callable[[Any, Any], float]) -> bool:
        """Look at the loss, keep what is better, and say whether nothing was better for `patience` looks."""
        pairs = once(self._validation.batches, self._validation.targets, batch_size=self._batch_size)
        seen = [(rows_in(batch), measured(batch, target)) for batch, target in pairs]
        loss = sum(rows * value for rows, value in seen) / sum(rows for rows, _ in seen)
        self._since += 1
        if loss < self._loss:
            self._loss, self._since = loss, 0
            self._kept = [leaf.clone() for leaf in self._leaves]
        return self._since >= self._validation.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best back."""
        for leaf, kept in zip(self._leaves, self._kept, strict=True):
            leaf.copy_(kept)
