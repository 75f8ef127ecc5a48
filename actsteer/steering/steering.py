"""Steering: what a Steerer does, as a value without the model, in memory or in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, final

from torch import Tensor, nn

import actsteer.html as html
from actsteer.errors import ConceptNotFoundError, FileFormatError, close_names
from actsteer.files import formats, native
from actsteer.files.formats import Format
from actsteer.sites.resolve import Sites, items
from actsteer.steering import saving
from actsteer.steering.gates.gate import AnyGate, leaves
from actsteer.steering.interventions.intervention import Edit, Intervention, PerSite, check_intervention
from actsteer.steering.strength import Strengths, strengths_of
from actsteer.tokens.positions import Positions
from actsteer.tokens.positions import check as check_positions
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector

Gates: TypeAlias = AnyGate | Mapping[str, AnyGate]
AllPositions: TypeAlias = Positions | Mapping[str, Positions]
"""One for every concept, or concept -> positions; what is not named is steered at all of them."""
Interventions: TypeAlias = Intervention | PerSite | Mapping[str, Intervention | PerSite]
"""One for every concept, or concept -> intervention; what is not named is added."""
_DEFAULTS: Mapping[str, Any] = {"c": 1.0, "intervention": None, "gate": None, "positions": None, "sites": None}


@final
@dataclass(frozen=True, init=False, repr=False, eq=False)
class Steering:
    """What a Steerer does, without the model: vectors, and how strongly, how, when and where they steer.

    `Steerer(model, steering)` takes all from it; arguments that are given beside it win, as in
    `dataclasses.replace(steering, c=2.0)`. A value: tensors, lists and mappings are copied. Interventions and gates are
    those that are given: a gate whose threshold is set later has the new one here too.

    Args:
        vectors: a SteeringVector, a VectorBank, or an edit that has its sites, such as `LowRank`.
        c, intervention, gate, positions, sites: as for `Steerer`. What cannot be known without the model (the sites,
            the sizes, how many rows) is checked by the Steerer.

    Raises:
        ConceptNotFoundError, StrengthError, TypeError, ValueError: as `Steerer`.

    >>> import pathlib, tempfile, torch
    >>> from actsteer import ProjectionAbove, Steerer
    >>> v = SteeringVector({"0": torch.tensor([1.0, 0.0])}, concept="nine")
    >>> steering = Steering(v, c=3, gate=ProjectionAbove(v, 0.5))
    >>> steering
    Steering(concepts=('nine',), c=3, gate=ProjectionAbove(site='0', threshold=0.5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     steering.save(pathlib.Path(folder) / "nine.safetensors")
    ...     loaded = Steering.load(pathlib.Path(folder) / "nine.safetensors")
    >>> model = nn.Sequential(nn.Identity())
    >>> with Steerer(model, loaded):
    ...     model(torch.tensor([[1.0, 2.0], [0.0, 2.0]]))
    tensor([[4., 2.],
            [0., 2.]])
    """

    vectors: VectorBank
    """The vectors; of an edit that has its sites, what it makes of an activation of zero."""
    c: Strengths
    """The strength; read-only if it is a mapping."""
    intervention: Interventions | None
    """One, or concept -> one; the edit, where that was given in the place of vectors."""
    gate: Gates | None
    """One, or concept -> one."""
    positions: AllPositions | None
    """One, or concept -> one."""
    sites: Sites | None
    """Which of the vectors' sites are steered; None: all of them."""

    def __init__(
        self,
        vectors: SteeringVector | VectorBank | Edit,
        *,
        c: Strengths = 1.0,
        intervention: Interventions | None = None,
        gate: Gates | None = None,
        positions: AllPositions | None = None,
        sites: Sites | None = None,
    ) -> None:
        bank, intervention = _bank_of(vectors, intervention)
        strengths_of(c, {concept: place for place, concept in enumerate(bank)})
        for own, where in _each(intervention, bank, by="intervention"):
            check_intervention(own, by=where)
        for own, _ in _each(gate, bank, by="gate"):
            list(leaves(own))
        for own, _ in _each(positions, bank, by="positions"):
            if own is not None:
                check_positions(own, steers=True)
        named = None if sites is None else items(sites)
        given: dict[str, Any] = {"c": c, "intervention": intervention, "gate": gate, "positions": positions}
        given["sites"] = sites if named is None or named[0] is sites else tuple(named)
        object.__setattr__(self, "vectors", bank)
        for name, part in given.items():
            object.__setattr__(self, name, _frozen(part))

    @property
    def concepts(self) -> tuple[str, ...]:
        """The concepts, in the order given."""
        return self.vectors.concepts

    @property
    def is_plain(self) -> bool:
        """Whether it is vectors and nothing else, added with strength 1."""
        return not self._given()

    def parts(self) -> dict[str, Any]:
        """All but the vectors, by the names of the arguments; mappings are copies."""
        found = {name: getattr(self, name) for name in _DEFAULTS}
        return {name: dict(part) if isinstance(part, MappingProxyType) else part for name, part in found.items()}

    def select(self, *concepts: str) -> Steering:
        """The steering by these concepts alone, in this order.

        Raises:
            ConceptNotFoundError: one that is not among its concepts.
        """
        kept_parts = {
            name: {concept: own for concept, own in part.items() if concept in concepts}
            if isinstance(part, dict)
            else part
            for name, part in self.parts().items()
        }
        return Steering(self.vectors.select(*concepts), **kept_parts)

    def save(self, path: str | PathLike[str], *, model: nn.Module | None = None) -> None:
        """Write all of it to one sealed `.safetensors` file; vectors and nothing else as `VectorBank.save` does.

        Of an intervention and a gate the file holds the name of the class and what makes it again: see `Saved`, for
        classes of your own.

        Args:
            model: the model that the vectors are for, which the file then names; without it, the metadata's.

        Raises:
            FileFormatError: before anything is written: a function (a schedule, positions that are computed, a plain
                function as an intervention or a gate) or another thing that a file cannot hold; another suffix.
            ModelMismatchError: a vector was made for a model of another architecture than `model`.
        """
        if self.is_plain:
            self.vectors.save(path, model=model)
            return
        if formats.of(path) is not native:
            raise FileFormatError(
                f"{path}: this format holds vectors alone, and the steering has {', '.join(self._given())} too; name "
                "the file with .safetensors"
            )
        with saving.named_in_errors(path):
            document, tensors = saving.encoded(self.parts())
        self.vectors.save(path, model=model, format=native.WithMore(document, tensors))

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: nn.Module | None = None,
        *,
        kinds: Iterable[type] = (),
        layer_offset: int = 0,
        format: Format | None = None,  # noqa: A002
    ) -> Steering:
        """Read what `save` wrote, or what `VectorBank.load` reads, which is a steering by vectors alone.

        Nothing in a file is executed or imported, and one of ours with any altered bit is refused. Vectors of a large
        file are read when they are asked for.

        Args:
            path, model, layer_offset, format: as for `VectorBank.load`.
            kinds: your own classes of interventions and gates, of which the file may hold objects.

        Raises:
            FileFormatError: as `VectorBank.load`; or a class that is neither ours nor among `kinds`.
            ActsteerError: and what `VectorBank.load` raises.
        """
        names = list(saving.known(kinds).values())
        if format is not None or not Path(path).is_file() or formats.of(path) is not native:
            return cls(VectorBank.load(path, model, layer_offset=layer_offset, format=format))
        file = native.WithMore()
        bank = VectorBank.load(path, model, layer_offset=layer_offset, format=file)
        if file.document is None:
            return cls(bank)
        with saving.described_by(path):
            parts = saving.decoded(file.document, file.tensors, names)
            if parts.keys() != _DEFAULTS.keys():
                raise ValueError(f"expected {', '.join(_DEFAULTS)}, got {', '.join(parts)}")
            return cls(bank, **parts)

    def _given(self) -> dict[str, Any]:
        """The parts that are not what they are without being given."""
        return {
            name: part
            for name, part in self.parts().items()
            if part is not None and not (name == "c" and isinstance(part, int | float) and part == 1)
        }

    def __repr__(self) -> str:
        shown = [f"concepts={self.concepts}", *(f"{name}={part!r}" for name, part in self._given().items())]
        return f"Steering({', '.join(shown)})"

    def _repr_html_(self) -> str:
        each = {name: part if isinstance(part, dict) else {"": part} for name, part in self.parts().items()}
        rows = [
            (name, concept, own if isinstance(own, str) else repr(own))
            for name, part in each.items()
            for concept, own in part.items()
            if own is not None
        ]
        said = html.table("Steering", ["part", "concept", ""], rows, total=len(rows))
        return said + self.vectors._repr_html_()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.vectors, self.parts())


