"""Generating: what is known of a generation that is under way."""

from __future__ import annotations

from typing import final

from torch import Tensor

from actsteer.steering.tokens import Tokens


@final
class Generating:
    """A call of `generate` that is under way: where its prompt ends, as far as that is known."""

    def __init__(self, *, rows: int | None, prompt: int | None, mask: Tensor | None) -> None:
        self.rows, self.prompt, self.mask = rows, prompt, mask

    def copies(self, rows: int) -> int:
        """How many rows were made from one of the caller's."""
        return rows // self.rows if self.rows and rows % self.rows == 0 else 1

    def within(self, tokens: Tokens) -> Tokens:
        """The tokens of a pass of this generation; the first one has the prompt, unless that is known."""
        if self.prompt is None and isinstance(tokens.start, int):
            self.prompt = tokens.start + tokens.length
        if self.rows is None:
            self.rows = tokens.rows
        copies = self.copies(tokens.rows)
        mask = (
            self.mask if self.mask is None or len(self.mask) == tokens.rows else self.mask.repeat_interleave(copies, 0)
        )
        return Tokens(
            tokens.rows,
            tokens.length,
            start=tokens.start,
            mask=tokens.mask,
            prompt=self.prompt,
            prompt_mask=mask,
            batch=tokens.batch,
            copies=copies,
            unknown=tokens.unknown,
            device=tokens.device,
        )
