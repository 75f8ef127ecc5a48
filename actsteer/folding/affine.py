"""The edit of a site as an affine map, h -> M h + m, which is what weights can carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import NotFoldable
from actsteer.steering.bound import edited_by
from actsteer.steering.edit import SiteEdit


@dataclass(frozen=True)
class AffineMap:
    """h -> M h + m in float64; `weight` M (d, d) is None for the identity."""

    weight: Float[Tensor, "d d"] | None
    bias: Float[Tensor, " d"]

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return self.weight is None and not bool(self.bias.any())

    def is_settled_by(self, other: AffineMap) -> bool:
        """Whether what the other map has given stays as it is under this one: both are one projection."""
        if self.weight is None or other.weight is None or bool(self.bias.any()) or bool(other.bias.any()):
            return False
        twice = self.weight @ self.weight
        return torch.allclose(self.weight, other.weight, atol=1e-9) and torch.allclose(twice, self.weight, atol=1e-9)


def affine_maps(edits: Mapping[str, SiteEdit], strengths: Sequence[Tensor]) -> dict[str, AffineMap]:
    """Site -> its edit as an affine map; `strengths` are 0-dim, in bank order.

    Raises:
        NotFoldable: an edit that depends otherwise on the activation.
    """
    return {site: _map(site, edit, [strengths[index] for index in edit.concepts]) for site, edit in edits.items()}


@torch.no_grad()
def _map(site: str, edit: SiteEdit, strengths: Sequence[Tensor]) -> AffineMap:
    directions = edit.directions.detach().double()
    if edit.is_sum:  # of plain Add
        c = torch.stack([strength.to(directions) for strength in strengths])
        return AffineMap(None, c @ directions)

    def apply(rows: Tensor) -> Tensor:
        for intervention, direction, strength in zip(edit.interventions, directions, strengths, strict=True):
            rows = edited_by(intervention, rows, direction, strength.to(directions))
        return rows

    d = directions.shape[1]
    bias = apply(directions.new_zeros(1, d))[0]
    weight = (apply(torch.eye(d).to(directions)) - bias).T
    if not _holds(apply, weight, bias):
        names = ", ".join(sorted({type(own).__name__ for own in edit.interventions}))
        raise NotFoldable(
            f"site {site!r}: {names} is not an affine map of the activation, and weights can carry no other; "
            "keep the Steerer"
        )
    return AffineMap(weight, bias)


def _holds(apply: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor) -> bool:
    """Whether it is M h + m for rows of all sizes, too."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-9, 1e-3, 1.0, 1e3, 1e9):
        rows = scale * torch.randn(8, len(bias), generator=generator, dtype=torch.float64).to(bias.device)
        expected = rows @ weight.T + bias
        if not torch.allclose(apply(rows), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())):
            return False
    return True
