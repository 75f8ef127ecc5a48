"""Intervention: how a direction edits an activation, as a pure function of plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from actsteer.vectors.vector import SteeringVector


@runtime_checkable
class Intervention(Protocol):
    """How one direction `(d,)` edits activations `(*batch, d)`: any pure function of plain tensors.

    It edits every row by itself: no row may change what happens to another. The Steerer does the rest: it puts the
    features last, computes in float32 at least and outside of autocast, rounds once to the activation's dtype, leaves
    pads alone, and keeps every row where c is 0 as it is, bit for bit.

    >>> import torch
    >>> from torch import nn
    >>> from actsteer import Steerer, SteeringVector
    >>> def scale_along(activation, direction, c):
    ...     return activation * (1 + c * direction)
    >>> model, v = nn.Sequential(nn.Identity()), SteeringVector({"0": torch.tensor([1.0, 0.0])})
    >>> with Steerer(model, v, c=2, intervention=scale_along):
    ...     model(torch.tensor([[5.0, 7.0]]))
    tensor([[15.,  7.]])
    """

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """The edited activation; `c` is 0-dim, or has one value per row and broadcasts against the activation."""
        ...


@runtime_checkable
class PerSite(Protocol):
    """An intervention that is another one at each site; it goes wherever an `Intervention` does."""

    def at(self, site: str) -> Intervention:
        """The intervention of one site.

        Raises:
            SiteNotFoundError: it has none there.
        """
        ...


@runtime_checkable
class Edit(PerSite, Protocol):
    """An intervention that has its sites, and takes the place of vectors in `Steerer(model, edit)`.

    An estimator may return one in the place of a SteeringVector, and `fit` names it by `described`.

    >>> import torch
    >>> from torch import nn
    >>> from actsteer import Steerer
    >>> class Doubled:
    ...     def __init__(self, sizes, metadata=()):
    ...         self.sizes, self.metadata = sizes, dict(metadata)
    ...
    ...     def at(self, site):
    ...         return lambda activation, direction, c: activation * (1 + c)
    ...
    ...     @property
    ...     def constant(self):
    ...         return SteeringVector({site: torch.zeros(d) for site, d in self.sizes.items()}, metadata=self.metadata)
    ...
    ...     def described(self, metadata):
    ...         return Doubled(self.sizes, metadata)
    >>> model = nn.Sequential(nn.Identity())
    >>> with Steerer(model, Doubled({"0": 2}).described({"concept": "large"}), c={"large": 1.0}):
    ...     model(torch.tensor([[1.0, 2.0]]))
    tensor([[2., 4.]])
    """

    @property
    def constant(self) -> SteeringVector:
        """What it makes of an activation of zero at c = 1: a vector with the edit's sites, sizes and metadata."""
        ...

    def described(self, metadata: Mapping[str, str]) -> Edit:
        """The same edit with this metadata, the concept among it, in the place of what it has."""
        ...


def at_site(intervention: Intervention | PerSite, site: str) -> Intervention:
    """The intervention at one site: another at each if it is `PerSite`, else the same at all."""
    return intervention.at(site) if isinstance(intervention, PerSite) else intervention


def check_intervention(intervention: Any, *, by: str) -> None:
    """TypeError unless it is an intervention, the same at all sites or another at each."""
    if isinstance(intervention, type):
        raise TypeError(f"{by}: expected an object, got the class {intervention.__name__}; call it first")
    if not isinstance(intervention, Intervention | PerSite):
        raise TypeError(
            f"{by}: expected one such as Add(), called with (activation, direction, c); got {intervention!r}"
        )


def unit(direction: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """v / ‖v‖, and zero for a zero direction; kept until the direction changes."""
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
