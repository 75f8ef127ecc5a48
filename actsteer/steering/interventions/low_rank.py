"""LowRank: an edit that depends on the activation through a few numbers, at every one of its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
class LowRankAt:
    """The edit of one site, h + c · Uᵀ(A h + b): reads A (r, d), adds along U (r, d), with offsets b (r,)."""

    reads: Float[Tensor, "r d"]
    adds: Float[Tensor, "r d"]
    offsets: Float[Tensor, " r"]

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """The edited activation; the direction is not used."""
        parts = (self.reads, self.adds, self.offsets)
        reads, adds, offsets = (brought(part, activation.device, activation.dtype) for part in parts)
        return activation + c * linear(linear(activation, reads, offsets), adds.T)

    def prepare(
        self, direction: Float[Tensor, " d"], c: Float[Tensor, ""]
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
        """h + (c Uᵀ)(A h + b), with A, b and c Uᵀ in the dtype and on the device of the direction."""
        parts = (self.reads, self.adds, self.offsets)
        reads, adds, offsets = (brought(part, direction.device, direction.dtype) for part in parts)
        change = c * adds.T
        return lambda activation: activation + linear(linear(activation, reads, offsets), change)


@final
class LowRank:
    """h + c · Uᵀ(A h + b) at every site: what is added has r directions, and how much of each depends on h linearly.

    `Steerer(model, edit, c=...)` takes it in the place of vectors. `optimize(..., train=LowRank(rank=r))` trains one:
    ReFT's h + Rᵀ(W h + b - R h) with A = W - R and U = R (Wu et al. 2024); `ConceptErasure` fits one (LEACE, Belrose et
    al. 2023). With A = 0 it is plain steering by `constant`. A value: it copies what comes in and what goes out.

    Args:
        sites: site -> (A, U, b), of shapes (r, d), (r, d) and (r,).
        rank: r, in the place of sites: an edit that has none yet, for `optimize` to train.
        concept, metadata: as for a `SteeringVector`.

    Raises:
        ShapeError: shapes that do not fit, or numbers that are not finite.

    >>> from torch import nn
    >>> from actsteer import Steerer
    >>> halve = LowRank({"0": (torch.tensor([[-0.5, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1))})
    >>> model = nn.Sequential(nn.Identity())
    >>> with Steerer(model, halve):
    ...     model(torch.tensor([[4.0, 3.0]]))
    tensor([[2., 3.]])
    """

    def __init__(
        self,
        sites: Mapping[str, tuple[Tensor, Tensor, Tensor]] | None = None,
        *,
        rank: int | None = None,
        concept: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if bool(sites) == (rank is not None):
            raise ShapeError("expected one site or more, or rank= for an edit that is yet to be trained, and not both")
        if rank is not None and rank < 1:
            raise ValueError(f"rank: expected 1 or more, got {rank}")
        self._parts = {site: _owned(site, parts) for site, parts in (sites or {}).items()}
        self._rank = rank or max(len(part.offsets) for part in self._parts.values())
        self._metadata = named(concept, metadata)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites, in the order given."""
        return tuple(self._parts)

    @property
    def metadata(self) -> dict[str, str]:
        """A copy of the metadata."""
        return dict(self._metadata)

    @property
    def concept(self) -> str | None:
        """What the edit stands for, if it was named."""
        return self._metadata.get("concept")

    @property
    def rank(self) -> int:
        """The largest number of directions at any site."""
        return self._rank

    @property
    def constant(self) -> SteeringVector:
        """What is added whatever the activation, Uᵀ b: the part of the edit that is plain steering."""
        return SteeringVector({site: p.adds.T @ p.offsets for site, p in self._parts.items()}, metadata=self._metadata)

    def __or__(self, other: LowRank) -> LowRank:
        """The edits of both; where both have a site, the right one's stands, as in a dict."""
        if not isinstance(other, LowRank):
            return NotImplemented
        described = (self.constant + other.constant).metadata
        return LowRank({site: edit[site] for edit in (self, other) for site in edit.sites}, metadata=described)

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        sites = {site: self[site] for site in self._parts} or None
        return {"sites": sites, "rank": None if sites else self._rank, "metadata": self.metadata}

    save = save_edit

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module | None = None, *, kinds: Iterable[type] = ()) -> LowRank:
        """Read what `save` wrote; see `Steering.load`, also for errors."""
        return load_edit(cls, path, model, kinds=kinds)

    def at(self, site: str) -> LowRankAt:
        """The edit of one site, a copy."""
        return _owned(site, self[site])

    def described(self, metadata: Mapping[str, str]) -> LowRank:
        """The same edit with other metadata."""
        parts = {site: self[site] for site in self._parts}
        return LowRank(parts, rank=None if parts else self._rank, metadata=metadata)

    def __getitem__(self, site: str) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of (A, U, b) at a site."""
        if site not in self._parts:
            raise SiteNotFoundError(f"no edit at site {site!r}. {close_names(site, self._parts)}")
        part = self._parts[site]
        return part.reads.clone(), part.adds.clone(), part.offsets.clone()

    def __repr__(self) -> str:
        return f"LowRank(rank={self.rank}, sites={self.sites}, concept={self.concept!r})"


def _owned(site: str, parts: Sequence[Tensor]) -> LowRankAt:
    if len(parts) != 3 or not all(isinstance(part, Tensor) for part in parts):
        raise ShapeError(f"site {site!r}: expected three tensors, A, U and b, got {[type(p).__name__ for p in parts]}")
    reads, adds, offsets = parts
    shapes = tuple(tuple(part.shape) for part in (reads, adds, offsets))
    if reads.ndim != 2 or shapes != (shapes[0], shapes[0], (len(reads),)):
        raise ShapeError(f"site {site!r}: expected A (r, d), U (r, d) and b (r,), got shapes {shapes}")
    if not all(part.is_floating_point() and bool(part.isfinite().all()) for part in (reads, adds, offsets)):
        raise ShapeError(f"site {site!r}: expected finite floating tensors; did a loss diverge?")
    with torch.inference_mode(mode=False):  # so that they work in autograd later
        return LowRankAt(reads.detach().clone(), adds.detach().clone(), offsets.detach().clone())
