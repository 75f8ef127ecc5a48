"""Soft: a gate that is a weight between 0 and 1, and not a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.steering.alone import load_gate, save_gate
from actsteer.steering.gates.gate import Fitted, Per, ScoredGate, wide
from actsteer.steering.numbers import finite


@final
class Soft:
    """The weight σ((s - t) / w) of a gate that compares a score s with a threshold t: ½ at the threshold.

    Args:
        gate: `ProjectionAbove`, `CosineAbove`, `ProbeAbove`, or another with a `score` and a `threshold`.
        width: w, in the score's units; from t - w to t + w the weight grows from 0.27 to 0.73.

    Raises:
        TypeError: a gate without a score.
        ValueError: a width that is not above 0.

    Source: the logistic function in the place of the step of CAST, Lee et al. 2024.

    >>> from actsteer import ProjectionAbove, SteeringVector
    >>> gate = Soft(ProjectionAbove(SteeringVector({"2": torch.tensor([1.0])}), threshold=2.0), width=0.5)
    >>> gate(torch.tensor([[2.0], [3.0]]))
    tensor([0.5000, 0.8808])
    """

    __slots__ = ("gate", "width")

    def __init__(self, gate: ScoredGate, *, width: float = 1.0) -> None:
        if isinstance(gate, type) or not isinstance(gate, ScoredGate):
            got = f"the class {gate.__name__}; call it first" if isinstance(gate, type) else type(gate).__name__
            raise TypeError(f"expected a gate with a score and a threshold, got {got}")
        self.gate, self.width = gate, finite(width, "width")
        if self.width <= 0:
            raise ValueError(f"width: expected a number above 0, got {width}")

    @property
    def site(self) -> str:
        """Where the gate inside reads."""
        return self.gate.site

    @property
    def per(self) -> Per:
        """What the gate inside decides for."""
        return self.gate.per

    @property
    def metadata(self) -> Mapping[str, str]:
        """That of the vector of the gate inside, if it tells."""
        return self.gate.metadata if isinstance(self.gate, Fitted) else {}

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """A weight per row, in float32 at least."""
        return torch.sigmoid((wide(self.gate.score(wide(rows))) - self.gate.threshold) / self.width)

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        return {"gate": self.gate, "width": self.width}

    save = save_gate

    @classmethod
    def load(cls, path: str | PathLike[str], *, kinds: Iterable[type] = ()) -> Soft:
        """Read what `save` wrote; `kinds` are your own classes, of which it may be made."""
        return load_gate(cls, path, kinds=kinds)

    def __repr__(self) -> str:
        return f"Soft({self.gate!r}, width={self.width:.4g})"
