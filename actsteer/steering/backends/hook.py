"""The hook backend: a forward hook that edits a module's output. It composes with everything in eager mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.errors import GateError, StrengthError
from actsteer.sites.outputs import positive_axis, read_activation, write_activation
from actsteer.steering.gates import Gate
from actsteer.steering.interventions import Add, Intervention


@final
class GateReader:
    """A forward hook at a gate's own site that keeps its decision for the rest of the forward pass."""

    def __init__(self, gate: Gate, *, axis: int | None, row_axis: int) -> None:
        self.gate = gate
        self.weights: Tensor | None = None
        self._axis = axis
        self._row_axis = row_axis

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Decide for every row, from the mean over its positions."""
        activation = read_activation(output, site=self.gate.site)
        axis = positive_axis(activation, axis=self._axis, size=None, site=self.gate.site)
        row_axis = self._row_axis if activation.ndim > 2 else 0
        if row_axis == axis:
            raise GateError(
                f"gate at site {self.gate.site!r}: the activation has shape {tuple(activation.shape)} and no axis of "
                "rows; give the model a batch"
            )
        rows = activation.movedim((row_axis, axis), (0, -1))
        weights = self.gate(reduce(rows, "rows ... d -> rows d", "mean"))
        if weights.shape != rows.shape[:1]:
            raise GateError(
                f"gate at site {self.gate.site!r}: expected one weight for each of {len(rows)} rows, got shape "
                f"{tuple(weights.shape)}; return a tensor of shape (rows,)"
            )
        self.weights = weights

    def weights_for(self, site: str) -> Tensor:
        """The decision per row; GateError if the gate's site has not run yet in this forward pass."""
        if self.weights is None:
            raise GateError(
                f"site {site!r} runs before site {self.gate.site!r}, where its gate reads; fit the gate at the steered "
                "site or at an earlier one"
            )
        return self.weights


@final
class SiteEdit:
    """The forward hook of one site, `edit.hook`: `directions` (k, d), each with its strength and perhaps a gate.

    For `Add`, all that is constant is summed once, when the strengths change, into one tensor in the output's dtype
    and device; a forward pass then costs one add, whatever the number of concepts.
    """

    __slots__ = (
        "_axis",
        "_constant",
        "_dtype",
        "_gated_directions",
        "_gates",
        "_intervention",
        "_row_axis",
        "_shape",
        "_shift",
        "_strengths",
        "directions",
        "fired",
        "site",
    )

    def __init__(
        self,
        site: str,
        directions: Float[Tensor, "k d"],
        *,
        intervention: Intervention,
        gates: Sequence[GateReader | None],
        axis: int | None,
        row_axis: int,
    ) -> None:
        self.site = site
        self.directions = directions
        self.fired = False
        self._intervention = intervention
        self._gates = gates
        self._axis = axis
        self._row_axis = row_axis
        self._strengths: Sequence[Tensor] = ()
        self._constant: Tensor | None = None  # (d,), or (B, d): everything that no gate decides
        self._gated_directions = directions
        self._shift = directions  # `_constant` as it is added to outputs of this shape and dtype
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None

    def set_strengths(self, strengths: Sequence[Tensor]) -> None:
        """New strengths, one of shape () or (B,) per direction, from the next forward pass on."""
        self._strengths = strengths
        self._shape = None
        if isinstance(self._intervention, Add):
            ungated = [index for index, gate in enumerate(self._gates) if gate is None]
            self._constant = _sum(self.directions[ungated], [strengths[i] for i in ungated]) if ungated else None
            gated = [index for index, gate in enumerate(self._gates) if gate is not None]
            self._gated_directions = self.directions[gated]

    def expect(self) -> None:
        """Forget that it ever fired."""
        self.fired = False
        self._shape = None  # so that the next call goes the whole way round, where `fired` is set

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The edited output: one add where the last call's shift still fits, else the whole way round."""
        try:
            if output.__class__ is Tensor and output.shape == self._shape and output.dtype is self._dtype:
                return output + self._shift
        except RuntimeError:  # the model has moved to another device, or the output is nested and has no shape
            self._shape = None
        self.fired = True
        activation = read_activation(output, site=self.site)
        axis = positive_axis(activation, axis=self._axis, size=self.directions.shape[1], site=self.site)
        edit = self._add if isinstance(self._intervention, Add) else self._intervene
        return write_activation(output, edit(activation, axis))

    def _add(self, activation: Tensor, axis: int) -> Tensor:
        decided = [
            self._decided(strength, gate)
            for strength, gate in zip(self._strengths, self._gates, strict=True)
            if gate is not None
        ]
        delta = self._constant
        if decided:
            gated = _sum(self._gated_directions.to(decided[0].device), decided)
            delta = gated if delta is None else delta.to(gated.device) + gated
        assert delta is not None
        shift = self._spread(delta, activation, axis).to(dtype=activation.dtype, device=activation.device)
        if not decided and delta.ndim == 1 and not delta.requires_grad:
            self._shift, self._shape, self._dtype = shift, activation.shape, activation.dtype
        return activation + shift

    def _intervene(self, activation: Tensor, axis: int) -> Tensor:
        last = activation.movedim(axis, -1)
        for direction, strength, gate in zip(self.directions, self._strengths, self._gates, strict=True):
            c = (strength if gate is None else self._decided(strength, gate)).to(activation)
            c = self._spread(c[..., None], activation, axis).movedim(axis, -1) if c.ndim else c
            last = self._intervention(last, direction.to(activation), c)
        return last.movedim(-1, axis)

    def _decided(self, strength: Tensor, gate: GateReader) -> Tensor:
        weights = gate.weights_for(self.site)
        if strength.ndim and len(strength) != len(weights):
            raise StrengthError(
                f"site {self.site!r}: {len(strength)} rows of strength, and a gate that decides for {len(weights)}; "
                "give one strength per row"
            )
        return weights * strength.to(weights.device)

    def _spread(self, delta: Tensor, activation: Tensor, axis: int) -> Tensor:
        """(d,) or (B, d) -> the rank of the activation, with the features and rows on their own axes."""
        shape = [1] * activation.ndim
        shape[axis] = delta.shape[-1]
        if delta.ndim == 2:
            row_axis = self._row_axis if activation.ndim > 2 else 0
            if activation.ndim < 2 or row_axis == axis or len(delta) != activation.shape[row_axis]:
                raise StrengthError(
                    f"site {self.site!r}: {len(delta)} rows of strength or gate against an activation of shape "
                    f"{tuple(activation.shape)} whose rows are on axis {row_axis}; give one strength per row"
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
    total = einsum(c, directions, "k ..., k d -> ... d")
    return torch.where((c == 0).all(dim=0)[..., None], -0.0, total)
