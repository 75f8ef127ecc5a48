"""SteeringVector: what is added to the activations, an element of a direct sum of vector spaces."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from os import PathLike
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

import actsteer.html as html
from actsteer.errors import FileFormatError, ShapeError, SiteNotFoundError, ZeroDirectionError, close_names
from actsteer.files.formats import Format
from actsteer.files.lazy import Stored
from actsteer.files.untrusted import not_dense
from actsteer.sites import fingerprint
from actsteer.vectors import on_disk
from actsteer.vectors.described import axes_in, named, offsets_in, with_offsets
from actsteer.vectors.site_map import SiteMap


@final
class SteeringVector:
    """An immutable map site -> direction, with the algebra of a vector space.

    A direction is a 1-D floating tensor of length d, the size of the activation's feature axis at that site.
    A site that one side of an operation lacks counts as zero there, so vectors of one model form the direct sum
    of its sites' activation spaces. The value owns its tensors: it copies what comes in and what goes out.

    Args:
        directions: site -> tensor of shape (d,).
        concept: the name of what the vector stands for; kept as `metadata["concept"]`.
        metadata: str -> str, kept by scaling, `select`, `to`, and by saving; a sum keeps what both sides share. What is
            added to h · v where v is read, "offset SITE", scales and adds up as v does; another direction has none.

    Raises:
        ShapeError: a direction that is not 1-D, floating and finite.

    Source: activation addition, Turner et al. 2023; the vector arithmetic of concepts, Ilharco et al. 2023.

    >>> v = SteeringVector({"2": torch.tensor([3.0, 4.0])}, concept="nine")
    >>> w = SteeringVector({"5": torch.tensor([1.0])})
    >>> (2 * v + w).sites
    ('2', '5')
    >>> v.norm(), v @ w
    (tensor(5.), tensor(0.))
    """

    __slots__ = ("_directions", "_metadata")
    __array_ufunc__ = None  # numpy scalars leave `scalar * vector` to us

    def __init__(
        self,
        directions: Mapping[str, Float[Tensor, " d"]],
        *,
        concept: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(directions, Mapping):
            raise TypeError(
                f"expected a mapping site -> direction, as {{'1': tensor}}, got {type(directions).__name__}"
            )
        with torch.inference_mode(mode=False):  # so that they work in autograd later
            self._directions = {site: _owned(site, direction) for site, direction in directions.items()}
        self._metadata = named(concept, metadata)

    # --- reading -------------------------------------------------------------------------------------------------
    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites, in the order given."""
        return tuple(self._directions)

    @property
    def metadata(self) -> dict[str, str]:
        """A copy of the metadata: concept, estimator, model, counts."""
        return dict(self._metadata)

    @property
    def concept(self) -> str | None:
        """What the vector stands for, if it was named."""
        return self._metadata.get("concept")

    def __getitem__(self, site: str) -> Float[Tensor, " d"]:
        """A copy of the direction at `site`."""
        return self._direction(site).clone()

    def _direction(self, site: str) -> Tensor:
        if site not in self._directions:
            raise SiteNotFoundError(f"no direction at site {site!r}. {close_names(site, self._directions)}")
        return self._directions[site]

    def __iter__(self) -> Iterator[str]:
        """The names of the sites, in the order given."""
        return iter(self._directions)

    def __len__(self) -> int:
        """The number of sites."""
        return len(self._directions)

    def __contains__(self, site: object) -> bool:
        """Whether there is a direction at `site`."""
        return site in self._directions

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._directions)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{site!r}: {len(direction)}" for site, direction in self._directions.items())
        return f"SteeringVector({{{sizes}}}, concept={self.concept!r}, norm={float(self.norm()):.4g})"

    def _repr_html_(self) -> str:
        norms = site_norms(self)
        rows = (
            (site, len(self._directions[site]), n, html.bar(n, of=max(norms.values()))) for site, n in norms.items()
        )
        return html.table(
            f"SteeringVector {self.concept or ''}", ["site", "features", "norm", ""], rows, total=len(self)
        )

    # --- the vector space ----------------------------------------------------------------------------------------
    def __add__(self, other: SteeringVector) -> SteeringVector:
        """The sum, site by site; a site that one side lacks counts as zero."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return self._zip(other, operator.add)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        """The difference, site by site; a site that one side lacks counts as zero."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return self._zip(other, operator.sub)

    def __mul__(self, scalar: float | Tensor) -> SteeringVector:
        """Every direction times a number."""
        if (factor := _number(scalar)) is None:
            return NotImplemented
        return self._scaled(lambda number: number * factor)

    __rmul__ = __mul__

    def __truediv__(self, scalar: float | Tensor) -> SteeringVector:
        """Every direction divided by a number; ZeroDivisionError by zero."""
        if (divisor := _number(scalar)) is None:
            return NotImplemented
        if divisor == 0.0:
            raise ZeroDivisionError(f"{self!r} divided by zero")
        return self._scaled(lambda number: number / divisor)

    def __neg__(self) -> SteeringVector:
        """Every direction the other way round."""
        return self._scaled(operator.neg)

    def __matmul__(self, other: SteeringVector) -> Float[Tensor, ""]:
        """The inner product over all sites, a 0-dim tensor."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        self._check_fits(other)
        like = [*self._directions.values(), *other._directions.values()]
        total = torch.zeros((), dtype=_common_dtype(like), device=like[0].device if like else None)
        for site in self._directions.keys() & other._directions.keys():
            total = total + (self._directions[site].to(total.dtype) @ other._directions[site].to(total.dtype))
        return total

    def norm(self) -> Float[Tensor, ""]:
        """The Euclidean norm over all sites, sqrt(v @ v)."""
        wide = self.to(dtype=torch.float64)  # a square overflows long before its root does
        return (wide @ wide).sqrt().to(_common_dtype(list(self._directions.values())))

    def unit(self) -> SteeringVector:
        """Each site scaled to norm 1.

        Raises:
            ZeroDirectionError: a site's direction is zero.
        """
        norms = site_norms(self)
        units = {site: _unit(direction, f"site {site!r}") for site, direction in self._directions.items()}
        return self._like(units, {site: offset / norms[site] for site, offset in self._offsets.items()})

    def cosine(self, other: SteeringVector) -> Float[Tensor, ""]:
        """The cosine of the angle over all sites, in [-1, 1]; ZeroDirectionError if either vector is zero."""
        dtype = _common_dtype([*self._directions.values(), *other._directions.values()])
        return (self._normalized() @ other._normalized()).clamp(-1.0, 1.0).to(dtype)

    def project(self, onto: SteeringVector) -> SteeringVector:
        """The component along `onto`, (v @ w) / (w @ w) * w; ZeroDirectionError if `onto` is zero."""
        unit = onto._normalized()
        along = unit * (self.to(dtype=torch.float64) @ unit)
        dtype = _common_dtype([*self._directions.values(), *onto._directions.values()])
        return self._like(along.to(dtype=dtype)._directions, {})

    def reject(self, onto: SteeringVector) -> SteeringVector:
        """What `project` leaves, v - v.project(onto)."""
        return self._like((self - self.project(onto))._directions, {})

    # --- choosing and comparing ----------------------------------------------------------------------------------
    def select(self, *sites: str) -> SteeringVector:
        """The same vector at these sites alone."""
        return SteeringVector({site: self._direction(site) for site in sites}, metadata=self._metadata)

    def to(
        self,
        other: torch.dtype | torch.device | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SteeringVector:
        """The same vector in another dtype or on another device.

        Args:
            other: a dtype or a device, as a tensor's `to` takes it; the keywords say which.

        >>> SteeringVector({"2": torch.tensor([1.0, 2.0])}).to(torch.float16)["2"].dtype
        torch.float16
        """
        if isinstance(other, torch.dtype):
            dtype = other
        elif other is not None:
            device = other
        moved = {site: direction.to(dtype=dtype, device=device) for site, direction in self._directions.items()}
        return SteeringVector(moved, metadata=self._metadata)

    def equal(self, other: SteeringVector) -> bool:
        """The same dtypes and numbers at every site; a site that one side lacks counts as zero."""
        return self._compare(other, lambda a, b: a.dtype == b.dtype and torch.equal(a, b))

    def allclose(self, other: SteeringVector, *, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
        """Equal up to |a - b| <= atol + rtol * |b| at every site, whatever the dtypes."""
        return self._compare(other, lambda a, b: torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol))

    def transport(self, along: SiteMap) -> SteeringVector:
        """The same directions at another model's sites: v_l @ W_l, as `align` has fitted W.

        Raises:
            SiteNotFoundError, ShapeError: a site from which no map leads, or one of another size.
        """
        carried = dict(along.carry(site, direction) for site, direction in self._directions.items())
        own = fingerprint.KEYS
        told = with_offsets(self._metadata, {})
        kept = {key: value for key, value in told.items() if not key.startswith("axis ") and key not in own}
        return SteeringVector(carried, metadata=kept | along.metadata)

    # --- files ---------------------------------------------------------------------------------------------------
    def save(
        self,
        path: str | PathLike[str],
        *,
        model: nn.Module | None = None,
        layer_offset: int = 0,
        format: Format | None = None,  # noqa: A002
    ) -> None:
        """Write a bank of this one vector, under its concept's name (or "vector"); see `VectorBank.save`."""
        bank = {self.concept or "vector": (self._directions, self._metadata)}
        on_disk.write(path, bank, model=model, layer_offset=layer_offset, format=format)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: nn.Module | None = None,
        *,
        layer_offset: int = 0,
        format: Format | None = None,  # noqa: A002
    ) -> SteeringVector:
        """Read a file that holds exactly one vector; see `VectorBank.load`."""
        bank = on_disk.read(path, model=model, layer_offset=layer_offset, format=format)
        if len(bank) != 1:
            raise FileFormatError(f"{path}: expected one vector, got {list(bank)}; open it with VectorBank.load")
        return from_file(next(iter(bank.values())))

    # --- inside --------------------------------------------------------------------------------------------------
    def _scaled(self, function: Callable[[Any], Any]) -> SteeringVector:
        """The function, which is linear, of every direction, and of what is added to what it reads."""
        offsets = {site: function(offset) for site, offset in self._offsets.items()}
        return self._like({s: function(d) for s, d in self._directions.items()}, offsets)

    def _like(self, directions: Mapping[str, Tensor], offsets: Mapping[str, float]) -> SteeringVector:
        """Other directions of the same concept and origin, with their offsets."""
        return SteeringVector(directions, metadata=with_offsets(self._metadata, offsets))

    @property
    def _offsets(self) -> dict[str, float]:
        return offsets_in(self._directions, self._metadata)

    def _zip(self, other: SteeringVector, function: Callable[[Any, Any], Any]) -> SteeringVector:
        shared = dict(self._metadata.items() & other._metadata.items())
        described = shared | axes_in((vector._directions, vector._metadata) for vector in (self, other))
        directions = {s: function(a, b) for s, a, b in self._pairs(other)}
        both = [(vector._directions, vector._offsets) for vector in (self, other)]
        known = [site for site in directions if all(site in offsets or site not in own for own, offsets in both)]
        offsets = {site: function(*(own.get(site, 0.0) for _, own in both)) for site in known}
        return SteeringVector(directions, metadata=with_offsets(described, offsets))

    def _compare(self, other: SteeringVector, same: Callable[[Tensor, Tensor], bool]) -> bool:
        sizes = all(len(d) == len(other._directions.get(s, d)) for s, d in self._directions.items())
        return sizes and all(same(a, b) for _, a, b in self._pairs(other))

    def _pairs(self, other: SteeringVector) -> Iterator[tuple[str, Tensor, Tensor]]:
        self._check_fits(other)
        for site in dict.fromkeys((*self._directions, *other._directions)):
            a, b = self._directions.get(site), other._directions.get(site)
            if a is None:
                assert b is not None
                a = torch.zeros_like(b)
            yield site, a, torch.zeros_like(a) if b is None else b

    def _check_fits(self, other: SteeringVector) -> None:
        for site in self._directions.keys() & other._directions.keys():
            a, b = self._directions[site], other._directions[site]
            if a.shape != b.shape:
                raise ShapeError(f"site {site!r}: {len(a)} features against {len(b)}; were they fitted on one model?")
            if a.device != b.device:
                raise ShapeError(f"site {site!r}: {a.device} against {b.device}; move one with .to(device=...)")

    def _normalized(self) -> SteeringVector:
        """The whole vector at norm 1 in float64, by way of its largest entry so that nothing overflows."""
        largest = max((float(d.abs().max()) for d in self._directions.values() if len(d)), default=0.0)
        if largest == 0.0:
            raise ZeroDirectionError(f"{self!r} is zero, and a zero vector has no direction; were both sides alike?")
        scaled = self.to(dtype=torch.float64) / largest
        return scaled / scaled.norm()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._directions, self._metadata)


