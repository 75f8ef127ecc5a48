"""Intervention: how a direction edits an activation, as a pure function of plain tensors."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from actsteer.private_names import is_functorch_wrapped
from actsteer.vectors.vector import SteeringVector


@runtime_checkable
class Intervention(Protocol):
    """An edit of activations `(*batch, d)` by one direction `(d,)`; `c = 0` leaves them bit for bit alone.

    It edits every row by itself: no row may change what happens to another.
    """

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """The edited activation; `c` is 0-dim, or has one value per row and broadcasts against the activation."""
        ...


@runtime_checkable
class PerSite(Protocol):
    """An intervention that is another one at each of its sites."""

    def at(self, site: str) -> Intervention:
        """The intervention of one site.

        Raises:
            SiteNotFoundError: it has none there.
        """
        ...


@runtime_checkable
class Edit(PerSite, Protocol):
    """An intervention that knows its own sites, and takes the place of vectors in `Steerer(model, edit)`."""

    @property
    def constant(self) -> SteeringVector:
        """What it adds to an activation of zero: a vector of its sites and concept."""
        ...


def moved(
    activation: Float[Tensor, "*batch d"], change: Float[Tensor, "*#batch d"], c: Float[Tensor, ...], *, keep_norm: bool
) -> Float[Tensor, "*batch d"]:
    """h + c · change, of the norm of h if that is to be kept; where c is 0, h itself."""
    return settled(activation, activation + c * change, c, keep_norm=keep_norm)


def settled(
    activation: Float[Tensor, "*batch d"], edited: Float[Tensor, "*batch d"], c: Float[Tensor, ...], *, keep_norm: bool
) -> Float[Tensor, "*batch d"]:
    """The edited activation, of the norm of h if that is to be kept; where c is 0, h itself."""
    if keep_norm:
        norm = edited.norm(dim=-1, keepdim=True)
        edited = edited * torch.where(norm > 0, activation.norm(dim=-1, keepdim=True) / norm, 1)
    if c.ndim == 0 and c.device.type == "cpu" and not torch.compiler.is_compiling() and not is_functorch_wrapped(c):
        return edited if c else activation  # no other device waits for it
    return torch.where(c == 0, activation, edited)


def unit(direction: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """v / ‖v‖; zero for zero, along which nothing is moved. Of a direction that stays as it is, computed once."""
    if torch.compiler.is_compiling() or direction.requires_grad or direction.is_inference():
        return _unit(direction)
    version: int
    known: Tensor
    version, known = _units.get(direction, (-1, direction))
    if version != direction._version:
        with torch.inference_mode(mode=False):  # so that it works in autograd later
            known = _unit(direction)
        _units[direction] = (direction._version, known)
    return known


_units: WeakIdKeyDictionary = WeakIdKeyDictionary()  # direction -> its version, and the unit direction


def _unit(direction: Tensor) -> Tensor:
    norm = direction.norm()
    scaled: Tensor = direction / torch.where(norm > 0, norm, 1)
    return scaled
