"""Positions: which tokens are steered, whatever part of the text a forward pass computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from actsteer.collecting import positions as of_data
from actsteer.collecting.positions import Positions
from actsteer.errors import BatchError, PositionsError, ShapeError
from actsteer.steering.tokens import Tokens


def check(positions: Positions) -> None:
    """Raise TypeError or ValueError unless these are positions that can be steered."""
    if isinstance(positions, str) and positions == "mean":
        raise ValueError("positions: the mean over a sequence is no token that could be steered; take 'all'")
    if isinstance(positions, slice) and (positions.step or 1) < 1:
        raise ValueError(f"positions: expected a slice that goes forward, got {positions!r}")
    if not (isinstance(positions, str) and positions == "generated"):
        of_data.check(positions)


def chosen(positions: Positions, tokens: Tokens) -> Bool[Tensor, "_ S"]:
    """Which of these tokens are steered, (B, S) or (1, S).

    "prompt" and "generated" part the tokens where the prompt ends. Indices count the real tokens of a row from the
    start of its text, so that those beyond the prompt are generated ones; negative indices, and "last", count from the
    end of the prompt. A slice without an end goes on into what is generated. A mask is one of the prompt.

    Raises:
        PositionsError: they cannot be known in this pass.
        BatchError, ShapeError: a prompt that is too short for a negative index; a mask of another shape.
    """
    found, real = _chosen(positions, tokens), tokens.real
    return found if real is None else found & real


def _chosen(positions: Positions, tokens: Tokens) -> Tensor:
    """The same, and perhaps some pads."""
    match positions:
        case "all":
            return torch.ones(1, tokens.length, dtype=torch.bool, device=tokens.device)
        case "prompt":
            return tokens.in_prompt[None]
        case "generated":
            return ~tokens.in_prompt[None]
        case "last":
            return _nth([-1], tokens)
        case int():
            return _nth([positions], tokens)
        case slice():
            return _within(positions, tokens)
        case Tensor():
            return _masked(positions, tokens)
        case Sequence() if not isinstance(positions, str):
            return _nth(positions, tokens)
        case _:
            assert callable(positions)
            if tokens.batch is None:
                raise PositionsError(
                    "positions: a callable sees all inputs, and those before the present ones are not known here; use "
                    "model.generate without prefill chunks, or run without a cache"
                )
            return _computed(positions(tokens.batch), tokens)


def _nth(indices: Sequence[int], tokens: Tokens) -> Tensor:
    numbers, found = tokens.numbers, None
    for index in indices:
        wanted = index if index >= 0 else tokens.prompt_lengths + index
        _check_long_enough(index, tokens)
        own = numbers == wanted
        own = own & tokens.in_prompt if index < 0 else own
        found = own if found is None else found | own
    assert found is not None
    return found


def _check_long_enough(index: int, tokens: Tokens) -> None:
    """Indices that count from the end of a prompt must lie in it; those from its start may be yet to come."""
    if index >= 0 or torch.compiler.is_compiling() or not tokens.has_whole_prompt:
        return
    lengths, needed = torch.as_tensor(tokens.prompt_lengths), -index
    if bool((lengths < needed).any()):
        row = int(lengths.flatten().argmin())
        raise BatchError(
            f"positions={index}: row {row} of the batch has {int(lengths.min())} tokens, and {needed} are needed; "
            "leave it out, or choose other positions"
        )


def _within(positions: slice, tokens: Tokens) -> Tensor:
    numbers = tokens.numbers

    def bound(index: int) -> Tensor | int:
        if index >= 0:
            return index
        lengths = tokens.prompt_lengths + index
        return lengths.clamp(min=0) if isinstance(lengths, Tensor) else max(0, lengths)

    first = bound(positions.start or 0)
    found = numbers >= first
    if positions.stop is not None:
        found = found & (numbers < bound(positions.stop))
    if positions.step not in (None, 1):
        found = found & ((numbers - first) % positions.step == 0)
    return found


def _masked(mask: Tensor, tokens: Tokens) -> Tensor:
    """A mask of the prompt's columns; what is generated after it is not in it."""
    tokens.check_known()
    assert tokens.prompt is not None
    whole = mask[None] if mask.ndim == 1 else mask
    if len(whole) > 1:
        whole = whole.repeat_interleave(tokens.copies, dim=0)
    if whole.shape[1] != tokens.prompt or len(whole) not in (1, tokens.rows):
        raise ShapeError(
            f"positions: a mask of shape {tuple(mask.shape)} against {tokens.rows} rows of {tokens.prompt} positions; "
            "give one of that shape, or a callable that makes one for each batch"
        )
    if not isinstance(tokens.start, int):
        raise PositionsError("positions: a mask needs a cache whose length is a number; use model.generate")
    own = whole.to(tokens.device)[:, tokens.start : tokens.start + tokens.length]
    return torch.nn.functional.pad(own, (0, tokens.length - own.shape[1]))


def _computed(mask: Any, tokens: Tokens) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.ndim not in (1, 2):
        raise ShapeError(f"positions: expected a callable that gives a bool mask (S,) or (B, S), got {mask!r}")
    whole = mask[None] if mask.ndim == 1 else mask
    assert isinstance(tokens.start, int)
    if whole.shape[1] != tokens.start + tokens.length or len(whole) not in (1, tokens.rows):
        raise ShapeError(
            f"positions: the callable gave a mask of shape {tuple(mask.shape)}, expected {tokens.rows} rows of "
            f"{tokens.start + tokens.length} positions"
        )
    return whole.to(tokens.device)[:, tokens.start :]
