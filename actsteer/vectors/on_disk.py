"""On disk: vectors to and from files, with sites named for the model at hand."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from actsteer.errors import FileFormatError, SiteNotFoundError
from actsteer.files import formats
from actsteer.files.formats import AnyPath, Format
from actsteer.files.lazy import Named, Numbered, Stored
from actsteer.sites import fingerprint
from actsteer.sites.blocks import block_of, blocks_of_type, find_blocks


def write(
    path: AnyPath,
    bank: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]],
    *,
    model: nn.Module | None = None,
    layer_offset: int = 0,
    format: Format | None = None,  # noqa: A002  (what it is called wherever files are saved)
) -> None:
    """Write vectors, concept -> (directions, metadata), in the format that the suffix tells, or in this one."""
    chosen = formats.of(path) if format is None else format
    if model is not None:
        for concept, (_, metadata) in bank.items():
            fingerprint.check(model, metadata, what=f"the vector {concept!r}")
        known = fingerprint.described(model)
        bank = {
            c: (own, metadata if "model" in metadata else {**metadata, **known}) for c, (own, metadata) in bank.items()
        }
    vectors = {
        concept: Named(
            directions,
            metadata,
            numbered=partial(_numbered, path, concept, directions, metadata, model=model, layer_offset=layer_offset),
            numbers_only="layer_offset is for files that number the blocks, .gguf" if layer_offset else "",
        )
        for concept, (directions, metadata) in bank.items()
    }
    chosen.write(Path(path), vectors)


def read(
    path: AnyPath,
    *,
    model: nn.Module | None = None,
    layer_offset: int = 0,
    format: Format | None = None,  # noqa: A002
) -> dict[str, Stored]:
    """Concept -> what the file, or each of the files that a pattern such as "dir/*.safetensors" names, says of it."""
    text = os.fspath(path)
    files = [text]
    if glob.has_magic(text) and not Path(text).exists():
        files = sorted(name for name in glob.glob(text) if Path(name).is_file())  # noqa: PTH207
        if not files:
            raise FileNotFoundError(f"{path}: no file has such a name")
    found: dict[str, Stored] = {}
    origin: dict[str, str] = {}
    for name in files:
        for concept, vector in _read(name, model, layer_offset, format).items():
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


def _read(path: str, model: nn.Module | None, layer_offset: int, form: Format | None) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    meant: dict[tuple[str | None, ...], str] = {}  # what is said of the model -> a concept of which it is said
    for concept, vector in (formats.of(path) if form is None else form).read(Path(path)).items():
        if isinstance(vector, Numbered):
            found[concept] = _named(path, concept, vector, model=model, layer_offset=layer_offset)
        elif layer_offset:
            raise FileFormatError(f"{path}: it names its sites, and an offset is for files that number the blocks")
        else:
            found[concept] = _stored(vector.directions, vector.metadata) if isinstance(vector, Named) else vector
        meant.setdefault(tuple(map(found[concept].metadata.get, fingerprint.KEYS)), concept)
    if model is not None:
        for concept in meant.values():
            fingerprint.check(model, found[concept].metadata, what=f"{path}: the vector {concept!r}")
    return found


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
    return Numbered(
        {number: directions[site] for number, site in found.items()},
        model_hint=kind,
        metadata=metadata,
        sites=found,
    )


def _named(path: str, concept: str, vector: Numbered, *, model: nn.Module | None, layer_offset: int) -> Stored:
    """A vector at sites, which have the model's names or, without one, those of its type."""
    metadata = {"concept": concept, **vector.metadata}
    if vector.model_hint not in ("", "unknown"):
        metadata.setdefault("model_type", vector.model_hint)
    if model is None and vector.sites.keys() == vector.directions.keys() and not layer_offset:
        return _stored({site: vector.directions[n] for n, site in vector.sites.items()}, metadata)
    count: int | None = None
    if model is not None:
        blocks, count = find_blocks(model)
    elif (of_type := blocks_of_type(vector.model_hint)) is not None:
        blocks = of_type
    else:
        raise FileFormatError(
            f"{path}: it numbers the blocks of a {vector.model_hint or 'model of unknown type'}; name them with model="
        )
    named: dict[str, Tensor] = {}
    ours = {} if layer_offset else {number: block_of(site) for number, site in vector.sites.items()}
    for number, row in sorted(vector.directions.items()):
        at = ours.get(number)
        block = _block(path, number, count, layer_offset) if at is None else at[1]
        if block < (0 if vector.side == "in" else -1) or (count is not None and block >= count):
            last = f"and the model has {blocks}.0 to {blocks}.{count - 1}" if count is not None else "and there is none"
            raise SiteNotFoundError(
                f"{path}: layer {number} would be block {block}, {last}; is layer_offset={layer_offset} right? Rows of "
                "hidden_states, which begin with the embeddings, need 1"
            )
        at_input = vector.side == "in" or block < 0
        site = f"{blocks}.{max(block, 0)}{':in' if at_input else ''}"
        if site in named:
            raise FileFormatError(
                f"{path}: layer {number} is {site!r}, and so is another one of {[*vector.directions]}"
            )
        named[site] = row
    return _stored(named, metadata)


def _block(path: str, number: int, count: int | None, layer_offset: int) -> int:
    """Which block a file's number means: counted from 0, or from the end if it is negative."""
    if number >= 0:
        return number - layer_offset
    if count is None:
        raise FileFormatError(
            f"{path}: layer {number} counts from the end, and the file does not say how many there are; give model="
        )
    if layer_offset:
        raise FileFormatError(
            f"{path}: layer {number} counts from the end, where the embeddings do not matter; leave layer_offset out"
        )
    return count + number


def _joined(one: Stored, other: Stored, concept: str, *, files: tuple[str, str]) -> Stored:
    """A vector whose sites are in several files, as rotalabs' layer_<N>.pt."""
    if one.sizes.keys() & other.sizes.keys() or one.metadata != other.metadata:
        raise FileFormatError(
            f"{files[1]}: the concept {concept!r} is in {files[0]} too; load them apart, and rename one"
        )
    return Stored({**one.sizes, **other.sizes}, one.metadata, lambda: {**one.read(), **other.read()})


def _stored(directions: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Stored:
    return Stored({site: len(row) for site, row in directions.items()}, metadata, lambda: directions)
