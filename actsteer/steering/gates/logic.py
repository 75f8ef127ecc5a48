"""And, Or, Not: gates made of gates, which may read at different sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from os import PathLike
from typing import Any, final

import torch
from torch import Tensor

from actsteer.steering.alone import load_gate, save_gate
from actsteer.steering.gates.gate import AnyGate, leaves


@final
class And:
    """Fires where all of its gates fire; of weights, their product.

    A gate that decides per sequence and one that decides per token give a decision per token.

    Source: conditions of several vectors (CAST), Lee et al. 2024; the product as in probabilistic logic.

    >>> fires = torch.tensor([False, True, True]), torch.tensor([True, True, False])
    >>> from actsteer import ProjectionAbove, SteeringVector
    >>> gate = ProjectionAbove(SteeringVector({"2": torch.tensor([1.0])}), 0.0)
    >>> And(gate, Not(gate)).combine(fires), Or(gate, gate).combine(fires), Not(gate).combine(fires[:1])
    (tensor([False,  True, False]), tensor([True, True, True]), tensor([ True, False, False]))
    """

    def __init__(self, *gates: AnyGate) -> None:
        self.gates = _checked(gates)

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        """The product; of bools, whether all are true."""
        return reduce(lambda one, other: one & other if _bools(one, other) else one * other, weights)

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        return {"gates": self.gates}

    save = save_gate

    @classmethod
    def load(cls, path: str | PathLike[str], *, kinds: Iterable[type] = ()) -> And:
        """Read what `save` wrote; `kinds` are your own classes, of which it may be made."""
        return load_gate(cls, path, kinds=kinds)

    def __repr__(self) -> str:
        return f"And({', '.join(map(repr, self.gates))})"


@final
class Or:
    """Fires where any of its gates fires; of weights a and b, a + b - a b. See `And`."""

    def __init__(self, *gates: AnyGate) -> None:
        self.gates = _checked(gates)

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        """1 - Π (1 - w); of bools, whether any is true."""
        return reduce(lambda a, b: a | b if _bools(a, b) else 1 - (1 - 1 * a) * (1 - 1 * b), weights)

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        return {"gates": self.gates}

    save = save_gate

    @classmethod
    def load(cls, path: str | PathLike[str], *, kinds: Iterable[type] = ()) -> Or:
        """Read what `save` wrote; `kinds` are your own classes, of which it may be made."""
        return load_gate(cls, path, kinds=kinds)

    def __repr__(self) -> str:
        return f"Or({', '.join(map(repr, self.gates))})"


@final
class Not:
    """Fires where its gate does not; of a weight w, 1 - w. See `And`."""

    def __init__(self, gate: AnyGate) -> None:
        self.gates = _checked((gate,))

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        """The contrary."""
        (weight,) = weights
        return ~weight if weight.dtype is torch.bool else 1 - weight

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        return {"gate": self.gates[0]}

    save = save_gate

    @classmethod
    def load(cls, path: str | PathLike[str], *, kinds: Iterable[type] = ()) -> Not:
        """Read what `save` wrote; `kinds` are your own classes, of which it may be made."""
        return load_gate(cls, path, kinds=kinds)

    def __repr__(self) -> str:
        return f"Not({self.gates[0]!r})"


def _checked(gates: tuple[AnyGate, ...]) -> tuple[AnyGate, ...]:
    if not gates:
        raise TypeError("expected one gate or more, got none")
    for gate in gates:
        list(leaves(gate))
    return gates


def _bools(one: Tensor, other: Tensor) -> bool:
    return one.dtype is torch.bool and other.dtype is torch.bool
