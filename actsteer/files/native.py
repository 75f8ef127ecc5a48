"""The native format: vectors in a sealed safetensors file, each with a digest of its own, read when it is asked for.

Tensors are named `<concept>/<site>`. The document says of every concept its metadata, the model's fingerprint, the
intervention meant, and of every site the side and the feature axis.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from actsteer.errors import FileFormatError
from actsteer.files import sealed
from actsteer.files.lazy import PlainVector, Stored


def write_bank(path: str | os.PathLike[str], bank: Mapping[str, PlainVector]) -> None:
    """Write vectors, concept -> (directions, metadata), to `path`."""
    tensors: dict[str, Tensor] = {}
    concepts: dict[str, Any] = {}
    for concept, (directions, metadata) in bank.items():
        own = {_key(concept, site): direction.detach().cpu() for site, direction in directions.items()}
        tensors |= own
        concepts[concept] = {
            "metadata": dict(metadata),
            "model": metadata.get("model"),
            "intervention": metadata.get("intervention", "add"),
            "sites": {site: {"side": _side(site), "axis": metadata.get(f"axis {site}")} for site in directions},
            "sha256": sealed.digest(own),
        }
    sealed.write(path, tensors, {"kind": "bank", "concepts": concepts}, sealed_apart=tensors)


def read_bank(path: str | os.PathLike[str]) -> dict[str, Stored]:
    """What `write_bank` wrote, concept -> vector; the directions of a large file when they are asked for.

    Raises:
        FileFormatError: the file is corrupt, foreign, or of a newer version.
    """
    file = sealed.Sealed(path, kind="bank")
    try:
        entries = file.document["concepts"].items()
        names = {concept: {site: _key(concept, site) for site in dict(entry["sites"])} for concept, entry in entries}
        shapes = file.shapes()
        bank = {concept: _stored(file, concept, entry, names[concept], shapes) for concept, entry in entries}
        apart = {name for concept, entry in entries if "sha256" in entry for name in names[concept].values()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise _undescribed(path, error) from None
    if rest := shapes.keys() - {name for own in names.values() for name in own.values()}:
        raise FileFormatError(f"{path}: tensors {sorted(rest)} are not in the document; write it again")
    file.verify(shapes.keys() - apart)
    _check_sizes(path, bank.values())
    if file.is_read:
        return {concept: _read(vector) for concept, vector in bank.items()}
    return bank


def _stored(
    file: sealed.Sealed,
    concept: str,
    entry: Mapping[str, Any],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Stored:
    sizes = {site: shapes[name] for site, name in names.items()}
    if any(len(shape) != 1 for shape in sizes.values()):
        raise ValueError(f"expected directions of shape (d,), got {sizes}")

    def read() -> dict[str, Tensor]:
        own = {name: file.tensor(name) for name in names.values()}
        if "sha256" in entry and entry["sha256"] != sealed.digest(own):
            raise FileFormatError(f"{file.path}: the SHA-256 of {concept!r} does not match; the file was altered")
        try:
            return {site: _direction(own[name]) for site, name in names.items()}
        except ValueError as error:
            raise _undescribed(file.path, error) from None

    return Stored({site: shape[0] for site, shape in sizes.items()}, _metadata(concept, entry), read)


def _metadata(concept: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """The metadata, with what the document says apart from it."""
    found = {str(key): str(value) for key, value in entry["metadata"].items()}
    sites = {site: described or {} for site, described in dict(entry["sites"]).items()}
    for site, described in sites.items():
        if described.get("side", _side(site)) != _side(site):
            raise ValueError(f"concept {concept!r}: site {site!r} is not an {described['side']}")
        if described.get("axis") is not None:
            found.setdefault(f"axis {site}", str(described["axis"]))
    if entry.get("intervention", "add") != "add":
        found.setdefault("intervention", str(entry["intervention"]))
    if entry.get("model") is not None:
        found.setdefault("model", str(entry["model"]))
    return found


def _read(vector: Stored) -> Stored:
    """The same vector, its directions in memory."""
    directions = vector.read()
    return Stored(vector.sizes, vector.metadata, lambda: directions)


def _check_sizes(path: str | os.PathLike[str], vectors: Iterable[Stored]) -> None:
    sizes: dict[str, int] = {}
    for vector in vectors:
        for site, size in vector.sizes.items():
            if size != sizes.setdefault(site, size):
                raise FileFormatError(f"{path}: site {site!r} has directions of two sizes; write it again")


def _undescribed(path: str | os.PathLike[str], error: Exception) -> FileFormatError:
    return FileFormatError(f"{path}: the document does not describe the tensors ({error!r}); write it again")


def _side(site: str) -> str:
    return "input" if ":in" in site[site.rfind(":") :] else "output"


def _key(concept: str, site: str) -> str:
    return f"{_escaped(concept).replace('/', '%2F')}/{_escaped(site)}"


def _escaped(name: str) -> str:
    """Without control characters, of which JSON has two spellings, \\u001f and \\u001F, a single bit apart."""
    return name.translate(_ESCAPES)


_ESCAPES = {code: f"%{code:02X}" for code in (*range(32), ord("%"))}


def _direction(tensor: Tensor) -> Tensor:
    if tensor.ndim != 1 or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise ValueError(f"expected directions of shape (d,), floating and finite, got {tensor.dtype}, {tensor.shape}")
    return tensor
