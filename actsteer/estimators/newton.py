"""Newton: logistic regression by Newton's method, from a stream of rows that is gone over once per step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError, SiteNotFoundError, StatisticsError

Recorded: TypeAlias = Mapping[str, Tensor]
"""Site -> (n, d), as `record` gives them."""


def newton(
    positive: Iterable[Recorded],
    negative: Iterable[Recorded] | None,
    *,
    C: float,  # noqa: N803
    steps: int,
    tolerance: float,
) -> dict[str, Float[Tensor, " _"]]:
    """Weights and, last, the offset at every site, all sites in one stream; of one side alone, without an offset.

    Raises:
        SiteNotFoundError, ShapeError: the sides have other sites, or sizes; blocks that are not (n, d).
        StatisticsError: a side without rows, rows that are not finite, a generator, or no convergence.
    """
    weights: dict[str, Tensor] = {}
    moves: dict[str, Tensor] = {}
    losses: dict[str, float] = {}
    sides = [(1.0, positive)] if negative is None else [(1.0, positive), (-1.0, negative)]
    offset = len(sides) - 1
    for _ in range(steps):
        sums = {site: _Sums(own, C, offset) for site, own in weights.items()}
        sites: list[set[str]] = []
        for sign, side in sides:
            sites.append(set())
            for site, rows in blocks(side):
                sites[-1].add(site)
                if site not in weights:
                    weights[site] = torch.zeros(rows.shape[1] + offset, dtype=torch.float64, device=rows.device)
                sums.setdefault(site, _Sums(weights[site], C, offset)).add(site, rows, sign)
        if sites[0] != sites[-1] or not weights:
            raise SiteNotFoundError(
                f"positive has the sites {sorted(sites[0])}, negative {sorted(sites[-1])}; stream the same on both "
                "sides"
            )
        if all(own.check(site).converged(tolerance) for site, own in sums.items()):
            return weights
        for site, own in sums.items():
            if own.loss > losses.get(site, math.inf) + 1e-12 * abs(own.loss):  # too far: half the way back
                moves[site] = moves[site] / 2
                weights[site] = weights[site] - moves[site]
            else:
                losses[site] = own.loss
                moves[site] = own.step()
                weights[site] = weights[site] + moves[site]
    raise StatisticsError(no_convergence(weights, steps))


def no_convergence(sites: Iterable[str], steps: int) -> str:
    """The message where it does not converge."""
    return f"sites {list(sites)}: no convergence in {steps} steps; scale the activations, or take a smaller C"


def blocks(side: Iterable[Recorded]) -> Iterator[tuple[str, Float[Tensor, "n d"]]]:
    """The sites and rows of each block.

    Raises:
        StatisticsError: it cannot be gone over again.
        TypeError, ShapeError: blocks that are not site -> (n, d).
    """
    if iter(side) is side:
        raise StatisticsError("a stream is gone over several times; give a list, or anything that starts again")
    for block in side:
        if not isinstance(block, Mapping):
            raise TypeError(f"expected rows, site -> (n, d), as `record` gives them; got {type(block).__name__}")
        for site, rows in block.items():
            if rows.ndim != 2:
                raise ShapeError(f"site {site!r}: expected rows (n, d), got shape {tuple(rows.shape)}")
            yield site, rows


@final
class _Sums:
    """Loss, gradient and Hessian at some weights, as they grow."""

    def __init__(self, weights: Float[Tensor, " _"], C: float, offset: int) -> None:  # noqa: N803
        self._weights, self._c, self._offset = weights, C, offset
        penalty = (torch.arange(len(weights)) < len(weights) - offset).to(weights)
        self._gradient, self._hessian = penalty * weights, torch.diag(penalty)
        self.loss = float((penalty * weights).square().sum() / 2)
        self._counts = {1.0: 0, -1.0: 0} if offset else {1.0: 0}

    def add(self, site: str, rows: Float[Tensor, "n d"], sign: float) -> None:
        """Take in rows of one side."""
        if rows.shape[1] + self._offset != len(self._weights):
            raise ShapeError(
                f"site {site!r}: {rows.shape[1]} features after {len(self._weights) - self._offset}; are both sides, "
                "and all blocks, from one model?"
            )
        extended = torch.cat([rows.double(), rows.new_ones(len(rows), self._offset).double()], dim=1)
        margins = sign * (extended @ self._weights)
        wrong = torch.sigmoid(-margins)
        self.loss += self._c * float(torch.nn.functional.softplus(-margins).sum())
        self._gradient -= self._c * sign * (wrong @ extended)
        self._hessian.addmm_((extended * (wrong * (1 - wrong))[:, None]).T, extended, alpha=self._c)
        self._counts[sign] += len(rows)

    def check(self, site: str) -> _Sums:
        """Itself; StatisticsError if a side is missing or not finite."""
        if not all(self._counts.values()) or not math.isfinite(self.loss):
            raise StatisticsError(f"site {site!r}: expected finite rows on both sides")
        return self

    def converged(self, tolerance: float) -> bool:
        return float(self._gradient.abs().max()) <= tolerance * sum(self._counts.values()) * max(self._c, 1e-300)

    def step(self) -> Float[Tensor, " _"]:
        """Newton's step."""
        solution: Tensor = torch.linalg.lstsq(self._hessian.cpu(), self._gradient.cpu()[:, None]).solution
        return -solution[:, 0].to(self._weights)
