"""SoftProjection: what is kept of each direction of the activation, from all to nothing; with and, or and not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.moments import exact
from actsteer.errors import ShapeError, SiteNotFoundError, close_names
from actsteer.steering.alone import load_edit, save_edit
from actsteer.steering.interventions.affine import AffineAt
from actsteer.vectors.described import named
from actsteer.vectors.vector import SteeringVector

_SLACK = 8  # times d eps: what rounding makes of an eigenvalue of 0


@final
class SoftProjection:
    """h + c · (C h - h) at every site, with C symmetric and its eigenvalues, the shares that are kept, in [0, 1].

    `Conceptor` fits one. They combine, site by site:

        ~A       1 - A                                    what A leaves out
        A & B    P (1 - P)⁻¹ with P = A (A + B)⁺ B        what both keep: (A⁻¹ + B⁻¹ - 1)⁻¹ where these are invertible
        A | B    ~(~A & ~B)                               what either keeps

    De Morgan's laws and double negation hold, `&` and `|` commute and associate, and 1, which keeps all, is neutral for
    `&`, 0 for `|`. On projections they are those of the subspaces; A & A is less than A where a share is between 0
    and 1. Of subspaces that are nearly the same, rounding decides. A value: it copies what comes in and goes out.

    Args:
        sites: site -> C, of shape (d, d).
        concept, metadata: as for a `SteeringVector`; `~` drops the concept, `&` and `|` keep what both sides share.

    Raises:
        ShapeError: what is not symmetric, or has eigenvalues outside of [0, 1].

    Source: conceptors, Jaeger 2014 (arXiv 1403.3369); A (A + B)⁺ B is the parallel sum, Anderson & Duffin 1969.

    >>> from torch import nn
    >>> from actsteer import Steerer
    >>> first, half = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.eye(2) / 2
    >>> one, other = (SoftProjection({"0": own}) for own in (first, half))
    >>> (one | other)["0"].diagonal(), (~one & other)["0"].diagonal()
    (tensor([1.0000, 0.5000]), tensor([0.0000, 0.5000]))
    >>> model = nn.Sequential(nn.Identity())
    >>> with Steerer(model, ~one):
    ...     model(torch.tensor([[4.0, 3.0]]))
    tensor([[0., 3.]])
    """

    def __init__(
        self,
        sites: Mapping[str, Tensor],
        *,
        concept: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if not sites:
            raise ShapeError("expected one site or more, got none")
        self._kept = {site: _owned(site, kept) for site, kept in sites.items()}
        self._metadata = named(concept, metadata)

    def __invert__(self) -> SoftProjection:
        """What this one leaves out: 1 - C."""
        described = {key: text for key, text in self._metadata.items() if key != "concept"}
        return SoftProjection({site: _rest(kept) for site, kept in self._kept.items()}, metadata=described)

    def __and__(self, other: SoftProjection) -> SoftProjection:
        """What both keep; of the same sites."""
        if not isinstance(other, SoftProjection):
            return NotImplemented
        if set(self._kept) != set(other._kept):
            raise SiteNotFoundError(f"{self.sites} & {other.sites}: expected the same sites; fit both at the same ones")
        return self._joined(other, _both)

    def __or__(self, other: SoftProjection) -> SoftProjection:
        """What either keeps; at a site that one of them lacks, it is the other."""
        if not isinstance(other, SoftProjection):
            return NotImplemented
        return self._joined(other, lambda one, two: _rest(_both(_rest(one), _rest(two))))

    def _joined(self, other: SoftProjection, rule: Callable[[Tensor, Tensor], Tensor]) -> SoftProjection:
        described = (self.constant + other.constant).metadata  # which refuses other sizes
        joined = self._kept | other._kept
        for site in self._kept.keys() & other._kept.keys():
            joined[site] = rule(self._kept[site], other._kept[site])
        return SoftProjection(joined, metadata=described)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites, in the order given."""
        return tuple(self._kept)

    @property
    def constant(self) -> SteeringVector:
        """What an activation of zero becomes: zero."""
        return SteeringVector({s: torch.zeros_like(kept[0]) for s, kept in self._kept.items()}, metadata=self._metadata)

    @property
    def metadata(self) -> dict[str, str]:
        """A copy of the metadata."""
        return dict(self._metadata)

    @property
    def concept(self) -> str | None:
        """What the edit stands for, if it was named."""
        return self._metadata.get("concept")

    def described(self, metadata: Mapping[str, str]) -> SoftProjection:
        """The same edit with other metadata."""
        return SoftProjection(self._kept, metadata=metadata)

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        return {"sites": {site: self[site] for site in self._kept}, "metadata": self.metadata}

    save = save_edit

    @classmethod
    def load(
        cls, path: str | PathLike[str], model: nn.Module | None = None, *, kinds: Iterable[type] = ()
    ) -> SoftProjection:
        """Read what `save` wrote; see `Steering.load`, also for errors."""
        return load_edit(cls, path, model, kinds=kinds)

    def at(self, site: str) -> AffineAt:
        """The edit of one site."""
        kept = self[site]
        return AffineAt(kept, torch.zeros_like(kept[0]))

    def __getitem__(self, site: str) -> Float[Tensor, "d d"]:
        """A copy of C at a site."""
        if site not in self._kept:
            raise SiteNotFoundError(f"no edit at site {site!r}. {close_names(site, self._kept)}")
        return self._kept[site].clone()

    def __repr__(self) -> str:
        return f"SoftProjection(sites={self.sites}, concept={self.concept!r})"


def _rest(kept: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    return torch.eye(len(kept)).to(kept) - kept


def _both(one: Float[Tensor, "d d"], other: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """P (1 - P)⁻¹, in float64: P is at most a half, so that this is well-posed, whatever the ranks are."""
    kind = torch.promote_types(one.dtype, other.dtype)
    a, b = exact(one), exact(other)
    rounding = _SLACK * len(a) * max(torch.finfo(own.dtype).eps for own in (one, other))
    shared = a @ torch.linalg.pinv(a + b, hermitian=True, rtol=rounding) @ b
    shared = (shared + shared.T) / 2
    both: Tensor = torch.linalg.solve(_rest(shared), shared)
    values, vectors = torch.linalg.eigh((both + both.T) / 2)
    within: Tensor = (vectors * values.clamp(0, 1)) @ vectors.T
    return within.to(one.device, kind)


def _owned(site: str, kept: Tensor) -> Float[Tensor, "d d"]:
    if not isinstance(kept, Tensor):
        raise TypeError(f"site {site!r}: expected a tensor, C, got {type(kept).__name__}; give torch.as_tensor of it")
    if kept.ndim != 2 or kept.shape[0] != kept.shape[1]:
        raise ShapeError(f"site {site!r}: expected C of shape (d, d), got {tuple(kept.shape)}")
    if not (kept.is_floating_point() and bool(kept.isfinite().all())):
        raise ShapeError(f"site {site!r}: expected a finite floating tensor")
    with torch.inference_mode(mode=False):  # so that it works in autograd later
        own = kept.detach().clone()
    plain, rounding = exact(own), _SLACK * len(own) * torch.finfo(own.dtype).eps
    values = torch.linalg.eigvalsh(plain)
    is_symmetric = torch.allclose(plain, plain.T, rtol=0, atol=rounding)
    if not (is_symmetric and -rounding <= values[0] and values[-1] <= 1 + rounding):
        found = f"from {float(values[0]):g} to {float(values[-1]):g}" if is_symmetric else "another one"
        raise ShapeError(
            f"site {site!r}: expected a symmetric matrix with eigenvalues from 0 to 1, got {found}; see Conceptor"
        )
    return own
