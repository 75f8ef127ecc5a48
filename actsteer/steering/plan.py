"""Plan: which edits a Steerer makes, each with its place, axis, directions and gates; nothing of it is attached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn

from actsteer.errors import (
    ShapeError,
    SiteNotFoundError,
    StrengthError,
    UnsupportedModelError,
)
from actsteer.sites import fingerprint
from actsteer.sites.axes import Axes, layout, layouts
from actsteer.sites.features import known_size
from actsteer.sites.place import Place
from actsteer.sites.resolve import Modules, Sites, are_there, hook_points, named_sites, resolve, select
from actsteer.sites.wrappers import unwrapped
from actsteer.steering.checkpointing import Checkpointing
from actsteer.steering.edit import SiteEdit
from actsteer.steering.gates.gate import AnyGate, Combined, Fitted, GateTree, gates_in, tree_at
from actsteer.steering.interventions.ablate import Ablate
from actsteer.steering.interventions.add import Add
from actsteer.steering.interventions.intervention import Intervention, PerSite
from actsteer.steering.reader import CombinedReader, GateReader, Reader, readers_in
from actsteer.steering.steering import AllPositions, Gates, Interventions, Steering
from actsteer.steering.strength import PerConcept, strength_at
from actsteer.tokens.passes import Passes, groups
from actsteer.tokens.whose import Masks, said_of
from actsteer.vectors.bank import VectorBank, axes_of_bank, metadata_in, stack_of
from actsteer.vectors.described import with_offsets
from actsteer.vectors.vector import SteeringVector


@dataclass
class Plan:
    """What is to be done at which site.

    Args:
        model: the model.
        bank: the vectors.
        edits: site -> its edit.
        readers: the gates that read at a site, each once.
        passes: what is known of the forward pass: the model's first, then those of sites with other tokens.
        axis: site -> feature axis, where it was given now or with the vectors.
    """

    model: nn.Module
    bank: VectorBank
    edits: dict[str, SiteEdit]
    readers: tuple[GateReader, ...]
    passes: tuple[Passes, ...]
    axis: Mapping[str, int]

    def __post_init__(self) -> None:
        self._every = False  # whether concepts of strength 0 count too
        self._strengths: PerConcept | None = None
        self._groups: dict[tuple[int, ...], list[SiteEdit]] = {}  # the concepts -> the sites that have them
        for edit in self.edits.values():
            self._groups.setdefault(tuple(edit.concepts), []).append(edit)

    @torch.inference_mode(mode=False)  # what is kept must work in autograd later
    def set_strengths(self, strengths: PerConcept) -> None:
        """New strengths at every site or, where one cannot take them, at none."""
        here = [(strengths.among(concepts), edits) for concepts, edits in self._groups.items()]
        for own, edits in here:
            for edit in edits:
                edit.check_strengths(own)
        by_token = {
            place: own if isinstance(own, Tensor) else partial(strength_at, own)
            for place, own in strengths.by_token.items()
        }
        active = strengths.active(every=self._every)
        for passes in self.passes:
            passes.set_amounts(by_token, active)
        idle = not strengths.active()
        try:
            for own, edits in here:
                for edit in edits:
                    edit.set_strengths(own, every=self._every, idle=idle)
        except StrengthError:  # of one site; the others have theirs already
            if self._strengths is not None:
                self.set_strengths(self._strengths)
            raise
        self._strengths = strengths

    @property
    def active(self) -> list[int]:
        """The concepts that have a strength."""
        return [] if self._strengths is None else self._strengths.active()

    def expect(self) -> None:
        """Forget what has run and where."""
        for edit in self.edits.values():
            edit.expect()
        for passes in self.passes:
            passes.is_met = dict.fromkeys(passes.positions, False)

    def silence(self) -> None:
        """Strength 0 at every site, in the shapes of the present ones."""
        if self._strengths is not None:
            self.set_strengths(self._strengths.zero())

    def count_every(self) -> None:
        """From now on concepts of strength 0 count too: compiled code, or a gradient, waits for theirs."""
        self._every = True
        if self._strengths is not None:
            self.set_strengths(self._strengths)

    @torch.inference_mode(mode=False)  # as above
    def hold(self) -> None:
        """Have the edits keep their tensors from now on, with room for every concept.

        Code that was compiled with them reads the same addresses for ever, so that neither a change of strength nor
        attaching and detaching compiles anything again; detached, it adds zero.
        """
        self.count_every()
        for edit in self.edits.values():
            edit.hold()

    def release(self) -> None:
        """Undo `hold`."""
        for edit in self.edits.values():
            edit.in_place = False

    def train_directions(self) -> dict[str, Tensor]:
        """Site -> its directions as a leaf tensor (k, d), from the next forward pass on."""
        leaves = {site: edit.train_directions() for site, edit in self.edits.items()}
        self.count_every()
        return leaves

    @torch.inference_mode(mode=False)  # as above
    def find_again(self) -> None:
        """The modules may have been replaced since the plan was made.

        Raises:
            SiteNotFoundError: one of them is gone.
        """
        present = [edit.place for edit in self.edits.values()] + [reader.place for reader in self.readers]
        if not are_there(self.model, present):
            places = resolve(self.model, [place.site for place in present])
            for edit in self.edits.values():
                edit.lens.place = places[edit.place.site]
            for reader in self.readers:
                reader.lens.place = places[reader.place.site]
            for passes in self.passes:
                passes.find_again({place.module for place in places.values()})
        first = next(self.model.parameters(), None)
        for edit in self.edits.values():
            weight = next((own for own in edit.place.module._parameters.values() if own is not None), first)
            edit.expect_on(None if weight is None or weight.is_meta else weight.device)

    def vectors(self) -> VectorBank:
        """The bank with the directions as they are now."""
        rows: dict[str, dict[str, Tensor]] = {concept: {} for concept in self.bank.concepts}
        for site, edit in self.edits.items():
            for index, direction in zip(edit.concepts, edit.directions, strict=True):
                rows[self.bank.concepts[index]][site] = direction
        said = {name: self.bank[name].metadata for name in rows}
        if any(edit.is_trained for edit in self.edits.values()):  # which other directions do not share
            said = {name: with_offsets(metadata, {}) for name, metadata in said.items()}
        return VectorBank({name: SteeringVector(own, metadata=said[name]) for name, own in rows.items()})


def is_alike(one: tuple[Any, VectorBank, Mapping[str, Any]], other: tuple[Any, VectorBank, Mapping[str, Any]]) -> bool:
    """Whether two Steerers do the same, by the arguments that each is made with: model, bank, options."""
    (bank, options), (theirs, others) = one[1:], other[1:]
    asked = options.keys() - {"backend", "strict"}
    if bank.concepts != theirs.concepts or not all(_is_same(options[name], others[name]) for name in asked):
        return False
    return bank is theirs or all(bank[name].equal(theirs[name]) for name in bank)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two options say the same; an object that has no == of its own by what it shows."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[name], other[name]) for name in one)
    return one is other or repr(one) == repr(other)


def make_plan(
    model: nn.Module,
    steering: Steering,
    *,
    axis: Axes | None,
    row_axis: Axes | None,
    token_axis: Axes | None,
    mask: Masks | None,
    checkpointing: Checkpointing,
) -> Plan:
    """Everything resolved and checked, as far as that is possible before the model runs."""
    bank, modules = steering.vectors, named_sites(model)
    places = _places(model, bank, steering.sites, modules)
    axes = _axes(bank, places, axis)
    stacks, gates = {site: stack_of(bank, site) for site in places}, gates_of(bank, steering.gate)
    gated = {place: gates[concept] for place, concept in enumerate(bank.concepts) if concept in gates}
    used = {(site, id(gated[p])): gated[p] for site, stack in stacks.items() for p in stack.concepts if p in gated}
    trees = {(site, key): tree_at(gate, site) for (site, key), gate in used.items()}
    single = {id(gate): gate for tree in trees.values() for gate in gates_in(tree)}
    made_for = [(f"the vector {concept!r}", metadata) for concept, metadata in metadata_in(bank).items()]
    made_for += [(f"the gate {leaf!r}", leaf.metadata) for leaf in single.values() if isinstance(leaf, Fitted)]
    fingerprint.check_each(model, made_for)
    read = resolve(model, [leaf.site for leaf in single.values()], modules=modules)
    everywhere = read | places
    layout_of = layouts(model, everywhere, axis=axes, row_axis=row_axis, token_axis=token_axis, modules=modules)
    passes, passes_of = _passes(model, bank, steering.positions, everywhere, mask)
    made = {
        id(leaf): GateReader(leaf, read[leaf.site], layout_of[leaf.site], passes_of[leaf.site], key=key)
        for key, leaf in enumerate(single.values())
    }
    readers = {key: _reader(tree, made) for key, tree in trees.items()}
    distinct = tuple(made.values())
    interventions = interventions_of(bank, steering.intervention)
    rule_of = {key: _by_site(own) for key, own in {id(own): own for own in interventions}.items()}
    rules = [rule_of[id(own)] for own in interventions]
    edits: dict[str, SiteEdit] = {}
    for site, place in places.items():
        stack = stacks[site]
        usual = site not in axes or axes[site] == layout(model, place, modules=modules).axis
        size = known_size(place) if usual else place.size
        if size not in (None, stack.size):
            raise ShapeError(
                f"site {site!r}: the activation has {size} features, the vector {stack.size}; was it "
                "fitted on another model?"
            )
        edits[site] = SiteEdit(
            place,
            layout_of[site],
            stack,
            interventions=[rules[index](site) for index in stack.concepts],
            gates={own: readers[site, id(gated[p])] for own, p in enumerate(stack.concepts) if p in gated},
            passes=passes_of[site],
            checkpointing=checkpointing,
        )
    for reader in distinct:
        users = [edit for edit in edits.values() if any(reader in readers_in(own) for own in edit.gates.values())]
        module, side, *part = reader.place.module, reader.place.side, reader.place.path, reader.place.features
        there = [edit for edit in edits.values() if edit.place.module is module and edit.place.side == side]
        holds = reader.gate.per != "token" and passes_of[reader.gate.site].sees_inputs  # for a generation perhaps
        reader.is_inline = (
            not holds
            and len(there) < 2
            and all(  # of several, each would read what the last one made
                edit in there
                and [edit.place.path, edit.place.features] == part
                and all(own is reader or reader not in readers_in(own) for own in edit.gates.values())
                for edit in users
            )
        )
    placed = [site for site, edit in edits.items() if edit.has_values]
    for site in (*read, *placed):
        passes_of[site].is_asked = True
    return Plan(model, bank, edits, distinct, passes, axes)


def _passes(
    model: nn.Module,
    bank: VectorBank,
    positions: AllPositions | None,
    places: Mapping[str, Place],
    mask: Masks | None,
) -> tuple[tuple[Passes, ...], dict[str, Passes]]:
    """The passes of the model, and site -> those that it is of: an encoder runs by itself when text is generated."""
    named = positions if isinstance(positions, Mapping) else dict.fromkeys(bank.concepts, positions)
    chosen = {place: named.get(concept) for place, concept in enumerate(bank.concepts)}
    somewhere = {
        place: own for place, own in chosen.items() if own is not None and not (isinstance(own, str) and own == "all")
    }
    bridged = getattr(model, "original_model", None) if hook_points(model) else None
    host = bridged if isinstance(bridged, nn.Module) else unwrapped(model)
    return groups(host, places, said_of(mask, places), somewhere)


def gates_of(bank: VectorBank, gate: Gates | None) -> Mapping[str, AnyGate]:
    """Concept -> its gate, of those that have one."""
    return gate if isinstance(gate, Mapping) else dict.fromkeys(bank.concepts, gate) if gate is not None else {}


def interventions_of(bank: VectorBank, intervention: Interventions | None) -> list[Intervention | PerSite]:
    """One per concept, in bank order: what was asked for, else what the vector's metadata says that it is meant for."""
    if intervention is not None and not isinstance(intervention, Mapping):
        return [intervention] * len(bank)
    chosen = intervention or {}
    return [
        chosen[concept] if concept in chosen else _meant(concept, metadata.get("intervention", "add"))
        for concept, metadata in metadata_in(bank).items()
    ]


