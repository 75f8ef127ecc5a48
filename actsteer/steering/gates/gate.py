"""Gate: whether, or how much, each row of the batch or each token is steered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeAlias, get_args, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Per: TypeAlias = Literal["sequence", "token"]
"""Whether a gate decides once for a sequence, from the mean over its prompt, or for each token by itself."""


@runtime_checkable
class Gate(Protocol):
    """A decision per row, read at the gate's own site: the steered one, or one that runs before it.

    A gate that has an attribute `per = "token"` is given every token as a row of its own; any other decides once per
    sequence, from the mean over the tokens of its prompt, pads left out, and that holds for what is generated after it.
    """

    @property
    def site(self) -> str:
        """The name of the module whose activation the gate reads."""
        ...

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Tensor:
        """A bool, or a weight that multiplies c, per row: shape (rows,)."""
        ...


@runtime_checkable
class Score(Gate, Protocol):
    """A gate that compares a number per row with a threshold; `Soft` makes a weight of the two."""

    threshold: float

    def score(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """The number per row; the gate fires where it exceeds the threshold."""
        ...


@runtime_checkable
class Combination(Protocol):
    """A decision made from those of other gates, each of which reads at a site of its own."""

    @property
    def gates(self) -> tuple[Gate | Combination, ...]:
        """The gates whose decisions are combined."""
        ...

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        """The decision, from one of each gate: bools or weights, all of one shape."""
        ...


AnyGate: TypeAlias = Gate | Combination


def leaves(gate: AnyGate) -> Iterator[Gate]:
    """The gates that read at a site, in order.

    Raises:
        TypeError: something that is no gate.
    """
    if isinstance(gate, Combination):
        for inner in gate.gates:
            yield from leaves(inner)
    elif isinstance(gate, Gate):
        yield gate
    else:
        raise TypeError(f"gate: expected a gate with a site, such as ProjectionAbove, got {type(gate).__name__}")


def check_per(per: str) -> None:
    """ValueError unless it is a known word."""
    if per not in get_args(Per):
        raise ValueError(f"per: expected one of {', '.join(map(repr, get_args(Per)))}, got {per!r}")
