"""SiteEdit: the edit of one site, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from actsteer.errors import StrengthError, UnsupportedModelError
from actsteer.private_names import is_outside_of_functions, saves_otherwise
from actsteer.sites.axes import Layout
from actsteer.sites.outputs import Arguments, get, locate, padded, put, unpadded
from actsteer.sites.place import Place
from actsteer.sites.shards import full_shape, own_part, share, whole_rows
from actsteer.steering.checkpointing import Checkpointing
from actsteer.steering.copies import Uncopied
from actsteer.steering.interventions.add import Add
from actsteer.steering.interventions.intervention import Intervention
from actsteer.steering.passes import Now, Passes
from actsteer.steering.reader import Reader
from actsteer.steering.spread import Lay

_is_compiling = torch.compiler.is_compiling
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


@final
class SiteEdit(Uncopied):
    """The edit of one site: `directions` (k, d), each with its strength and perhaps a gate.

    For `Add`, all that is constant is summed once, when the strengths change, into one tensor in the output's dtype
    and device; a forward pass then costs one add, whatever the number of concepts. In compiled code nothing is kept
    but `fired`, and the strengths are inputs of the graph, so that a change of them compiles nothing.
    """

    __slots__ = (
        "_asks",
        "_checkpointing",
        "_concepts",
        "_dtype",
        "_exported",
        "_like",
        "_shape",
        "_shift",
        "_strengths",
        "_traced_shift",
        "_trained",
        "changed",
        "constant",
        "directions",
        "fired",
        "gates",
        "in_place",
        "interventions",
        "is_sum",
        "layout",
        "passes",
        "place",
    )

    def __init__(
        self,
        place: Place,
        layout: Layout,
        directions: Float[Tensor, "k d"],
        *,
        concepts: Sequence[int],
        interventions: Sequence[Intervention],
        gates: Sequence[Reader | None],
        passes: Passes,
        checkpointing: Checkpointing,
    ) -> None:
        self.place = place
        self.layout = layout
        self.directions = directions
        self.interventions = interventions
        self.is_sum = all(isinstance(own, Add) and own.is_plain for own in interventions)  # of terms without h
        self.fired: bool | None = False  # None: nobody can know, for it is folded into the weights
        self.in_place = False  # new strengths are written into the tensors that compiled code reads already
        self.changed: Callable[[], None] | None = None  # called after new strengths
        self.constant: Tensor | None = None  # (d,), or (B, d): everything that no gate decides
        self.gates = gates
        self.passes = passes
        self._concepts = concepts  # their places in the bank
        self._asks = [passes.asks(index) for index in concepts]  # whether tokens of one row get different strengths
        self._checkpointing = checkpointing
        self._strengths: list[Tensor] = []
        self._like: dict[int | tuple[int, ...], Tensor] = {}  # directions as they were last needed
        self._shift = directions  # `constant` as it is added to outputs of this shape, dtype and state
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None
        self._traced_shift: Tensor | None = None  # `constant` as compiled code adds it to whatever has that axis
        self._trained = False
        self._exported: SiteEdit | None = None  # with strengths of its own, which an exported program keeps

    @property
    def concepts(self) -> Sequence[int]:
        """The places of its concepts in the bank."""
        return self._concepts

    def train_directions(self) -> Tensor:
        """The directions as a leaf tensor (k, d) that asks for gradients, from the next forward pass on."""
        if not self._trained:
            self.directions = self.directions.detach().clone().requires_grad_()
        self._trained = True
        self._shape = self._traced_shift = None
        return self.directions

    def silence(self) -> None:
        """Strength 0, in the shape of the present ones."""
        self.set_strengths([torch.zeros_like(strength) for strength in self._strengths])

    @property
    def is_constant(self) -> bool:
        """Whether the same tensor is added to every row, whatever the activation."""
        gated = any(gate is not None for gate in self.gates)
        return self.is_sum and not gated and not any(self._asks) and all(s.ndim == 0 for s in self._strengths)

    def notice(self, now: Now | None) -> None:
        """A pass begins: with pads, the next call goes the whole way round."""
        if now is not None and now.real is not None:
            self._shape = None

    def check_strengths(self, strengths: Sequence[Tensor], *, per_token: bool) -> None:
        """StrengthError if the way in which this edit is attached leaves no room for these."""
        if self.changed is not None and (per_token or any(strength.ndim for strength in strengths)):
            raise StrengthError(f"site {self.place.site!r}: a bias has one strength for all rows; use another backend")
        if self.in_place and per_token:
            raise StrengthError(
                f"site {self.place.site!r}: the buffer backend has no room for a strength per position or step; use "
                "another backend"
            )
        if self.in_place and [s.shape for s in strengths] != [s.shape for s in self._strengths]:
            raise StrengthError(
                f"site {self.place.site!r}: the buffer backend keeps the shape of its strengths, one number or the "
                "same number of rows; install it with a strength of the shape that is to come"
            )

    @torch.inference_mode(mode=False)  # what is kept must work in autograd later
    def set_strengths(self, strengths: Sequence[Tensor]) -> None:
        """New strengths, one of shape () or (B,) per direction, from the next forward pass on."""
        self._asks = [self.passes.asks(index) for index in self._concepts]
        ungated = self._plain
        constant = None
        if self.is_sum and ungated:
            constant = _sum(self.directions[ungated], [strengths[index] for index in ungated])
        if self.in_place:
            for tensor, value in zip([self.constant, *self._strengths], [constant, *strengths], strict=True):
                if tensor is not None and value is not None:
                    tensor.detach().copy_(value)
            self._exported = self._twin(constant, strengths)
        else:
            self.constant, self._strengths = constant, [strength.clone() for strength in strengths]
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
        self.fired = None if self.changed is not None else False
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
        return self.edit(module, output)

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The edited arguments."""
        return tuple(self.edit(module, Arguments(args, kwargs)))

    def edit(self, module: nn.Module, value: Any) -> Any:
        """A module's output or its `Arguments`, with the activation edited."""
        self.fired = True
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
        keys = locate(self.place, value)
        raw = get(value, keys)
        conversion = getattr(module, "hook_conversion", None)  # TransformerLens: how its users see the activation
        activation = padded(raw if conversion is None else conversion.convert(raw), site=self.place.site)
        shape, size = full_shape(activation, module), self.directions.shape[1]
        axis = self.layout.feature_axis(shape, size=size, site=self.place.site)
        packed = isinstance(get(value, keys[:-1]), PackedSequence) if keys else False
        row_axis = None if packed else self.layout.row_axis if activation.ndim > 2 else 0
        lay = Lay(self.place.site, shape, axis, row_axis)
        edited = (self._add if self.is_sum else self._intervene)(
            module, activation, lay, self._now(lay, activation.device)
        )
        if not _is_compiling():
            cacheable = not keys and edited.__class__ is Tensor and conversion is None and not raw.is_nested
            if self._checkpointing.notice(edited) or not cacheable:
                self._shape = None
        edited = unpadded(edited, raw)
        return put(value, keys, edited if conversion is None else conversion.revert(edited))

    def _may_have_pads(self) -> bool:
        return self.passes.sees_inputs and self.passes.now is not None

    @property
    def _plain(self) -> list[int]:
        """The directions that have one strength for all tokens of a row, whatever the activation."""
        return [i for i, gate in enumerate(self.gates) if gate is None and not self._asks[i]]

    def _now(self, lay: Lay, device: torch.device) -> Now | None:
        """What is known of the pass that runs, if it matters."""
        now = self.passes.now
        if not any(self._asks):
            return now
        if not _is_compiling() and _may_be_checkpointed() and self._checkpointing.runs_inside:
            raise UnsupportedModelError(
                f"site {self.place.site!r}: under gradient checkpointing a part of the model runs again later, when "
                "nobody knows the positions any more; steer all positions, or train without checkpointing"
            )
        if now is not None and now.tokens is not None:
            return now
        return self.passes.of_shape(*lay.rows_and_length, device)

    def _add(self, module: nn.Module, activation: Tensor, lay: Lay, now: Now | None) -> Tensor:
        plain = self._plain
        others = [index for index in range(len(self.gates)) if index not in plain]
        delta = self.constant
        if delta is not None and self._trained:  # a graph of its own for every forward pass
            delta = _sum(self.directions[plain], [self._strengths[index] for index in plain])
        shift = None if delta is None else lay.vectors(delta, copies=_copies(now))
        if others:
            c = [self._strength(index, lay, now).movedim(lay.axis, -1)[..., 0] for index in others]
            varied = _sum(self._rows(tuple(others), self.directions.dtype, c[0].device), c).movedim(-1, lay.axis)
            shift = varied if shift is None else shift.to(varied.device) + varied
        assert shift is not None
        shift = shift.to(dtype=activation.dtype, device=activation.device)
        real = self._real(lay, now, device=shift.device)
        if real is not None:
            shift = torch.where(real, shift, -0.0)
        shift = share(shift, activation, module)
        if (
            not (_is_compiling() or others or real is not None or self._trained)
            and delta is not None
            and delta.ndim == 1
        ):
            self._shift, self._shape, self._dtype = shift, activation.shape, activation.dtype
        return activation + shift

    def _intervene(self, module: nn.Module, activation: Tensor, lay: Lay, now: Now | None) -> Tensor:
        whole = whole_rows(activation, module)
        last = whole.movedim(lay.axis, -1).to(
            torch.promote_types(whole.dtype, torch.float32)
        )  # rounded once, at the end
        real = self._real(lay, now, device=last.device)
        with _without_autocast(last.device.type):
            for index, intervention in enumerate(self.interventions):
                c = self._strength(index, lay, now)
                c = c if real is None else torch.where(real, c.to(last.device), 0.0)
                if c.ndim:  # a number for all stays on the CPU, where nobody waits for it
                    c = c.to(last).movedim(lay.axis, -1)
                last = intervention(last, self._rows(index, last.dtype, last.device), c)
        return own_part(last.movedim(-1, lay.axis).to(activation.dtype), activation, module)

    def _rows(self, which: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """One direction (d,), or several (k, d), in this dtype and on this device; the same tensor every time."""
        rows = which if isinstance(which, int) else list(which)
        if _is_compiling() or self._trained:  # whose directions change in place
            return self.directions[rows].to(device, dtype)
        kept = self._like.get(which)
        if kept is None or kept.dtype is not dtype or kept.device != device:
            with torch.inference_mode(mode=False):
                kept = self._like[which] = self.directions[rows].to(device, dtype)
        return kept

    def _traceable(self) -> Tensor | None:
        """What may be added to a plain output in compiled code without a look at anything else; it costs few guards."""
        axis = self.layout.axis
        simple = self.is_constant and self.place.side == "out" and not self.place.path and not self._trained
        if not simple or self.constant is None or axis is None or axis >= 0:
            return None
        if getattr(self.place.module, "hook_conversion", None) is not None:
            return None
        return self.constant.view(-1, *[1] * (-axis - 1))

    def _strength(self, index: int, lay: Lay, now: Now | None) -> Tensor:
        """How much of one direction: 0-dim or, of the activation's rank, per row or per token."""
        c = self._strengths[index]
        parts = [lay.rows(c, copies=_copies(now)) if c.ndim else c]
        if (gate := self.gates[index]) is not None:
            weights = gate.weights_for(self.place.site)
            if c.ndim and len(c) not in (len(weights), len(weights) // _copies(now)):
                raise StrengthError(
                    f"site {self.place.site!r}: {len(c)} rows of strength, and a gate that decides for "
                    f"{len(weights)}; give one strength per row"
                )
            by_token = weights.ndim == 2
            parts.append(
                lay.needed_tokens(weights, rows=len(weights)) if by_token else lay.rows(weights, copies=_copies(now))
            )
        if now is not None and now.tokens is not None and self._asks[index]:
            dose = now.doses[self._concepts[index]]
            if dose is not None:
                parts.append(lay.needed_tokens(dose, rows=now.tokens.rows))
        total = parts[-1]
        for part in parts[:-1]:
            total = total * (part.to(total.device) if part.ndim else part)  # a number for all may stay on the CPU
        return total

    def _real(self, lay: Lay, now: Now | None, *, device: torch.device) -> Tensor | None:
        """Where there are tokens and not pads, if the activation has positions; pads are not steered."""
        if now is None or now.real is None or now.tokens is None:
            return None
        if not _is_compiling() and _may_be_checkpointed():  # what runs again later does not know of pads
            return None
        real = lay.tokens(now.real, rows=now.tokens.rows)
        return None if real is None else real.to(device)


def _copies(now: Now | None) -> int:
    return 1 if now is None or now.tokens is None else now.tokens.copies


def _may_be_checkpointed() -> bool:
    """Whether autograd may run this again later."""
    return saves_otherwise(True) is not None or not is_outside_of_functions()


def _sum(directions: Float[Tensor, "k d"], strengths: Sequence[Tensor]) -> Float[Tensor, "*rows d"]:
    """Σ c_k v_k, (d,) or (B, d); minus zero where every c is 0, because h + (-0.0) is h bit for bit."""
    # in float32 at least, so that c · v is rounded once, to the output's dtype
    directions = directions.to(torch.promote_types(directions.dtype, torch.float32))
    if len(strengths) == 1:
        c = strengths[0].to(directions)
        return torch.where((c == 0)[..., None], -0.0, c[..., None] * directions[0])
    c = torch.stack(torch.broadcast_tensors(*(strength.to(directions) for strength in strengths)))
    with _without_autocast(directions.device.type):
        total = einsum(c, directions, "k ..., k d -> ... d")
    return torch.where((c == 0).all(dim=0)[..., None], -0.0, total)


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    # compiled code asks less: before torch 2.13 it knows no is_autocast_available
    known = kind != "meta" if _is_compiling() else torch.amp.is_autocast_available(kind)
    casts = known and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if casts else nullcontext()
