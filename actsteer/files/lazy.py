"""Lazy: what a file says of a vector, by sites (in memory or read on demand), or by the numbers of blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """A vector that is not read yet.

    Args:
        sizes: site -> number of features.
        metadata: the vector's metadata.
        read: site -> direction, from the file.
    """

    sizes: Mapping[str, int]
    metadata: Mapping[str, str]
    read: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Numbered:
    """A vector that knows blocks by their numbers.

    Args:
        directions: N -> direction of shape (d,) at block N; N counts from 0, and from the end where it is negative.
        side: whether at the block's output or at its input.
        model_hint: the model's type, "llama"; empty where the file does not tell.
        metadata: the vector's metadata.
        sites: N -> the site's name, where the file tells that too.
    """

    directions: Mapping[int, Tensor]
    side: Literal["in", "out"] = "out"
    model_hint: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    sites: Mapping[int, str] = field(default_factory=dict)


@final
class Named:
    """A vector that knows its sites by their names; what is written gives their numbers too.

    Args:
        directions: site -> direction of shape (d,).
        metadata: the vector's metadata.
        numbered: gives the same vector by the numbers of the model's blocks, or raises FileFormatError.
        numbers_only: why a format may not write the sites' names, if it may not.
    """

    __slots__ = ("_directions", "_numbered", "_numbers_only", "metadata")

    def __init__(
        self,
        directions: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        *,
        numbered: Callable[[], Numbered] | None = None,
        numbers_only: str = "",
    ) -> None:
        self._directions, self._numbered, self._numbers_only = directions, numbered, numbers_only
        self.metadata = metadata

    @property
    def directions(self) -> Mapping[str, Tensor]:
        """Site -> direction.

        Raises:
            ValueError: the numbers of the blocks are to be shifted, and the file would have none.
        """
        if self._numbers_only:
            raise ValueError(self._numbers_only)
        return self._directions

    def numbered(self) -> Numbered:
        """The vector by the numbers of the blocks at whose outputs it is added.

        Raises:
            FileFormatError: a site is not the output of a block, or the vector is not added.
        """
        if self._numbered is None:
            raise ValueError("this vector was read; one that is to be written has numbers")
        return self._numbered()
