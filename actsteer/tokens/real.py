"""Real: where in an activation the tokens are, and where the pads."""

from __future__ import annotations

import torch
from torch import Tensor

from actsteer.errors import ShapeError
from actsteer.sites.lens import Frame
from actsteer.tokens.inputs import SAY
from actsteer.tokens.passes import Pass


def real_at(frame: Frame, now: Pass) -> Tensor | None:
    """Which of an activation's tokens are no pads, on the axes of its rows and tokens; None where all are.

    An activation with one row for each of the call's is of whole texts, and one of the real tokens alone has no pads.

    Raises:
        ShapeError: there are pads, and no telling where in such an activation.
    """
    if frame.row_axis is None or len(frame.shape) < 2 or (now.real is None and now.doubt is None):
        return None
    rows, count = now.rows, frame.shape[frame.row_axis]
    if now.real is not None and now.tokens is not None:
        placed = frame.by_token(now.real, rows=now.tokens.rows)
        if placed is not None and (len(frame.shape) > 2 or count != rows or not frame.is_step):
            return placed if len(frame.shape) > 2 or count != rows else None
    if len(frame.shape) == 2 and not frame.is_step and (count == rows or count == _number(now)):
        return None
    if now.doubt is not None:
        name, found = now.doubt
        what = f"{name!r}, of shape {tuple(found.shape)}, may say which tokens are pads, and how is open"
    else:
        assert now.real is not None
        what = f"the attention mask has shape {tuple(now.real.shape)}"
    raise ShapeError(
        f"site {frame.site!r}: {what}, the activation has shape {frame.shape}, and it cannot be told which of its "
        f"positions are pads; pass row_axis= or token_axis=, {SAY}, or run without pads"
    )


def _number(now: Pass) -> int | None:
    """How many tokens there are that are no pads."""
    found = now.real if now.real is not None else now.doubt[1] if now.doubt is not None else None
    return None if found is None or torch.compiler.is_compiling() else int(found.sum())
