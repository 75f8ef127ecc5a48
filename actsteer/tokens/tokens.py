"""Tokens: where the tokens of one forward pass stand in their texts, counted from the start of each, pads left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from actsteer.errors import PositionsError


@final
class Tokens:
    """The S tokens of each of B rows, with what was computed before them in a cache.

    Args:
        rows, length: B and S.
        start: the column of the first of them: how many columns lie in the cache; None if it cannot be known.
        mask: the tokens (true) and pads (false) of all columns so far, (B, start + S); None where there are no pads.
        prompt: the number of columns of the prompt; None if it cannot be known.
        prompt_mask: the mask of all columns of the prompt, where `mask` does not reach so far yet.
        batch: the inputs that a callable chooses positions from, of all columns so far; None if they are not known.
        copies: how many rows in a row were made from one of the caller's, as beams are.
        texts: of packed rows, the number of the text that each token is of, counted on from row to row, (B, S).
        may_go_on: whether a later pass may go on with these texts.
        unknown: why something is not known.
        device: where the inputs are.
    """

    __slots__ = (
        *("batch", "copies", "device", "length", "mask", "may_go_on", "prompt", "prompt_mask", "rows", "start"),
        *("texts", "unknown"),
    )

    def __init__(
        self,
        rows: int,
        length: int,
        *,
        start: int | Tensor | None = 0,
        mask: Bool[Tensor, "B T"] | None = None,
        prompt: int | None = None,
        prompt_mask: Bool[Tensor, "B P"] | None = None,
        batch: Mapping[str, Any] | None = None,
        copies: int = 1,
        texts: Int[Tensor, "B S"] | None = None,
        may_go_on: bool = False,
        unknown: str = "",
        device: torch.device | None = None,
    ) -> None:
        self.rows, self.length, self.start = rows, length, start
        self.mask, self.prompt, self.prompt_mask = mask, prompt, prompt_mask
        self.batch, self.copies, self.unknown, self.device = batch, copies, unknown, device
        self.texts, self.may_go_on = texts, may_go_on

    def but(self, **changed: Any) -> Tokens:
        """These tokens, some of which is otherwise."""
        given = {name: getattr(self, name) for name in Tokens.__slots__} | changed
        return Tokens(given.pop("rows"), given.pop("length"), **given)

    def last(self, count: int) -> Tokens:
        """The last columns alone, as a head sees them that is to answer there."""
        if count >= self.length or self.start is None:
            return self if count >= self.length else self.but(length=count)
        return self.but(start=self.start + self.length - count, length=count, batch=None)

    @property
    def grid(self) -> tuple[Int[Tensor, "T L"], Bool[Tensor, "T L"]]:
        """Of packed rows, where the tokens of each text are among all in a line, and which places it fills."""
        assert self.texts is not None
        sizes = torch.bincount(self.texts.flatten())
        places = torch.arange(int(sizes.max()), device=sizes.device)
        index = (sizes.cumsum(dim=0) - sizes)[:, None] + places
        return index.clamp(max=self.rows * self.length - 1), places < sizes[:, None]

    def unpacked(self) -> Tokens:
        """Of packed rows, the tokens of each text in a row of its own, filled up with pads on the right."""
        _, mask = self.grid
        return Tokens(*mask.shape, mask=mask, prompt=mask.shape[1], may_go_on=self.may_go_on, device=self.device)

    def spread(self, found: Shaped[Tensor, "T L"]) -> Shaped[Tensor, "B S"]:
        """What was found of `unpacked` tokens, where they lie in the packed rows."""
        index, real = self.grid
        flat = torch.zeros(self.rows * self.length, dtype=found.dtype, device=found.device)
        flat[index[real]] = found.expand(real.shape)[real]
        return flat.view(self.rows, self.length)

    @property
    def real(self) -> Bool[Tensor, "B S"] | None:
        """Which of them are tokens and not pads; None: all."""
        return None if self.mask is None else self.mask[:, self.mask.shape[1] - self.length :]

    @property
    def columns(self) -> Int[Tensor, " S"]:
        """The column of each."""
        if self.start is None:
            raise PositionsError(self.unknown)
        return self.start + torch.arange(self.length, device=self.device)

    @property
    def numbers(self) -> Int[Tensor, "_ S"]:
        """The place of each token in its text, from 0; of a pad, the place of the token before it."""
        if self.mask is None:
            return self.columns[None]
        if isinstance(self.start, int) and self.mask.shape[1] != self.start + self.length:
            raise PositionsError(
                f"the attention mask has {self.mask.shape[1]} columns, and there are {self.start + self.length} with "
                "those in the cache; pass a mask of all of them"
            )
        return self.mask.cumsum(dim=1)[:, self.mask.shape[1] - self.length :] - 1

    @property
    def in_prompt(self) -> Bool[Tensor, " S"]:
        """Which columns are of the prompt."""
        self.check_known()
        assert self.prompt is not None
        return self.columns < self.prompt

    @property
    def prompt_lengths(self) -> Int[Tensor, "_ 1"] | int:
        """How many tokens the prompt of each row has."""
        mask = self._mask_in_prompt
        assert self.prompt is not None
        return self.prompt if mask is None else mask.sum(dim=1, keepdim=True)

    @property
    def _mask_in_prompt(self) -> Bool[Tensor, "B P"] | None:
        self.check_known()
        assert self.prompt is not None
        mask = self.prompt_mask if self.prompt_mask is not None else self.mask
        if mask is None:
            return None
        if mask.shape[1] < self.prompt:
            raise PositionsError(
                "the prompt comes in chunks, and where its pads lie is not known yet; pass attention_mask= to generate"
            )
        return mask[:, : self.prompt]

    def whole(self) -> Tokens:
        """The tokens of all columns so far, or those of the whole prompt where it is longer."""
        mask = self._mask_in_prompt
        assert self.prompt is not None
        if isinstance(self.start, int) and self.start + self.length >= self.prompt:
            return self.but(start=0, length=self.start + self.length)
        return self.but(start=0, length=self.prompt, mask=mask, batch=None)

    @property
    def steps(self) -> list[int]:
        """The generation step in which each column is fed to the model: 0 for the prompt, then 1, 2, ..."""
        self.check_known()
        assert self.prompt is not None
        if not isinstance(self.start, int):
            raise PositionsError("c: the generation step is not known here, for the length of the cache is a tensor")
        return [max(0, self.start + index - self.prompt + 1) for index in range(self.length)]

    @property
    def has_whole_prompt(self) -> bool:
        """Whether all of the prompt's tokens are among these."""
        return (
            isinstance(self.start, int) and self.start == 0 and self.prompt is not None and self.length >= self.prompt
        )

    def check_known(self) -> None:
        """Raise PositionsError if it cannot be known where the prompt ends."""
        if self.prompt is None:
            raise PositionsError(self.unknown)
