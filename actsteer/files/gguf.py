"""GGUF control vectors, as llama.cpp and repeng have them: block number -> direction, added at the block's output.

Needs the `gguf` package, of the extra `actsteer[gguf]`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from actsteer.errors import FileFormatError
from actsteer.files import sealed
from actsteer.files.lazy import Numbered

_ARCHITECTURE = "controlvector"
_OWN = "actsteer"


def write(path: str | os.PathLike[str], vector: Numbered) -> None:
    """Write a control vector to `path`, atomically; numbers are rounded to float32, the only dtype llama.cpp reads.

    Raises:
        FileFormatError: no directions, or one at block 0 or below, which the format cannot express.
        FileNotFoundError: there is no such folder.
    """
    gguf = _library()
    if not vector.directions:
        raise FileFormatError(f"{path}: a control vector needs one direction or more, got none")
    if (lowest := min(vector.directions)) < 1:
        raise FileFormatError(
            f"{path}: direction.{lowest} cannot be written: llama.cpp's format begins at block 1, and refuses a file "
            "with others; select the later sites, or save as .safetensors"
        )
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {Path(path).parent}; make it first")
    rows = {f"direction.{n}": _row(path, n, direction) for n, direction in sorted(vector.directions.items())}
    with sealed.replacing(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", vector.model_hint or "unknown")
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(rows))
        for key, text in vector.described.items():
            writer.add_string(f"{_OWN}.{key}", text)
        writer.add_string(f"{_OWN}.sha256", _digest(rows, vector.model_hint or "unknown", vector.described))
        for name, row in rows.items():
            writer.add_tensor(name, row.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())


def read(path: str | os.PathLike[str]) -> Numbered:
    """A control vector that any tool has written; what ours has sealed is refused with any altered bit.

    Raises:
        FileFormatError: no readable GGUF, or not a control vector of 1-D float32 directions.
    """
    gguf = _library()
    with Path(path).open("rb"):
        pass  # a missing or unreadable file is the operating system's own error
    try:
        reader = _bounded(gguf)(path)
        keys = {name: one.contents() for name, one in reader.fields.items() if not name.startswith("GGUF.")}
        is_vector = keys.get("general.architecture") == _ARCHITECTURE  # of others nothing is copied
        tensors = {
            tensor.name: (tensor.tensor_type.name, tuple(tensor.shape.tolist()), tensor.data.copy())
            for tensor in (reader.tensors if is_vector else ())
        }
    except Exception as error:
        raise FileFormatError(f"{path}: not a readable GGUF file ({error!r}); is it truncated?") from None
    if not is_vector:
        raise FileFormatError(
            f"{path}: expected a control vector, this is a GGUF file of {keys.get('general.architecture')!r}"
        )
    rows = {name: _direction(path, name, *tensor) for name, tensor in tensors.items() if name.startswith("direction.")}
    if len(rows) != len(tensors) or not rows:
        raise FileFormatError(f"{path}: expected tensors direction.N, and no others, got {sorted(tensors)}")
    if len({len(row) for row in rows.values()}) > 1:
        raise FileFormatError(f"{path}: the directions have several sizes, {[len(row) for row in rows.values()]}")
    hint = str(keys.get(f"{_ARCHITECTURE}.model_hint", ""))
    own = {key.removeprefix(f"{_OWN}."): str(text) for key, text in keys.items() if key.startswith(f"{_OWN}.")}
    known = {"general.architecture", f"{_ARCHITECTURE}.model_hint", f"{_ARCHITECTURE}.layer_count"}
    others = {
        key: str(text)
        for key, text in keys.items()
        if key not in known and key.startswith(f"{_ARCHITECTURE}.") and isinstance(text, str | int | float)
    }
    seal = own.pop("sha256", None)
    if (own or seal is not None) and seal != _digest(rows, hint, others | own):
        raise FileFormatError(f"{path}: the SHA-256 does not match; the file was altered after it was written")
    numbered = {_number(path, name): row for name, row in rows.items()}
    return Numbered(numbered, model_hint=hint, described=others | own)


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package; pip install 'actsteer[gguf]'") from error
    return gguf


def _bounded(gguf: ModuleType) -> Any:
    class Bounded(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """A reader that does not go on past the end of a damaged file, which says that 2^60 entries follow."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
            found = super()._get(offset, dtype, count, *order, **named)
            if len(found) < count:
                raise ValueError(f"{count} numbers at byte {offset} lie past the end")
            return found

    return Bounded


def _row(path: str | os.PathLike[str], number: int, direction: Tensor) -> Tensor:
    row = direction.detach().to("cpu", torch.float32).contiguous()
    if not bool(row.isfinite().all()):
        raise FileFormatError(f"{path}: direction.{number} is not finite in float32, the only dtype of this format")
    return row


def _direction(path: str | os.PathLike[str], name: str, kind: str, shape: tuple[int, ...], data: Any) -> Tensor:
    if kind != "F32" or len(shape) != 1:
        raise FileFormatError(f"{path}: {name}: expected F32 of shape (d,), got {kind} of shape {shape}")
    row = torch.from_numpy(data)
    if not bool(row.isfinite().all()):
        raise FileFormatError(f"{path}: {name} is not finite")
    return row


def _number(path: str | os.PathLike[str], name: str) -> int:
    digits = name.removeprefix("direction.")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 6 and str(int(digits)) == digits):
        raise FileFormatError(f"{path}: {name!r}: expected direction.N, with a number")
    return int(digits)


def _digest(rows: Mapping[str, Tensor], hint: str, described: Mapping[str, str]) -> str:
    return sealed.digest(rows, repr([hint, sorted(described.items())]))
