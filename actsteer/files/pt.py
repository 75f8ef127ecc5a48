"""`.pt` files of tensors alone, as other projects write them; nothing else in them is unpickled.

- a tensor (layers, d) or (layers, 1, d), or a list of directions, a layer each;
- a mapping layer -> direction; RepE's layers are negative, -1 the last one;
- a mapping concept -> one of these, or site -> direction;
- one direction in a file whose name tells the layer: CAA's `vec_layer_<N>_<model>.pt`, rotalabs' `layer_<N>.pt`.

A direction has shape (d,) or (1, d), and is a tensor or a numpy array. Layer N is the output of block N.
"""

from __future__ import annotations

import re
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import safe_globals

from actsteer.errors import FileFormatError
from actsteer.files import foreign
from actsteer.files.lazy import Named, Numbered
from actsteer.files.untrusted import not_plain

SUFFIX = (".pt", ".pth", ".bin")
_NAME = re.compile(r"(?:(?P<concept>.+?)_)??(?:vec_)?layers?_?(?P<layer>-?\d{1,5})(?:_(?P<rest>.+))?")
_SHARED = 1000  # one tensor may have many names: how many times the file's size its directions may take
_LOCK = threading.Lock()  # torch has one list of what may be in a file


def read(path: Path) -> dict[str, Named | Numbered]:
    """Concept -> vector, by the blocks' numbers, or by site where the keys are names.

    The concept is the file's name; where that tells a layer, what stands before it or, without that, the folder's. What
    stands behind the layer, in CAA's files the model, is the metadata's "variant".
    """
    content, size = loaded(path)
    budget = _Budget(path, _SHARED * size)
    found = _NAME.fullmatch(path.stem)
    if found is not None and isinstance(content, Tensor):
        row = budget.row(found["layer"], content)
        if row.ndim != 1:
            raise FileFormatError(
                f"{path}: its name tells one layer, and its shape is {tuple(row.shape)}; a direction has (d,)"
            )
        rows = foreign.checked(path, {int(found["layer"]): row})
        metadata = {} if found["rest"] is None else {"variant": found["rest"]}
        return {found["concept"] or path.absolute().parent.name: Numbered(rows, metadata=metadata)}
    if isinstance(content, Mapping) and _is_by_concept(content):
        return {concept: _vector(path, concept, own, budget) for concept, own in _by_name(path, content).items()}
    return {path.stem: _vector(path, path.stem, content, budget)}


def write(path: Path, vectors: Mapping[str, Named]) -> None:
    """Raise: it is only read."""
    raise FileFormatError(f"{path}: {path.suffix} is only read; name the file with .safetensors or .gguf")


def loaded(path: Path) -> tuple[Any, int]:
    """What is in the file, tensors, lists and mappings of them; and its size in bytes.

    Raises:
        FileFormatError: there is anything else in it.
        OSError: there is no such file, or it may not be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        return _loaded(path, file, size), size


def _loaded(path: Path, file: BinaryIO, size: int) -> Any:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as parts:
                if sum(part.file_size for part in parts.infolist()) > size:
                    raise ValueError("its parts are larger than the file")
        file.seek(0)
        with _LOCK, safe_globals(_NUMPY):
            content = torch.load(file, map_location="cpu", weights_only=True)
        return _with_tensors(content, {})
    except Exception as error:
        told = "" if isinstance(error, UnpicklingError) else f": {str(error).partition(chr(10))[0]}"
        raise FileFormatError(
            f"{path}: expected tensors, and nothing is unpickled beside them ({type(error).__name__}{told}); save them "
            "alone"
        ) from None


def _vector(path: Path, concept: str, content: Any, budget: _Budget) -> Named | Numbered:
    if isinstance(content, Tensor):
        budget.check("it", content)
        if content.ndim == 3 and content.shape[1] == 1:
            content = content[:, 0]
        if content.ndim != 2:
            raise FileFormatError(
                f"{path}: expected a tensor (layers, d) or (layers, 1, d), got {tuple(content.shape)}; a file with one "
                "direction is named after its layer, layer_<N>.pt"
            )
    if isinstance(content, Tensor | list):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping) or not all(isinstance(row, Tensor) for row in content.values()):
        raise FileFormatError(f"{path}: expected a tensor (layers, d) or a mapping layer -> tensor (d,)")
    rows = {key: budget.row(key, row) for key, row in _by_name(path, content).items()}
    numbers = {key: foreign.layer(key) for key in rows}
    by_number: dict[int, Tensor] = {}
    for key, number in numbers.items():
        if number is not None:
            foreign.put(path, by_number, number, rows[key])
    if not by_number:
        return Named(foreign.checked(path, rows), {"concept": concept})
    if len(by_number) < len(rows):
        names = [key for key, number in numbers.items() if number is None]
        raise FileFormatError(f"{path}: expected layers alone, or sites alone; {names} are no layers")
    return Numbered(foreign.checked(path, by_number))


def _is_by_concept(content: Mapping[Any, Any]) -> bool:
    """Whether its values are vectors' directions, several each, and not directions."""
    if content and all(isinstance(own, Mapping) for own in content.values()):
        return True
    return bool(content) and all(
        foreign.layer(str(key)) is None and (isinstance(own, Mapping | list) or _is_stack(own))
        for key, own in content.items()
    )


