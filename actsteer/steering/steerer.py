"""Steerer: a model, what to add to its activations, and how strongly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

from torch import Tensor, nn

from actsteer.collecting.batches import Batches
from actsteer.collecting.statistics import Statistics
from actsteer.errors import AttachedError, UnsupportedModelError
from actsteer.sites.axes import Axes, said_at
from actsteer.sites.place import Side
from actsteer.sites.resolve import Sites
from actsteer.sites.tap import lock
from actsteer.steering.attach import Watch, attach_all, check_applied, choices, others_at, owners_at
from actsteer.steering.check import checked
from actsteer.steering.checkpointing import Checkpointing
from actsteer.steering.choose import Backend, Choice, check
from actsteer.steering.edit import SiteEdit
from actsteer.steering.explain import Explanation, as_html, explain
from actsteer.steering.handles import Handles
from actsteer.steering.plan import is_alike, make_plan
from actsteer.steering.scope import Presence, Scope
from actsteer.steering.silence import unused
from actsteer.steering.steering import AllPositions, Gates, Interventions, Steerable, steering_of
from actsteer.steering.strength import Strengths, kept, strengths_of
from actsteer.tokens.whose import Masks
from actsteer.vectors.bank import VectorBank, of_any_model


@final
class Steerer:
    """Edits a model's activations while it is attached: phi_l(x) + c · v_l at every site l of the vectors.

    After the block the model is bit for bit what it was. `c = 0` is bit for bit the unsteered model. Steerers nest:
    the one entered last edits last, and for `Add` the edits sum. Everything is checked before anything is attached.
    A copy of a steered model, or one unpickled, is the plain model; a copy of a Steerer is not attached.

    Args:
        model: any `nn.Module`, wrapped (compiled, DDP, FSDP) or not.
        vectors: one vector, or a bank of concepts; they are copied (see `requires_grad_`). Or an edit that has its
            sites: `LowRank`, `Affine`, `Replace`, `KeepNorm` around one, or yours (see `Edit`). Or a `Steering`, which
            has c, intervention, gate, positions and sites, where they are not given here.
        c: the strength, 1 unless given, in multiples of the vectors: one number; a tensor (B,), one per row of the
            batch, or (B, S), one per row and position; a callable of the generation step (0 for the prompt, 1 for the
            first token that was generated and is fed to the model, ...); or concept -> one of these. What is not named
            is 0, and costs nothing: it is not read from its file either. A vector without a name is the concept
            "vector".
        intervention: how a direction edits the activation, `Add()` unless given; one for every concept, or concept ->
            intervention. The concepts of a bank edit in its order.
        gate: which rows, or tokens, are steered; one gate for every concept, or concept -> gate (what is not named
            has none). `AtSites` is another at each site.
        positions: which tokens of a sequence are steered, for every concept, or concept -> positions: "all", "prompt",
            "generated", "last" (of the prompt), an index or a list of them, a list for each row, a slice, a mask of the
            prompt (bool, or (B, S) of 0 and 1), or a callable that makes one of the inputs by name, for all tokens so
            far. They count from the start of each text, pads left out, whatever lies in a cache; negative ones from
            the end of the prompt. The first generated token is the answer to the prompt's last one, so that "prompt"
            and "last" steer it, and "generated" does not. Pads never are.
        sites: steer only these of the vectors' sites: names, globs, modules, or a predicate on (name, module).
        axis: the feature axis, of every site or site -> axis, where it is not the one that the module's class tells.
        row_axis, token_axis: the axes of the batch's rows and of its tokens, likewise; the rows lie on axis 0, and the
            tokens on the axis that remains, unless the module's class says otherwise. What cannot be told is refused.
        mask: where the call has its token mask, 1 for a token and 0 for a pad, if not under a usual name: the name of
            the argument, a dotted path into it ("batch.attention_mask", "args.1"), or a callable of the inputs by name
            that makes it; for every site, or site -> mask. {site: None}: its tokens are not those of the call.
        backend: "auto" takes a tap, a subclass in the place of the module's class, which works in eager and in compiled
            code; or a hook, where the module is sharded, or lazy. "buffer" keeps the strengths in tensors that compiled
            code reads (see `install`). "fold" writes c · v into the module's bias: no cost at all, and it works in
            scripted, exported and frozen code; but `state_dict` shows it, a copy made inside the block keeps it, and
            that it ran cannot be proved.
        scope: "process": every thread that runs the model is steered. "context": the attaching thread or asyncio task
            alone.
        strict: on leaving, raise if the model ran and a site did not.

    Raises:
        SiteNotFoundError, ShapeError, ConceptNotFoundError, StrengthError, UnsupportedModelError: before attaching.
        SteeringNotApplied: on leaving the block, with `strict`.
        PositionsError, GateError: in a forward pass, where positions, or what a gate reads, cannot be known.

    Warns:
        UserWarning: the model did not run in the block, or, for positions="generated", nothing was generated in it; `c`
            is set, or a block entered or left, between a forward pass under gradient checkpointing and its backward
            pass; on leaving, another `forward` covers what was steered, or a folded bias has other numbers, which stay.

    A module with `inplace=True` whose result the caller drops is steered where no gradient is recorded.

    Source: Turner et al. 2023 (activation addition); Rimsky et al. 2023 (contrastive activation addition).

    >>> import torch
    >>> from actsteer import SteeringVector
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> v = SteeringVector({"1": torch.tensor([1.0, 0.0])})
    >>> x = torch.zeros(1, 2)
    >>> with Steerer(model, v, c=3):
    ...     steered = model(x)
    >>> bool((steered - model(x) == torch.tensor([[3.0, 0.0]])).all())
    True
    """

    __slots__ = (
        *("__weakref__", "_attached", "_c", "_checkpointing", "_chosen", "_given", "_installed", "_norms", "_places"),
        *("_plan", "_presence", "_strengths", "_watch", "bank", "model"),
    )

    def __init__(
        self,
        model: nn.Module,
        vectors: Steerable,
        *,
        c: Strengths | None = None,
        intervention: Interventions | None = None,
        gate: Gates | None = None,
        positions: AllPositions | None = None,
        sites: Sites | None = None,
        axis: Axes | None = None,
        row_axis: Axes | None = None,
        token_axis: Axes | None = None,
        mask: Masks | None = None,
        backend: Backend = "auto",
        scope: Scope = "process",
        strict: bool = True,
    ) -> None:
        check(backend, scope)
        parts = {"c": c, "intervention": intervention, "gate": gate, "positions": positions, "sites": sites}
        steering = steering_of(vectors, parts)
        self.bank, self.model = steering.vectors, model
        self._places = {concept: place for place, concept in enumerate(self.bank)}
        where: dict[str, Any] = {"row_axis": row_axis, "token_axis": token_axis, "mask": mask}
        self._given = steering.parts() | where | {"backend": backend, "scope": scope, "strict": strict}
        self._checkpointing = Checkpointing(model, one_context=scope == "context")
        self._plan = make_plan(model, steering, axis=axis, **where, checkpointing=self._checkpointing)
        self._attached, self._installed, self._watch = Handles(), Handles(), Watch()
        self._presence: Presence | None = None
        self._chosen: Mapping[str, Choice] = {}  # what was attached
        self._norms: Mapping[str, float] = {}  # site -> the typical ‖h‖, where it is known
        self.c = steering.c
        self.choices()  # a backend that cannot serve a site raises here

    @property
    def c(self) -> Strengths:
        """The strength, read-only if it is a mapping; setting it takes effect at the next forward pass."""
        return self._c

    @c.setter
    def c(self, c: Strengths) -> None:
        strengths = strengths_of(c, self._places)
        kept_c = {name: kept(own) for name, own in c.items()} if isinstance(c, Mapping) else kept(c)
        with lock:
            if self._attached:
                self._checkpointing.leave("with another strength", "before c is set")
            if not self._installed or self._attached:  # what is installed and not attached stays at 0
                self._plan.set_strengths(strengths)
            self._strengths = strengths
            self._c = MappingProxyType(kept_c) if isinstance(kept_c, dict) else kept_c

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are steered."""
        return tuple(self.edits)

    @property
    def attached(self) -> bool:
        """Whether the model is being steered now."""
        return bool(self._attached)

    @property
    def edits(self) -> Mapping[str, SiteEdit]:
        """Site -> its edit."""
        return self._plan.edits

    @property
    def axes(self) -> Mapping[str, int]:
        """Site -> feature axis, where it was given now or with the vectors."""
        return self._plan.axis

    @property
    def _tells(self) -> dict[str, Any]:
        """What was said of where rows and tokens are."""
        return {name: self._given[name] for name in ("row_axis", "token_axis", "mask")}

    def on(self, model: nn.Module, *, sites: Sequence[str]) -> Steerer:
        """The same steering, of another model of this architecture, at some of the sites."""
        tells = {name: said_at(own, sites) for name, own in (self._tells | {"axis": self.axes}).items()}
        return Steerer(model, of_any_model(self.bank), **self._arguments()[2] | tells | {"sites": sites})

    def choices(self) -> dict[str, Choice]:
        """Site -> the backend that would serve it now, and why.

        Raises:
            UnsupportedModelError: one was asked for that would not be honoured there.
        """
        return choices(self._plan, backend=self._given["backend"])

    def explain(self) -> Explanation:
        """What would be edited where: by which backend, along which axis, with which strength.

        Where `check` was told how large the activations are, it says what share of them ‖c·v‖ is.

        >>> from actsteer import SteeringVector
        >>> Steerer(nn.Sequential(nn.Linear(2, 2)), SteeringVector({"0": Tensor([3.0, 4.0])}, concept="nine")).explain()
        Sequential: 1 site, in this order
        '0': the output of Linear, 2 features
            axis: -1
            backend: tap (a call of the module's forward)
            nine: Add, c = 1, norm 5
        """
        chosen = self._chosen if self._attached or self._installed else self.choices()
        others = {site: others_at(edit, but=self) for site, edit in self.edits.items()}
        return explain(self.model, self.bank, self.edits, chosen, self._strengths, others, self._norms)

    def check(self, inputs: Batches | Statistics, *, batch_size: int = 256) -> Explanation:
        """What `explain` says, and how large the activations of the unsteered model are, beside what is added.

        Args:
            inputs: on which the model runs, as for `collect`; the first call shows the reach of the edits too. Or
                `Statistics` with variances, with which it does not run.

        Raises:
            AttachedError: it is attached; check it before the block.

        Warns:
            UserWarning: a site on which nothing depends that the model returns; an `Ablate` of what lies far from 0.

        >>> from actsteer import SteeringVector
        >>> steerer = Steerer(nn.Sequential(nn.Identity()), SteeringVector({"0": Tensor([3.0, 4.0])}), c=2)
        >>> print(steerer.check(Tensor([[0.0, 20.0]])).splitlines()[-1])
            vector: Add, c = 2, norm 5, ‖c·v‖ 0.5 of the typical ‖h‖ 20
        """
        if self._attached:
            raise AttachedError(f"{self!r} is attached, and what is checked is the unsteered model; leave the block")
        found = checked(self.model, self.edits, inputs, batch_size=batch_size, where=self._tells | {"axis": self.axes})
        self._norms = {site: seen.norm for site, seen in found.seen.items()}
        for message in found.warnings(self.edits, self.bank.concepts):
            warnings.warn(message, UserWarning, stacklevel=2)
        return self.explain()

    def requires_grad_(self) -> dict[str, Tensor]:
        """Ask for gradients to the directions: site -> (k, d), a leaf with a row for each concept that steers there.

        >>> import torch
        >>> from actsteer import SteeringVector
        >>> model, v = nn.Sequential(nn.Identity()), SteeringVector({"0": torch.zeros(2)})
        >>> with Steerer(model, v, c=3) as steerer:
        ...     directions = steerer.requires_grad_()
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> directions["0"].grad
        tensor([[3., 3.]])
        """
        if any(choice.mechanism == "fold" for choice in self.choices().values()):
            raise UnsupportedModelError("gradients do not reach directions that are folded; use another backend")
        return self._plan.train_directions()

    @property
    def vectors(self) -> VectorBank:
        """The vectors as they are now, after training perhaps; otherwise those that were given."""
        return self._plan.vectors()

    def edits_at(self, module: nn.Module, side: Side) -> list[SiteEdit]:
        """Its edits of what a module takes, or gives."""
        return [edit for edit in self.edits.values() if edit.place.module is module and edit.place.side == side]

    def attach(self) -> Steerer:
        """Start steering, until `detach`; all sites or, if anything fails, none.

        Raises:
            AttachedError: it is attached already.

        Warns:
            UserWarning: an equal Steerer is attached already, as by a cell of a notebook that runs twice.
        """
        with lock:
            if self._attached:
                raise AttachedError(f"{self!r} is attached already; detach it, or make a second Steerer")
            try:
                self._plan.expect()
                self._checkpointing.forget()
                self._watch.ran = False
                if not self._installed:
                    self._put(self._attached)
                if self._given["backend"] == "buffer":
                    self._attached.add(self._plan.silence)
                    self._plan.set_strengths(self._strengths)
            except BaseException:
                self._attached.close()
                raise
        return self

    def detach(self) -> None:
        """Stop steering; the model is what it was. Nothing happens if it is not attached.

        An interrupted `attach` or `detach` leaves something for it to do, and it may be called again.

        Raises:
            SteeringNotApplied: with `strict`, if the model ran and a site did not, or was replaced after it had.
        """
        if self._remove():
            self._checkpointing.leave()
            if self._given["strict"] and self._watch.ran:
                check_applied(self._plan)

    def install(self) -> Steerer:
        """For the buffer backend: put the edits in place with strength 0, so that the model can be compiled with them.

        From then on `attach`, `c` and `detach` write into tensors that the compiled code reads, and nothing is
        compiled again; until `uninstall`.
        """
        with lock:
            if self._given["backend"] != "buffer" or self._installed or self._attached:
                raise AttachedError(f"{self!r}: install is for a buffer backend that is neither installed nor attached")
            try:
                self._put(self._installed)
                self._plan.silence()
            except BaseException:
                self._installed.close()
                raise
        return self

    def uninstall(self) -> None:
        """Take out what `install` put in place. Nothing happens if it is not installed."""
        try:
            self.detach()
        finally:
            with lock:
                self._installed.close()

    def __enter__(self) -> Steerer:
        was_attached = self.attached
        try:
            return self.attach()
        except BaseException:
            if not was_attached:  # an interrupt may come when all is attached, too
                self._remove()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            was_attached, by = self.attached, self._chosen
            if kind is None:
                self.detach()
        finally:  # whatever interrupts it
            self._remove()
        if kind is None and self._given["strict"] and was_attached and self._given["backend"] != "buffer":
            for message in unused(self._plan, by, ran=self._watch.ran):
                warnings.warn(message, UserWarning, stacklevel=2)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "c" or name.startswith("_") or not hasattr(self, "_watch"):
            object.__setattr__(self, name, value)
        elif name in ("model", "bank") or name in self._arguments()[2]:
            raise AttributeError(f"{name} cannot be changed, c can; make a new Steerer with another {name}")
        else:
            raise AttributeError(f"a Steerer has no {name!r} to be set, but c, its strength; did you mean c?")

    def __repr__(self) -> str:
        return f"Steerer({type(self.model).__name__}, concepts={self.bank.concepts}, sites={self.sites}, c={self._c})"

    _repr_html_ = as_html

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, self._arguments()

    def _arguments(self) -> tuple[nn.Module, VectorBank, dict[str, Any]]:
        c = dict(self._c) if isinstance(self._c, Mapping) else self._c
        options = self._given | {"c": c, "sites": self.sites, "axis": self.axes}
        trained = any(edit.is_trained for edit in self.edits.values())
        return self.model, self.vectors if trained else self.bank, options

    def _put(self, handles: Handles) -> None:
        self._plan.find_again()
        self._chosen = self.choices()
        others = dict.fromkeys(own for edit in self.edits.values() for own in others_at(edit, but=self))
        if any(own._is_here and is_alike(self._arguments(), own._arguments()) for own in others):
            said = "an equal Steerer is attached already, and this one steers once more; if a notebook's cell ran twice"
            warnings.warn(f"{self!r}: {said}, call actsteer.detach_all(model) first", UserWarning, stacklevel=4)
        for other in dict.fromkeys(owner for module in self.model.modules() for owner in owners_at(module)):
            if isinstance(other, Steerer):
                other._checkpointing.leave("with another steering too", "before the block")
        self._presence = Presence() if self._given["scope"] == "context" else None
        how: dict[str, Any] = {"backend": self._given["backend"], "presence": self._presence, "owner": self}
        attach_all(handles, self._plan, self._watch, self._chosen, **how)

    @property
    def _is_here(self) -> bool:
        """Whether it steers in this context, if it is attached."""
        return self._presence is None or self._presence.is_here

    def _remove(self) -> bool:
        with lock:
            was_attached = self.attached
            self._attached.close()
        return was_attached


def _rebuilt(model: nn.Module, bank: VectorBank, options: dict[str, Any]) -> Steerer:
    """A Steerer of the same kind, not attached."""
    return Steerer(model, bank, **options)
