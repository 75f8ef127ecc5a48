"""SiteMap: linear maps that carry directions from one model's sites to another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError, SiteNotFoundError, close_names


@final
class SiteMap:
    """Site of one model -> (site of the other, weight (d, d')): a direction v there is v @ weight here.

    `align` fits one; `SteeringVector.transport` uses it. A value: it copies what comes in and what goes out.

    Raises:
        ShapeError: a weight that is not 2-D, floating and finite; two sites that lead to one.

    >>> turn = SiteMap({"2": ("h.2", torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))})
    >>> turn.sites, turn["2"][0], turn.T["h.2"][1]
    (('2',), 'h.2', tensor([[ 0., -1.],
            [ 1.,  0.]]))
    """

    __slots__ = ("_maps", "_metadata")

    def __init__(self, maps: Mapping[str, tuple[str, Tensor]], *, metadata: Mapping[str, str] | None = None) -> None:
        for site, (_, weight) in maps.items():
            if weight.ndim != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
                raise ShapeError(f"site {site!r}: expected a finite floating weight (d, d'), got {tuple(weight.shape)}")
        targets = [target for target, _ in maps.values()]
        if len(targets) != len(set(targets)):
            raise ShapeError(f"two sites lead to one: {targets}")
        self._maps = {site: (target, weight.detach().clone()) for site, (target, weight) in maps.items()}
        self._metadata = dict(metadata or {})

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites from which it leads."""
        return tuple(self._maps)

    @property
    def metadata(self) -> dict[str, str]:
        """What a transported vector is described with: the other model's fingerprint, and how the map was fitted."""
        return dict(self._metadata)

    @property
    def T(self) -> SiteMap:  # noqa: N802  (as of a tensor)
        """The transposed map, from the other model's sites: what carries a probe back, for x·(W w) = (x W)·w."""
        return SiteMap({target: (site, weight.T) for site, (target, weight) in self._maps.items()})

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._maps)

    def __getitem__(self, site: str) -> tuple[str, Float[Tensor, "d other"]]:
        if site not in self._maps:
            raise SiteNotFoundError(f"no map from site {site!r}. {close_names(site, self._maps)}")
        target, weight = self._maps[site]
        return target, weight.clone()

    def carry(self, site: str, direction: Float[Tensor, " d"]) -> tuple[str, Float[Tensor, " other"]]:
        """The other site, and the direction there, in the direction's dtype and device."""
        target, weight = self[site]
        if len(weight) != len(direction):
            raise ShapeError(f"site {site!r}: the map takes {len(weight)} features, the vector has {len(direction)}")
        kind = torch.promote_types(weight.dtype, direction.dtype)
        carried = direction.to(kind) @ weight.to(direction.device, kind)
        return target, carried.to(direction.dtype)

    def __repr__(self) -> str:
        maps = ", ".join(f"{site!r} -> {target!r} {tuple(w.shape)}" for site, (target, w) in self._maps.items())
        return f"SiteMap({maps})"
