"""CosineAbove: a gate on the angle between an activation and a direction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.steering.alone import load_gate, save_gate
from actsteer.steering.gates.gate import Per, wide
from actsteer.steering.gates.gate_direction import GateDirection, shown
from actsteer.steering.gates.threshold import Evidence, best_split
from actsteer.steering.norms import norms
from actsteer.steering.numbers import bound
from actsteer.vectors.vector import SteeringVector


@final
class CosineAbove:
    """Fires for a row h where its cosine with the direction exceeds a threshold: h · v / (‖h‖ ‖v‖) > t.

    A row of zeros has the cosine 0.

    Args:
        vector: the direction, at the one site where the gate reads.
        threshold: t, from -1 to 1; `CosineAbove.between` picks it.
        per: decide once per "sequence", from the mean over its prompt, or on the prompt's "last" token, or for each
            "token"; None takes what the vector's metadata says that it was fitted at: "last", or else "sequence".
            A UserWarning says where the two do not agree.

    Raises:
        ShapeError: the vector has several sites; select one.
        ZeroDirectionError: the direction is zero.

    Source: conditional activation steering (CAST), Lee et al. 2024.

    >>> gate = CosineAbove(SteeringVector({"2": torch.tensor([0.0, 5.0])}), threshold=0.5)
    >>> gate(torch.tensor([[9.0, 1.5], [0.0, 0.1], [0.0, 0.0]]))
    tensor([False,  True, False])
    """

    __slots__ = ("_direction", "per", "threshold")

    def __init__(self, vector: SteeringVector, threshold: float, *, per: Per | None = None) -> None:
        self._direction = GateDirection(vector, unit=True)
        self.threshold = bound(threshold, "threshold")
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
        """A copy of the unit direction of which the cosine is taken."""
        return self._direction.exact.clone()

    def score(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """The cosine of each row with the direction, in float32 at least."""
        rows = wide(rows)
        norm = norms(rows)[..., 0].to(rows.dtype)
        return (rows @ self._direction.like(rows)) / torch.where(norm > 0, norm, 1)

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Tensor:
        """Whether each row's cosine exceeds the threshold, shape (rows,), bool."""
        return self.score(rows) > self.threshold

    def prepare(self, like: Float[Tensor, "rows d"]) -> Callable[[Float[Tensor, "rows d"]], Tensor]:
        """The decision on rows like these, in float32 or float64: h · u / t > ‖h‖."""
        threshold = self.threshold
        column = self._direction.like(like)[:, None] / (threshold or 1)

        def above(rows: Tensor) -> Tensor:
            # a row of zeros exceeds what is below 0, and by what is near 0 nothing can be divided
            if self.threshold < 1e-3 or self.threshold != threshold:
                return self(rows)
            return (rows @ column > norms(rows)).squeeze(-1)

        return above

    @classmethod
    def between(
        cls, vector: SteeringVector, *, positive: Evidence, negative: Evidence, per: Per | None = None
    ) -> CosineAbove:
        """The gate whose threshold best separates recorded activations, or cosines, of the positive rows, which are to
        be steered, from those of the negative ones: halfway between the two neighbours of largest balanced accuracy.

        Raises:
            StatisticsError: no threshold tells the sides apart, a side is empty, or statistics were given.
        """
        gate = cls(vector, 0.0, per=per)
        gate.threshold = best_split(gate, positive=positive, negative=negative)
        return gate

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        return {"vector": self._direction.vector, "threshold": self.threshold, "per": self.per}

    save = save_gate

    @classmethod
    def load(cls, path: str | PathLike[str], *, kinds: Iterable[type] = ()) -> CosineAbove:
        """Read what `save` wrote; `kinds` are your own classes, of which it may be made."""
        return load_gate(cls, path, kinds=kinds)

    def __repr__(self) -> str:
        return f"CosineAbove(site={self.site!r}, threshold={self.threshold:.4g}{shown(self.per)})"
