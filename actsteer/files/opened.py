"""Opened: a safetensors file that is opened once, whatever happens to its name afterwards."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from actsteer.errors import FileFormatError

_WHOLE = 16 * 2**20, 1000  # bytes and tensors: up to here a file is read at once
_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, RuntimeError, KeyError, MemoryError)


@final
class Opened:
    """The tensors of a file as it was when it was opened; a small file is read at once, a large one tensor by tensor.

    A file that takes its place meanwhile is not seen. A file that is written to in place is refused.

    Raises:
        FileFormatError: not a readable safetensors file.
        OSError: there is no such file, or it may not be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        file = self.path.open("rb")
        closing = weakref.finalize(self, file.close)
        self._descriptor = file.fileno()
        self._stamp = self._stamped()
        self._known: dict[str, Tensor] = {}
        self._file: Any = None
        with self._reading():
            content = file.read() if self._stamp[0] <= _WHOLE[0] else b""
            header = _header(content)
            if content and len(header.keys() - {"__metadata__"}) <= _WHOLE[1]:
                self._known = load(content)
                self.names: tuple[str, ...] = tuple(self._known)
                self.metadata: dict[str, str] = header.get("__metadata__") or {}
                closing()
                return
            again = Path(f"/dev/fd/{self._descriptor}")  # the same file, under whatever name it has by now
            self._file = safe_open(again if again.exists() else self.path, framework="pt")
            self.names = tuple(self._file.keys())
            self.metadata = self._file.metadata() or {}

    @property
    def is_read(self) -> bool:
        """Whether all tensors are in memory."""
        return self._file is None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, without reading one."""
        if self.is_read:
            return {name: tuple(tensor.shape) for name, tensor in self._known.items()}
        with self._reading():
            return {name: tuple(self._file.get_slice(name).get_shape()) for name in self.names}

    def tensor(self, name: str) -> Tensor:
        """One tensor, which shares no memory with the file."""
        if self.is_read:
            return self._known[name]
        with self._reading():
            tensor: Tensor = self._file.get_tensor(name).clone()
            return tensor

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            if self._stamped() != self._stamp:
                raise FileFormatError(f"{self.path}: the file has changed since it was opened; open it again")
            yield
        except FileFormatError:
            raise
        except _UNREADABLE as error:
            raise FileFormatError(f"{self.path}: not a readable safetensors file ({error}); is it truncated?") from None

    def _stamped(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


def _header(content: bytes) -> dict[str, Any]:
    """The header, which says what tensors there are; `load` checks it."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")] or b"{}")
    return header if isinstance(header, dict) else {}
