"""Lazy: what a file says of a vector, by sites (and read on demand), or by the numbers of a model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

PlainVector: TypeAlias = tuple[Mapping[str, Tensor], Mapping[str, str]]
"""A vector's directions (site -> tensor) and its metadata."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A vector that is not read yet.

    Args:
        sizes: site -> number of features.
        metadata: the vector's own.
        read: site -> direction, from the file.
    """

    sizes: Mapping[str, int]
    metadata: Mapping[str, str]
    read: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Numbered:
    """A vector that knows blocks by their numbers, and no names.

    Args:
        directions: N -> direction of shape (d,) at the 0-based block N.
        side: whether at the block's output or at its input.
        model_hint: the model's type, "llama"; empty where the file does not tell.
        described: what else is known.
    """

    directions: Mapping[int, Tensor]
    side: Literal["in", "out"] = "out"
    model_hint: str = ""
    described: Mapping[str, str] = field(default_factory=dict)
