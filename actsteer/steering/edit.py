"""SiteEdit: the edit of one site, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.errors import StrengthError, UnsupportedModelError
from actsteer.private_names import is_outside_of_functions, saves_otherwise
from actsteer.sites.axes import Layout
from actsteer.sites.containers import Arguments
from actsteer.sites.lens import Frame, Lens, View
from actsteer.sites.place import Place
from actsteer.sites.tap import lock
from actsteer.steering.bound import Amount, Bound, Decide, Run, applied, has_no_pads, summed
from actsteer.steering.checkpointing import Checkpointing
from actsteer.steering.directions import Directions
from actsteer.steering.interventions.add import Add
from actsteer.steering.interventions.intervention import Intervention, Placed
from actsteer.steering.limits import check_direction, check_dtype, check_strength, check_sum
from actsteer.steering.reader import GateReader, Reader
from actsteer.steering.strength import PerConcept, Terms
from actsteer.tokens.passes import Pass, Passes
from actsteer.vectors.stack import Stack

_is_compiling = torch.compiler.is_compiling
_is_traced = torch.compiler.is_dynamo_compiling  # which costs half, and no fake tensor is a plain one
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
        *("_apart", "_asks", "_by_row", "_by_token", "_checkpointing", "_device", "_directed"),
        *("_directions", "_exported", "_given", "_in_range", "_kept", "_stack", "_strengths", "_terms"),
        *("_traced_shift", "_whole", "changed", "constant", "fired", "gates", "has_values", "in_place"),
        *("interventions", "is_sum", "lens", "passes"),
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
        self.has_values = any(isinstance(own, Placed) for own in kinds)  # for some tokens, or rows
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
        self._directed: set[int] = set()  # the concepts whose directions are known to serve their interventions
        self._device: torch.device | None = None  # where the activations are likely to be
        self._in_range: torch.dtype | None = None  # in which the strengths are known to be finite
        self._whole: Tensor | None = None  # `constant`, where it was computed
        self._terms: Terms | None = None  # those that are summed beforehand
        self._strengths: list[Tensor] = []  # of the others that have one
        self._by_row = False  # whether rows get different amounts
        self._by_token = False  # whether tokens of one row get different amounts
        self._asks = False  # whether what is known of the pass matters
        self._kept: tuple[torch.Size, torch.dtype, Run, Tensor | None, Frame] | None = None
        """The edit of plain outputs of one shape and dtype: what it does, the constant that it adds if that is all."""
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

    def check_strengths(self, strengths: PerConcept) -> None:
        """That these can be applied, before anything changes.

        Raises:
            StrengthError: the way in which this edit is attached leaves no room for them.
            ZeroDirectionError: a concept gets a strength whose intervention needs a direction that is not zero.
        """
        if not (self.is_sum or self.is_trained):
            for own in set(strengths.parts(None, every=False)[1]) - self._directed:
                where = f"site {self.place.site!r}, concept {self._stack.names[own]!r}"
                check_direction(self.interventions[own], self._stack.rows((own,))[0], where=where)
                self._directed.add(own)
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

    def _check_range(self, dtype: torch.dtype) -> None:
        """Once for each dtype that comes, until the strengths change: that they can be used in it."""
        check_dtype(dtype, site=self.place.site)
        if dtype is self._in_range or self.is_trained or _is_compiling():
            return
        if self._whole is not None:
            check_sum(self._whole, dtype, site=self.place.site)
        for own, c in enumerate(self._strengths):
            wide = torch.promote_types(dtype, torch.float32)
            check_strength(c, wide, site=self.place.site)
            if self.is_sum and c.device.type == "cpu":
                shift = c[..., None].to(wide) * self._directions.cast(own, wide, c.device)
                check_sum(shift, dtype, site=self.place.site)
        self._in_range = dtype

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
        if constant is not None:
            check_sum(constant, constant.dtype, site=self.place.site)
        if idle and not every:
            others = self._directions.others
        if terms is None and self.is_sum and (not others or (idle and self.constant is not None)):
            constant = self._directions.zero(self.constant)
        self._directions.choose(others)
        self._whole = constant
        self._by_row = any(own.ndim for own in strengths.by_row.values())
        self._by_token = bool(others) and any(self._is_placed(own) for own in others)
        if self.in_place:
            given = [strengths.at(own) for own in others]
            for tensor, value in zip([self.constant, *self._strengths], [constant, *given], strict=True):
                if tensor is not None and value is not None:
                    tensor.detach().copy_(value)
            self._exported = self._twin(constant, given)
        else:
            self.constant = constant
            self._strengths = [strengths.at(own).clone() for own in others]
            self._bring()
        self._asks = self.passes.sees_inputs or self._by_token or self._by_row or self.has_values or bool(self.gates)
        self._kept = self._in_range = None
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

    def expect_on(self, device: torch.device | None) -> None:
        """Keep what compiled code adds on this device, where the activations probably are."""
        if device != self._device:
            self._device = device
            self._bring()

    def hold(self) -> None:
        """From now on write new strengths into the tensors on the device that compiled code and CUDA graphs read."""
        self.in_place = True
        self._bring()

    def _bring(self) -> None:
        """Move what a pass reads to the device; until `hold`, a strength for all rows stays on the CPU, for a look."""
        device, constant = self._device, self.constant
        if constant is not None and device not in (None, constant.device):
            self.constant = constant.to(device)
        self._strengths = [c.to(device=device) if c.ndim or self.in_place else c for c in self._strengths]
        self._traced_shift = self._traceable()

    def expect(self) -> None:
        """Forget that it ever fired."""
        self.fired = Fired.UNKNOWN if self.changed is not None else Fired.NO
        self._kept = None  # so that the next call goes the whole way round, where `fired` is set

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The edited output: by what the last call bound where that still fits, else the whole way round."""
        kept = None if _is_traced() or self._is_captured(output) else self._kept
        if kept is not None:
            shape, dtype, run, shift, frame = kept
            try:
                if (
                    output.__class__ is Tensor
                    and output.shape == shape
                    and output.dtype is dtype
                    and (output.is_inference() or (is_outside_of_functions() and saves_otherwise(True) is None))
                ):
                    if not self._asks:
                        return run(output, None) if shift is None else output + shift
                    if shift is not None and not self.passes.may_have_pads:
                        return output + shift
                    return run(output, self._now(frame, output.device, runs_again=False))
            except RuntimeError:  # the model has moved to another device, or the output is nested and has no shape
                self._kept = None
        edited = self.edit(module, output)
        if not is_in_place(module, output, edited):
            return edited
        self._kept = None
        return output.copy_(edited)  # its caller may look there, and not at the result

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The edited arguments."""
        edited: Arguments = self.edit(module, Arguments(args, kwargs))
        if len(args) == 1 and is_in_place(module, args[0], edited.args[0]):
            args[0].copy_(edited.args[0])  # the module writes there too
            return args, kwargs
        return tuple(edited)

    def edit(self, module: nn.Module, value: Any) -> Any:
        """A module's output or its `Arguments`, with the activation edited."""
        self.fired = Fired.YES
        if _is_exporting() and self._exported is not None:
            return self._exported.edit(module, value)
        if (
            _is_compiling()  # which guards on all that it is asked here
            and self._traced_shift is not None
            and value.__class__ is Tensor
            and not (self._asks and self.passes.may_have_pads)
        ):
            shift = self._traced_shift.to(dtype=value.dtype, device=value.device)
            if not value.is_nested and value.ndim >= shift.ndim and value.shape[-shift.ndim] == shift.shape[0]:
                return value + shift
        view = self.lens.read(module, value).open()
        runs_again = not _is_compiling() and not view.part.is_inference() and _may_be_checkpointed()
        now = self._now(view.frame, view.part.device, runs_again=runs_again)
        if _is_compiling():
            return view.write(self._bound(view).run(view.part, now))
        with lock:  # new strengths may come from another thread
            bound, given = self._bound(view), self._given
        edited = bound.run(view.part, now)
        is_checkpointed = self._checkpointing.notice(edited)
        keeps = view.is_whole and not (is_checkpointed or self.is_trained or self._is_captured(view.part))
        with lock:
            if given is self._given:
                self._kept = (view.part.shape, view.part.dtype, bound.run, bound.shift, view.frame) if keeps else None
        return view.write(edited)

    def _bound(self, view: View) -> Bound:
        """The edit of activations like this one."""
        self._check_range(view.part.dtype)
        others = self._directions.others
        places = [self._stack.concepts[own] for own in others]
        at = self.passes.positions
        amounts = [
            Amount(c, self._decide(own, view), place=place, is_by_token=self._is_placed(own), at=at.get(place, "all"))
            for c, own, place in zip(self._strengths, others, places, strict=True)
        ]
        rows = self._directions.cast(None, None, view.part.device) if others else None
        if self.is_sum:
            constant = self.constant
            if self.is_trained and self._terms is not None:  # a graph of its own for every forward pass
                constant = self._terms.sum(self._directions.of(self._terms))
            return summed(view, constant, amounts, rows)
        return applied(view, [self.interventions[own] for own in others], amounts, rows)

    def _is_captured(self, output: object) -> bool:
        """Whether a CUDA graph records this pass; it must read strengths from `in_place` tensors, which may change."""
        return self.in_place and getattr(output, "is_cuda", False) and torch.cuda.is_current_stream_capturing()

    def _decide(self, own: int, view: View) -> Decide | None:
        """What the gate of a concept decides of activations like this one."""
        reader, site = self.gates.get(own), self.place.site
        if reader is None:
            return None
        if isinstance(reader, GateReader) and reader.is_inline:
            return reader.bind(view)
        return lambda h, now: reader.weights_for(site)

    def _is_placed(self, own: int) -> bool:
        """Whether tokens of one row get different amounts of a concept."""
        by_token = self._given is not None and own in self._given.by_token
        return by_token or self._stack.concepts[own] in self.passes.positions

    def _now(self, frame: Frame, device: torch.device, *, runs_again: bool) -> Pass | None:
        """What is known of the pass that runs, if it matters.

        Args:
            runs_again: whether autograd may run this once more, later.
        """
        now = self.passes.now
        if now is not None and self._by_row:
            frame.check_rows(now.rows)
            if now.tokens is not None and not now.tokens.copies:
                raise StrengthError(
                    f"site {self.place.site!r}: a strength per row, and the generation goes on with other rows than it "
                    "began with; generate each row by itself, or give one strength for all"
                )
        if (self._by_token or not has_no_pads(now)) and runs_again and self._checkpointing.runs_inside:
            what = "the positions" if self._by_token else "pads"
            raise UnsupportedModelError(
                f"site {self.place.site!r}: under gradient checkpointing a part of the model runs again later, when "
                f"{what} are not known any more; steer all positions of batches without pads, or train without "
                "checkpointing"
            )
        if not self._by_token or (now is not None and now.tokens is not None):
            return now
        if now is not None:
            frame.check_rows(now.rows)
        return self.passes.of_shape(*frame.rows_and_length, device)

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


def is_in_place(module: nn.Module, activation: Any, edited: Any) -> bool:
    """Whether the edit is to be made in place, as the module's work is; not where autograd keeps what lies there."""
    if not module.__dict__.get("inplace") or not isinstance(activation, Tensor) or edited is activation:
        return False
    return not (torch.is_grad_enabled() and edited.requires_grad)


def _may_be_checkpointed() -> bool:
    """Whether autograd may run this again later."""
    return saves_otherwise(True) is not None or not is_outside_of_functions()
