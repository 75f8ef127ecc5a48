"""`.svec` of IBM's conditional activation steering: JSON, directions that are applied at the input of a block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actsteer.errors import FileFormatError
from actsteer.files import foreign
from actsteer.files.lazy import Named, Numbered

SUFFIX = ".svec"


def read(path: Path) -> dict[str, Numbered]:
    """{"model_type": ..., "directions": {"<layer>": [...]}}; the concept is the file's name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        rows = {_digits(layer): torch.tensor(row, dtype=torch.float32) for layer, row in content["directions"].items()}
        variances = {f"explained_variance {n}": str(x) for n, x in content.get("explained_variances", {}).items()}
        hint = str(content.get("model_type", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, RuntimeError) as error:
        raise FileFormatError(f"{path}: not a .svec file ({error!r}); expected its directions by layer") from None
    return {path.stem: Numbered(foreign.checked(path, rows), side="in", model_hint=hint, metadata=variances)}


def write(path: Path, vectors: Mapping[str, Named]) -> None:
    """Raise: it is only read."""
    raise FileFormatError(f"{path}: {SUFFIX} is only read; name the file with .safetensors or .gguf")


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
