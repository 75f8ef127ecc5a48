"""ProbeAbove: a gate on what a linear probe says."""

from __future__ import annotations

import math
from typing import final

from jaxtyping import Float
from torch import Tensor

from actsteer.steering.gates.gate import Per, check_per
from actsteer.steering.gates.projection_above import fitting, only_site
from actsteer.vectors.vector import SteeringVector


@final
class ProbeAbove:
    """Fires for a row h where a logistic probe gives more than a probability: σ(h · w + b) > p.

    `Soft(ProbeAbove(vector), width=1)` steers with the probability itself as the weight.

    Args:
        vector: the weights w, at the one site where the gate reads, as `LogisticDirection` fits them.
        offset: b; from the vector's metadata, "offset SITE", unless given.
        probability: p, above 0 and below 1.
        per: decide once per "sequence", from the mean over its prompt, or for each "token".

    Raises:
        ShapeError: the vector has several sites; select one.
        ValueError: no offset, given or in the metadata; a probability out of range.

    Source: probes, Alain & Bengio 2016; gated steering by a probe, Lee et al. 2024 (CAST).

    >>> import torch
    >>> probe = SteeringVector({"2": torch.tensor([2.0, 0.0])}, metadata={"offset 2": "-1.0"})
    >>> ProbeAbove(probe)(torch.tensor([[0.4, 9.0], [0.6, 9.0]]))
    tensor([False,  True])
    """

    __slots__ = ("_weights", "offset", "per", "site", "threshold")

    def __init__(
        self, vector: SteeringVector, *, offset: float | None = None, probability: float = 0.5, per: Per = "sequence"
    ) -> None:
        check_per(per)
        if not 0 < probability < 1:
            raise ValueError(f"probability: expected a number between 0 and 1, got {probability}")
        self.site, self._weights = only_site(vector)
        found = offset if offset is not None else vector.metadata.get(f"offset {self.site}")
        if found is None:
            raise ValueError(f"offset: the vector's metadata has no 'offset {self.site}', as LogisticDirection's has")
        self.offset = float(found)
        self.threshold = math.log(probability / (1 - probability))
        self.per: Per = per

    def score(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """The logit of each row, h · w + b."""
        return rows @ fitting(self._weights, rows, self.site) + self.offset

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Tensor:
        """Whether each row's probability exceeds p, shape (rows,), bool."""
        return self.score(rows) > self.threshold

    def __repr__(self) -> str:
        tokens = ", per='token'" if self.per == "token" else ""
        return f"ProbeAbove(site={self.site!r}, probability={1 / (1 + math.exp(-self.threshold)):.4g}{tokens})"
