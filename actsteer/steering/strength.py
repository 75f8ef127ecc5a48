"""Strength: what the user gives as `c`, checked and spread over the concepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor

from actsteer.errors import ConceptNotFoundError, StrengthError, close_names

Schedule: TypeAlias = Callable[[int], float]
"""The strength in each step of the generation: 0 for the prompt, 1 for the first token that was generated, ..."""
Strength: TypeAlias = float | Tensor | Schedule
"""One number; a tensor (B,), one per row of the batch, or (B, S), one per row and position; or a schedule."""
Strengths: TypeAlias = (
    Strength | Mapping[str, float] | Mapping[str, Tensor] | Mapping[str, Schedule] | Mapping[str, Strength]
)
"""One strength for every concept, or concept -> strength; a concept that is not named counts as zero."""


def strengths_of(c: Strengths, concepts: Sequence[str]) -> list[Tensor | Schedule]:
    """One strength per concept, each a tensor of shape (), (B,) or (B, S), or a schedule.

    Raises:
        ConceptNotFoundError: a concept that is not in the bank.
        StrengthError: not a number, not finite, of another shape, or rows that disagree in number.
    """
    if isinstance(c, Mapping):
        for concept in c:
            if concept not in concepts:
                near = close_names(concept, concepts)
                raise ConceptNotFoundError(f"c names no concept of the bank: {concept!r}. {near}")
        parsed = [_checked(c.get(concept, 0.0), f"c[{concept!r}]") for concept in concepts]
    else:
        parsed = [_checked(c, "c")] * len(concepts)
    rows = {len(strength) for strength in parsed if isinstance(strength, Tensor) and strength.ndim}
    if len(rows) > 1:
        raise StrengthError(f"c has {sorted(rows)} rows for different concepts; give each one strength per row")
    return parsed


def strength_at(schedule: Schedule, step: int) -> Tensor:
    """What a schedule says about one step, 0-dim.

    Raises:
        StrengthError: not one finite number.
    """
    try:
        given = schedule(step)
    except TypeError as error:
        raise StrengthError(f"c({step}): expected a callable of the generation step alone; {error}") from error
    checked = _checked(given, f"c({step})")
    if not isinstance(checked, Tensor) or checked.ndim:
        raise StrengthError(f"c({step}): expected one number for a step of the generation, got {checked}")
    return checked


def _checked(strength: object, where: str) -> Tensor | Schedule:
    if isinstance(strength, Real):
        if not math.isfinite(strength):
            raise StrengthError(f"{where}: expected a finite number, got {strength}")
        return torch.tensor(float(strength), dtype=torch.float64)
    if not isinstance(strength, Tensor):
        if callable(strength):
            return strength
        raise StrengthError(
            f"{where}: expected a number or a tensor of shape (), (B,) or (B, S), or a callable of the generation "
            f"step, got {strength!r}"
        )
    if strength.ndim > 2 or strength.is_complex() or strength.dtype is torch.bool:
        raise StrengthError(
            f"{where}: expected a tensor of shape (), (B,) or (B, S), one strength per row or per row and position, "
            f"got {strength.dtype} of shape {tuple(strength.shape)}"
        )
    if strength.requires_grad:
        raise StrengthError(f"{where}: gradients do not reach c; detach it, or train a vector with optimize")
    if strength.device.type == "cpu" and not bool(torch.isfinite(strength).all()):
        raise StrengthError(f"{where}: expected finite numbers, got {strength}")
    return strength.clone()
