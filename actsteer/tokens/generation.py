"""Generation: what is known of a text while it is generated."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from actsteer.tokens.tokens import Tokens


@final
class Generation:
    """A text that is being generated: where its prompt ends, and what was decided about it.

    Args:
        rows, prompt, mask: rows and columns of the prompt, and where its tokens are, as far as that is known.
        parent: the generation inside of which it runs, whose decisions hold for as many rows.
    """

    def __init__(
        self,
        *,
        rows: int | None = None,
        prompt: int | None = None,
        mask: Tensor | None = None,
        parent: Generation | None = None,
    ) -> None:
        self.rows, self.prompt, self.mask, self.parent = rows, prompt, mask, parent
        self._is_given, self._rows = prompt is not None, rows
        self.keeps_rows = True  # whether its rows are those that it began with
        self.decisions: dict[int, Tensor] = {}
        self.embedded = 0  # the columns of a prompt that came as embeddings alone, without ids
        self.announces = False  # whether it tells of each of its passes beforehand
        self.announced: dict[int, Any] = {}  # number of the passes -> the one that comes next
        self.others: dict[int, tuple[Any, Generation]] = {}  # id of a cache -> it, and the other text that it holds

    def begin_window(self, rows: int) -> None:
        """The next pass has a prompt of so many rows: the first, or that of the next window of a recording."""
        if self.announces:
            self.keeps_rows = self.keeps_rows and rows == self._rows
            self.decisions = {}
        if self.announces or not self._is_given:  # what ran before, to find the language, was no prompt of it
            self.prompt = self.mask = None
        self._rows = rows

    def within(self, tokens: Tokens) -> Tokens:
        """The tokens, which nobody else has yet, as those of a pass of this text; the first one has its prompt."""
        if self.prompt is None and isinstance(tokens.start, int):
            self.prompt = tokens.start + tokens.length
        if self.rows is None:
            self.rows = tokens.rows
        copies, mask = self.copies(tokens.rows), self.mask
        if mask is not None and len(mask) != tokens.rows:
            mask = mask.repeat_interleave(max(1, copies), 0)
        tokens.prompt, tokens.prompt_mask, tokens.copies, tokens.may_go_on = self.prompt, mask, copies, True
        return tokens

    def copies(self, rows: int) -> int:
        """How many rows were made from one of the caller's; 0 if that is not known any more."""
        if not self.keeps_rows:
            return 0
        return rows // self.rows if self.rows and rows % self.rows == 0 else 1

    def decided(self, gate: int, rows: int | None) -> Tensor | None:
        """What a gate has decided here, or for as many rows in a generation around."""
        found, parent = self.decisions.get(gate), self.parent
        while found is None and parent is not None:
            found = parent.decisions.get(gate)
            if found is not None and rows is not None and len(found) != rows:
                found = None
            parent = parent.parent
        return found
