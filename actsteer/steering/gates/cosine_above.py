"""CosineAbove: a gate on the angle between an activation and a direction."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.steering.gates.gate import Per, check_per
from actsteer.steering.gates.projection_above import fitting, only_site
from actsteer.steering.gates.threshold import Evidence, best_split
from actsteer.vectors.vector import SteeringVector


@final
class CosineAbove:
    """Fires for a row h where its cosine with the direction exceeds a threshold: h · v / (‖h‖ ‖v‖) > t.

    A row of zeros has the cosine 0.

    Args:
        vector: the direction, at the one site where the gate reads.
        threshold: t, from -1 to 1; `CosineAbove.between` picks it.
        per: decide once per "sequence", from the mean over its prompt, or for each "token".

    Raises:
        ShapeError: the vector has several sites; select one.
        ZeroDirectionError: the direction is zero.

    Source: conditional activation steering (CAST), Lee et al. 2024.

    >>> gate = CosineAbove(SteeringVector({"2": torch.tensor([0.0, 5.0])}), threshold=0.5)
    >>> gate(torch.tensor([[9.0, 1.5], [0.0, 0.1], [0.0, 0.0]]))
    tensor([False,  True, False])
    """

    __slots__ = ("_direction", "per", "site", "threshold")

    def __init__(self, vector: SteeringVector, threshold: float, *, per: Per = "sequence") -> None:
        check_per(per)
        self.site, self._direction = only_site(vector.unit())
        self.threshold = float(threshold)
        self.per: Per = per

    def score(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """The cosine of each row with the direction."""
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))  # squares of half precision overflow
        norm = wide.norm(dim=-1)
        return (wide @ fitting(self._direction, wide, self.site)) / torch.where(norm > 0, norm, 1)

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Tensor:
        """Whether each row's cosine exceeds the threshold, shape (rows,), bool."""
        return self.score(rows) > self.threshold

    @classmethod
    def between(
        cls, vector: SteeringVector, *, positive: Evidence, negative: Evidence, per: Per = "sequence"
    ) -> CosineAbove:
        """The gate whose threshold best separates recorded activations, or cosines, of the positive rows, which are to
        be steered, from those of the negative ones: halfway between the two neighbours of largest balanced accuracy.

        Raises:
            StatisticsError: no threshold tells the sides apart, a side is empty, or statistics were given.
        """
        return cls(vector, best_split(cls(vector, 0.0), positive=positive, negative=negative), per=per)

    def __repr__(self) -> str:
        tokens = ", per='token'" if self.per == "token" else ""
        return f"CosineAbove(site={self.site!r}, threshold={self.threshold:.4g}{tokens})"