def _rebuild(directions: Mapping[str, Tensor], metadata: Mapping[str, str]) -> SteeringVector:
    return SteeringVector(directions, metadata=metadata)


def site_norms(vector: SteeringVector) -> dict[str, float]:
    """Site -> the norm of the direction there."""
    return {site: float(direction.double().norm()) for site, direction in vector._directions.items()}


def from_file(stored: Stored) -> SteeringVector:
    """The vector that a file holds."""
    return SteeringVector(stored.read(), metadata=stored.metadata)


def _owned(site: str, direction: Tensor) -> Tensor:
    if not isinstance(site, str):
        raise TypeError(f"a site is a module's name, a str; got {site!r}")
    if not isinstance(direction, Tensor):
        raise TypeError(
            f"site {site!r}: expected a tensor of shape (d,), got {type(direction).__name__}; torch.as_tensor makes one"
        )
    if (problem := not_dense(direction)) is not None:
        raise ShapeError(
            f"site {site!r}: expected a 1-D floating tensor of shape (d,), got {direction.dtype}: {problem}"
        )
    if direction.ndim != 1:
        raise ShapeError(
            f"site {site!r}: expected a 1-D floating tensor of shape (d,), got {direction.dtype} of shape "
            f"{tuple(direction.shape)}; a direction has one number per feature"
        )
    # one that is not finite shows in the sum, which is the quicker; but the sum of large ones may be infinite too
    if not (math.isfinite(direction.detach().sum().item()) or bool(torch.isfinite(direction).all())):
        raise ShapeError(f"site {site!r}: the direction is not finite; did a loss diverge, or a count reach zero?")
    return direction.detach().clone(memory_format=torch.contiguous_format)


def _number(scalar: object) -> float | None:
    """A number, or a 0-dim tensor, as a float; None for anything else."""
    is_number = isinstance(scalar, Real) or (isinstance(scalar, Tensor) and scalar.ndim == 0)
    return as_float(scalar) if is_number else None  # type: ignore[arg-type]


def as_float(number: float) -> float:
    """The number as a float; infinite for an integer beyond the range of one, so that what it makes is refused."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _unit(direction: Tensor, where: str) -> Tensor:
    largest = direction.abs().max() if len(direction) else torch.zeros(())
    if float(largest) == 0.0:
        raise ZeroDirectionError(
            f"{where}: the direction is zero, and zero cannot be scaled to norm 1; leave the site out, with select"
        )
    scaled = (direction / largest).double()
    unit: Tensor = (scaled / scaled.norm()).to(direction.dtype)
    return unit


def _common_dtype(tensors: list[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype if tensors else torch.get_default_dtype()
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
