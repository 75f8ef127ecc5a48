"""The edit of a site as an affine map, h -> M h + m, which is what weights can carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from actsteer.errors import NotFoldable
from actsteer.sites.features import known_size
from actsteer.sites.place import Place
from actsteer.steering.bound import edited_by
from actsteer.steering.edit import SiteEdit

_FIRST, _ROWS = 16, 256  # how many random rows are tried first; how many rows of the identity are edited at once


@dataclass(frozen=True)
class AffineMap:
    """h -> h + U A h + m in float64: M = 1 + U A, with `adds` U (d, r), `reads` A (r, d) and `bias` m.

    The columns of U are orthonormal, and r is the rank of M - 1, 0 where a constant is added and 1 where one direction
    is ablated; or d, where that is not small.
    """

    adds: Float[Tensor, "d r"]
    reads: Float[Tensor, "r d"]
    bias: Float[Tensor, " d"]

    @property
    def mixes(self) -> bool:
        """Whether it does more than add a constant."""
        return len(self.reads) > 0

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return not self.mixes and not bool(self.bias.any())

    @property
    def is_projection(self) -> bool:
        """Whether what it has given stays as it is when it comes again: M M = M, that is A + A U A = 0, and m = 0."""
        twice = self.reads + (self.reads @ self.adds) @ self.reads
        return self.mixes and not bool(self.bias.any()) and bool((twice.abs() <= 1e-9).all())

    def __call__(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What becomes of the rows."""
        return rows + (rows @ self.reads.T) @ self.adds.T + self.bias

    def among(self, size: int, *, start: int) -> AffineMap:
        """The map of so many features that does this with those from `start` on, and nothing with the others."""
        around = (start, size - start - len(self.bias))
        return AffineMap(pad(self.adds, (0, 0, *around)), pad(self.reads, around), pad(self.bias, around))

    def after(self, weight: Tensor, *, axis: int) -> Tensor:
        """M W, where the axis of a weight is that of the outputs."""
        read = torch.tensordot(self.reads.to(weight), weight, ([1], [axis]))
        moved: Tensor = weight + torch.tensordot(self.adds.to(weight), read, ([1], [0])).movedim(0, axis)
        return moved

    def before(self, weight: Tensor, *, axis: int) -> Tensor:
        """W M, where the axis of a weight is that of the inputs."""
        added = torch.tensordot(weight, self.adds.to(weight), ([axis], [0]))
        moved: Tensor = weight + torch.tensordot(added, self.reads.to(weight), ([-1], [0])).movedim(-1, axis)
        return moved


def affine_maps(edits: Mapping[str, SiteEdit], strengths: Sequence[Tensor]) -> dict[str, AffineMap]:
    """Site -> its edit as an affine map of the whole activation; `strengths` are 0-dim, in bank order.

    Raises:
        NotFoldable: an edit that depends otherwise on the activation; or of a part of the features, where the module's
            class does not tell how many there are.
    """
    return {
        site: _whole(_map(site, edit, [strengths[index] for index in edit.concepts]), edit.place)
        for site, edit in edits.items()
    }


def _whole(edit: AffineMap, place: Place) -> AffineMap:
    if place.features is None:
        return edit
    size = known_size(replace(place, features=None))
    if size is None:
        raise NotFoldable(
            f"site {place.site!r}: of how many features it names a part is not known of a "
            f"{type(place.module).__name__} before it runs; keep the Steerer, or name the whole activation"
        )
    return edit.among(size, start=place.features[0])


def same_projections(maps: Mapping[str, AffineMap]) -> dict[str, frozenset[str]]:
    """Site -> the sites that have the same projection, itself among them; itself alone, where it has none.

    Two maps are the same if they make the same of one random row, which others do with probability 0.
    """
    images: dict[str, tuple[int, float, Tensor]] = {}
    for site, own in maps.items():
        if own.is_projection:
            row = torch.randn(1, len(own.bias), generator=_seeded(), dtype=torch.float64)
            image = own(row.to(own.bias)).cpu()
            images[site] = (len(own.bias), float((row * image).sum()), image)
    groups: list[list[str]] = []
    for site in sorted(images, key=lambda site: images[site][:2]):  # so that the same ones are neighbours
        size, _, image = images[site]
        alike = groups and images[groups[-1][0]]
        if alike and alike[0] == size and torch.allclose(alike[2], image, atol=1e-9):
            groups[-1].append(site)
        else:
            groups.append([site])
    alone = {site: frozenset([site]) for site in maps}
    return alone | {site: group for group in map(frozenset, groups) for site in group}


@torch.no_grad()
def _map(site: str, edit: SiteEdit, strengths: Sequence[Tensor]) -> AffineMap:
    directions = edit.directions.detach().double()
    d = directions.shape[1]
    if edit.is_sum:  # of plain Add
        c = torch.stack([strength.to(directions) for strength in strengths])
        return AffineMap(directions.new_zeros(d, 0), directions.new_zeros(0, d), c @ directions)

    def apply(rows: Tensor) -> Tensor:
        for intervention, direction, strength in zip(edit.interventions, directions, strengths, strict=True):
            rows = edited_by(intervention, rows, direction, strength.to(directions))
        return rows

    bias = apply(directions.new_zeros(1, d))[0]
    adds = _span(lambda rows: apply(rows) - bias - rows, bias)
    reads = torch.cat([(apply(rows) - bias - rows) @ adds for rows in _identity(bias)]).T
    found = AffineMap(adds, reads, bias)
    if not _holds(apply, found):
        names = ", ".join(sorted({type(own).__name__ for own in edit.interventions}))
        raise NotFoldable(
            f"site {site!r}: {names} is not an affine map of the activation, and weights can carry no other; "
            "keep the Steerer"
        )
    return found


def _span(change: Callable[[Tensor], Tensor], bias: Float[Tensor, " d"]) -> Float[Tensor, "d r"]:
    """An orthonormal basis of all that a linear map gives: what it makes of r random rows spans it, almost surely."""
    d, generator = len(bias), _seeded()
    count = min(_FIRST, d)
    while True:
        rows = torch.randn(count, d, generator=generator, dtype=torch.float64)
        made = change(rows.to(bias)).nan_to_num(0, 0, 0)  # such a map does not hold
        _, sizes, basis = torch.linalg.svd(made, full_matrices=False)
        noise = 1e-13 * d**0.5 * max(1.0, float(sizes[0]), float(bias.abs().max()))
        rank = int((sizes > noise).sum())
        if rank < count:
            found: Tensor = basis[:rank].T
            return found
        if 4 * count >= d:
            return torch.eye(d).to(bias)
        count *= 4


def _identity(like: Float[Tensor, " d"]) -> Iterator[Float[Tensor, "n d"]]:
    """The rows of the identity matrix, some at a time: the whole of it is large."""
    d = len(like)
    for start in range(0, d, _ROWS):
        rows = like.new_zeros(min(_ROWS, d - start), d)
        rows.diagonal(start).fill_(1.0)
        yield rows


def _holds(apply: Callable[[Tensor], Tensor], found: AffineMap) -> bool:
    """Whether it is M h + m for rows of all sizes, too."""
    generator = _seeded()
    for scale in (1e-9, 1e-3, 1.0, 1e3, 1e9):
        rows = scale * torch.randn(8, len(found.bias), generator=generator, dtype=torch.float64).to(found.bias.device)
        expected = found(rows)
        size = float(expected.abs().max())
        if not math.isfinite(size) or not torch.allclose(apply(rows), expected, rtol=1e-9, atol=1e-9 * size):
            return False
    return True


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
