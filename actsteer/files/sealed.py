"""Sealed files: safetensors with a JSON document and a SHA-256 in the header, written atomically, never pickled."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from actsteer.errors import FileFormatError

VERSION = 1
_WHOLE = 16 * 2**20, 1000  # bytes and tensors: up to here a file is read at once
_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, RuntimeError, KeyError, MemoryError)
_Stamp = tuple[int, int, int]


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    *,
    sealed_apart: Iterable[str] = (),
) -> None:
    """Write tensors and a document to `path`: a temporary file beside it, then a rename.

    Args:
        sealed_apart: tensors whose digests the document has, so that each can be read without the others.
    """
    text = json.dumps({"format": VERSION, **document}, ensure_ascii=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    apart = set(sealed_apart)
    seal = digest({name: tensor for name, tensor in plain.items() if name not in apart}, text)
    with replacing(checked(path)) as temporary, temporary.open("xb") as file:
        file.write(save(plain, metadata={"actsteer": text, "sha256": seal}))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place on leaving without an error; a link stays a link."""
    target = Path(os.path.realpath(target))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """The SHA-256 over a text and tensors, with their names, dtypes and shapes."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b"")
    return found.hexdigest()


def checked(path: str | os.PathLike[str], *, writing: bool = False) -> Path:
    """The path, if its suffix is right and, for writing, its folder exists.

    Raises:
        FileFormatError, FileNotFoundError: before any work, if nothing could be written there.
    """
    target = Path(path)
    if target.suffix.lower() != ".safetensors":
        raise FileFormatError(f"{path}: unknown format {target.suffix!r}; name the file with .safetensors")
    if writing and not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {target.parent}; make it first")
    return target


@final
class Sealed:
    """An open file: its document, verified; and its tensors, small files read at once, of large ones what is asked for.

    Raises:
        FileFormatError: the file is corrupt, foreign, of a newer version, or has changed since it was opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, kind: str) -> None:
        self.path = checked(path).absolute()  # whatever the current folder is when more of it is read
        with self.path.open("rb") as opened:  # a missing or unreadable file is the operating system's own error
            self._stamp = _stamp(os.fstat(opened.fileno()))
        with self._reading():
            file: Any = safe_open(self.path, framework="pt")
            self._names = tuple(file.keys())
            header: dict[str, str] = file.metadata() or {}
            small = self._stamp[1] <= _WHOLE[0] and len(self._names) <= _WHOLE[1]
            self._known = load(self.path.read_bytes()) if small else None
            self._file: Any = None if self._known is not None else file
        if "actsteer" not in header or "sha256" not in header:
            raise FileFormatError(f"{path}: a safetensors file that actsteer did not write; it has no actsteer header")
        self.text, self._seal = header["actsteer"], header["sha256"]
        self.document = _document(path, self.text)
        if self.document.get("kind") != kind or self.document.get("format") != VERSION:
            raise FileFormatError(f"{path}: expected a file of kind {kind!r}; it holds something else")

    def verify(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, if the header's digest is theirs and the document's."""
        tensors = {name: self.tensor(name) for name in names}
        if self._seal != digest(tensors, self.text):
            raise FileFormatError(f"{self.path}: the SHA-256 does not match; the file was altered after it was written")
        return tensors

    @property
    def is_read(self) -> bool:
        """Whether all tensors are in memory."""
        return self._known is not None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, without reading one."""
        if self._known is not None:
            return {name: tuple(tensor.shape) for name, tensor in self._known.items()}
        with self._reading():
            return {name: tuple(self._file.get_slice(name).get_shape()) for name in self._names}

    def tensor(self, name: str) -> Tensor:
        """One tensor, which shares no memory with the file."""
        if self._known is not None:
            return self._known[name]
        with self._reading():
            tensor: Tensor = self._file.get_tensor(name).clone()
            return tensor

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            if _stamp(self.path.stat()) != self._stamp:
                raise FileFormatError(f"{self.path}: the file has changed since it was opened; open it again")
            yield
        except FileFormatError:
            raise
        except _UNREADABLE as error:
            raise FileFormatError(f"{self.path}: not a readable safetensors file ({error}); is it truncated?") from None


def read(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and document of a file, whole and verified, or FileFormatError."""
    file = Sealed(path, kind=kind)
    return file.verify(sorted(file.shapes())), file.document


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns


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


def is_sealed(path: str | os.PathLike[str]) -> bool:
    """Whether it is a readable safetensors file with our header."""
    try:
        with safe_open(path, framework="pt") as file:
            return "actsteer" in (file.metadata() or {})
    except _UNREADABLE:
        return False
