"""Positions: which tokens of a text are meant, in data and in steering alike; pads are never among them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeGuard, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from actsteer.errors import BatchError, PositionsError, ShapeError
from actsteer.sites.device import brought
from actsteer.tokens.tokens import Tokens

Words: TypeAlias = Literal["all", "last", "mean", "prompt", "generated"]
Positions: TypeAlias = Words | int | Sequence[int] | Sequence[Sequence[int]] | slice | Tensor | Callable[[Any], Tensor]
"""A word; an index or several, negative ones from the end of the prompt; a list of indices for each row; a slice that
goes forward; a bool mask (S,) or (B, S), or one (B, S) of the integers 0 and 1; or a callable that makes such a mask of
the inputs by name. They count the real tokens of each text."""

_FURTHEST = 2**31 - 1


def check(positions: Positions, *, steers: bool) -> None:
    """Raise TypeError or ValueError unless these are positions that data has or, with `steers`, that can be steered."""
    if hasattr(positions, "__array__") and not isinstance(positions, Tensor):
        raise TypeError(
            f"positions: expected a tensor for a mask, got {type(positions).__name__}; give torch.as_tensor of it"
        )
    match positions:
        case str() if positions not in get_args(Words):
            words = ", ".join(map(repr, get_args(Words)))
            raise ValueError(f"positions: expected one of {words}, an index, a slice or a mask, got {positions!r}")
        case "generated" if not steers:
            raise ValueError(
                "positions: 'generated' is for steering, and a pass over data generates nothing; feed the generated "
                "text and take a slice"
            )
        case "mean" if steers:
            raise ValueError(
                "positions: 'mean' is for data, and the mean over a text is no token that could be steered; take 'all'"
            )
        case slice() if positions.step is not None and positions.step < 1:
            raise ValueError(f"positions: expected a slice that goes forward, got {positions!r}")
        case int() | slice() | Sequence() if any(
            isinstance(own, int) and abs(own) > _FURTHEST for own in _numbers(positions)
        ):
            raise ValueError(
                f"positions: expected indices of at most {_FURTHEST}, and no text is as long; got a larger one"
            )
        case Tensor() if not _is_mask(positions):
            raise ShapeError(
                "positions: expected a bool mask of shape (S,) or (B, S), or (B, S) integers 0 and 1, got "
                f"{positions.dtype} of shape {tuple(positions.shape)}; give indices as a list"
            )
        case bool():
            raise TypeError("positions: expected a word, an index, a slice, a mask or a callable, got a bool")
        case str() | int() | slice() | Tensor():
            pass
        case Sequence() if are_indices(positions):
            pass
        case Sequence() if positions and all(map(are_indices, positions)):
            if len({len(own) for own in positions if isinstance(own, Sequence)}) > 1:
                raise ShapeError(
                    f"positions: expected as many indices for each row, got {positions!r}; give a bool mask (B, S)"
                )
        case _ if not callable(positions):
            raise TypeError(
                "positions: expected a word, an index, a list of indices, or one for each row, a slice, a mask or a "
                f"callable, got {positions!r}"
            )


def are_indices(positions: Any) -> TypeGuard[Sequence[int]]:
    """Whether it is a list of indices."""
    if not isinstance(positions, Sequence) or isinstance(positions, str):
        return False
    return bool(positions) and all(isinstance(own, int) and not isinstance(own, bool) for own in positions)


def are_of_rows(positions: Positions | None) -> bool:
    """Whether they may be other ones for each row of a batch, as a mask, or a list for each row."""
    is_list = isinstance(positions, Sequence) and not isinstance(positions, str)
    return isinstance(positions, Tensor) or (is_list and not are_indices(positions))


def _is_mask(given: Tensor) -> bool:
    """Whether it can be nothing but a mask: one row of integers may be meant as indices."""
    if given.dtype is torch.bool:
        return given.ndim in (1, 2)
    if given.ndim != 2 or given.is_floating_point() or given.is_complex():
        return False
    return torch.compiler.is_compiling() or bool(((given == 0) | (given == 1)).all())


def _numbers(positions: int | slice | Sequence[Any]) -> Sequence[Any]:
    """What they consist of."""
    if isinstance(positions, slice):
        return positions.start, positions.stop, positions.step
    if isinstance(positions, int):
        return [positions]
    return [index for own in positions for index in (own if isinstance(own, list | tuple) else [own])]


def each_of(positions: Positions) -> list[Positions]:
    """Positions each of which means one token of a row, of several indices; any others are one."""
    if isinstance(positions, str) or not isinstance(positions, Sequence):
        return [positions]
    if are_indices(positions):
        return list(positions)
    return [[[index] for index in column] for column in zip(*positions, strict=True)]


def from_text(text: str) -> Positions:
    """Positions in writing: a word as it is, "3" an index, "1:4" a slice.

    Raises:
        ValueError: none of these.

    >>> from_text("last"), from_text("-1"), from_text("1:")
    ('last', -1, slice(1, None, None))
    """
    found: Any = text
    try:
        if ":" in text:
            found = slice(*(int(part) if part else None for part in text.split(":")))
        elif text not in get_args(Words):
            found = int(text)
    except (ValueError, TypeError):
        raise ValueError(
            f"positions: expected all, last, prompt, generated, an index, or start:stop, got {text!r}"
        ) from None
    check(found, steers=True)
    return found  # type: ignore[no-any-return]


def described(positions: Positions) -> dict[str, str]:
    """Metadata that tells statistics of different positions apart; none for all of them."""
    if positions in ("all", "prompt") if isinstance(positions, str) else False:
        return {}
    if isinstance(positions, Tensor):
        bits = bytes(positions.cpu().flatten().to(torch.uint8).tolist())
        return {"positions": f"mask {tuple(positions.shape)} {hashlib.sha256(bits).hexdigest()[:16]}"}
    return {"positions": getattr(positions, "__qualname__", "callable") if callable(positions) else str(positions)}


def chosen(positions: Positions, tokens: Tokens) -> Bool[Tensor, "_ S"]:
    """Which of these tokens are meant, (B, S) or (1, S).

    "prompt" and "generated" part the tokens where the prompt ends; in data all is prompt. Indices count the real tokens
    of a text from its start, so that those beyond the prompt are generated ones; negative indices, and "last", count
    from the end of the prompt. A slice without an end goes on into what is generated. A mask is one of the prompt.

    Raises:
        PositionsError: they cannot be known in this pass.
        BatchError, ShapeError: a text that is too short for an index; a mask of another shape.
    """
    counts = positions == "last" if isinstance(positions, str) else isinstance(positions, int | slice | Sequence)
    if tokens.texts is not None and counts:  # in each text of a packed row
        return tokens.spread(chosen(positions, tokens.unpacked()))
    found, real = _chosen(positions, tokens), tokens.real
    return found if real is None else found & real


def all_or_none(positions: Positions, tokens: Tokens) -> bool | None:
    """Whether all of these tokens, none of which is a pad, are meant (True) or none of them (False); None: neither is
    plain to see, as it is where a generation goes on by one token."""
    start, prompt = tokens.start, tokens.prompt
    if positions not in ("prompt", "generated") or not (isinstance(start, int) and isinstance(prompt, int)):
        return None
    if start < prompt < start + tokens.length:
        return None
    return (start < prompt) == (positions == "prompt")


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
            return _nth([-1], tokens, positions)
        case int():
            return _nth([positions], tokens, positions)
        case slice():
            return _within(positions, tokens)
        case Tensor():
            return _masked(positions, tokens)
        case Sequence() if not isinstance(positions, str):
            return _nth(positions, tokens, positions) if are_indices(positions) else _of_rows(positions, tokens)
        case _:
            assert callable(positions)
            if tokens.batch is None:
                raise PositionsError(
                    "positions: a callable sees all inputs, and those before the present ones are not known here; use "
                    "model.generate without prefill chunks, or run without a cache"
                )
            return _computed(positions(tokens.batch), tokens)


def _nth(indices: Sequence[int], tokens: Tokens, positions: Positions) -> Tensor:
    numbers, found = tokens.numbers, None
    for index in indices:
        wanted = index if index >= 0 else tokens.prompt_lengths + index
        _check_long_enough(-index if index < 0 else 0 if tokens.may_go_on else index + 1, tokens, positions)
        own = numbers == wanted
        own = own & tokens.in_prompt if index < 0 else own
        found = own if found is None else found | own
    assert found is not None
    return found


def _of_rows(positions: Sequence[Any], tokens: Tokens) -> Tensor:
    """The tokens at the indices of each row."""
    indices = torch.tensor([list(own) for own in positions])
    if len(indices) * tokens.copies != tokens.rows:
        raise ShapeError(
            f"positions: indices for {len(indices)} rows against {tokens.rows} rows; give a list for each row, or one "
            "list of indices for all of them"
        )
    indices = indices.repeat_interleave(tokens.copies, dim=0)
    back = indices < 0
    needed = torch.where(back, -indices, 0 if tokens.may_go_on else indices + 1).amax(dim=1)
    _check_long_enough(needed, tokens, positions)
    indices, back = (brought(own, tokens.device) for own in (indices, back))
    wanted = torch.where(back, tokens.prompt_lengths + indices, indices)
    found = tokens.numbers[:, :, None] == wanted[:, None]
    return (found & (tokens.in_prompt[:, None] | ~back[:, None])).any(dim=2)


def _check_long_enough(needed: int | Int[Tensor, " B"], tokens: Tokens, positions: Positions) -> None:
    """The prompt must have as many tokens as are needed, in each row."""
    if torch.compiler.is_compiling() or not tokens.has_whole_prompt or not bool(torch.as_tensor(needed).any()):
        return
    lengths = torch.as_tensor(tokens.prompt_lengths).flatten()
    lengths, least = torch.broadcast_tensors(lengths, torch.as_tensor(needed, device=lengths.device))
    if bool((lengths < least).any()):
        row = int((lengths < least).int().argmax())
        raise BatchError(
            f"positions={positions!r}: row {row} of the batch has {int(lengths[row])} tokens, and {int(least[row])} "
            "are needed; leave it out, or choose other positions"
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
    whole = mask[None] if mask.ndim == 1 else mask.bool()
    if len(whole) > 1:
        whole = whole.repeat_interleave(tokens.copies, dim=0)
    if whole.shape[1] != tokens.prompt or len(whole) not in (1, tokens.rows):
        raise ShapeError(
            f"positions: a mask of shape {tuple(mask.shape)} against {tokens.rows} rows of {tokens.prompt} positions; "
            "give one of that shape, or a callable that makes one for each batch"
        )
    if not isinstance(tokens.start, int):
        raise PositionsError("positions: a mask needs a cache whose length is a number; use model.generate")
    part = brought(whole, tokens.device)[:, tokens.start : tokens.start + tokens.length]
    return torch.nn.functional.pad(part, (0, tokens.length - part.shape[1]))


def _computed(mask: Any, tokens: Tokens) -> Tensor:
    if not isinstance(mask, Tensor) or not _is_mask(mask):
        raise ShapeError(
            "positions: expected a callable that gives a bool mask (S,) or (B, S), or (B, S) integers 0 and 1, got "
            f"{mask!r}"
        )
    whole = mask[None] if mask.ndim == 1 else mask.bool()
    assert isinstance(tokens.start, int)
    if whole.shape[1] != tokens.start + tokens.length or len(whole) not in (1, tokens.rows):
        raise ShapeError(
            f"positions: the callable gave a mask of shape {tuple(mask.shape)}, expected {tokens.rows} rows of "
            f"{tokens.start + tokens.length} positions"
        )
    return brought(whole, tokens.device)[:, tokens.start :]
