"""Replace: put another activation in the place of the one that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.errors import ShapeError, SiteNotFoundError, close_names
from actsteer.sites.device import brought
from actsteer.steering.alone import load_edit, save_edit
from actsteer.steering.interventions.intervention import Intervention
from actsteer.vectors.described import named
from actsteer.vectors.vector import SteeringVector


@final
@dataclass(frozen=True)
class ReplaceAt:
    """The edit of one site, h + c · (a - h), with `values` a for every row and position."""

    values: Float[Tensor, " d"]

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """The activation on its way to the values, which it is at c = 1."""
        return _toward(self.values, activation, direction, c)


@final
@dataclass(frozen=True)
class ReplaceTokens:
    """The edit of one site whose `values` are those of single tokens, or rows; see `Placed`."""

    values: Float[Tensor, "*shape d"]

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """As `ReplaceAt`, for values of the activation's own shape."""
        return _toward(self.values, activation, direction, c)

    def placed(self, place: Callable[[Float[Tensor, "*shape d"]], Float[Tensor, "*batch d"]]) -> Intervention:
        """With each value where it belongs in the activation that is there."""
        return partial(_toward, place(self.values))


def _toward(values: Tensor, activation: Tensor, direction: Tensor, c: Tensor) -> Tensor:
    if values.ndim > 1 and values.shape != activation.shape:
        raise ShapeError(
            f"Replace: an activation of shape {tuple(activation.shape)}, features last, and values of shape "
            f"{tuple(values.shape)} for it; record them on a batch of this shape, or give one row (d,)"
        )
    goal = brought(values, activation.device, activation.dtype).expand_as(activation)
    return torch.lerp(activation, goal, brought(c, activation.device, activation.dtype))


@final
class Replace:
    """Patch another activation in: h + c · (a - h), which at c = 1 is a.

    `Steerer(model, Replace(recorded), positions=...)` takes it in the place of vectors. A value: it copies what comes
    in.

    Args:
        activations: site -> a, in units of the activation. Of shape (d,) it is put at every row and position. (n, d)
            has one for each token that is steered, in the order in which `record(positions=...)` gives them: row by
            row, pads left out. So token i of one text goes to token j of another, of any length: record at i, and
            steer at j. Or it has the activation's own shape in the pass with the prompt, features last, as
            `record(keep_shape=True)` gives it.
        concept, metadata: as for a `SteeringVector`.

    Values of single tokens are those of a prompt: `positions="prompt"` patches it, and then generates.

    Raises:
        ShapeError: no sites, or tensors that are not finite; when the model runs, another shape than the activation's,
            another number of values than of tokens that are steered (compiled code cannot look: they are nan then), or
            positions that go on into what is generated.

    Source: activation patching, Vig et al. 2020 and Meng et al. 2022 (arXiv 2202.05262); mean ablation with a = the
    mean.

    >>> from torch import nn
    >>> from actsteer import Steerer, record
    >>> model = nn.Sequential(nn.Identity())
    >>> with Steerer(model, Replace({"0": torch.tensor([7.0, 8.0])})):
    ...     model(torch.zeros(1, 2))
    tensor([[7., 8.]])
    >>> source = record(model, torch.arange(8.0).view(1, 4, 2), sites="0", positions=[3, 0])
    >>> with Steerer(model, Replace(source), positions=[0, 1]):
    ...     model(torch.zeros(1, 2, 2))
    tensor([[[6., 7.],
             [0., 1.]]])
    """

    def __init__(
        self,
        activations: Mapping[str, Float[Tensor, "*batch d"]],
        *,
        concept: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if not activations:
            raise ShapeError("expected one site or more, got none")
        for site, values in activations.items():
            if not isinstance(values, Tensor):
                raise TypeError(
                    f"site {site!r}: expected a tensor, got {type(values).__name__}; give torch.as_tensor of it"
                )
            if not values.ndim or not values.is_floating_point() or not bool(values.isfinite().all()):
                raise ShapeError(
                    f"site {site!r}: expected finite floating values, (d,) or (..., d), got {tuple(values.shape)}"
                )
        with torch.inference_mode(mode=False):  # so that they work in autograd later
            copies = {site: values.detach().clone() for site, values in activations.items()}
        self._parts = {s: ReplaceAt(own) if own.ndim == 1 else ReplaceTokens(own) for s, own in copies.items()}
        self._metadata = named(concept, metadata)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites, in the order given."""
        return tuple(self._parts)

    @property
    def constant(self) -> SteeringVector:
        """What an activation of zero becomes, on average over rows and positions."""
        rows = {site: part.values.reshape(-1, part.values.shape[-1]) for site, part in self._parts.items()}
        return SteeringVector({site: values.mean(dim=0) for site, values in rows.items()}, metadata=self._metadata)

    @property
    def metadata(self) -> dict[str, str]:
        """A copy of the metadata."""
        return dict(self._metadata)

    @property
    def concept(self) -> str | None:
        """What the edit stands for, if it was named."""
        return self._metadata.get("concept")

    def described(self, metadata: Mapping[str, str]) -> Replace:
        """The same edit with other metadata."""
        return Replace({site: part.values for site, part in self._parts.items()}, metadata=metadata)

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        return {"activations": {site: part.values for site, part in self._parts.items()}, "metadata": self.metadata}

    save = save_edit

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module | None = None, *, kinds: Iterable[type] = ()) -> Replace:
        """Read what `save` wrote; see `Steering.load`, also for errors."""
        return load_edit(cls, path, model, kinds=kinds)

    def at(self, site: str) -> ReplaceAt | ReplaceTokens:
        """The edit of one site."""
        if site not in self._parts:
            raise SiteNotFoundError(f"no edit at site {site!r}. {close_names(site, self._parts)}")
        return self._parts[site]

    def __repr__(self) -> str:
        return f"Replace(sites={self.sites}, concept={self.concept!r})"
