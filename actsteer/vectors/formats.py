"""Formats: vectors to and from files, by the file's suffix, with sites named for the model at hand."""

from __future__ import annotations

import glob
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from actsteer.errors import FileFormatError, SiteNotFoundError
from actsteer.files import foreign, gguf, native, sealed
from actsteer.files.lazy import Numbered, PlainVector, Stored
from actsteer.sites import fingerprint
from actsteer.sites.blocks import block_of, blocks_of_type, find_blocks

AnyPath = str | os.PathLike[str]
_SUFFIXES = (".safetensors", ".gguf", *foreign.SUFFIXES)


def write(
    path: AnyPath, bank: Mapping[str, PlainVector], *, model: nn.Module | None = None, layer_offset: int = 0
) -> None:
    """Write vectors, concept -> (directions, metadata), to a `.safetensors` or a `.gguf` file."""
    suffix = Path(path).suffix.lower()
    if model is not None:
        for concept, (_, metadata) in bank.items():
            fingerprint.check(model, metadata, what=f"the vector {concept!r}")
        known = fingerprint.described(model)
        bank = {
            c: (own, metadata if "model" in metadata else {**metadata, **known}) for c, (own, metadata) in bank.items()
        }
    if suffix == ".safetensors":
        if layer_offset:
            raise ValueError("layer_offset is for files that number the blocks, .gguf")
        native.write_bank(path, bank)
    elif suffix == ".gguf":
        if len(bank) != 1:
            raise FileFormatError(f"{path}: a GGUF file holds one vector, got {list(bank)}; save them one by one")
        ((concept, vector),) = bank.items()
        gguf.write(path, _numbered(path, concept, *vector, model=model, layer_offset=layer_offset))
    else:
        raise FileFormatError(f"{path}: unknown format {suffix!r}; name the file with .safetensors or .gguf")


def read(path: AnyPath, *, model: nn.Module | None = None, layer_offset: int = 0) -> dict[str, Stored]:
    """Concept -> what the file, or each of the files that a pattern such as "dir/*.safetensors" names, says of it."""
    text = os.fspath(path)
    if Path(text).exists() or not glob.has_magic(text):
        return _read(text, model, layer_offset)
    files = sorted(name for name in glob.glob(text) if Path(name).is_file())  # noqa: PTH207
    if not files:
        raise FileNotFoundError(f"{path}: no file has such a name")
    found: dict[str, Stored] = {}
    origin: dict[str, str] = {}
    for name in files:
        for concept, vector in _read(name, model, layer_offset).items():
            if concept in found:
                vector = _joined(found[concept], vector, concept, files=(origin[concept], name))
            found[concept], origin[concept] = vector, name
    sizes: dict[str, tuple[int, str]] = {}
    for concept, vector in found.items():
        for site, size in vector.sizes.items():
            first, name = sizes.setdefault(site, (size, origin[concept]))
            if first != size:
                raise FileFormatError(
                    f"{origin[concept]}: site {site!r} has {size} features, in {name} {first}; are they of one model?"
                )
    return found


def _read(path: str, model: nn.Module | None, layer_offset: int) -> dict[str, Stored]:
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise FileFormatError(
            f"{path}: unknown format {suffix!r}; name the file with .safetensors or .gguf; of others there are "
            f"{', '.join(foreign.SUFFIXES)}"
        )
    name: Callable[[str, Numbered], Stored] = lambda concept, vector: _named(  # noqa: E731
        path, concept, vector, model=model, layer_offset=layer_offset
    )
    if suffix == ".gguf":
        vector = gguf.read(path)
        return {_concept(path, vector): name(_concept(path, vector), vector)}
    if suffix == ".svec":
        return {concept: name(concept, vector) for concept, vector in foreign.read_svec(path).items()}
    if suffix != ".safetensors":
        tensors = foreign.read_tensors(path)
        if layer_offset and not all(isinstance(own, Numbered) for own in tensors.values()):
            raise _unnumbered(path)
        return {
            concept: name(concept, own) if isinstance(own, Numbered) else _stored(own, {"concept": concept})
            for concept, own in tensors.items()
        }
    if not sealed.is_sealed(path) and foreign.is_numbered(path):
        return {concept: name(concept, vector) for concept, vector in foreign.read_numbered(path).items()}
    if layer_offset:
        raise _unnumbered(path)
    found = native.read_bank(path)
    if model is not None:
        meant = {(own.metadata.get("model"), own.metadata.get("weights")): (c, own) for c, own in found.items()}
        for concept, own in meant.values():
            fingerprint.check(model, own.metadata, what=f"{path}: the vector {concept!r}")
    return found


def _unnumbered(path: str) -> FileFormatError:
    return FileFormatError(f"{path}: it names its sites, and an offset is for files that number the blocks")


