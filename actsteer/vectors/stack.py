"""Stack: the directions that a bank has at one site, in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.files.lazy import Stored
from actsteer.vectors.vector import SteeringVector, from_file

Vectors = dict[str, SteeringVector | Stored]
"""Concept -> its vector, or what a file says of it until the vector is asked for."""


@final
class Stack:
    """The directions at one site of those concepts of a bank that have it, in the bank's order.

    They are stacked when all of them are first asked for, in the narrowest dtype that holds each of them exactly, and
    the tensor is kept.

    Args:
        vectors: those of the bank.
        site: the site.
        size: the number of features, d.
        device: where the directions are.
    """

    __slots__ = ("_rows", "_vectors", "concepts", "device", "names", "site", "size")

    def __init__(self, vectors: Vectors, site: str, *, size: int, device: torch.device) -> None:
        self.site, self.size, self.device = site, size, device
        self.concepts: list[int] = []  # their places in the bank
        self.names: list[str] = []  # and their names
        self._vectors = vectors
        self._rows: Tensor | None = None

    def add(self, place: int, concept: str) -> None:
        """One more concept of the bank has the site."""
        self.concepts.append(place)
        self.names.append(concept)

    def rows(self, which: Sequence[int] | None = None) -> Float[Tensor, "k d"]:
        """The directions of all these concepts, or of some, by their places in `concepts` and in that order.

        They are not to be written into.
        """
        with torch.inference_mode(mode=False):  # so that they work in autograd later
            if which is not None and len(which) < len(self.names):
                return torch.stack([self._direction(self.names[place]) for place in which])
            if self._rows is None:
                self._rows = torch.stack([self._direction(name) for name in self.names])
            return self._rows

    def _direction(self, concept: str) -> Tensor:
        return read(self._vectors, concept)._directions[self.site]


def read(vectors: Vectors, concept: str) -> SteeringVector:
    """The vector of a concept; one that is still in a file is read, and kept."""
    vector = vectors[concept]
    if isinstance(vector, Stored):
        vector = vectors[concept] = from_file(vector)
    return vector
