"""Steerer: a model, what to add to its activations, and how strongly."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import combinations
from types import MappingProxyType, TracebackType
from typing import Any, final

from torch import nn

from actsteer.errors import (
    AttachedError,
    ConceptNotFoundError,
    ShapeError,
    SiteNotFoundError,
    SteeringNotApplied,
    UnsupportedModelError,
    close_names,
)
from actsteer.sites.axes import feature_axis, known_size, row_axis
from actsteer.sites.resolve import Sites, resolve, select
from actsteer.steering.backends.hook import GateReader, SiteEdit
from actsteer.steering.gates import Gate
from actsteer.steering.interventions import Add, Intervention
from actsteer.steering.strength import Strengths, strengths_of
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector

Gates = Gate | Mapping[str, Gate]


@final
class Steerer:
    """Edits a model's activations while it is attached: phi_l(x) + c · v_l at every site l of the vectors.

    After the block the model is bit for bit what it was. `c = 0` is bit for bit the unsteered model. Steerers nest:
    the one entered last edits last, and for `Add` the edits sum. Everything is checked before anything is attached.
    Hooks belong to the module, not to a thread: every thread that runs the model is steered.

    Args:
        model: any `nn.Module`.
        vectors: one vector, or a bank whose concepts are added together.
        c: the strength, in multiples of the vectors: one number; concept -> number (what is not named is 0); or a
            tensor of shape (B,), one strength per row of the batch. A vector without a name is the concept "vector".
        intervention: how a direction edits the activation.
        gate: which rows are steered; one gate for every concept, or concept -> gate (what is not named has none).
        sites: steer only these of the vectors' sites: names, globs, or a predicate on (name, module).
        strict: on leaving, raise if the model ran and a site did not.

    Raises:
        SiteNotFoundError, ShapeError, ConceptNotFoundError, StrengthError, UnsupportedModelError: before attaching.
        SteeringNotApplied: on leaving the block, with `strict`.

    Source: Turner et al. 2023 (activation addition); Rimsky et al. 2023 (contrastive activation addition).

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> v = SteeringVector({"1": torch.tensor([1.0, 0.0])})
    >>> x = torch.zeros(1, 2)
    >>> with Steerer(model, v, c=3):
    ...     steered = model(x)
    >>> bool((steered - model(x) == torch.tensor([[3.0, 0.0]])).all())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: SteeringVector | VectorBank,
        *,
        c: Strengths = 1.0,
        intervention: Intervention | None = None,
        gate: Gates | None = None,
        sites: Sites | None = None,
        strict: bool = True,
    ) -> None:
        if isinstance(vectors, SteeringVector):
            vectors = VectorBank({vectors.concept or "vector": vectors})
        if not isinstance(vectors, VectorBank):
            raise TypeError(f"expected a SteeringVector or a VectorBank, got {type(vectors).__name__}")
        self.model = model
        self.bank = vectors
        self._strict = strict
        self._handles: ExitStack | None = None
        self._ran = False
        if not vectors.sites:
            raise SiteNotFoundError("the vectors have no sites, so there is nothing to add")
        modules = resolve(model, vectors.sites)
        if sites is not None:
            modules = resolve(model, select(modules, sites, owner="the vectors"))
        for one, other in combinations(modules, 2):
            if modules[one] is modules[other]:
                raise UnsupportedModelError(
                    f"sites {one!r} and {other!r} are one module, and an edit at either is an edit at both; select one"
                )
        readers = _readers(model, vectors, gate)
        self._readers = tuple({id(reader): reader for reader in readers if reader is not None}.values())
        self.edits: dict[str, SiteEdit] = {}  # site -> its hook
        self._concepts: dict[str, list[int]] = {}  # site -> the places in the bank of the concepts that steer there
        for site, module in modules.items():
            own = [index for index, concept in enumerate(vectors) if site in vectors[concept]]
            directions = vectors.directions(site)[own]
            self._concepts[site] = own
            size = known_size(module)
            if size not in (None, directions.shape[1]):
                raise ShapeError(
                    f"site {site!r}: the activation has {size} features, the vector {directions.shape[1]}; was it "
                    "fitted on another model?"
                )
            self.edits[site] = SiteEdit(
                site,
                directions,
                intervention=intervention or Add(),
                gates=[readers[index] for index in own],
                axis=feature_axis(model, site, module),
                row_axis=row_axis(model, site, module),
            )
        self.c = c

    @property
    def c(self) -> Strengths:
        """The strength, read-only if it is a mapping; setting it takes effect at the next forward pass."""
        return self._c

    @c.setter
    def c(self, c: Strengths) -> None:
        strengths = strengths_of(c, self.bank.concepts)
        for site, edit in self.edits.items():
            edit.set_strengths([strengths[index] for index in self._concepts[site]])
        self._c = MappingProxyType(dict(c)) if isinstance(c, Mapping) else c

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are steered."""
        return tuple(self.edits)

    @property
    def attached(self) -> bool:
        """Whether the model is being steered now."""
        return self._handles is not None

    def attach(self) -> Steerer:
        """Start steering, until `detach`; all sites or, if anything fails, none.

        Raises:
            AttachedError: it is attached already.
        """
        if self._handles is not None:
            raise AttachedError(f"{self!r} is attached already; detach it, or make a second Steerer")
        modules = resolve(self.model, [*self.edits, *(reader.gate.site for reader in self._readers)])
        self._ran = False
        with ExitStack() as handles:
            self._finished = self.model.register_forward_hook(self._finish)
            handles.callback(self._finished.remove)
            if self._readers:
                handles.callback(self.model.register_forward_pre_hook(self._forget).remove)
                handles.callback(self.model.register_forward_hook(self._forget).remove)
            for reader in self._readers:
                handles.callback(modules[reader.gate.site].register_forward_hook(reader).remove)
            for site, edit in self.edits.items():
                edit.expect()
                handles.callback(modules[site].register_forward_hook(edit.hook).remove)
            self._handles = handles.pop_all()
        return self

    def detach(self) -> None:
        """Stop steering; the model is what it was. Nothing happens if it is not attached.

        Raises:
            SteeringNotApplied: with `strict`, if the model ran and a site did not.
        """
        if self._remove() and self._strict and self._ran:
            self._check_applied()

    def __enter__(self) -> Steerer:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.detach()
        else:
            self._remove()

    def __repr__(self) -> str:
        return f"Steerer({type(self.model).__name__}, concepts={self.bank.concepts}, sites={self.sites}, c={self._c})"

    def _remove(self) -> bool:
        handles, self._handles = self._handles, None
        if handles is not None:
            handles.close()
        self._forget()
        return handles is not None

    def _finish(self, *_: Any) -> None:
        self._ran = True
        self._finished.remove()  # one completed forward pass is proof enough; the others need not pay for it

    def _forget(self, *_: Any) -> None:
        for reader in self._readers:
            reader.weights = None

    def _check_applied(self) -> None:
        silent = [site for site, edit in self.edits.items() if not edit.fired]
        if silent:
            kinds = {site: type(module).__name__ for site, module in resolve(self.model, silent).items()}
            raise SteeringNotApplied(
                f"the model ran, but these sites did not: {kinds}. Is the module unused on this path, called by its "
                "forward() alone, or bypassed by a fused or compiled one? Choose another site, or pass strict=False"
            )


def _readers(model: nn.Module, bank: VectorBank, gate: Gates | None) -> list[GateReader | None]:
    """One reader per concept, in bank order; concepts that share a gate share its reader."""
    gates = gate if isinstance(gate, Mapping) else dict.fromkeys(bank.concepts, gate) if gate is not None else {}
    for concept in gates:
        if concept not in bank:
            raise ConceptNotFoundError(f"gate names no concept of the bank: {concept!r}. {close_names(concept, bank)}")
    for chosen in gates.values():
        if not isinstance(chosen, Gate):
            raise TypeError(f"gate: expected a gate with a site, such as ProjectionAbove, got {type(chosen).__name__}")
    modules = resolve(model, [gate.site for gate in gates.values()])
    made = {
        id(gate): GateReader(
            gate,
            axis=feature_axis(model, gate.site, modules[gate.site]),
            row_axis=row_axis(model, gate.site, modules[gate.site]),
        )
        for gate in gates.values()
    }
    return [made[id(gates[concept])] if concept in gates else None for concept in bank.concepts]
