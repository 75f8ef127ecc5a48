"""Sealed files: safetensors with a JSON document and a SHA-256 in the header, written atomically, never pickled."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from actsteer.errors import FileFormatError
from actsteer.files.opened import Opened
from actsteer.files.replacing import check_replaceable, replacing

VERSION = 1


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    *,
    sealed_apart: Iterable[str] = (),
) -> None:
    """Write tensors and a document to `path`, as `replacing` has it.

    Args:
        sealed_apart: tensors whose digests the document has, so that each can be read without the others.
    """
    text = json.dumps({"format": VERSION, **document}, ensure_ascii=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    apart = set(sealed_apart)
    seal = digest({name: tensor for name, tensor in plain.items() if name not in apart}, text)
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(save(plain, metadata={"actsteer": text, "sha256": seal}))
        file.flush()
        os.fsync(file.fileno())


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """The SHA-256 over a text and tensors, with their names, dtypes and shapes."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b"")
    return found.hexdigest()


def checked(path: str | os.PathLike[str], *, writing: bool = False) -> Path:
    """The path, if its suffix is right and, for writing, a file can be written there.

    Raises:
        FileFormatError, FileNotFoundError: before any work, if nothing could be written there.
    """
    target = Path(path)
    if target.suffix.lower() != ".safetensors":
        raise FileFormatError(f"{path}: unknown format {target.suffix!r}; name the file with .safetensors")
    if writing:
        check_replaceable(target)
    return target


def read(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and document of a file, whole and verified, or FileFormatError."""
    file = Opened(path)
    document = document_of(file, kind)
    return verified(file, sorted(file.names)), document


def document_of(file: Opened, *kinds: str) -> dict[str, Any]:
    """The document of a file of ours, of one of these kinds; it is verified with the tensors.

    Raises:
        FileFormatError: the file is corrupt, foreign, or of a newer version.
    """
    if not is_ours(file):
        raise FileFormatError(
            f"{file.path}: a safetensors file that actsteer did not write; it has no actsteer header. If it holds "
            "directions, read them with safetensors, and give SteeringVector({site: direction})"
        )
    document = _document(file.path, file.metadata["actsteer"])
    found = document.get("kind")
    if found not in kinds or document.get("format") != VERSION:
        opened = _OPENED_BY.get(found, "") if isinstance(found, str) and found not in kinds else ""
        raise FileFormatError(
            f"{file.path}: expected a file of kind {' or '.join(map(repr, kinds))}; it holds something else{opened}"
        )
    return document


_OPENED_BY = {
    "bank": ", vectors: open it with VectorBank.load(path)",
    "steering": ", a steering that is more than its vectors: open it with Steering.load(path)",
    "gate": ", a gate: open it with the load of its class, as ProjectionAbove.load(path)",
    "statistics": ", statistics: open it with Statistics.load(path)",
    "class statistics": ", statistics by class: open it with ClassStatistics.load(path)",
}


def verified(file: Opened, names: Iterable[str]) -> dict[str, Tensor]:
    """These tensors of a file of ours, if the header's digest is theirs and the document's."""
    tensors = {name: file.tensor(name) for name in names}
    if file.metadata["sha256"] != digest(tensors, file.metadata["actsteer"]):
        raise FileFormatError(f"{file.path}: the SHA-256 does not match; the file was altered after it was written")
    return tensors


def is_ours(file: Opened) -> bool:
    """Whether a file has our header."""
    return "actsteer" in file.metadata and "sha256" in file.metadata


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """What kind of file of ours there is ("bank", "steering"); None if there is another one, or none."""
    try:
        kind = _document(path, Opened(path).metadata["actsteer"]).get("kind")
    except (KeyError, OSError, FileFormatError):
        return None
    return kind if isinstance(kind, str) else None


def _document(path: str | os.PathLike[str], text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise FileFormatError(f"{path}: the header's document is not JSON; the file is corrupt") from None
    if not isinstance(document, dict):
        return {}
    if isinstance(document.get("format"), int) and document["format"] > VERSION:
        raise FileFormatError(
            f"{path}: format {document['format']}, this version reads up to {VERSION}; upgrade actsteer to open it"
        )
    return document
