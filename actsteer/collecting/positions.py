"""Positions: which tokens of a sequence are meant, counted among the real ones: pads are never among them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsteer.errors import BatchError, ShapeError

Words: TypeAlias = Literal["all", "last", "mean", "prompt", "generated"]
Positions: TypeAlias = Words | int | Sequence[int] | slice | Tensor | Callable[[Any], Tensor]
"""A word; an index or several, negative ones from the end; a slice; a bool mask (S,) or (B, S); or a callable that
makes such a mask from the batch. With an attention mask, all but the masks count real tokens alone."""


def check(positions: Positions) -> None:
    """Raise TypeError or ValueError unless these are positions that a pass over data knows."""
    match positions:
        case str() if positions not in get_args(Words):
            words = ", ".join(map(repr, get_args(Words)))
            raise ValueError(f"positions: expected one of {words}, an index, a slice or a mask, got {positions!r}")
        case "generated":
            raise ValueError("positions: a pass over data generates nothing; feed the generated text and take a slice")
        case Tensor() if positions.dtype is not torch.bool or positions.ndim not in (1, 2):
            raise ShapeError(
                f"positions: expected a bool mask of shape (S,) or (B, S), got {positions.dtype} of shape "
                f"{tuple(positions.shape)}; give indices as a list"
            )
        case bool():
            raise TypeError("positions: expected a word, an index, a slice, a mask or a callable, got a bool")
        case str() | int() | slice() | Tensor():
            pass
        case Sequence() if positions and all(isinstance(i, int) and not isinstance(i, bool) for i in positions):
            pass
        case _ if not callable(positions):
            raise TypeError(
                "positions: expected a word, an index, a list of indices, a slice, a mask or a callable, got "
                f"{positions!r}"
            )


def described(positions: Positions) -> dict[str, str]:
    """Metadata that tells statistics of different positions apart; none for all of them."""
    if positions in ("all", "prompt") if isinstance(positions, str) else False:
        return {}
    if isinstance(positions, Tensor):
        bits = bytes(positions.cpu().flatten().to(torch.uint8).tolist())
        return {"positions": f"mask {tuple(positions.shape)} {hashlib.sha256(bits).hexdigest()[:16]}"}
    return {"positions": getattr(positions, "__qualname__", "callable") if callable(positions) else str(positions)}


def mean(
    activation: Float[Tensor, "rows positions d"], real: Bool[Tensor, "rows positions"] | None
) -> Float[Tensor, "rows d"]:
    """The mean over the real tokens of every sequence."""
    real = torch.ones(activation.shape[:2], dtype=torch.bool) if real is None else real
    real = real.to(activation.device)
    _check_long_enough(real, 1, "mean")
    wide = activation.to(torch.promote_types(activation.dtype, torch.float32))
    total = torch.where(real[..., None], wide, 0).sum(dim=1)
    return (total / real.sum(dim=1, keepdim=True)).to(activation.dtype)


def chosen(
    shape: tuple[int, int], real: Bool[Tensor, "rows positions"] | None, positions: Positions, *, device: torch.device
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The rows of the batch and the positions in them that are meant, in activations of shape (rows, positions)."""
    real = torch.ones(shape, dtype=torch.bool) if real is None else real
    real = real.to(device)
    if isinstance(positions, int) or positions == "last" or isinstance(positions, list | tuple):
        indices = [positions] if isinstance(positions, int) else [-1] if isinstance(positions, str) else positions
        where = torch.stack([_nth(real, index) for index in indices], dim=1)
        return torch.arange(shape[0], device=device).repeat_interleave(len(indices)), where.flatten()
    owners, where = (real & _mask(positions, real)).nonzero(as_tuple=True)
    return owners, where


def _nth(real: Tensor, index: int) -> Tensor:
    """The position of the index-th real token of each sequence."""
    _check_long_enough(real, index + 1 if index >= 0 else -index, index)
    counts = real.cumsum(dim=1)
    wanted = index + 1 if index >= 0 else counts[:, -1:] + index + 1
    return ((counts == wanted) & real).int().argmax(dim=1)


def _check_long_enough(real: Tensor, needed: int, positions: Any) -> None:
    lengths = real.sum(dim=1)
    if short := (lengths < needed).nonzero().flatten().tolist():
        raise BatchError(
            f"positions={positions!r}: row {short[0]} of the batch has {int(lengths[short[0]])} positions, and "
            f"{needed} are needed; leave it out, or choose other positions"
        )


def _mask(positions: Positions, real: Tensor) -> Tensor:
    if isinstance(positions, str):
        return real
    if isinstance(positions, slice):
        number = real.cumsum(dim=1) - 1
        ranges = [range(*positions.indices(int(n))) for n in real.sum(dim=1)]
        chosen = [torch.isin(own, torch.tensor(list(r)).to(own)) for own, r in zip(number, ranges, strict=True)]
        return torch.stack(chosen)
    assert isinstance(positions, Tensor)
    if positions.shape not in (real.shape, real.shape[1:]):
        raise ShapeError(
            f"positions: a mask of shape {tuple(positions.shape)} against {tuple(real.shape)} of the activation (rows, "
            "positions); give one of that shape, or a callable that makes one for each batch"
        )
    return positions.to(real.device).expand_as(real)
