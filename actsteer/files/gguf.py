"""GGUF control vectors, as llama.cpp and repeng have them: block number -> direction, added at the block's output.

Needs the `gguf` package, of the extra `actsteer[gguf]`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from actsteer.errors import FileFormatError
from actsteer.files import sealed
from actsteer.files.lazy import Named, Numbered
from actsteer.files.replacing import replacing

SUFFIX = ".gguf"
_ARCHITECTURES = ("controlvector", "steervector")  # ours, llama.cpp's and repeng's; EasySteer's
_OWN = "actsteer"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def write(path: Path, vectors: Mapping[str, Named]) -> None:
    """Write one control vector; numbers are rounded to float32, the only dtype llama.cpp reads.

    Raises:
        FileFormatError: no directions, or one at block 0 or below, which the format cannot express.
        FileNotFoundError: there is no such folder.
    """
    gguf = _library()
    if len(vectors) != 1:
        raise FileFormatError(f"{path}: a GGUF file holds one vector, got {list(vectors)}; save them one by one")
    vector = next(iter(vectors.values())).numbered()
    if not vector.directions:
        raise FileFormatError(f"{path}: a control vector needs one direction or more, got none")
    if (lowest := min(vector.directions)) < 1:
        raise FileFormatError(
            f"{path}: direction.{lowest} cannot be written: llama.cpp's format begins at block 1, and refuses a file "
            "with others; select the later sites, or save as .safetensors"
        )
    rows = {f"direction.{n}": _row(path, n, direction) for n, direction in sorted(vector.directions.items())}
    hint = vector.model_hint or "unknown"
    described = {
        "operation": vector.metadata.get("intervention", "add"),
        "sites": json.dumps({str(number): site for number, site in vector.sites.items()}),
        "metadata": json.dumps(dict(vector.metadata)),
    }
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURES[0])
        writer.add_string(f"{_ARCHITECTURES[0]}.model_hint", hint)
        writer.add_uint32(f"{_ARCHITECTURES[0]}.layer_count", len(rows))
        for key, text in described.items():
            writer.add_string(f"{_OWN}.{key}", text)
        writer.add_string(f"{_OWN}.sha256", _digest(rows, hint, described))
        for name, row in rows.items():
            writer.add_tensor(name, row.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())


def read(path: Path) -> dict[str, Numbered]:
    """A control vector that any tool has written; what ours has sealed is refused with any altered bit.

    Directions have shape (d,) or (1, d), and a floating dtype. Concept: the file's name, if the file does not tell it.

    Raises:
        FileFormatError: no readable GGUF, or not a control vector.

    Warns:
        UserWarning: there are tensors beside the directions, which are ignored.
    """
    keys, tensors = _contents(path)
    if (architecture := keys.get("general.architecture")) not in _ARCHITECTURES:
        raise FileFormatError(f"{path}: expected a control vector, this is a GGUF file of {architecture!r}")
    rows = {name: _direction(path, name, *tensor) for name, tensor in tensors.items() if _is_direction(name)}
    others = [name for name in tensors if not _is_direction(name)]
    if not rows:
        raise FileFormatError(f"{path}: expected tensors direction.N, got {others}")
    if len({len(row) for row in rows.values()}) > 1:
        raise FileFormatError(f"{path}: the directions have several sizes, {[len(row) for row in rows.values()]}")
    hint = str(keys.get(f"{architecture}.model_hint", ""))
    own = {key.removeprefix(f"{_OWN}."): str(text) for key, text in keys.items() if key.startswith(f"{_OWN}.")}
    known = {f"{architecture}.model_hint", f"{architecture}.layer_count"}
    foreign = {
        key: str(text)
        for key, text in keys.items()
        if key not in known and key.startswith(f"{architecture}.") and isinstance(text, str | int | float)
    }
    seal = own.pop("sha256", None)
    if (own or seal is not None) and (others or seal != _digest(rows, hint, foreign | own)):
        raise FileFormatError(f"{path}: the SHA-256 does not match; the file was altered after it was written")
    if others:
        warnings.warn(f"{path}: the tensors {others} are no directions, and ignored", UserWarning, stacklevel=2)
    sites, metadata = _ours(path, own)
    if (operation := own.get("operation", "add")) != "add":
        metadata["intervention"] = operation
    vector = Numbered(
        {_number(path, name): row for name, row in rows.items()},
        model_hint=hint,
        metadata={key: text for key, text in own.items() if key not in _KEYS} | foreign | metadata,
        sites=sites,
    )
    return {metadata.get("concept") or path.stem: vector}


def is_ours(path: Path) -> bool:
    """Whether there is a control vector that this library has written."""
    try:
        return any(key.startswith(f"{_OWN}.") for key in _contents(path)[0])
    except (OSError, FileFormatError):
        return False


_KEYS = ("operation", "sites", "metadata")


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], Any]]]:
    """Key -> value; and name -> dtype, shape and numbers of every tensor, with a direction's numbers copied."""
    gguf = _library()
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(0)
        if start[:4] == b"GGUF" and start[4:6] == b"\0\0" and any(start[6:]):
            raise FileFormatError(
                f"{path}: a big-endian GGUF file; convert it first, with gguf_convert_endian.py of llama.cpp"
            )
        try:
            reader = _bounded(gguf)(file)
            keys = {name: one.contents() for name, one in reader.fields.items() if not name.startswith("GGUF.")}
            is_vector = keys.get("general.architecture") in _ARCHITECTURES  # of others nothing is copied
            found = reader.tensors if is_vector else []
            if sum(tensor.n_bytes for tensor in found) > len(reader.data):
                raise ValueError("its tensors are larger than the file")
            tensors = {
                tensor.name: (
                    tensor.tensor_type.name,
                    tuple(tensor.shape.tolist()),
                    tensor.data.copy() if _is_direction(tensor.name) else None,
                )
                for tensor in found
            }
        except Exception as error:
            raise FileFormatError(f"{path}: not a readable GGUF file ({error!r}); is it truncated?") from None
    return keys, tensors