def _is_stack(content: Any) -> bool:
    return isinstance(content, Tensor) and not_plain(content) is None and content.ndim > 1 and len(content) > 1


def _by_name(path: Path, content: Mapping[Any, Any]) -> dict[str, Any]:
    """The same with strings for keys, which were strings or numbers."""
    for key in content:
        if type(key) not in (int, str):
            raise FileFormatError(f"{path}: expected layers' numbers or names, got the key {key!r}")
        if type(key) is int and str(key) in content:
            raise FileFormatError(f"{path}: layer {key} is there twice, under two names")
    return {str(key): value for key, value in content.items()}


class _Budget:
    """How many bytes a file's directions may take, which may be one tensor under many names."""

    def __init__(self, path: Path, left: int) -> None:
        self._path, self._left = path, left

    def row(self, key: object, tensor: Tensor) -> Tensor:
        """The direction, checked, of shape (d,)."""
        self.check(f"layer {key}", tensor)
        return tensor.detach().reshape(-1) if tensor.ndim == 2 and len(tensor) == 1 else tensor.detach()

    def check(self, what: str, tensor: Tensor) -> None:
        """Take the tensor's size from what is left."""
        if (problem := not_plain(tensor)) is not None:
            raise FileFormatError(f"{self._path}: {what}: {problem}")
        if not tensor.numel():
            raise FileFormatError(f"{self._path}: {what}: it is empty, of shape {tuple(tensor.shape)}")
        self._left -= tensor.numel() * tensor.itemsize
        if self._left < 0:
            raise FileFormatError(f"{self._path}: its directions take over {_SHARED} times the file's size")


# --- numpy -------------------------------------------------------------------------------------------------------
class _Dtype:
    """What a pickle says of a numpy dtype; no numpy is called with what a file says."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = str(name), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])


class _Array:
    """What a pickle says of a numpy array."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def tensor(self) -> Tensor:
        """The array as a tensor with memory of its own."""
        _, shape, kind, is_fortran, content = self.state
        dtypes = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}
        if not isinstance(kind, _Dtype) or kind.name not in dtypes or kind.order != "<":
            raise ValueError("a numpy array of other numbers than float16, float32 or float64, little-endian")
        if not isinstance(content, bytes) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("a numpy array whose parts do not fit")
        flat = torch.frombuffer(bytearray(content), dtype=dtypes[kind.name]) if content else torch.empty(0)
        return flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1]) if is_fortran else flat.reshape(shape)


def _array(*_: Any) -> _Array:
    return _Array()


_NUMPY: list[Any] = [
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (_Array, "numpy.ndarray"),
    (_Dtype, "numpy.dtype"),
]


def _with_tensors(content: Any, known: dict[int, Any]) -> Any:
    """The same with tensors in the place of arrays, and what is there many times made once."""
    if id(content) not in known:
        if isinstance(content, _Array):
            known[id(content)] = content.tensor()
        elif isinstance(content, list | tuple):
            known[id(content)] = [_with_tensors(own, known) for own in content]
        elif isinstance(content, Mapping):
            known[id(content)] = {key: _with_tensors(own, known) for key, own in content.items()}
        else:
            return content
    return known[id(content)]
