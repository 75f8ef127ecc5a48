"""Symmetric matrices of which the lower half alone is kept up to date, panel by panel: half the work of a product."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PANEL = 128


def add_square(matrix: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """Add rowsᵀ rows to the lower half of `matrix`, and to what of the upper one lies in its panels, in place."""
    for start in range(0, len(matrix), PANEL):
        end = start + PANEL
        matrix[start:end, :end].addmm_(rows[:, start:end].T, rows[:, :end])


def times(matrix: Float[Tensor, "d d"], vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The product of the whole symmetric matrix with a vector."""
    result = torch.zeros_like(vector)
    for start in range(0, len(matrix), PANEL):
        end = start + PANEL
        result[start:end] += matrix[start:end, :end] @ vector[:end]
        result[:start] += matrix[start:end, :start].T @ vector[start:end]
    return result


def whole(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """A copy with both halves, each the mirror image of the other bit for bit."""
    copied = matrix.clone()
    for start in range(0, len(matrix), PANEL):
        end = start + PANEL
        corner = copied[start:end, start:end].tril()
        copied[start:end, start:end] = corner + corner.tril(-1).T
        copied[start:end, end:] = copied[end:, start:end].T
    return copied
