"""SiteEdit: the edit of one site, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.errors import ShapeError, StrengthError, UnsupportedModelError
from actsteer.private_names import is_functorch_wrapped, is_outside_of_functions, saves_otherwise
from actsteer.sites.axes import Layout
from actsteer.sites.containers import Arguments
from actsteer.sites.lens import Frame, Lens, View
from actsteer.sites.place import Place
from actsteer.steering.checkpointing import Checkpointing
from actsteer.steering.directions import Directions
from actsteer.steering.interventions.add import Add
from actsteer.steering.interventions.intervention import Intervention
from actsteer.steering.passes import Now, Passes
from actsteer.steering.reader import Reader
from actsteer.steering.strength import PerConcept, Terms, weighted, without_autocast
from actsteer.vectors.stack import Stack

_is_compiling = torch.compiler.is_compiling
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


class Fired(Enum):
    """Whether an edit has run since it was attached."""

    NO = "no"
    YES = "yes"
    UNKNOWN = "unknown"  # it is in a bias, which nothing calls


@final
class SiteEdit:
    """The edit of one site: the directions of k concepts, each with its strength and perhaps a gate.

    For `Add`, all that is constant is summed once, when the strengths change, into one tensor in the output's dtype
    and device; a forward pass then costs one add, whatever the number of concepts. A concept of strength 0 costs
    nothing. In compiled code nothing is kept but `fired`, and the strengths are inputs of the graph, so that a change
    of them compiles nothing; but where they cannot be summed beforehand, a change of which concepts have one does.
    """

    __slots__ = (
        "_apart",
        "_by_token",
        "_checkpointing",
        "_directions",
        "_dtype",
        "_exported",
        "_given",
        "_shape",
        "_shift",
        "_stack",
        "_strengths",
        "_terms",
        "_traced_shift",
        "changed",
        "constant",
        "fired",
        "gates",
        "in_place",
        "interventions",
        "is_sum",
        "lens",
        "passes",
    )

    def __init__(
        self,
        place: Place,
        layout: Layout,
        stack: Stack,
        *,
        interventions: Sequence[Intervention],
        gates: Mapping[int, Reader],
        passes: Passes,
        checkpointing: Checkpointing,
    ) -> None:
        self.lens = Lens(place, layout, size=stack.size)
        self.interventions = interventions
        kinds = {id(own): own for own in interventions}.values()
        self.is_sum = all(isinstance(own, Add) and not own.relative for own in kinds)  # of terms without h
        self.fired = Fired.NO
        self.in_place = False  # new strengths are written into the tensors that compiled code reads already
        self.changed: Callable[[], None] | None = None  # called after new strengths
        self.constant: Tensor | None = None  # (d,), or (B, d): everything that no gate decides
        self.gates = gates  # of the concepts that have one, by their places at this site, as everywhere below
        self.passes = passes
        self._stack = stack
        self._directions = Directions(stack)
        placed = passes.positions and {own for own, place in enumerate(stack.concepts) if place in passes.positions}
        self._apart = frozenset(gates).union(placed)  # those that are not the same for all tokens of a row
        self._checkpointing = checkpointing
        self._given: PerConcept | None = None
        self._terms: Terms | None = None  # those that are summed beforehand
        self._strengths: list[Tensor] = []  # of the others that have one
        self._by_token = False  # whether tokens of one row get different amounts
        self._shift = torch.empty(0)  # `constant` as it is added to outputs of this shape, dtype and state
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None
        self._traced_shift: Tensor | None = None  # `constant` as compiled code adds it to whatever has that axis
        self._exported: SiteEdit | None = None  # with strengths of its own, which an exported program keeps

    @property
    def place(self) -> Place:
        """Where it edits."""
        return self.lens.place

    @property
    def concepts(self) -> Sequence[int]:
        """The places of its concepts in the bank."""
        return self._stack.concepts

    @property
    def directions(self) -> Float[Tensor, "k d"]:
        """The directions as they are now; not to be written into."""
        return self._directions.all

    @property
    def is_trained(self) -> bool:
        """Whether the directions ask for gradients."""
        return self._directions.leaf is not None

    @property
    def size(self) -> int:
        """The number of features, d."""
        return self._stack.size

    def train_directions(self) -> Tensor:
        """The directions as a leaf tensor (k, d) that asks for gradients, from the next `set_strengths` on."""
        return self._directions.train()

    @property
    def is_constant(self) -> bool:
        """Whether the same tensor is added to every row, whatever the activation."""
        given = self._given
        varies = given is not None and (given.by_token or any(own.ndim for own in given.by_row.values()))
        return self.is_sum and not self._apart and not varies

    def notice(self, now: Now | None) -> None:
        """A pass begins: with pads, the next call goes the whole way round."""
        if now is not None and now.real is not None:
            self._shape = None

    def check_strengths(self, strengths: PerConcept) -> None:
        """StrengthError if the way in which this edit is attached leaves no room for these."""
        if self.changed is None and not self.in_place:
            return
        rows = any(own.ndim for own in strengths.by_row.values())
        if self.changed is not None and (strengths.by_token or rows):
            raise StrengthError(f"site {self.place.site!r}: a bias has one strength for all rows; use another backend")
        if self.in_place and strengths.by_token:
            raise StrengthError(
                f"site {self.place.site!r}: the buffer backend has no room for a strength per position or step; use "
                "another backend"
            )
        if self.in_place and self._given is not None and strengths.shapes != self._given.shapes:
            raise StrengthError(
                f"site {self.place.site!r}: the buffer backend keeps the shape of its strengths, one number or the "
                "same number of rows; install it with a strength of the shape that is to come"
            )

    def set_strengths(self, strengths: PerConcept, *, every: bool, idle: bool) -> None:
        """New strengths of its concepts, from the next forward pass on.

        Args:
            every: whether a concept of strength 0 counts too: compiled code, or a gradient, waits for it.
            idle: whether no concept has a strength, at any site; then those that had one stay, at 0, and what was
                compiled with them is still right.
        """
        terms, others = strengths.parts(self._apart if self.is_sum else None, every=every)
        self._given, self._terms = strengths, terms
        constant = None if terms is None else terms.sum(self._directions.of(terms))
        if idle and not every:
            others = self._directions.others
        if terms is None and self.is_sum and (not others or (idle and self.constant is not None)):
            constant = self._directions.zero(self.constant)
        self._directions.choose(others)
        self._by_token = bool(others) and any(
            own in strengths.by_token or self._stack.concepts[own] in self.passes.positions for own in others
        )
        if self.in_place:
            given = [strengths.at(own) for own in others]
            for tensor, value in zip([self.constant, *self._strengths], [constant, *given], strict=True):
                if tensor is not None and value is not None:
                    tensor.detach().copy_(value)
            self._exported = self._twin(constant, given)
        else:
            self.constant = constant
            self._strengths = [strengths.at(own).clone() for own in others]
        self._shape = None
        self._traced_shift = self._traceable()
        if self.changed is not None:
            self.changed()

    def _twin(self, constant: Tensor | None, strengths: Sequence[Tensor]) -> SiteEdit:
        twin = object.__new__(SiteEdit)
        for name in SiteEdit.__slots__:
            setattr(twin, name, getattr(self, name))
        twin.in_place, twin._exported = False, None
        twin.constant, twin._strengths = constant, [strength.clone() for strength in strengths]
        twin._traced_shift = twin._traceable()
        return twin

    def expect(self) -> None:
        """Forget that it ever fired."""
        self.fired = Fired.UNKNOWN if self.changed is not None else Fired.NO
        self._shape = None  # so that the next call goes the whole way round, where `fired` is set

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The edited output: one add where the last call's shift still fits, else the whole way round."""
        try:
            if (
                output.__class__ is Tensor
                and output.shape == self._shape
                and output.dtype is self._dtype
                and not _is_compiling()
                and (
                    output.is_inference()
                    or (is_outside_of_functions() and (not output.requires_grad or saves_otherwise(True) is None))
                )
            ):
                return output + self._shift
        except RuntimeError:  # the model has moved to another device, or the output is nested and has no shape
            self._shape = None
        edited = self.edit(module, output)
        if not module.__dict__.get("inplace") or not args or output is not args[0] or not isinstance(output, Tensor):
            return edited
        self._shape = None
        if torch.is_grad_enabled() and edited.requires_grad:  # autograd keeps what the module has written
            return edited
        return output.copy_(edited)  # its caller may look there, and not at the result

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The edited arguments."""
        return tuple(self.edit(module, Arguments(args, kwargs)))

    def edit(self, module: nn.Module, value: Any) -> Any:
        """A module's output or its `Arguments`, with the activation edited."""
        self.fired = Fired.YES
        if self._exported is not None and _is_exporting():
            return self._exported.edit(module, value)
        if (
            self._traced_shift is not None
            and _is_compiling()
            and value.__class__ is Tensor
            and not self._may_have_pads()
        ):
            shift = self._traced_shift.to(dtype=value.dtype, device=value.device)
            if not value.is_nested and value.ndim >= shift.ndim and value.shape[-shift.ndim] == shift.shape[0]:
                return value + shift
        view = self.lens.read(module, value).open()
        now = self._now(view.frame, view.part.device)
        edited = self._add(view, now) if self.is_sum else self._intervene(view, now)
        if not _is_compiling() and (self._checkpointing.notice(edited) or not view.is_plain):
            self._shape = None
        return view.write(edited)

    def _may_have_pads(self) -> bool:
        return self.passes.sees_inputs and self.passes.now is not None

    def _now(self, frame: Frame, device: torch.device) -> Now | None:
        """What is known of the pass that runs, if it matters."""
        now = self.passes.now
        if not self._by_token:
            return now
        if not _is_compiling() and _may_be_checkpointed() and self._checkpointing.runs_inside:
            raise UnsupportedModelError(
                f"site {self.place.site!r}: under gradient checkpointing a part of the model runs again later, when "
                "the positions are not known any more; steer all positions, or train without checkpointing"
            )
        if now is not None and now.tokens is not None:
            return now
        return self.passes.of_shape(*frame.rows_and_length, device)

    def _add(self, view: View, now: Now | None) -> Tensor:
        activation, frame = view.part, view.frame
        others, trained = self._directions.others, self.is_trained
        delta = self.constant
        if trained and self._terms is not None:  # a graph of its own for every forward pass
            delta = self._terms.sum(self._directions.of(self._terms))
        shift = None if delta is None else frame.vectors(delta, copies=_copies(now))
        if others:
            amounts = [self._strength(own, frame, now) for own in range(len(others))]
            rows = self._directions.cast(None, None, amounts[0].device)
            alike = [c.movedim(frame.axis, -1)[..., 0] if c.ndim else c for c in amounts]
            varied = weighted(torch.stack(torch.broadcast_tensors(*(c.to(rows) for c in alike))), rows)
            varied = frame.vectors(varied) if varied.ndim == 1 else varied.movedim(-1, frame.axis)
            shift = varied if shift is None else shift.to(varied.device) + varied
        assert shift is not None
        shift = shift.to(dtype=activation.dtype, device=activation.device)
        real = self._real(frame, now, device=shift.device)
        if real is not None:
            shift = torch.where(real, shift, -0.0)
        shift = view.share(shift)
        if not (_is_compiling() or others or real is not None or trained) and delta is not None and delta.ndim == 1:
            self._shift, self._shape, self._dtype = shift, activation.shape, activation.dtype
        return activation + shift

    def _intervene(self, view: View, now: Now | None) -> Tensor:
        last = view.features_last()
        last = last.to(torch.promote_types(last.dtype, torch.float32))  # rounded once, at the end
        real = self._real(view.frame, now, device=last.device)
        with without_autocast(last.device.type):
            for own, place in enumerate(self._directions.others):
                c = self._strength(own, view.frame, now)
                c = c if real is None else torch.where(real, c.to(last.device), 0.0)
                if c.ndim:  # a number for all stays on the CPU: reading it waits for no other device
                    c = c.to(last).movedim(view.frame.axis, -1)
                direction = self._directions.cast(own, last.dtype, last.device)
                last = edited_by(self.interventions[place], last, direction, c)
        return view.part_of(last)

    def _traceable(self) -> Tensor | None:
        """What may be added to a plain output in compiled code without a look at anything else; it costs few guards."""
        axis = self.lens.output_axis
        if (
            axis is None
            or self.constant is None
            or self.constant.ndim > 1
            or self._directions.others
            or self.is_trained
        ):
            return None
        return self.constant if axis == -1 else self.constant.view(-1, *[1] * (-axis - 1))

    def _strength(self, own: int, frame: Frame, now: Now | None) -> Tensor:
        """How much of one of the others: 0-dim or, of the activation's rank, per row or per token."""
        c, place = self._strengths[own], self._directions.others[own]
        parts = [frame.by_row(c, copies=_copies(now)) if c.ndim else c]
        if (gate := self.gates.get(place)) is not None:
            weights = gate.weights_for(self.place.site)
            if c.ndim and len(c) not in (len(weights), len(weights) // _copies(now)):
                raise StrengthError(
                    f"site {self.place.site!r}: {len(c)} rows of strength, and a gate that decides for "
                    f"{len(weights)}; give one strength per row"
                )
            by_token = weights.ndim == 2
            parts.append(
                frame.needs_tokens(weights, rows=len(weights))
                if by_token
                else frame.by_row(weights, copies=_copies(now))
            )
        if now is not None and now.tokens is not None:
            dose = now.doses.get(self._stack.concepts[place])
            if dose is not None:
                parts.append(frame.needs_tokens(dose, rows=now.tokens.rows))
        total = parts[-1]
        for part in parts[:-1]:
            total = total * (part.to(total.device) if part.ndim else part)  # a number for all may stay on the CPU
        return total

    def _real(self, frame: Frame, now: Now | None, *, device: torch.device) -> Tensor | None:
        """Where there are tokens and not pads, if the activation has positions; pads are not steered."""
        if now is None or now.real is None or now.tokens is None:
            return None
        if not _is_compiling() and _may_be_checkpointed():  # what runs again later does not know of pads
            return None
        real = frame.by_token(now.real, rows=now.tokens.rows)
        return None if real is None else real.to(device)


def _copies(now: Now | None) -> int:
    return 1 if now is None or now.tokens is None else now.tokens.copies


def _may_be_checkpointed() -> bool:
    """Whether autograd may run this again later."""
    return saves_otherwise(True) is not None or not is_outside_of_functions()


def edited_by(
    intervention: Intervention,
    activation: Float[Tensor, "*batch d"],
    direction: Float[Tensor, " d"],
    c: Float[Tensor, ...],
) -> Float[Tensor, "*batch d"]:
    """What the intervention makes of the activation; where c is 0, the activation as it is, bit for bit."""
    # a number on the CPU is looked at; no other device waits for one
    is_known = c.ndim == 0 and c.device.type == "cpu" and not _is_compiling() and not is_functorch_wrapped(c)
    if is_known and not c:
        return activation
    edited = intervention(activation, direction, c)
    if not isinstance(edited, Tensor) or edited.shape != activation.shape:
        got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise ShapeError(
            f"intervention {intervention!r}: expected an activation of the shape that it was given, "
            f"{tuple(activation.shape)}, got {got}"
        )
    return edited if is_known else torch.where(c == 0, activation, edited)
