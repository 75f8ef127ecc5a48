"""Intervals: of means and percentiles, by the bootstrap over rows."""

from __future__ import annotations

from typing import Literal, TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Of: TypeAlias = Literal["mean", "p95"]
Interval: TypeAlias = tuple[float, float]
DRAWS = 500


@final
class Sample:
    """The rows over which figures are means, and how often each of them is drawn.

    Args:
        owners: (m,), the row of each number; a text has one for each of its tokens.
        is_in: (rows,), the rows that count.
        seed: of the draws.

    Source: the percentile bootstrap, Efron 1979; of texts whole ones are drawn, for their tokens depend on each other.

    >>> sample = Sample(torch.arange(100), torch.ones(100, dtype=torch.bool), seed=0)
    >>> sample.of(torch.arange(100.0), "mean"), sample.of(torch.arange(100.0), "p95")
    (49.5, 94.0)
    >>> low, high = sample.interval(torch.arange(100.0), "mean")
    >>> 40 < low < 49.5 < high < 60
    True
    """

    def __init__(self, owners: Int[Tensor, " m"], is_in: Bool[Tensor, " rows"], *, seed: int) -> None:
        self._counts = is_in[owners]
        own = owners[self._counts]
        rows, self._owners = own.unique(return_inverse=True)
        self.rows = len(rows)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(max(1, self.rows), (DRAWS, self.rows), generator=generator)
        self._weights = torch.zeros(DRAWS, self.rows, dtype=torch.float64)
        self._weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))

    @classmethod
    def of_all(cls, rows: int) -> Sample:
        """Every one of so many rows counts, with a number each."""
        return cls(torch.arange(rows), torch.ones(rows, dtype=torch.bool), seed=0)

    def of(self, values: Float[Tensor, " m"], what: Of) -> float:
        """The mean, or the 95th percentile, of the rows that count."""
        own = values[self._counts]
        if what == "mean":
            return float(own.mean())
        return float(own.sort().values[max(0, -(-95 * len(own) // 100) - 1)])

    def interval(self, values: Float[Tensor, " m"], what: Of) -> Interval | None:
        """Between which values 95 % of the draws lie; None of fewer than two rows."""
        if self.rows < 2:
            return None
        own = values[self._counts].double()
        if what == "mean":
            sums = torch.zeros(self.rows, dtype=torch.float64).index_add_(0, self._owners, own)
            sizes = torch.bincount(self._owners, minlength=self.rows).double()
            found = (self._weights @ sums) / (self._weights @ sizes)
        else:
            order = own.argsort()
            weights = self._weights[:, self._owners[order]].cumsum(dim=1)
            places = torch.searchsorted(weights, 0.95 * weights[:, -1:]).clamp(max=len(own) - 1)
            found = own[order][places[:, 0]]
        low, high = (
            found.nan_to_num(posinf=float("inf")).sort().values[[int(0.025 * DRAWS), int(0.975 * DRAWS)]].tolist()
        )
        return low, high


def halves(rows: int, generator: torch.Generator) -> tuple[Bool[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Two halves of the rows by chance; a single row is in both.

    >>> one, other = halves(5, torch.Generator().manual_seed(0))
    >>> int(one.sum()), int(other.sum()), bool((one ^ other).all())
    (2, 3, True)
    """
    if rows < 2:
        return torch.ones(rows, dtype=torch.bool), torch.ones(rows, dtype=torch.bool)
    first = torch.zeros(rows, dtype=torch.bool)
    first[torch.randperm(rows, generator=generator)[: rows // 2]] = True
    return first, ~first
