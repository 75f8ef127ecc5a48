"""Formats: the kinds of files that vectors are read from and written to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from actsteer.errors import FileFormatError
from actsteer.files import gguf, native, pt, svec
from actsteer.files.lazy import Named, Numbered, Stored

AnyPath: TypeAlias = str | os.PathLike[str]


@runtime_checkable
class Format(Protocol):
    """A kind of file: a module, or any object, with a suffix and two functions.

    A module of your own is as good as those of `FORMATS`: `bank.save(path, format=mine)`,
    `VectorBank.load(path, format=mine)`, and `actsteer convert --format mine`.

    What `read` gives for each concept is one of three, of `actsteer.files.lazy`:

    - `Named(directions, metadata)`: site -> tensor of shape (d,), and strings;
    - `Numbered(directions, side=..., model_hint=..., metadata=...)`, where the file numbers a model's blocks: `load`
      gives them the model's names;
    - `Stored(sizes, metadata, read)`, where the tensors are read when they are asked for.

    >>> import json, pathlib, tempfile, torch, types
    >>> from actsteer import SteeringVector
    >>> from actsteer.files.lazy import Named
    >>> def read(path):
    ...     return {
    ...         concept: Named({site: torch.tensor(row) for site, row in rows.items()}, {"concept": concept})
    ...         for concept, rows in json.loads(path.read_text()).items()
    ...     }
    >>> def write(path, vectors):
    ...     rows = {
    ...         concept: {site: row.tolist() for site, row in vector.directions.items()}
    ...         for concept, vector in vectors.items()
    ...     }
    ...     path.write_text(json.dumps(rows))
    >>> mine = types.SimpleNamespace(SUFFIX=".json", read=read, write=write)
    >>> v = SteeringVector({"2": torch.tensor([1.0, 2.0])}, concept="nine")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "v.json"
    ...     v.save(path, format=mine)
    ...     SteeringVector.load(path, format=mine).equal(v)
    True
    """

    @property
    def SUFFIX(self) -> str | tuple[str, ...]:  # noqa: N802  (a constant of a module)
        """How the files' names end, in small letters and with the dot; one, or several."""

    def read(self, path: Path, /) -> Mapping[str, Named | Numbered | Stored]:
        """Concept -> vector. Opens the file once, so that what takes its place meanwhile is not mixed in.

        Raises:
            FileFormatError: the file is not of this format, or is damaged.
        """

    def write(self, path: Path, vectors: Mapping[str, Named], /) -> None:
        """Write concept -> vector, by `vector.directions` and `.metadata`, or by the blocks' numbers, `.numbered()`.

        Raises:
            FileFormatError: the format cannot express these vectors, or is only read.
        """


FORMATS: tuple[Format, ...] = (native, gguf, svec, pt)
"""The formats that are known by their suffixes."""


def of(path: AnyPath) -> Format:
    """The format of `FORMATS` whose suffix the file has.

    Raises:
        FileFormatError: there is none.
    """
    name = Path(path).name.lower()
    for known in FORMATS:
        if name.endswith(known.SUFFIX):
            return known
    raise FileFormatError(
        f"{path}: unknown format {Path(path).suffix!r}; name the file with .safetensors or .gguf, or give format=; "
        f"only read are {', '.join((svec.SUFFIX, *pt.SUFFIX))}"
    )
