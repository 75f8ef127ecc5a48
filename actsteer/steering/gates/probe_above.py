"""ProbeAbove: a gate on what a linear probe says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from actsteer.steering.alone import load_gate, save_gate
from actsteer.steering.gates.gate import Per, wide
from actsteer.steering.gates.gate_direction import GateDirection, shown
from actsteer.steering.numbers import bound, finite
from actsteer.vectors.described import offsets_in
from actsteer.vectors.vector import SteeringVector


@final
class ProbeAbove:
    """Fires for a row h where a logistic probe gives more than a probability: σ(h · w + b) > p.

    `Soft(ProbeAbove(vector), width=1)` steers with the probability itself as the weight.

    Args:
        vector: the weights w, at the one site where the gate reads, as `LogisticDirection` fits them.
        offset: b; from the vector's metadata, "offset SITE", unless given.
        probability: p, above 0 and below 1; 0.5 unless given.
        threshold: log(p / (1 - p)), in the place of the probability.
        per: decide once per "sequence", from the mean over its prompt, or on the prompt's "last" token, or for each
            "token"; None takes what the vector's metadata says that it was fitted at: "last", or else "sequence".
            A UserWarning says where the two do not agree.

    Raises:
        ShapeError: the vector has several sites; select one.
        ValueError: no offset, given or in the metadata; a probability out of range, or one and a threshold.

    Source: probes, Alain & Bengio 2016; gated steering by a probe, Lee et al. 2024 (CAST).

    >>> import torch
    >>> probe = SteeringVector({"2": torch.tensor([2.0, 0.0])}, metadata={"offset 2": "-1.0"})
    >>> ProbeAbove(probe)(torch.tensor([[0.4, 9.0], [0.6, 9.0]]))
    tensor([False,  True])
    """

    __slots__ = ("_direction", "offset", "per", "threshold")

    def __init__(
        self,
        vector: SteeringVector,
        *,
        offset: float | None = None,
        probability: float | None = None,
        threshold: float | None = None,
        per: Per | None = None,
    ) -> None:
        if probability is not None and threshold is not None:
            raise ValueError("probability: a threshold says the same, and both were given; leave one out")
        p = 0.5 if probability is None else probability
        if not 0 < p < 1:
            raise ValueError(f"probability: expected a number between 0 and 1, got {p}")
        self._direction = GateDirection(vector, unit=False)
        found = offset if offset is not None else offsets_in(vector, vector.metadata).get(self.site)
        if found is None:
            raise ValueError(f"offset: the vector's metadata has no 'offset {self.site}', as LogisticDirection's has")
        self.offset = finite(found, "offset")
        self.threshold = math.log(p / (1 - p)) if threshold is None else bound(threshold, "threshold")
        self.per: Per = self._direction.per(per)

    @property
    def site(self) -> str:
        """Where the gate reads."""
        return self._direction.site

    @property
    def metadata(self) -> dict[str, str]:
        """That of the vector: on which model it was fitted, and at which positions."""
        return dict(self._direction.metadata)

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """A copy of the weights, w."""
        return self._direction.exact.clone()

    def score(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """The logit of each row, h · w + b, in float32 at least."""
        rows = wide(rows)
        return rows @ self._direction.like(rows) + self.offset

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Tensor:
        """Whether each row's probability exceeds p, shape (rows,), bool."""
        return self.score(rows) > self.threshold

    def prepare(self, like: Float[Tensor, "rows d"]) -> Callable[[Float[Tensor, "rows d"]], Tensor]:
        """The decision on rows like these, in float32 or float64."""
        direction = self._direction.like(like)
        return lambda rows: rows @ direction + self.offset > self.threshold

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        return {
            "vector": self._direction.vector,
            "offset": self.offset,
            "threshold": self.threshold,
            "per": self.per,
        }

    save = save_gate

    @classmethod
    def load(cls, path: str | PathLike[str], *, kinds: Iterable[type] = ()) -> ProbeAbove:
        """Read what `save` wrote; `kinds` are your own classes, of which it may be made."""
        return load_gate(cls, path, kinds=kinds)

    def __repr__(self) -> str:
        probability = (1 + math.tanh(self.threshold / 2)) / 2  # which no threshold overflows
        return f"ProbeAbove(site={self.site!r}, probability={probability:.4g}{shown(self.per)})"
