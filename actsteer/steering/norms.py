"""Norms: of rows and of directions, however large or small their numbers are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ZeroDirectionError


def norms(rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
    """‖h‖ of every row in float64, in which no square of a float32 number overflows or vanishes.

    A device without float64 gets it in the rows' dtype, by way of each row's largest number.

    >>> norms(torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]]))
    tensor([[5.0000e+30],
            [5.0000e-30],
            [0.0000e+00]], dtype=torch.float64)
    """
    if rows.is_mps:
        return norms_by_largest(rows)
    found: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
    return found


def norms_by_largest(rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
    """‖h‖ of every row in its dtype, m ‖h / m‖ with m the largest |h_i|, a constant to gradients."""
    largest = rows.detach().abs().amax(dim=-1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1)
    found: Tensor = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True) * largest
    return found


def typical(sizes: Sequence[Float[Tensor, " _"]]) -> float:
    """The median of ‖h‖ over all rows; 0 if there are none.

    Not its root mean square: in a language model a few tokens have activations a hundred times as large as the rest
    (Sun et al. 2024, massive activations), and that would be their size alone.

    >>> typical([torch.tensor([1.0, 2.0]), torch.tensor([900.0])])
    2.0
    """
    found = torch.cat([*sizes, torch.zeros(0)])
    return float(found.median()) if len(found) else 0.0


def unit(direction: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """v / ‖v‖ in the direction's dtype, and zero for a zero direction.

    >>> unit(torch.tensor([3e30, 4e30])), unit(torch.zeros(2))
    (tensor([0.6000, 0.8000]), tensor([0., 0.]))
    """
    largest = direction.detach().abs().amax()
    scaled = direction / torch.where(largest > 0, largest, 1)
    length: Tensor = torch.linalg.vector_norm(scaled).clamp(min=1)  # its largest number is 1, or it is zero
    return scaled / length


def nonzero_unit(direction: Float[Tensor, " d"], *, by: object) -> Float[Tensor, " d"]:
    """As `unit`.

    Raises:
        ZeroDirectionError: the direction is zero; noticed on the CPU alone, for no other device is waited for.
    """
    if direction.device.type == "cpu" and not bool(direction.any()):
        raise ZeroDirectionError(f"the direction is zero, and {by!r} needs one; leave it out, or give it strength 0")
    return unit(direction)
