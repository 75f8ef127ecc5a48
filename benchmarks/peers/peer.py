"""What every peer is to the rows: two functions; and what a row is to the table: cells."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor, nn

PEERS = (
    "by hand",
    "actsteer",
    "steering-vectors",
    "repeng",
    "nnsight",
    "pyvene",
    "tdhook",
    "TransformerLens",
)
"""Each is a file in this folder, named in small letters with underscores."""


class Cannot(Exception):  # noqa: N818 - no failure of the benchmark: an entry of its table
    """A peer does not do this; the message says why, with the line of its documentation or source."""


class Peer(Protocol):
    """A way to steer, and to find a direction, as the peer's own documentation recommends it."""

    def steer(self, model: nn.Module, directions: dict[str, Tensor], c: float) -> AbstractContextManager[Any]:
        """Inside: what is called, and has `generate`, as the model does, with c times the direction added at each site.

        Raises:
            Cannot: it does not steer such a model, or there.
        """

    def extract(
        self, model: nn.Module, tokenizer: Any, positive: list[str], negative: list[str], sites: list[str]
    ) -> dict[str, Tensor]:
        """The mean difference of the activations at each text's last token, one direction per site.

        Raises:
            Cannot: it does not find such a direction.
        """


@dataclass(frozen=True)
class Cell:
    """An entry of a table: what it says, the evidence in its footnote, and its numbers for the file."""

    says: str
    evidence: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


Row = Callable[..., dict[str, Cell]]
"""`row(peer, repeats=..., quick=...)`: the peer's cells in this row, by column."""


def peer_of(name: str) -> Peer:
    """The peer of that name; imported only where its library is installed."""
    return cast("Peer", import_module(f"benchmarks.peers.{name.lower().replace('-', '_').replace(' ', '_')}"))


def tried(make: Callable[[], Cell]) -> Cell:
    """The cell, or why there is none: what the peer says that it cannot, or how it failed."""
    try:
        return make()
    except Cannot as reason:
        return Cell("cannot", str(reason))
    except Exception as error:  # the other cells and peers have their turn
        first = str(error).strip().partition("\n")[0]
        return Cell("fails", f"{type(error).__name__}: {first}")