Steerable: TypeAlias = SteeringVector | VectorBank | Edit | Steering
"""What a Steerer steers by."""


def steering_of(vectors: Steerable, given: Mapping[str, Any]) -> Steering:
    """The steering by vectors; of a Steering, with the parts that are given, and not None, in the place of its."""
    said = {name: part for name, part in given.items() if part is not None}
    return replace(vectors, **said) if isinstance(vectors, Steering) else Steering(vectors, **said)


def _rebuilt(vectors: VectorBank, parts: dict[str, Any]) -> Steering:
    return Steering(vectors, **parts)


def _each(given: Any, bank: VectorBank, *, by: str) -> list[tuple[Any, str]]:
    """What is given for all concepts, or for each, once, and how an error calls it.

    Raises:
        ConceptNotFoundError: a concept that the bank lacks.
    """
    if not isinstance(given, Mapping):
        return [] if given is None else [(given, by)]
    for concept in given:
        if concept not in bank:
            raise ConceptNotFoundError(f"{by} names no concept of the bank: {concept!r}. {close_names(concept, bank)}")
    return list({id(own): (own, f"{by} of {concept!r}") for concept, own in given.items()}.values())


def _frozen(part: Any) -> Any:
    """A copy of what can be changed."""
    if isinstance(part, Mapping):
        return MappingProxyType({concept: _frozen(own) for concept, own in part.items()})
    if isinstance(part, Tensor):
        return part.detach().clone()
    return tuple(map(_frozen, part)) if isinstance(part, list) else part


def _bank_of(
    vectors: SteeringVector | VectorBank | Edit, intervention: Interventions | None
) -> tuple[VectorBank, Interventions | None]:
    """What is to be added, as a bank, and how.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(vectors, Edit):
        if intervention is not None:
            raise TypeError(f"{vectors!r} says itself how it edits; leave intervention= out")
        intervention, vectors = vectors, vectors.constant
    if isinstance(vectors, SteeringVector):
        vectors = VectorBank({vectors.concept or "vector": vectors})
    if not isinstance(vectors, VectorBank):
        hint = ""
        if isinstance(vectors, Steering):
            hint = "; dataclasses.replace(steering, c=2.0) is one with another strength"
        elif isinstance(vectors, nn.Module):
            hint = "; model and vectors are swapped: Steerer(model, vectors)"
        elif isinstance(vectors, Tensor | Mapping):
            hint = "; make one of it: SteeringVector({site: tensor})"
        elif isinstance(vectors, str | PathLike):
            hint = "; read the file: SteeringVector.load(path), VectorBank.load(path) or Steering.load(path)"
        raise TypeError(
            "expected a SteeringVector, a VectorBank, or an edit such as LowRank, got " + type(vectors).__name__ + hint
        )
    return vectors, intervention
