"""steering-lite: `.safetensors` files with tensors `layer<N>.<key>`, a vector for each key."""

from __future__ import annotations

import re

from torch import Tensor

from actsteer.errors import FileFormatError
from actsteer.files import foreign
from actsteer.files.lazy import Numbered
from actsteer.files.opened import Opened


def is_numbered(file: Opened) -> bool:
    """Whether a `.safetensors` file has only tensors `layer<N>.<key>`."""
    return bool(file.names) and all(re.match(r"layers?[._]?\d{1,5}\.", name) for name in file.names)


def read(file: Opened) -> dict[str, Numbered]:
    """A vector for each key whose tensors are directions."""
    found: dict[str, dict[int, Tensor]] = {}
    for name in file.names:
        tensor = file.tensor(name)
        layer, key = name.split(".", 1) if name.count(".") == 1 else name.rsplit(".", 1)
        if (number := foreign.layer(layer)) is None:
            raise FileFormatError(f"{file.path}: {name!r}: expected layer<N>.<key>")
        row = tensor.reshape(-1) if tensor.ndim == 2 and len(tensor) == 1 else tensor
        if row.ndim == 1 and row.is_floating_point():  # others are a method's own state
            foreign.put(file.path, found.setdefault(key, {}), number, row)
    if not found:
        raise FileFormatError(f"{file.path}: none of its tensors is a direction of shape (d,)")
    return {key: Numbered(foreign.checked(file.path, rows)) for key, rows in found.items()}
