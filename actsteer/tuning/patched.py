"""Patched: what activation patching recovered at every site and position."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import final

from jaxtyping import Float
from torch import Tensor

import actsteer.html as html
from actsteer.tuning.text_table import lines


@final
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Patched:
    """What `patching` has found: one row for each site, one column for each choice of positions.

    Args:
        sites, positions: the names of the rows and of the columns.
        clean, corrupted: the metric of the n rows of both runs, (n,), in float64.
        patched: the metric of every corrupted row with a site and positions patched, (sites, positions, n).
    """

    sites: tuple[str, ...]
    positions: tuple[str, ...]
    clean: Float[Tensor, " n"]
    corrupted: Float[Tensor, " n"]
    patched: Float[Tensor, "sites positions n"]

    @property
    def recovered(self) -> Float[Tensor, "sites positions"]:
        """The share of the difference of the means that each cell recovers: 0 nothing, 1 all; it may lie outside."""
        worst = self.corrupted.mean()
        return (self.patched.mean(dim=-1) - worst) / (self.clean.mean() - worst)

    @property
    def verdict(self) -> str:
        """Where most is recovered, in a sentence."""
        shares, (worst, best) = self.recovered, (float(own.mean()) for own in (self.corrupted, self.clean))
        site, column = divmod(int(shares.argmax()), len(self.positions))
        return (
            f"a share of {float(shares.max()):.2f} of {best - worst:.4g} (corrupted {worst:.4g}, clean {best:.4g}) is "
            f"recovered at {self.sites[site]!r}, positions {self.positions[column]}"
        )

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the recovered shares, sites by positions, as PNG, SVG or PDF by the suffix.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from actsteer.tuning.picture import draw_shares

        draw_shares(self, path)

    def __str__(self) -> str:
        shares = self.recovered.tolist()
        cells = [(site, *(f"{own:.2f}" for own in row)) for site, row in zip(self.sites, shares, strict=True)]
        return "\n".join([*lines([("site", *self.positions), *cells]), "", self.verdict])

    def _repr_html_(self) -> str:
        return html.matrix(self.verdict, self.sites, self.recovered.tolist(), columns=self.positions)

    def __repr__(self) -> str:
        return f"Patched(sites={len(self.sites)}, positions={len(self.positions)}, rows={len(self.clean)})"
