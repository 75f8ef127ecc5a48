"""Plan: which edits a Steerer makes, each with its place, axis, directions and gates; nothing of it is attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from actsteer.errors import ConceptNotFoundError, ShapeError, SiteNotFoundError, UnsupportedModelError, close_names
from actsteer.sites.axes import Axes, known_size, layout, layouts
from actsteer.sites.place import Place
from actsteer.sites.resolve import Sites, resolve, select
from actsteer.steering.checkpointing import Checkpointing
from actsteer.steering.edit import SiteEdit
from actsteer.steering.gates import Gate
from actsteer.steering.interventions.add import Add
from actsteer.steering.interventions.intervention import Intervention, PerSite
from actsteer.steering.reader import GateReader
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector, axes_of

Gates = Gate | Mapping[str, Gate]
Interventions = Intervention | PerSite | Mapping[str, Intervention | PerSite]
"""One for every concept, or concept -> intervention; what is not named is added."""


@dataclass(frozen=True)
class Plan:
    """What is to be done at which site.

    Args:
        model: the model.
        bank: the vectors.
        edits: site -> its edit.
        concepts: site -> the indices in the bank of the concepts that steer there.
        readers: the gates, each once.
        axis: site -> feature axis, where it was given now or with the vectors.
    """

    model: nn.Module
    bank: VectorBank
    edits: dict[str, SiteEdit]
    concepts: dict[str, list[int]]
    readers: tuple[GateReader, ...]
    axis: Mapping[str, int]

    def set_strengths(self, strengths: Sequence[Tensor]) -> None:
        """New strengths at every site or, where one cannot take them, at none."""
        own = {site: [strengths[index] for index in self.concepts[site]] for site in self.edits}
        for site, edit in self.edits.items():
            edit.check_strengths(own[site])
        for site, edit in self.edits.items():
            edit.set_strengths(own[site])

    def silence(self) -> None:
        """Strength 0 at every site."""
        for edit in self.edits.values():
            edit.silence()

    def find_again(self) -> None:
        """The modules may have been replaced since the plan was made.

        Raises:
            SiteNotFoundError: one of them is gone.
        """
        places = resolve(self.model, [*self.edits, *(reader.gate.site for reader in self.readers)])
        for site, edit in self.edits.items():
            edit.place = places[site]
        for reader in self.readers:
            reader.place = places[reader.gate.site]

    def vectors(self) -> VectorBank:
        """The bank with the directions as they are now."""
        rows: dict[str, dict[str, Tensor]] = {concept: {} for concept in self.bank.concepts}
        for site, edit in self.edits.items():
            for index, direction in zip(self.concepts[site], edit.directions, strict=True):
                rows[self.bank.concepts[index]][site] = direction
        return VectorBank({name: SteeringVector(own, metadata=self.bank[name].metadata) for name, own in rows.items()})


def make_plan(
    model: nn.Module,
    bank: VectorBank,
    *,
    intervention: Interventions | None,
    gate: Gates | None,
    sites: Sites | None,
    axis: Axes | None,
    checkpointing: Checkpointing,
) -> Plan:
    """Everything resolved and checked, as far as that is possible before the model runs."""
    places = _places(model, bank, sites)
    axes = _axes(bank, places, axis)
    lies = layouts(model, places, axis=axes)
    readers = _readers(model, bank, gate)
    interventions = _interventions(bank, intervention)
    concepts = {site: [i for i, concept in enumerate(bank) if site in bank[concept]] for site in places}
    edits: dict[str, SiteEdit] = {}
    for site, place in places.items():
        with torch.inference_mode(mode=False):  # so that they work in autograd later
            directions = bank.directions(site)[concepts[site]].clone()
        usual = site not in axes or axes[site] == layout(model, place).axis
        size = known_size(place) if usual else None
        if size not in (None, directions.shape[1]):
            raise ShapeError(
                f"site {site!r}: the activation has {size} features, the vector {directions.shape[1]}; was it "
                "fitted on another model?"
            )
        edits[site] = SiteEdit(
            place,
            lies[site],
            directions,
            interventions=[_at(interventions[index], site) for index in concepts[site]],
            gates=[readers[index] for index in concepts[site]],
            checkpointing=checkpointing,
        )
    distinct = tuple({id(reader): reader for reader in readers if reader is not None}.values())
    return Plan(model, bank, edits, concepts, distinct, axes)


def _interventions(bank: VectorBank, intervention: Interventions | None) -> list[Intervention | PerSite]:
    """One per concept, in bank order."""
    if not isinstance(intervention, Mapping):
        return [intervention or Add()] * len(bank)
    for concept, own in intervention.items():
        if concept not in bank:
            raise ConceptNotFoundError(
                f"intervention names no concept of the bank: {concept!r}. {close_names(concept, bank)}"
            )
        if not callable(own) and not isinstance(own, PerSite):
            raise TypeError(f"intervention: expected one such as Add(), got {own!r} for {concept!r}")
    return [intervention.get(concept, Add()) for concept in bank.concepts]


def _at(intervention: Intervention | PerSite, site: str) -> Intervention:
    return intervention.at(site) if isinstance(intervention, PerSite) else intervention


def _places(model: nn.Module, bank: VectorBank, sites: Sites | None) -> dict[str, Place]:
    """Where the vectors' sites, or the chosen ones among them, are; one edit for one activation."""
    if not bank.sites:
        raise SiteNotFoundError("the vectors have no sites, so there is nothing to add")
    places = resolve(model, bank.sites)
    if sites is not None:
        chosen = select({site: place.module for site, place in places.items()}, sites, owner="the vectors")
        places = {site: places[site] for site in chosen}
    for one, other in combinations(places.values(), 2):
        shared = min(len(one.path), len(other.path))
        if one.module is other.module and one.side == other.side and one.path[:shared] == other.path[:shared]:
            raise UnsupportedModelError(
                f"sites {one.site!r} and {other.site!r} are one module, and an edit at either is an edit at both; "
                "select one"
            )
    return places


def _axes(bank: VectorBank, places: Mapping[str, Place], axis: Axes | None) -> Mapping[str, int]:
    """Site -> feature axis: what was asked for now or, failing that, when the vectors were collected."""
    given = dict.fromkeys(places, axis) if isinstance(axis, int) else dict(axis or {})
    rest = [site for site in places if site not in given]
    collected = axes_of(bank[concept].select(*(site for site in bank[concept] if site in rest)) for concept in bank)
    return {site: int(collected[f"axis {site}"]) for site in rest if f"axis {site}" in collected} | given


def _readers(model: nn.Module, bank: VectorBank, gate: Gates | None) -> list[GateReader | None]:
    """One reader per concept, in bank order; concepts that share a gate share its reader."""
    gates = gate if isinstance(gate, Mapping) else dict.fromkeys(bank.concepts, gate) if gate is not None else {}
    for concept in gates:
        if concept not in bank:
            raise ConceptNotFoundError(f"gate names no concept of the bank: {concept!r}. {close_names(concept, bank)}")
    for chosen in gates.values():
        if not isinstance(chosen, Gate):
            raise TypeError(f"gate: expected a gate with a site, such as ProjectionAbove, got {type(chosen).__name__}")
    places = resolve(model, [gate.site for gate in gates.values()])
    made = {id(gate): GateReader(gate, places[gate.site], layout(model, places[gate.site])) for gate in gates.values()}
    return [made[id(gates[concept])] if concept in gates else None for concept in bank.concepts]