def _ours(path: Path, own: Mapping[str, str]) -> tuple[dict[int, str], dict[str, str]]:
    """What actsteer's keys say: number -> site, and the metadata; empty for another tool's file."""
    try:
        sites = {int(n): str(site) for n, site in json.loads(own.get("sites", "{}")).items()}
        metadata = {str(k): str(text) for k, text in json.loads(own.get("metadata", "{}")).items()}
    except (ValueError, AttributeError, RecursionError):
        raise FileFormatError(f"{path}: its actsteer keys are not JSON; the file is corrupt") from None
    return sites, metadata


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package; pip install 'actsteer[gguf]'") from error
    return gguf


def _bounded(gguf: ModuleType) -> Any:
    class Bounded(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """A reader that does not go on past the end of a damaged file, which says that 2^60 entries follow."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, *order: Any, **named: Any) -> Any:
            found = super()._get(offset, dtype, count, *order, **named)
            if len(found) < count:
                raise ValueError(f"{count} numbers at byte {offset} lie past the end")
            return found

    return Bounded


def _row(path: Path, number: int, direction: Tensor) -> Tensor:
    row = direction.detach().to("cpu", torch.float32).contiguous()
    if not bool(row.isfinite().all()):
        raise FileFormatError(f"{path}: direction.{number} is not finite in float32, the only dtype of this format")
    return row


def _is_direction(name: str) -> bool:
    return name.startswith("direction.")


def _direction(path: Path, name: str, kind: str, shape: tuple[int, ...], data: Any) -> Tensor:
    if kind not in _DTYPES or any(size != 1 for size in shape[1:]):  # its order is that of llama.cpp, d first
        raise FileFormatError(
            f"{path}: {name}: expected {', '.join(_DTYPES)} of shape (d,) or (1, d), got {kind} of shape {shape[::-1]}"
        )
    row = torch.from_numpy(data).view(_DTYPES[kind]).reshape(-1)
    if not bool(row.isfinite().all()):
        raise FileFormatError(f"{path}: {name} is not finite")
    return row


def _number(path: Path, name: str) -> int:
    digits = name.removeprefix("direction.")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 6 and str(int(digits)) == digits):
        raise FileFormatError(f"{path}: {name!r}: expected direction.N, with a number")
    return int(digits)


def _digest(rows: Mapping[str, Tensor], hint: str, described: Mapping[str, str]) -> str:
    return sealed.digest(rows, repr([hint, sorted(described.items())]))
