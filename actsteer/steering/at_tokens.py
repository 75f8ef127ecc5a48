"""at_tokens: values that were recorded, put where they belong in the activation that is there."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsteer.errors import PositionsError, ShapeError
from actsteer.sites.device import brought
from actsteer.sites.lens import Frame
from actsteer.tokens.order import are_behind, in_this_pass, numbered
from actsteer.tokens.passes import Pass
from actsteer.tokens.positions import Positions
from actsteer.tokens.tokens import Tokens


def at_tokens(
    values: Float[Tensor, "*shape d"], *, frame: Frame, now: Pass | None, positions: Positions
) -> Float[Tensor, "*batch d"]:
    """The values in the shape of the activation, features last; at tokens that are not steered, any of them.

    Args:
        values: (n, d), one for each token of the prompt that is steered, in the order in which `record` gives those at
            these positions; or of the activation's own shape in the pass that has the whole prompt.
        frame: where the activation of this pass has its rows and tokens.
        now: the pass; where the tokens are not known, all of the activation counts.

    Raises:
        ShapeError: another number of values (in compiled code they are nan then), or another shape; tokens that were
            generated are steered.
        PositionsError: it is not known where the prompt ends.
    """
    tokens = None if now is None else now.tokens
    is_all = isinstance(positions, str) and positions == "all"
    if tokens is None or (is_all and tokens.prompt is None) or not _has_tokens(frame, tokens):
        return _everywhere(values, frame)
    lead = [size for axis, size in enumerate(frame.shape) if axis != frame.axis]
    if are_behind(positions, tokens):
        return values.reshape(-1, values.shape[-1])[0].expand(*lead, -1)
    if not tokens.copies:
        raise PositionsError(
            f"site {frame.site!r}: the generation goes on with other rows than it began with, and has no values for "
            "them; generate each row by itself"
        )
    rest = frame.order[2:-1]
    others = math.prod([lead[axis] for axis in rest])
    if values.ndim == 2:
        table = numbered(positions, tokens)
        meant = (table >= 0).sum() * others
        if torch.compiler.is_compiling():  # where none can look, nan is better than rows in wrong places
            values = torch.where(meant == len(values), brought(values, table.device), torch.nan)
        elif int(meant) != len(values):
            raise ShapeError(
                f"site {frame.site!r}: {len(values)} values for {int(meant)} rows of the activation at positions="
                f"{positions!r}; give one for each token that is steered, in the order of record(positions=...)"
            )
    else:
        table = _of_columns(values, frame, tokens)
        values = values.permute(frame.order)
    placed = frame.needs_tokens(in_this_pass(table, tokens), rows=tokens.rows).movedim(frame.axis, -1)[..., 0]
    inner = torch.arange(others, device=placed.device).view([lead[a] if a in rest else 1 for a in range(len(lead))])
    index = (placed.clamp(min=0) * others + inner).expand(lead)
    return brought(values, index.device).reshape(-1, values.shape[-1])[index]


def _has_tokens(frame: Frame, tokens: Tokens) -> bool:
    return frame.by_token(torch.ones(1, tokens.length), rows=tokens.rows) is not None


def _everywhere(values: Float[Tensor, "*shape d"], frame: Frame) -> Float[Tensor, "*batch d"]:
    """The values at every row of the activation; those that do not fit as they are, for the intervention to refuse."""
    order = frame.order
    sizes = [frame.shape[axis] for axis in range(len(frame.shape)) if axis != frame.axis]
    if values.ndim != 2 or len(values) != math.prod(sizes):
        return values
    lined = values.reshape([*(sizes[axis] for axis in order[:-1]), values.shape[-1]])
    return lined.permute([order.index(axis) for axis in range(len(order))])


def _of_columns(values: Float[Tensor, "*shape d"], frame: Frame, tokens: Tokens) -> Int[Tensor, "rows prompt"]:
    """The number of every column of the prompt, pads and all, among values that have its shape."""
    assert frame.row_axis is not None and tokens.prompt is not None
    rows, length, wanted = tokens.rows // tokens.copies, tokens.prompt, list(frame.shape)
    if frame.token_axis is not None:  # or the tokens of all rows lie in a line
        wanted[frame.row_axis], wanted[frame.token_axis] = rows, length
    wanted.append(wanted.pop(frame.axis))
    if list(values.shape) != wanted:
        raise ShapeError(
            f"site {frame.site!r}: values of shape {tuple(values.shape)}, and at the whole prompt the activation has "
            f"shape {tuple(wanted)}, features last; record them on a batch of that shape with keep_shape=True, or give "
            "one row (d,), or (n, d), one for each token that is steered"
        )
    return torch.arange(rows * length, device=tokens.device).view(rows, length)
