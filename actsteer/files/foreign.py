"""Foreign: what the files of other projects have in common, directions by the numbers of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from actsteer.errors import FileFormatError
from actsteer.files.untrusted import not_a_direction

Key = TypeVar("Key", int, str)
_LAYER = re.compile(r"(?:layers?)?[._]?(-?\d{1,5})")


def layer(name: str) -> int | None:
    """The number that a layer's name tells; None for any other name.

    >>> layer("14"), layer("layers.14"), layer("layer_-1"), layer("calm")
    (14, 14, -1, None)
    """
    found = _LAYER.fullmatch(name)
    return None if found is None else int(found[1])


def put(path: Path, rows: dict[int, Tensor], number: int, row: Tensor) -> None:
    """Add a layer's direction, if there is none yet."""
    if number in rows:
        raise FileFormatError(f"{path}: layer {number} is there twice, under two names")
    rows[number] = row


def checked(path: Path, rows: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """The rows, if there are any and all are directions."""
    if not rows:
        raise FileFormatError(f"{path}: it has no directions")
    for key, row in rows.items():
        if (problem := not_a_direction(row)) is not None:
            raise FileFormatError(f"{path}: layer {key}: {problem}")
    return dict(rows)
