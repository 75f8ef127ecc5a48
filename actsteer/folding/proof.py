"""Proof: that a folded model gives what the hooked one gives, but for rounding, which is measured and not assumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, call, iterate
from actsteer.collecting.eval_mode import eval_mode
from actsteer.errors import NotFoldable
from actsteer.folding.unpadded import at_tokens, named, unpadded
from actsteer.sites.containers import tensors_in
from actsteer.steering.steerer import Steerer
from actsteer.vectors.vector import SteeringVector

_SLACK = 16.0  # roundings of the folded weights add up, where one at each site was measured


class Proof:
    """What a steered model gives on a batch, and how far rounding at its sites moves that.

    Args:
        verify_on: as for `fold`; of texts with pads the rows are taken one by one.

    Raises:
        NotFoldable: the model gives other outputs each time, or the steering changes nothing that could be checked.
    """

    def __init__(self, steerer: Steerer, verify_on: Batches) -> None:
        model = steerer.model
        self.batches: list[Any] = []
        self._padded: list[Mapping[str, Any]] = []
        for given in _whole(verify_on):
            batch = named(model, given)
            rows = unpadded(batch)
            self.batches += rows
            self._padded += [batch] * (not rows or rows[0] is not batch)
        if not self.batches:
            raise NotFoldable("verify_on has no inputs, or none with a token; nothing can be proved")
        plain = self._outputs(model)
        with steerer:
            self._expected, again = self._outputs(model), self._outputs(model)
            zeros = {site: torch.zeros(edit.size) for site, edit in steerer.edits.items()}
            with Steerer(model, SteeringVector(zeros), axis=steerer.axes, intervention=Rounding()):
                rounded = self._outputs(model)
        least = [8 * _eps(one) * _size(one) for one in self._expected]
        if any(distance(a, b) > 8 * own for a, b, own in zip(self._expected, again, least, strict=True)):
            raise NotFoldable("the model gives other outputs each time, on the same verify_on; nothing can be proved")
        self._tolerance = [
            _SLACK * distance(one, other) + own for one, other, own in zip(self._expected, rounded, least, strict=True)
        ]
        if any(is_lost(one, other) for one, other in zip(self._expected, plain, strict=True)):
            raise NotFoldable("the steering makes numbers of the outputs infinite or nan; c is too large")
        effects = [distance(a, b) for a, b in zip(self._expected, plain, strict=True)]
        if all(effect <= tolerance for effect, tolerance in zip(effects, self._tolerance, strict=True)):
            raise NotFoldable(
                f"on verify_on the steering moves the outputs by {max(effects):.3g}, no more than rounding can "
                f"({max(self._tolerance):.3g}), and nothing is proved; give other inputs, or fold in float32"
            )

    def failure(self, model: nn.Module) -> str | None:
        """How far a model's outputs, folded and perhaps hooked, are from those that are expected; None if equal."""
        given = self._outputs(model)
        for index, (one, other, tolerance) in enumerate(zip(self._expected, given, self._tolerance, strict=True)):
            if not (apart := distance(one, other)) <= tolerance:
                pads = " on the rows with their pads (give them without)" * (index >= self._alone)
                return f"the outputs differ by {apart:.3g}{pads}, where rounding makes {tolerance:.3g}"
        return None

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        """Of every row without its pads; and of all rows with them, where there are tokens."""
        found = [tensor for batch in self.batches for tensor in outputs(model, batch)]
        self._alone = len(found)
        return found + [one for padded in self._padded for one in at_tokens(outputs(model, padded), padded)]


def _whole(verify_on: Batches) -> Iterable[Any]:
    """The calls that are meant; a tensor is one."""
    return [verify_on] if isinstance(verify_on, Tensor) else iterate(verify_on, batch_size=1, progress=False, label="")


class Rounding:
    """An intervention that does what rounding may do: scales every number by 1 ± eps."""

    def __call__(self, activation: Tensor, direction: Tensor, c: Tensor) -> Tensor:
        """The activation, rounded otherwise."""
        generator = torch.Generator(activation.device).manual_seed(0)
        signs = torch.randint(0, 2, activation.shape, generator=generator, device=activation.device) * 2 - 1
        return activation * (1 + torch.finfo(activation.dtype).eps * signs.to(activation.dtype))


@torch.no_grad()
def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The tensors of a model's output on a batch, in evaluation mode."""
    with eval_mode(model):
        found = [tensor for tensor in tensors_in(call(model, batch)) if tensor.numel()]
    if not any(tensor.is_floating_point() for tensor in found):
        raise NotFoldable(f"{type(model).__name__} gives no floating tensors, by which a fold could be proved")
    return [(torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().clone() for tensor in found]


def is_lost(steered: Tensor, plain: Tensor) -> bool:
    """Whether numbers have become nan, or more of them infinite; a mask may make as many others infinite."""
    nans, infinite = ([int(kind(one).sum()) for one in (steered, plain)] for kind in (torch.isnan, torch.isinf))
    return steered.shape == plain.shape and (nans[0] > nans[1] or infinite[0] > infinite[1])


def _eps(one: Tensor) -> float:
    """How far rounding moves a number, relative to it; whole numbers are what they are, or other ones."""
    return torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0


def _size(one: Tensor) -> float:
    """The largest number, infinities aside."""
    return float(one.double().abs().masked_fill(~torch.isfinite(one), 0.0).max())


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where one has a number and the other an infinity, or they have other shapes."""
    if one.shape != other.shape:
        return float("inf")
    both = torch.isfinite(one) & torch.isfinite(other)
    if not bool((both | (one == other) | (one.isnan() & other.isnan())).all()):  # an infinity, as of a mask, stays one
        return float("inf")
    return float((one.double() - other.double()).abs().masked_fill(~both, 0.0).max())
