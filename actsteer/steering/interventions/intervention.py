"""Intervention: how a direction edits an activation, as a pure function of plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

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
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...], /
    ) -> Float[Tensor, "*batch d"]:
        """The edited activation; `c` is 0-dim, or has one value per row and broadcasts against the activation."""
        ...


@runtime_checkable
class Prepared(Intervention, Protocol):
    """An intervention that does once, for one direction and one strength, whatever does not depend on the activation.

    It is optional: it makes an edit faster, and no other. For all v, c and h, `prepare(v, c)(h)` is what
    `__call__(h, v, c)` gives, up to rounding. The Steerer prepares when a site first meets a dtype and a device, and
    calls the function that it gets until the strengths change; in compiled code, where the direction is trained, and
    where c differs between rows it uses `__call__`.

    >>> import torch
    >>> from torch import nn
    >>> from actsteer import Steerer, SteeringVector
    >>> class ScaleAlong:
    ...     def __call__(self, activation, direction, c):
    ...         return activation * (1 + c * direction)
    ...
    ...     def prepare(self, direction, c):
    ...         factor = 1 + c * direction
    ...         return lambda activation: activation * factor
    >>> model, v = nn.Sequential(nn.Identity()), SteeringVector({"0": torch.tensor([1.0, 0.0])})
    >>> with Steerer(model, v, c=2, intervention=ScaleAlong()):
    ...     model(torch.tensor([[5.0, 7.0]]))
    tensor([[15.,  7.]])
    """

    def prepare(
        self, direction: Float[Tensor, " d"], c: Float[Tensor, ""], /
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
        """The edit as a function of the activation alone.

        Args:
            direction: of the activation's dtype and device; it asks for no gradients and does not change.
            c: one number, not 0, on the CPU.

        Raises:
            ZeroDirectionError: the direction is zero, and the intervention needs one.
        """
        ...


@runtime_checkable
class Placed(Intervention, Protocol):
    """An intervention that has values for single tokens, or rows, and does not know where these are in an activation.

    It is optional. The Steerer, which knows, asks for the intervention of the pass that runs before it calls it; inside
    `Chain` and `KeepNorm` it is called as it is.

    >>> import torch
    >>> from torch import nn
    >>> from actsteer import Steerer, SteeringVector
    >>> class AddTo:
    ...     def __init__(self, values):
    ...         self.values = values
    ...
    ...     def __call__(self, activation, direction, c):
    ...         return activation + c * self.values
    ...
    ...     def placed(self, place):
    ...         return AddTo(place(self.values))
    >>> model, v = nn.Sequential(nn.Identity()), SteeringVector({"0": torch.zeros(1)})
    >>> with Steerer(model, v, intervention=AddTo(torch.tensor([[7.0]])), positions=[1]):
    ...     model(torch.zeros(1, 3, 1)).flatten()
    tensor([0., 7., 0.])
    """

    def placed(self, place: Callable[[Float[Tensor, "*shape d"]], Float[Tensor, "*batch d"]], /) -> Intervention:
        """The intervention of one pass.

        Args:
            place: gives values the shape of the activation. They are (n, d), in the order in which `record` gives the
                activations of the tokens that are steered, or of the activation's shape in the pass with the prompt.
        """
        ...


@runtime_checkable
class PerSite(Protocol):
    """An intervention that is another one at each site; it goes wherever an `Intervention` does."""

    def at(self, site: str, /) -> Intervention:
        """The intervention of one site.

        Raises:
            SiteNotFoundError: it has none there.
        """
        ...


@runtime_checkable
class Edit(PerSite, Protocol):
    """An intervention that has its sites, and takes the place of vectors in `Steerer(model, edit)`.

    An estimator may return one in the place of a SteeringVector, and `fit` names it by `described`. With `one | other`,
    which has the sites of both, it may be fitted `one_by_one` too.

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

    def described(self, metadata: Mapping[str, str], /) -> Edit:
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


def prepared(
    intervention: Intervention, direction: Float[Tensor, " d"], c: Float[Tensor, ""]
) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
    """The intervention as a function of the activation alone, prepared if it can be."""
    if isinstance(intervention, Prepared):
        return intervention.prepare(direction, c)
    return lambda activation: intervention(activation, direction, c)
