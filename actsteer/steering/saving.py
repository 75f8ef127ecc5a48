"""Saving: values as JSON in which tensors are names: the class of a value, and the arguments that make it again."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, Protocol, TypeAlias, final, runtime_checkable

import torch
from torch import Tensor, nn

from actsteer.errors import FileFormatError
from actsteer.files import sealed
from actsteer.files.untrusted import DTYPES
from actsteer.steering.gates.cosine_above import CosineAbove
from actsteer.steering.gates.logic import And, Not, Or
from actsteer.steering.gates.probe_above import ProbeAbove
from actsteer.steering.gates.projection_above import ProjectionAbove
from actsteer.steering.gates.soft import Soft
from actsteer.steering.interventions.ablate import Ablate
from actsteer.steering.interventions.add import Add
from actsteer.steering.interventions.affine import Affine
from actsteer.steering.interventions.chain import Chain
from actsteer.steering.interventions.clamp import Clamp
from actsteer.steering.interventions.keep_norm import KeepNorm
from actsteer.steering.interventions.low_rank import LowRank
from actsteer.steering.interventions.replace import Replace
from actsteer.steering.interventions.rotate import Rotate
from actsteer.steering.interventions.soft_projection import SoftProjection
from actsteer.vectors.vector import SteeringVector

KINDS: tuple[type, ...] = (
    *(Ablate, Add, Affine, Chain, Clamp, KeepNorm, LowRank, Replace, Rotate, SoftProjection),
    *(And, CosineAbove, Not, Or, ProbeAbove, ProjectionAbove, Soft),
)
"""The classes of this library that a file may name."""
Document: TypeAlias = dict[str, Any]
_DEEPEST = 64
_DTYPES = (*DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@runtime_checkable
class Saved(Protocol):
    """An intervention or a gate that says how to make it again, so that a file can hold it.

    A dataclass needs none of this: its fields are what it is made with. Arguments are numbers, strings, bools, None,
    tensors, SteeringVectors, slices, other such values, and tuples, lists and mappings from str of these. A file names
    the class, and whoever loads it gives the class: nothing of a file is imported or run. Tensors are then on the CPU.

    >>> import pathlib, tempfile, torch
    >>> from actsteer import Steering
    >>> class FirstAbove:
    ...     site, per = "0", "sequence"
    ...
    ...     def __init__(self, threshold):
    ...         self.limit = threshold
    ...
    ...     def __call__(self, rows):
    ...         return rows[:, 0] > self.limit
    ...
    ...     def saved(self):
    ...         return {"threshold": self.limit}
    >>> v = SteeringVector({"0": torch.ones(2)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "gated.safetensors"
    ...     Steering(v, gate=FirstAbove(0.5)).save(path)
    ...     Steering.load(path, kinds=(FirstAbove,)).gate.limit
    0.5
    """

    def saved(self) -> Mapping[str, Any]:
        """The arguments with which the class makes the same value again, by name; those of `*args` as a tuple."""
        ...


def encoded(values: Mapping[str, Any]) -> tuple[Document, dict[str, Tensor]]:
    """The JSON of values, and the tensors that it names.

    Raises:
        FileFormatError: one cannot be made again from a file, with where it is and what to do.
    """
    encoder = _Encoder()
    document = {name: encoder.node(value, name) for name, value in values.items()}
    try:
        with warnings.catch_warnings(action="ignore"):  # which came when the values were made
            again = _Encoder()
            made = decoded(document, encoder.tensors, tuple(encoder.kinds.values()))
            twin = {name: again.node(value, name) for name, value in made.items()}
    except Exception as error:
        raise FileFormatError(f"what is to be saved cannot be made again from its arguments: {error!r}") from error
    if json.dumps(twin) != json.dumps(document) or sealed.digest(again.tensors) != sealed.digest(encoder.tensors):
        names = ", ".join(sorted(encoder.kinds))
        raise FileFormatError(
            f"what is to be saved is another one when it is made again ({names}); `saved` must give all that the value "
            "was made with, as it was given"
        )
    return document, encoder.tensors


def told(value: Any) -> tuple[str, str]:
    """What tells a value from others: its JSON, and a digest of its tensors, empty without any.

    Of what cannot be saved it is what the value shows of itself.
    """
    encoder = _Encoder()
    try:
        text = json.dumps(encoder.node(value, ""))
    except FileFormatError:
        return repr(value), ""
    return text, sealed.digest(encoder.tensors) if encoder.tensors else ""


def decoded(document: Mapping[str, Any], tensors: Mapping[str, Tensor], kinds: Iterable[type] = ()) -> dict[str, Any]:
    """What `encoded` was given.

    Args:
        kinds: classes of the caller's, beside `KINDS`.

    Raises:
        FileFormatError: a class that is none of these.
        ValueError: two of the classes have one name.
        Exception: whatever the document makes a class raise; or it speaks of other tensors.
    """
    decoder = _Decoder(tensors, kinds)
    found = {name: decoder.value(node) for name, node in document.items()}
    if rest := tensors.keys() - decoder.used:
        raise ValueError(f"tensors {sorted(rest)} are not in the document")
    return found


@contextmanager
def named_in_errors(path: str | PathLike[str]) -> Iterator[None]:
    """FileFormatError of this block says which file."""
    try:
        yield
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error.__cause__


@contextmanager
def described_by(path: str | PathLike[str]) -> Iterator[None]:
    """Whatever a document makes go wrong in this block is FileFormatError."""
    try:
        with named_in_errors(path):
            yield
    except FileFormatError:
        raise
    except Warning:  # where warnings are errors
        raise
    except Exception as error:  # of the constructor of a class, say
        raise FileFormatError(
            f"{path}: the document does not describe what it is to hold ({error!r}); write it again"
        ) from None


@final
class _Encoder:
    """Values to JSON; what is met twice is written alike, and is one value when it is read."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.kinds: dict[str, type] = {}
        self._met: dict[int, tuple[Any, Document]] = {}  # keeps the value, so that its id stays its own
        self._depth = 0

    def node(self, value: Any, where: str) -> Any:
        """The JSON of a value."""
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return value
        if type(value) is float:
            return {"float": repr(value)}
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if id(value) in self._met:
            return self._met[id(value)][1]
        self._depth += 1
        if self._depth > _DEEPEST:
            raise FileFormatError(f"{where}: it is nested more than {_DEEPEST} deep")
        node = self._inner(value, where)
        self._depth -= 1
        self._met[id(value)] = value, node
        return node

    def _inner(self, value: Any, where: str) -> Any:
        if isinstance(value, SteeringVector):
            directions = {site: self._tensor(value[site], f"{where}[{site!r}]") for site in value}
            return {"vector": directions, "metadata": value.metadata}
        if type(value) is slice:
            return {"slice": [self.node(end, where) for end in (value.start, value.stop, value.step)]}
        if type(value) in (list, tuple):
            items = [self.node(item, f"{where}[{index}]") for index, item in enumerate(value)]
            return items if type(value) is list else {"tuple": items}
        if (arguments := _arguments(value)) is not None:
            name = self._kind(type(value), where)
            return {"class": name, "arguments": {k: self.node(own, f"{where}.{k}") for k, own in arguments.items()}}
        if isinstance(value, Mapping):
            if odd := [key for key in value if type(key) is not str]:
                raise FileFormatError(f"{where}: expected a mapping from str, got the key {odd[0]!r}")
            return {"mapping": {key: self.node(own, f"{where}[{key!r}]") for key, own in value.items()}}
        what = repr(value) if callable(value) else f"a {type(value).__name__}"
        raise FileFormatError(
            f"{where}: {what} cannot be saved; expected a number, a string, a tensor, a SteeringVector, a dataclass or "
            "an object with saved() (see Saved), or a tuple, list or mapping of these"
        )

    def _tensor(self, value: Tensor, where: str) -> Document:
        odd = value.is_nested or value.layout is not torch.strided or value.is_quantized or value.is_meta
        if type(value) not in (Tensor, nn.Parameter) or odd or value.dtype not in _DTYPES:
            raise FileFormatError(
                f"{where}: expected a plain, dense tensor with numbers, got {type(value).__name__} of {value.dtype}"
            )
        name = f"#{len(self.tensors)}"
        self.tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}

    def _kind(self, kind: type, where: str) -> str:
        name = kind.__name__
        other = next((own for own in KINDS if own.__name__ == name), kind)
        if other is not kind or self.kinds.setdefault(name, kind) is not kind:
            raise FileFormatError(f"{where}: two classes are called {name}, and a file could not tell; rename one")
        return name


def _arguments(value: Any) -> Mapping[str, Any] | None:
    """What makes the value again, if it says."""
    if isinstance(value, type):
        return None
    if isinstance(value, Saved):
        return value.saved()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    return None


@final
class _Decoder:
    """JSON to values; the same JSON is the same value."""

    def __init__(self, tensors: Mapping[str, Tensor], kinds: Iterable[type]) -> None:
        self.used: set[str] = set()
        self._tensors = tensors
        self._kinds = known(kinds)
        self._made: dict[str, Any] = {}
        self._depth = 0

    def value(self, node: Any) -> Any:
        """The value of JSON."""
        if type(node) is not dict and type(node) is not list:
            return node
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        found = [self.value(item) for item in node] if isinstance(node, list) else self._value(node)
        self._depth -= 1
        return found

    def _value(self, node: Document) -> Any:
        match node:
            case {"tensor": str(), **rest} if not rest:
                return self._tensor(node)
            case {"float": str(text), **rest} if not rest and text in ("inf", "-inf", "nan"):
                return float(text)
            case {"tuple": [*items], **rest} if not rest:
                return tuple(self.value(item) for item in items)
            case {"slice": [start, stop, step], **rest} if not rest:
                if not all(end is None or type(end) is int for end in (start, stop, step)):
                    raise ValueError(f"expected a slice of integers, got {node}")
                return slice(start, stop, step)
            case {"mapping": dict(items), **rest} if not rest:
                return {key: self.value(item) for key, item in items.items()}
            case {"vector": dict(directions), "metadata": dict(metadata), **rest} if not rest:
                own = {site: self._tensor(named) for site, named in directions.items()}
                return self._once(node, lambda: SteeringVector(own, metadata=metadata))
            case {"class": str(name), "arguments": dict(arguments), **rest} if not rest:
                if name not in self._kinds:
                    raise FileFormatError(
                        f"it holds a {name}, a class that is not known here; if you trust the file and have the class, "
                        f"pass it: load(path, kinds=({name},))"
                    )
                given = {key: self.value(own) for key, own in arguments.items()}
                return self._once(node, lambda: _called(self._kinds[name], given))
            case _:
                raise ValueError(f"expected a value, got an object of {sorted(node)[:4]}")

    def _tensor(self, node: Any) -> Tensor:
        if not isinstance(node, dict) or list(node) != ["tensor"] or node["tensor"] not in self._tensors:
            raise ValueError(f"expected the name of a tensor, got {node}")
        self.used.add(node["tensor"])
        return self._tensors[node["tensor"]].clone()  # that of a file may lie where kernels round otherwise

    def _once(self, node: Document, make: Callable[[], Any]) -> Any:
        text = json.dumps(node)
        if text not in self._made:
            self._made[text] = make()
        return self._made[text]


def known(kinds: Iterable[type]) -> dict[str, type]:
    """Name -> class, of ours and of the caller's.

    Raises:
        TypeError, ValueError: something that is no class; two of one name.
    """
    every = list(dict.fromkeys((*KINDS, *kinds)))
    for kind in every:
        if not isinstance(kind, type):
            raise TypeError(f"kinds: expected classes, got {kind!r}")
    found = {kind.__name__: kind for kind in every}
    if len(found) < len(every):
        twice = next(kind.__name__ for kind in every if found[kind.__name__] is not kind)
        raise ValueError(f"kinds: two classes are called {twice}; rename one")
    return found


def _called(kind: type, arguments: dict[str, Any]) -> Any:
    """An object of the class, made with these arguments by name; those of `*args` are a tuple."""
    signature = inspect.signature(kind)
    if unknown := arguments.keys() - signature.parameters.keys():
        raise ValueError(f"{kind.__name__} takes no {', '.join(sorted(unknown))}")
    bound = inspect.BoundArguments(signature, arguments)  # whose order is the signature's
    return kind(*bound.args, **bound.kwargs)
