"""Foreign: the files of other projects, read into vectors by block number; nothing in them is executed.

- `.svec` of IBM's conditional activation steering: JSON, applied at the input of a block.
- `.safetensors` of steering-lite: tensors `layer<N>.<key>`.
- `.pt`: a tensor (layers, d), a mapping layer -> tensor or concept -> one of these, or rotalabs' `layer_<N>.pt`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from actsteer.errors import FileFormatError
from actsteer.files.lazy import Numbered

SUFFIXES = (".svec", ".pt", ".pth", ".bin")
_LAYER = re.compile(r"(?:layers?)?[._]?(\d{1,5})")


def read_svec(path: str | os.PathLike[str]) -> dict[str, Numbered]:
    """A `.svec`: {"model_type": ..., "directions": {"<layer>": [...]}}; the concept is the file's name."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
        rows = {_digits(layer): torch.tensor(row, dtype=torch.float32) for layer, row in content["directions"].items()}
        variances = {f"explained_variance {n}": str(x) for n, x in content.get("explained_variances", {}).items()}
        hint = str(content.get("model_type", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, RuntimeError) as error:
        raise FileFormatError(f"{path}: not a .svec file ({error!r}); expected its directions by layer") from None
    return {Path(path).stem: Numbered(_checked(path, rows), side="in", model_hint=hint, described=variances)}


def is_numbered(path: str | os.PathLike[str]) -> bool:
    """Whether a `.safetensors` file has only tensors `layer<N>.<key>`."""
    return bool(names := list(_tensors(path))) and all(re.match(r"layers?[._]?\d{1,5}\.", name) for name in names)


def read_numbered(path: str | os.PathLike[str]) -> dict[str, Numbered]:
    """A `.safetensors` of steering-lite: `layer<N>.<key>`, a vector for each key whose tensors are directions."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in _tensors(path).items():
        layer, key = name.split(".", 1) if name.count(".") == 1 else name.rsplit(".", 1)
        if (number := _LAYER.fullmatch(layer)) is None:
            raise FileFormatError(f"{path}: {name!r}: expected layer<N>.<key>")
        row = tensor.reshape(-1) if tensor.ndim == 2 and len(tensor) == 1 else tensor
        if row.ndim == 1 and row.is_floating_point():  # others are a method's own state
            _put(path, found.setdefault(key, {}), int(number[1]), row)
    if not found:
        raise FileFormatError(f"{path}: none of its tensors is a direction of shape (d,)")
    return {key: Numbered(_checked(path, rows)) for key, rows in found.items()}


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Numbered | dict[str, Tensor]]:
    """A `.pt` of tensors alone: concept -> vector, by block number, or by site where the keys are names."""
    with Path(path).open("rb"):
        pass  # a missing or unreadable file is the operating system's own error
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileFormatError(
            f"{path}: expected tensors, and nothing is unpickled beside them ({type(error).__name__}); save them alone"
        ) from None
    stem = Path(path).stem
    if isinstance(content, Tensor) and content.ndim == 1 and (number := re.fullmatch(r"layers?_?(\d{1,5})", stem)):
        return {Path(path).absolute().parent.name: Numbered(_checked(path, {int(number[1]): content}))}
    if isinstance(content, Mapping) and content and all(isinstance(own, Mapping) for own in content.values()):
        return {str(concept): _vector(path, own) for concept, own in content.items()}
    return {stem: _vector(path, content)}


def _vector(path: str | os.PathLike[str], content: Any) -> Numbered | dict[str, Tensor]:
    if isinstance(content, Tensor) and content.ndim == 2:
        content = dict(enumerate(content))
    if not isinstance(content, Mapping) or not all(isinstance(row, Tensor) for row in content.values()):
        raise FileFormatError(f"{path}: expected a tensor (layers, d) or a mapping layer -> tensor (d,)")
    rows = {key: row.reshape(-1) if row.ndim == 2 and len(row) == 1 else row for key, row in content.items()}
    numbers = {key: _LAYER.fullmatch(str(key)) for key in rows}
    if all(numbers.values()):
        by_number: dict[int, Tensor] = {}
        for key, found in numbers.items():
            if found:
                _put(path, by_number, int(found[1]), rows[key])
        return Numbered(_checked(path, by_number))
    return {str(key): row for key, row in _checked(path, rows).items()}


def _put(path: str | os.PathLike[str], rows: dict[int, Tensor], number: int, row: Tensor) -> None:
    if number in rows:
        raise FileFormatError(f"{path}: layer {number} is there twice, under two names")
    rows[number] = row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose names is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _digits(layer: str) -> int:
    if not (layer.isascii() and layer.isdecimal() and str(int(layer)) == layer):
        raise ValueError(f"expected a layer's number, got {layer!r}")
    return int(layer)


def _checked(path: str | os.PathLike[str], rows: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """The rows, if they are directions."""
    if not rows:
        raise FileFormatError(f"{path}: it has no directions")
    for key, row in rows.items():
        if row.ndim != 1 or not row.is_floating_point() or not bool(row.isfinite().all()):
            raise FileFormatError(
                f"{path}: layer {key}: expected a finite floating direction (d,), got {row.dtype} {tuple(row.shape)}"
            )
    return dict(rows)


def _tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    content = Path(path).read_bytes()
    try:
        return load(content)
    except (SafetensorError, ValueError, TypeError, RuntimeError, KeyError, MemoryError) as error:
        raise FileFormatError(f"{path}: not a readable safetensors file ({error}); is it truncated?") from None
