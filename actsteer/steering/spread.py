"""Spread: put numbers per row, or per row and token, on the axes of an activation."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError, StrengthError


@dataclass(frozen=True)
class Lay:
    """How an activation lies: its whole shape, the axis of its features, and that of its rows (None: it has none)."""

    site: str
    shape: tuple[int, ...]
    axis: int
    row_axis: int | None

    @property
    def rows_and_length(self) -> tuple[int, int]:
        """The rows and positions of an activation that has these axes and that of its features.

        Raises:
            ShapeError: it has others.
        """
        if len(self.shape) != 3 or self.row_axis is None or self.row_axis == self.axis:
            raise ShapeError(
                f"site {self.site!r}: positions of an activation of shape {self.shape}, in which nobody can tell them; "
                "steer a site whose activation has the shape (rows, positions, d), or all positions"
            )
        return self.shape[self.row_axis], self.shape[3 - self.row_axis - self.axis]

    def vectors(self, delta: Float[Tensor, "*B d"], *, copies: int = 1) -> Tensor:
        """(d,) on the axis of the features; or (B, d), one per row, on that and the axis of the rows."""
        shape = [1] * len(self.shape)
        shape[self.axis] = delta.shape[-1]
        if delta.ndim == 1:
            return delta.reshape(shape)
        where = self._row_axis_for(delta.shape[0], copies)
        own = delta if delta.shape[0] == self.shape[where] else delta.repeat_interleave(copies, dim=0)
        shape[where] = len(own)
        return (own if where < self.axis else own.T).reshape(shape)

    def rows(self, weights: Float[Tensor, " B"], *, copies: int = 1) -> Tensor:
        """(B,) on the axis of the rows; each serves all the copies that were made of its row.

        Raises:
            StrengthError: another number of rows.
        """
        where = self._row_axis_for(len(weights), copies)
        own = weights if len(weights) == self.shape[where] else weights.repeat_interleave(copies)
        shape = [1] * len(self.shape)
        shape[where] = len(own)
        return own.reshape(shape)

    def _row_axis_for(self, count: int, copies: int) -> int:
        axis = self.row_axis
        if axis is None or axis == self.axis or len(self.shape) < 2 or self.shape[axis] not in (count, count * copies):
            where = "are packed" if axis is None else f"are on axis {axis}"
            raise StrengthError(
                f"site {self.site!r}: {count} rows of strength or gate against an activation of shape {self.shape} "
                f"whose rows {where}; give one strength per row"
            )
        return axis

    def tokens(self, weights: Float[Tensor, "B S"], *, rows: int) -> Tensor | None:
        """(B, S), or (1, S) for all of so many rows, on the axes of the rows and positions; None where there are no
        such axes, or nobody can tell which they are."""
        if self.row_axis is None or self.row_axis == self.axis or len(self.shape) < 2:
            return None
        length = weights.shape[1]
        shape = [1] * len(self.shape)
        if len(self.shape) == 2 and self.shape[self.row_axis] == rows * length:  # the tokens of all rows in a line
            shape[self.row_axis] = rows * length
            return weights.expand(rows, length).reshape(shape)
        others = [i for i, size in enumerate(self.shape) if i not in (self.axis, self.row_axis) and size == length]
        if self.shape[self.row_axis] != rows or len(others) != 1:
            return None
        shape[self.row_axis], shape[others[0]] = len(weights), length
        return (weights if self.row_axis < others[0] else weights.T).reshape(shape)

    def needed_tokens(self, weights: Float[Tensor, "B S"], *, rows: int) -> Tensor:
        """As `tokens`.

        Raises:
            ShapeError: the activation has no such axes.
        """
        spread = self.tokens(weights, rows=rows)
        if spread is None:
            raise ShapeError(
                f"site {self.site!r}: {rows} rows of {weights.shape[1]} positions, and an activation of shape "
                f"{self.shape}, in which nobody can tell them; steer a site whose activation has the shape (rows, "
                "positions, d), or all positions"
            )
        return spread
