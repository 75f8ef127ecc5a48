"""SiteEdit: the edit of one site, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from actsteer.errors import StrengthError
from actsteer.sites.axes import Layout
from actsteer.sites.outputs import Arguments, get, locate, padded, put, unpadded
from actsteer.sites.place import Place
from actsteer.sites.shards import full_shape, own_part, share, whole_rows
from actsteer.steering.checkpointing import Checkpointing, saves_otherwise
from actsteer.steering.copies import Uncopied
from actsteer.steering.interventions.add import Add
from actsteer.steering.interventions.intervention import Intervention
from actsteer.steering.reader import GateReader

_is_compiling = torch.compiler.is_compiling
_outside_of_functions: Callable[[], bool] = torch._C._is_fwd_grad_enabled  # not in one that may be a checkpoint's


@final
class SiteEdit(Uncopied):
    """The edit of one site: `directions` (k, d), each with its strength and perhaps a gate.

    For `Add`, all that is constant is summed once, when the strengths change, into one tensor in the output's dtype
    and device; a forward pass then costs one add, whatever the number of concepts. In compiled code nothing is kept
    but `fired`, and the strengths are inputs of the graph, so that a change of them compiles nothing.
    """

    __slots__ = (
        "_checkpointing",
        "_dtype",
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
        "place",
    )

    def __init__(
        self,
        place: Place,
        layout: Layout,
        directions: Float[Tensor, "k d"],
        *,
        interventions: Sequence[Intervention],
        gates: Sequence[GateReader | None],
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
        self._checkpointing = checkpointing
        self._strengths: list[Tensor] = []
        self._shift = directions  # `constant` as it is added to outputs of this shape, dtype and state
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None
        self._traced_shift: Tensor | None = None  # `constant` as compiled code adds it to whatever has that axis
        self._trained = False

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
        return self.is_sum and not any(self.gates) and all(s.ndim == 0 for s in self._strengths)

    def check_strengths(self, strengths: Sequence[Tensor]) -> None:
        """StrengthError if the way in which this edit is attached leaves no room for these."""
        if self.changed is not None and any(strength.ndim for strength in strengths):
            raise StrengthError(f"site {self.place.site!r}: a bias has one strength for all rows; use another backend")
        if self.in_place and [s.shape for s in strengths] != [s.shape for s in self._strengths]:
            raise StrengthError(
                f"site {self.place.site!r}: the buffer backend keeps the shape of its strengths, one number or the "
                "same number of rows; install it with a strength of the shape that is to come"
            )

    @torch.inference_mode(mode=False)  # what is kept must work in autograd later
    def set_strengths(self, strengths: Sequence[Tensor]) -> None:
        """New strengths, one of shape () or (B,) per direction, from the next forward pass on."""
        ungated = [index for index, gate in enumerate(self.gates) if gate is None]
        constant = None
        if self.is_sum and ungated:
            constant = _sum(self.directions[ungated], [strengths[index] for index in ungated])
        if self.in_place:
            for tensor, value in zip([self.constant, *self._strengths], [constant, *strengths], strict=True):
                if tensor is not None and value is not None:
                    tensor.detach().copy_(value)
        else:
            self.constant, self._strengths = constant, [strength.clone() for strength in strengths]
        self._shape = None
        self._traced_shift = self._traceable()
        if self.changed is not None:
            self.changed()

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
                    or (_outside_of_functions() and (not output.requires_grad or saves_otherwise(True) is None))
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
        if self._traced_shift is not None and _is_compiling() and value.__class__ is Tensor:
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
        edited = (self._add if self.is_sum else self._intervene)(
            module, activation, axis, row_axis=None if packed else self.layout.row_axis if activation.ndim > 2 else 0
        )
        if not _is_compiling():
            cacheable = not keys and edited.__class__ is Tensor and conversion is None and not raw.is_nested
            if self._checkpointing.notice(edited) or not cacheable:
                self._shape = None
        edited = unpadded(edited, raw)
        return put(value, keys, edited if conversion is None else conversion.revert(edited))

    def _add(self, module: nn.Module, activation: Tensor, axis: int, *, row_axis: int | None) -> Tensor:
        gated = [index for index, gate in enumerate(self.gates) if gate is not None]
        delta = self.constant
        if delta is not None and self._trained:  # a graph of its own for every forward pass
            rest = [index for index, gate in enumerate(self.gates) if gate is None]
            delta = _sum(self.directions[rest], [self._strengths[index] for index in rest])
        if gated:
            decided = [self._decided(index) for index in gated]
            weighted = _sum(self.directions[gated].to(decided[0].device), decided)
            delta = weighted if delta is None else delta.to(weighted.device) + weighted
        assert delta is not None
        shift = self._spread(delta, activation, axis, row_axis).to(dtype=activation.dtype, device=activation.device)
        shift = share(shift, activation, module)
        if not _is_compiling() and not gated and delta.ndim == 1 and not self._trained:
            self._shift, self._shape, self._dtype = shift, activation.shape, activation.dtype
        return activation + shift

    def _intervene(self, module: nn.Module, activation: Tensor, axis: int, *, row_axis: int | None) -> Tensor:
        whole = whole_rows(activation, module)
        last = whole.movedim(axis, -1).to(torch.promote_types(whole.dtype, torch.float32))  # rounded once, at the end
        with _without_autocast(last.device.type):
            for index, intervention in enumerate(self.interventions):
                c = (self._strengths[index] if self.gates[index] is None else self._decided(index)).to(last)
                c = self._spread(c[..., None], whole, axis, row_axis).movedim(axis, -1) if c.ndim else c
                last = intervention(last, self.directions[index].to(last), c)
        return own_part(last.movedim(-1, axis).to(activation.dtype), activation, module)

    def _traceable(self) -> Tensor | None:
        """What may be added to a plain output in compiled code without a look at anything else; it costs few guards."""
        axis = self.layout.axis
        simple = self.is_constant and self.place.side == "out" and not self.place.path and not self._trained
        if not simple or self.constant is None or axis is None or axis >= 0:
            return None
        if getattr(self.place.module, "hook_conversion", None) is not None:
            return None
        return self.constant.view(-1, *[1] * (-axis - 1))

    def _decided(self, index: int) -> Tensor:
        """The strength of one gated direction for every row."""
        gate, strength = self.gates[index], self._strengths[index]
        assert gate is not None
        weights = gate.weights_for(self.place.site)
        if strength.ndim and len(strength) != len(weights):
            raise StrengthError(
                f"site {self.place.site!r}: {len(strength)} rows of strength, and a gate that decides for "
                f"{len(weights)}; give one strength per row"
            )
        return weights * strength.to(weights.device)

    def _spread(self, delta: Tensor, activation: Tensor, axis: int, row_axis: int | None) -> Tensor:
        """(d,) or (B, d) -> the rank of the activation, with the features and rows on their own axes."""
        shape = [1] * activation.ndim
        shape[axis] = delta.shape[-1]
        if delta.ndim == 2:
            if row_axis in (None, axis) or activation.ndim < 2 or len(delta) != activation.shape[row_axis]:
                where = "are packed" if row_axis is None else f"are on axis {row_axis}"
                raise StrengthError(
                    f"site {self.place.site!r}: {len(delta)} rows of strength or gate against an activation of shape "
                    f"{tuple(activation.shape)} whose rows {where}; give one strength per row"
                )
            shape[row_axis] = len(delta)
            if row_axis > axis:
                delta = rearrange(delta, "rows d -> d rows")
        return delta.reshape(shape)


def _sum(directions: Float[Tensor, "k d"], strengths: Sequence[Tensor]) -> Float[Tensor, "*rows d"]:
    """Σ c_k v_k, (d,) or (B, d); minus zero where every c is 0, because h + (-0.0) is h bit for bit."""
    # in float32 at least, so that c · v is rounded once, to the output's dtype
    directions = directions.to(torch.promote_types(directions.dtype, torch.float32))
    c = torch.stack(torch.broadcast_tensors(*(strength.to(directions) for strength in strengths)))
    with _without_autocast(directions.device.type):
        total = einsum(c, directions, "k ..., k d -> ... d")
    return torch.where((c == 0).all(dim=0)[..., None], -0.0, total)


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if casts else nullcontext()