def _numbered(
    path: AnyPath,
    concept: str,
    directions: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    model: nn.Module | None,
    layer_offset: int,
) -> Numbered:
    """A vector at blocks' outputs, by their numbers."""
    operation = metadata.get("intervention", "add")
    if operation != "add":
        raise FileFormatError(
            f"{path}: {concept!r} is meant for {operation!r}, and a control vector is always added; save as "
            ".safetensors"
        )
    known = None if model is None else find_blocks(model)
    found: dict[int, str] = {}
    for site in directions:
        at = block_of(site)
        if at is None or (known is not None and (at[0] != known[0] or at[1] >= known[1])):
            raise FileFormatError(
                f"{path}: site {site!r} is not the output of a block"
                f"{'' if known is None else f' of {known[0]} (0 to {known[1] - 1})'}, and a control vector is added "
                "nowhere else; select others, or save as .safetensors"
            )
        if (other := found.setdefault(at[1] + layer_offset, site)) != site:
            raise FileFormatError(f"{path}: sites {other!r} and {site!r} are one place; select one of them")
    if len({at[0] for at in map(block_of, directions) if at is not None}) > 1:
        raise FileFormatError(f"{path}: the sites {list(directions)} are of several lists of blocks")
    kind = (fingerprint.model_type(model) if model is not None else None) or metadata.get("model_type", "")
    described = {
        "operation": operation,
        "sites": json.dumps({str(number): site for number, site in found.items()}),
        "metadata": json.dumps(dict(metadata)),
    }
    return Numbered({n: directions[site] for n, site in found.items()}, model_hint=kind, described=described)


def _concept(path: str, vector: Numbered) -> str:
    return _own(path, vector)[1].get("concept") or Path(path).stem


def _own(path: str, vector: Numbered) -> tuple[dict[int, str], dict[str, str]]:
    """What our own keys say of a control vector: number -> site, and the metadata; empty for another tool's."""
    try:
        sites = {int(n): str(site) for n, site in json.loads(vector.described.get("sites", "{}")).items()}
        metadata = {str(k): str(text) for k, text in json.loads(vector.described.get("metadata", "{}")).items()}
    except (ValueError, AttributeError, RecursionError):
        raise FileFormatError(f"{path}: its actsteer keys are not JSON; the file is corrupt") from None
    return sites, metadata


def _named(path: str, concept: str, vector: Numbered, *, model: nn.Module | None, layer_offset: int) -> Stored:
    """A vector at sites, which have the model's names or, without one, those of its type."""
    sites, metadata = _own(path, vector)
    described = {k: text for k, text in vector.described.items() if k not in ("sites", "metadata", "operation")}
    metadata = {"concept": concept} | described | metadata
    if (operation := vector.described.get("operation", "add")) != "add":
        metadata["intervention"] = operation
    if vector.model_hint not in ("", "unknown"):
        metadata.setdefault("model_type", vector.model_hint)
    if model is None and sites.keys() == vector.directions.keys() and not layer_offset:
        return _stored({site: vector.directions[n] for n, site in sites.items()}, metadata)
    if model is not None:
        (blocks, count), kind = find_blocks(model), fingerprint.model_type(model)
        fingerprint.check(model, metadata, what=f"{path}: the vector {concept!r}")
        if kind is not None and vector.model_hint not in ("", "unknown", kind):
            warnings.warn(f"{path}: made for a {vector.model_hint}, the model is a {kind}", UserWarning, stacklevel=5)
    elif (of_type := blocks_of_type(vector.model_hint)) is not None:
        blocks, count = of_type, 100_000
    else:
        raise FileFormatError(
            f"{path}: it numbers the blocks of a {vector.model_hint or 'model of unknown type'}; name them with model="
        )
    named: dict[str, Tensor] = {}
    ours = {} if layer_offset else {number: block_of(site) for number, site in sites.items()}  # in a file of our own
    for number, row in sorted(vector.directions.items()):
        at = ours.get(number)
        block = number - layer_offset if at is None else at[1]
        if not (0 if vector.side == "in" else -1) <= block < count:
            raise SiteNotFoundError(
                f"{path}: layer {number} would be block {block}, and the model has {blocks}.0 to {blocks}.{count - 1}; "
                f"is layer_offset={layer_offset} right? Rows of hidden_states, which begin with the embeddings, need 1"
            )
        at_input = vector.side == "in" or block < 0
        named[f"{blocks}.{max(block, 0)}{':in' if at_input else ''}"] = row
    return _stored(named, metadata)


def _joined(one: Stored, other: Stored, concept: str, *, files: tuple[str, str]) -> Stored:
    """A vector whose sites are in several files, as rotalabs' layer_<N>.pt."""
    if one.sizes.keys() & other.sizes.keys() or one.metadata != other.metadata:
        raise FileFormatError(
            f"{files[1]}: the concept {concept!r} is in {files[0]} too; load them apart, and rename one"
        )
    return Stored({**one.sizes, **other.sizes}, one.metadata, lambda: {**one.read(), **other.read()})


def _stored(directions: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Stored:
    return Stored({site: len(row) for site, row in directions.items()}, metadata, lambda: directions)
