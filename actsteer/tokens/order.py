"""Order: the chosen tokens one after another, as `record` gives their activations, and their numbers in that order."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from actsteer.errors import ShapeError
from actsteer.tokens.positions import Positions, chosen, each_of
from actsteer.tokens.tokens import Tokens


def places(positions: Positions, tokens: Tokens) -> Int[Tensor, " n"]:
    """Which of all tokens in a line are meant; of several indices, row by row, in their order."""
    found = [
        chosen(own, tokens).expand(tokens.rows, tokens.length).flatten().nonzero()[:, 0] for own in each_of(positions)
    ]
    return torch.stack(found, dim=1).flatten()


def numbered(positions: Positions, tokens: Tokens) -> Int[Tensor, "rows prompt"]:
    """The number that each token of the prompt has in the order of `places`, -1 where it is not meant.

    Raises:
        PositionsError: it is not known where the prompt ends.
    """
    whole, several = tokens.whole(), each_of(positions)
    if whole.texts is not None and len(several) > 1:  # each text of a packed row has its own
        return whole.spread(numbered(positions, whole.unpacked()) + 1) - 1
    each = [chosen(own, whole).expand(whole.rows, whole.length)[:: whole.copies, : whole.prompt] for own in several]
    meant = torch.stack(each, dim=1)
    meant = meant & (meant.cumsum(dim=1) == 1)  # a token once, and a text may have none at one of the indices
    rank = meant.flatten().cumsum(dim=0).view(meant.shape) - 1
    return torch.where(meant, rank, -1).amax(dim=1)


def in_this_pass(table: Int[Tensor, "rows prompt"], tokens: Tokens) -> Int[Tensor, "B S"]:
    """Of numbers for all tokens of the prompt, those of the tokens of a pass; -1 behind the prompt."""
    columns, last = tokens.columns, table.shape[1] - 1
    here = torch.where(columns <= last, table[:, columns.clamp(max=last)], -1)
    return here.repeat_interleave(tokens.copies, dim=0)


def are_behind(positions: Positions, tokens: Tokens) -> bool:
    """Whether it is plain to see that none of these tokens is of the prompt and meant.

    Raises:
        ShapeError: some were generated, and are meant.
        PositionsError: some are meant, and it is not known where the prompt ends.
    """
    prompt, start = tokens.prompt, tokens.start
    if torch.compiler.is_compiling() or (
        prompt is not None and isinstance(start, int) and start + tokens.length <= prompt
    ):
        return False
    meant = chosen(positions, tokens)
    if prompt is None and not bool(meant.any()):
        return True
    if bool((meant & ~tokens.in_prompt).any()):
        raise ShapeError(
            f"values for the tokens of a prompt of {prompt}, and positions={positions!r} go on into what is generated; "
            "give positions='prompt', or others that end with it"
        )
    return isinstance(start, int) and prompt is not None and start >= prompt