def _by_site(own: Intervention | PerSite) -> Callable[[str], Intervention]:
    return own.at if isinstance(own, PerSite) else lambda site: own


_KNOWN: dict[str, Intervention] = {"add": Add(), "ablate": Ablate()}


def _meant(concept: str, name: str) -> Intervention:
    if name not in _KNOWN:
        raise UnsupportedModelError(
            f"concept {concept!r} is meant for the intervention {name!r}, which has more to it than a name; pass "
            "intervention=, for example intervention=Clamp(3.0)"
        )
    return _KNOWN[name]


def _places(model: nn.Module, bank: VectorBank, sites: Sites | None, modules: Modules) -> dict[str, Place]:
    """Where the vectors' sites, or the chosen ones among them, are; one edit for one activation, or part of it."""
    if not bank.sites:
        raise SiteNotFoundError("the vectors have no sites, so there is nothing to add")
    places = resolve(model, bank.sites, modules=modules)
    if sites is not None:
        chosen = select({site: place.module for site, place in places.items()}, sites, owner="the bank", model=model)
        places = {site: places[site] for site in chosen}
    there: dict[tuple[int, str], list[Place]] = {}
    for place in places.values():
        there.setdefault((id(place.module), place.side), []).append(place)
    for one, other in chain.from_iterable(combinations(same, 2) for same in there.values()):
        shared = min(len(one.path), len(other.path))
        if one.path[:shared] == other.path[:shared] and one.features == other.features:
            raise UnsupportedModelError(
                f"sites {one.site!r} and {other.site!r} are one module, and an edit at either is an edit at both; "
                "select one"
            )
    return places


def _axes(bank: VectorBank, places: Mapping[str, Place], axis: Axes | None) -> Mapping[str, int]:
    """Site -> feature axis: what was asked for now or, failing that, when the vectors were collected."""
    if not isinstance(axis, int | Mapping | None):
        raise TypeError(f"axis: expected an int or a mapping site -> int, got {axis!r}")
    given = dict.fromkeys(places, axis) if isinstance(axis, int) else dict(axis or {})
    rest = [site for site in places if site not in given]
    collected = axes_of_bank(bank, rest)
    return {site: int(collected[f"axis {site}"]) for site in rest if f"axis {site}" in collected} | given


def _reader(tree: GateTree, made: Mapping[int, GateReader]) -> Reader:
    if isinstance(tree, Combined):
        return CombinedReader(tree.gate, [_reader(part, made) for part in tree.parts])
    return made[id(tree)]
