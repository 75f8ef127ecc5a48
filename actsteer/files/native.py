"""The native format: one safetensors file, sealed by a SHA-256, written atomically, never pickled.

Tensors are named `<concept>/<site>`. The header's string metadata holds a JSON document (format version, what the
tensors mean) and the digest of the document and every tensor, so that any altered bit is noticed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from actsteer.errors import FileFormatError

VERSION = 1

PlainVector: TypeAlias = tuple[Mapping[str, Tensor], Mapping[str, str]]
"""A vector's directions (site -> tensor) and its metadata."""


def write_bank(path: str | os.PathLike[str], bank: Mapping[str, PlainVector]) -> None:
    """Write vectors, concept -> (directions, metadata), to `path`."""
    concepts = {
        concept: {
            "metadata": dict(metadata),
            "model": metadata.get("model"),
            "intervention": "add",
            "sites": {site: {"side": "output", "axis": metadata.get(f"axis {site}")} for site in directions},
        }
        for concept, (directions, metadata) in bank.items()
    }
    tensors = {_key(concept, site): d for concept, (directions, _) in bank.items() for site, d in directions.items()}
    write(path, tensors, {"kind": "bank", "concepts": concepts})


def read_bank(path: str | os.PathLike[str]) -> dict[str, PlainVector]:
    """Read what `write_bank` wrote: concept -> (directions, metadata)."""
    tensors, document = read(path, kind="bank")
    try:
        _refuse_other_meanings(path, document)
        bank: dict[str, PlainVector] = {
            concept: (
                {site: _direction(tensors.pop(_key(concept, site))) for site in dict(entry["sites"])},
                {str(key): str(value) for key, value in entry["metadata"].items()},
            )
            for concept, entry in document["concepts"].items()
        }
    except FileFormatError:
        raise
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path}: the document does not describe the tensors ({error!r}); write it again"
        ) from None
    sizes: dict[str, int] = {}
    for directions, _ in bank.values():
        for site, direction in directions.items():
            if len(direction) != sizes.setdefault(site, len(direction)):
                raise FileFormatError(f"{path}: site {site!r} has directions of two sizes; write it again")
    if tensors:
        raise FileFormatError(f"{path}: tensors {sorted(tensors)} are not in the document; write it again")
    return bank


def _refuse_other_meanings(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    for concept, entry in document["concepts"].items():
        meant = {entry.get("intervention", "add"), *(site.get("side", "output") for site in entry["sites"].values())}
        if meant - {"add", "output"}:
            raise FileFormatError(
                f"{path}: concept {concept!r} means {meant}, not an addition to outputs; upgrade actsteer"
            )


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write tensors and a JSON document to `path`: a temporary file beside it, then a rename."""
    target = _native_path(path)
    text = json.dumps({"format": VERSION, **document}, ensure_ascii=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    payload = save(plain, metadata={"actsteer": text, "sha256": _digest(text, plain)})
    target = Path(os.path.realpath(target))  # a link stays a link
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and document from `path`, whole and verified, or raise FileFormatError."""
    source = _native_path(path)
    with source.open("rb"):
        pass  # a missing or unreadable file is the operating system's own error
    try:
        with safe_open(source, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, KeyError, MemoryError) as error:
        raise FileFormatError(f"{path}: not a readable safetensors file ({error}); is it truncated?") from None
    if "actsteer" not in header or "sha256" not in header:
        raise FileFormatError(f"{path}: a safetensors file that actsteer did not write; it has no actsteer header")
    try:
        document = json.loads(header["actsteer"])
    except (ValueError, RecursionError):
        raise FileFormatError(f"{path}: the header's document is not JSON; the file is corrupt") from None
    if isinstance(document, dict) and isinstance(document.get("format"), int) and document["format"] > VERSION:
        raise FileFormatError(
            f"{path}: format {document['format']}, this version reads up to {VERSION}; upgrade actsteer to open it"
        )
    if header["sha256"] != _digest(header["actsteer"], tensors):
        raise FileFormatError(f"{path}: the SHA-256 does not match; the file was altered after it was written")
    if not isinstance(document, dict) or document.get("kind") != kind or document.get("format") != VERSION:
        raise FileFormatError(f"{path}: expected a file of kind {kind!r}; it holds something else")
    return tensors, document


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise FileFormatError or FileNotFoundError, before any work, if nothing could be written there."""
    folder = _native_path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {folder}; make it first")


def _native_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix.lower() != ".safetensors":
        raise FileFormatError(f"{path}: unknown format {target.suffix!r}; name the file with .safetensors")
    return target


def _key(concept: str, site: str) -> str:
    return f"{_escaped(concept).replace('/', '%2F')}/{_escaped(site)}"


def _escaped(name: str) -> str:
    """Without control characters, of which JSON has two spellings, \\u001f and \\u001F, a single bit apart."""
    return "".join(f"%{ord(c):02X}" if c < " " or c == "%" else c for c in name)


def _direction(tensor: Tensor) -> Tensor:
    if tensor.ndim != 1 or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise ValueError(f"expected directions of shape (d,), floating and finite, got {tensor.dtype}, {tensor.shape}")
    return tensor


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b"")
    return digest.hexdigest()
