"""Affine: an affine map of the activation, another one at every site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from actsteer.errors import ShapeError, SiteNotFoundError, close_names
from actsteer.sites.device import brought
from actsteer.steering.alone import load_edit, save_edit
from actsteer.vectors.described import named
from actsteer.vectors.vector import SteeringVector


@final
@dataclass(frozen=True)
class AffineAt:
    """The edit of one site, h + c · (W h + b - h)."""

    weight: Float[Tensor, "d d"]
    bias: Float[Tensor, " d"]

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """The activation on its way to W h + b, which it is at c = 1."""
        goal = linear(
            activation, *(brought(part, activation.device, activation.dtype) for part in (self.weight, self.bias))
        )
        return torch.lerp(activation, goal, brought(c, activation.device, activation.dtype))

    def prepare(
        self, direction: Float[Tensor, " d"], c: Float[Tensor, ""]
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
        """W and b in the dtype and on the device of the direction, and c as a number."""
        weight, bias = (brought(part, direction.device, direction.dtype) for part in (self.weight, self.bias))
        share = float(c)
        if share == 1:
            return lambda activation: linear(activation, weight, bias)
        return lambda activation: torch.lerp(activation, linear(activation, weight, bias), share)


@final
class Affine:
    """An affine map at every site: h + c · (W h + b - h), which at c = 1 is W h + b.

    `Steerer(model, Affine(maps))` takes it in the place of vectors. `GaussianMap` and `PairedMap` fit one;
    `LowRank` is the same with a few numbers where W - 1 is of low rank. A value: it copies what comes in.

    Args:
        maps: site -> (W, b), of shapes (d, d) and (d,).
        concept, metadata: as for a `SteeringVector`.

    Raises:
        ShapeError: shapes that do not fit, or numbers that are not finite.

    >>> from torch import nn
    >>> from actsteer import Steerer
    >>> model, mirror = nn.Sequential(nn.Identity()), Affine({"0": (-torch.eye(2), torch.ones(2))})
    >>> with Steerer(model, mirror):
    ...     model(torch.tensor([[3.0, 0.0]]))
    tensor([[-2.,  1.]])
    """

    def __init__(
        self,
        maps: Mapping[str, tuple[Tensor, Tensor]],
        *,
        concept: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if not maps:
            raise ShapeError("expected one site or more, got none")
        self._parts = {site: AffineAt(*_owned(site, *parts)) for site, parts in maps.items()}
        self._metadata = named(concept, metadata)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites, in the order given."""
        return tuple(self._parts)

    @property
    def constant(self) -> SteeringVector:
        """What an activation of zero becomes: b."""
        return SteeringVector({site: part.bias for site, part in self._parts.items()}, metadata=self._metadata)

    @property
    def metadata(self) -> dict[str, str]:
        """A copy of the metadata."""
        return dict(self._metadata)

    @property
    def concept(self) -> str | None:
        """What the edit stands for, if it was named."""
        return self._metadata.get("concept")

    def described(self, metadata: Mapping[str, str]) -> Affine:
        """The same edit with other metadata."""
        return Affine({site: self[site] for site in self._parts}, metadata=metadata)

    def __or__(self, other: Affine) -> Affine:
        """The edits of both; where both have a site, the right one's stands, as in a dict."""
        if not isinstance(other, Affine):
            return NotImplemented
        described = (self.constant + other.constant).metadata
        return Affine({site: edit[site] for edit in (self, other) for site in edit.sites}, metadata=described)

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        return {"maps": {site: self[site] for site in self._parts}, "metadata": self.metadata}

    save = save_edit

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module | None = None, *, kinds: Iterable[type] = ()) -> Affine:
        """Read what `save` wrote; see `Steering.load`, also for errors."""
        return load_edit(cls, path, model, kinds=kinds)

    def at(self, site: str) -> AffineAt:
        """The edit of one site."""
        if site not in self._parts:
            raise SiteNotFoundError(f"no edit at site {site!r}. {close_names(site, self._parts)}")
        return self._parts[site]

    def __getitem__(self, site: str) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
        """Copies of (W, b) at a site."""
        part = self.at(site)
        return part.weight.clone(), part.bias.clone()

    def __repr__(self) -> str:
        return f"Affine(sites={self.sites}, concept={self.concept!r})"


def _owned(site: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        kinds = f"{type(weight).__name__} and {type(bias).__name__}"
        raise TypeError(f"site {site!r}: expected two tensors, W and b, got {kinds}; give torch.as_tensor of them")
    shapes = tuple(weight.shape), tuple(bias.shape)
    if bias.ndim != 1 or shapes[0] != (len(bias), len(bias)):
        raise ShapeError(f"site {site!r}: expected W (d, d) and b (d,), got shapes {shapes}")
    if not all(part.is_floating_point() and bool(part.isfinite().all()) for part in (weight, bias)):
        raise ShapeError(f"site {site!r}: expected finite floating tensors")
    with torch.inference_mode(mode=False):  # so that they work in autograd later
        return weight.detach().clone(), bias.detach().clone()
