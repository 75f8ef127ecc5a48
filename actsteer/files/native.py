"""The native format: vectors in a sealed safetensors file, each with a digest, read when it is asked for.

Tensors are named `<concept>/<site>`. The document says of every concept its metadata, the model's fingerprint, the
intervention meant, and of every site the side and the feature axis. A file of kind "steering" holds more beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor

from actsteer.errors import FileFormatError
from actsteer.files import sealed, steering_lite
from actsteer.files.lazy import Named, Numbered, Stored
from actsteer.files.opened import Opened
from actsteer.files.untrusted import not_a_direction

SUFFIX = ".safetensors"
_INPUT = re.compile(r":in[^:]*(\[\d+:\d+\])?$")  # as of "h.3:in.hidden_states[0:64]"


def write(path: Path, vectors: Mapping[str, Named]) -> None:
    """Write vectors to `path`."""
    _write(path, vectors, {"kind": "bank"}, {})


def _write(path: Path, vectors: Mapping[str, Named], document: Mapping[str, Any], beside: Mapping[str, Tensor]) -> None:
    tensors: dict[str, Tensor] = {}
    concepts: dict[str, Any] = {}
    for concept, vector in vectors.items():
        directions, metadata = vector.directions, vector.metadata
        own = {_key(concept, site): direction.detach().cpu() for site, direction in directions.items()}
        tensors |= own
        concepts[concept] = {
            "metadata": dict(metadata),
            "model": metadata.get("model"),
            "intervention": metadata.get("intervention", "add"),
            "sites": {site: {"side": _side(site), "axis": metadata.get(f"axis {site}")} for site in directions},
            "sha256": sealed.digest(own),
        }
    sealed.write(path, {**tensors, **beside}, {**document, "concepts": concepts}, sealed_apart=tensors)


def read(path: Path) -> Mapping[str, Stored | Numbered]:
    """What `write` wrote; the directions of a large file when they are asked for. And the files of steering-lite.

    Raises:
        FileFormatError: the file is corrupt, foreign, or of a newer version.
    """
    return _read(path, "bank")[0]


@final
class WithMore:
    """The same format for a file that may hold more than vectors: a document and tensors, whose sense others know.

    Args:
        document: what to write beside the vectors, under names that they do not use.
        tensors: the tensors of which it speaks; there is no slash in their names.
    """

    SUFFIX = SUFFIX

    def __init__(self, document: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.document, self.tensors = document, dict(tensors or {})

    def write(self, path: Path, vectors: Mapping[str, Named]) -> None:
        """Write vectors and what is beside them."""
        _write(path, vectors, {"kind": "steering", **(self.document or {})}, self.tensors)

    def read(self, path: Path) -> Mapping[str, Stored | Numbered]:
        """The vectors; what is beside them is then in `document`, or None of a file of vectors alone.

        Raises:
            FileFormatError: as the function.
        """
        found, self.document, self.tensors = _read(path, "bank", "steering")
        return found


def _read(
    path: Path, *kinds: str
) -> tuple[Mapping[str, Stored | Numbered], Mapping[str, Any] | None, dict[str, Tensor]]:
    """The vectors, and the document and the tensors beside them."""
    file = Opened(path.absolute())  # whatever the current folder is when more of it is read
    if not sealed.is_ours(file) and steering_lite.is_numbered(file):
        return steering_lite.read(file), None, {}
    document, shapes = sealed.document_of(file, *kinds), file.shapes()
    is_bank = document["kind"] == "bank"
    bank: dict[str, Stored] = {}
    described, apart = set[str](), set[str]()
    try:
        for concept, entry in document["concepts"].items():
            names = {site: _key(concept, site) for site in dict(entry["sites"])}
            bank[concept] = _stored(file, concept, entry, names, shapes)
            described.update(names.values())
            apart.update(names.values() if "sha256" in entry else ())
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise _undescribed(path, error) from None
    if (rest := shapes.keys() - described) and is_bank:
        raise FileFormatError(f"{path}: tensors {sorted(rest)} are not in the document; write it again")
    verified = sealed.verified(file, shapes.keys() - apart)
    if file.is_read:
        bank = {concept: _in_memory(vector) for concept, vector in bank.items()}
    if is_bank:
        return bank, None, {}
    beside = {name: part for name, part in document.items() if name not in ("format", "kind", "concepts")}
    return bank, beside, {name: verified[name] for name in rest}


def _stored(
    file: Opened,
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
        for tensor in own.values():
            if (problem := not_a_direction(tensor)) is not None:
                raise _undescribed(file.path, ValueError(problem))
        return {site: own[name] for site, name in names.items()}

    return Stored({site: shape[0] for site, shape in sizes.items()}, _metadata(concept, entry), read)


def _metadata(concept: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """The metadata, and what the document says beside it."""
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


def _in_memory(vector: Stored) -> Stored:
    """The same vector, its directions in memory."""
    directions = vector.read()
    return Stored(vector.sizes, vector.metadata, lambda: directions)


def _undescribed(path: Path, error: Exception) -> FileFormatError:
    return FileFormatError(f"{path}: the document does not describe the tensors ({error!r}); write it again")


def _side(site: str) -> str:
    return "input" if _INPUT.search(site) else "output"


def _key(concept: str, site: str) -> str:
    return f"{_escaped(concept).replace('/', '%2F')}/{_escaped(site)}"


def _escaped(name: str) -> str:
    """Without control characters, of which JSON has two spellings, \\u001f and \\u001F, a single bit apart."""
    return name.translate(_ESCAPES)


_ESCAPES = {code: f"%{code:02X}" for code in (*range(32), ord("%"))}
