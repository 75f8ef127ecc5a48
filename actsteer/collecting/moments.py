"""Moments: what a pass over the data leaves behind at one site, in memory that does not grow with the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.symmetric import add_product, times, whole
from actsteer.errors import ShapeError, StatisticsError

BLOCK = 1024
"""Rows that are turned into float64 at a time."""


@dataclass(frozen=True)
class Scatter:
    """Sums over rows c that have the mean subtracted: Σ ccᵀ (its lower half alone), Σ ‖c‖²c, and Σ ‖c‖⁴."""

    second: Float[Tensor, "d d"]
    third: Float[Tensor, " d"]
    fourth: Float[Tensor, ""]

    @classmethod
    def zero(cls, like: Float[Tensor, " d"]) -> Scatter:
        """No rows."""
        return cls(like.new_zeros(len(like), len(like)), torch.zeros_like(like), like.new_zeros(()))

    def clone(self) -> Scatter:
        """The same numbers in tensors of its own."""
        return Scatter(self.second.clone(), self.third.clone(), self.fourth.clone())

    def to(self, device: torch.device) -> Scatter:
        """The same numbers on this device."""
        return Scatter(self.second.to(device), self.third.to(device), self.fourth.to(device))


@final
class Moments:
    """Count, mean and, when asked for, scatter of the activations at one site, in float64.

    Parts merge exactly as if their rows had been seen together (Chan, Golub & LeVeque 1979):

        n = n_a + n_b,   δ = mean_b - mean_a,   mean = mean_a + δ n_b / n,   S = S_a + S_b + δ δᵀ n_a n_b / n

    The mean is held as an origin, that of the first rows, and an offset from it. So the differences δ, and with
    them the scatter, stay exact where the mean is a billion times the spread.

    >>> m = Moments.empty(2, covariance=True).update(torch.tensor([[0.0, 2.0], [4.0, 2.0]]))
    >>> m.count, m.mean.tolist(), m.covariance.tolist()
    (2, [2.0, 2.0], [[8.0, 0.0], [0.0, 0.0]])
    """

    __slots__ = ("_offset", "_origin", "_scatter", "_shared", "count")

    @torch.inference_mode(mode=False)  # what is kept must work in autograd later
    def __init__(
        self, count: int, mean: Float[Tensor, " d"], scatter: Float[Tensor, "d d"] | Scatter | None = None
    ) -> None:
        if mean.ndim != 1 or (isinstance(scatter, Tensor) and scatter.shape != (len(mean), len(mean))):
            raise ShapeError(f"expected a mean of shape (d,) and a scatter of shape (d, d), got {tuple(mean.shape)}")
        self.count = count
        self._origin = _exact(mean).clone()
        self._offset = torch.zeros_like(self._origin)
        if isinstance(scatter, Tensor):  # without the higher moments nobody can estimate how sure it is
            unknown = torch.full_like(self._origin, torch.nan)
            scatter = Scatter(_exact(scatter).clone(), unknown, unknown.sum())
        self._scatter = scatter
        self._shared = False

    @classmethod
    @torch.inference_mode(mode=False)
    def empty(cls, d: int, *, covariance: bool = False, device: torch.device | str | None = None) -> Moments:
        """The moments of no rows of d features: what merges with any other without changing it."""
        zero = torch.zeros(d, dtype=torch.float64, device=device)
        return cls(0, zero, Scatter.zero(zero) if covariance else None)

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"], *, covariance: bool = False) -> Moments:
        """The moments of these rows."""
        if rows.ndim != 2:
            raise ShapeError(f"expected rows of shape (n, d), got {tuple(rows.shape)}")
        device = "cpu" if rows.device.type == "mps" else rows.device  # which has no float64
        return cls.empty(rows.shape[1], covariance=covariance, device=device).update(rows)

    # --- reading -------------------------------------------------------------------------------------------------
    @property
    def d(self) -> int:
        """The number of features."""
        return len(self._origin)

    @property
    def has_covariance(self) -> bool:
        """Whether the scatter was collected."""
        return self._scatter is not None

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean activation, shape (d,).

        Raises:
            StatisticsError: there are no rows.
        """
        if not self.count:
            raise StatisticsError("the mean of no rows is not defined; collect at least one")
        return self._origin + self._offset

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance, shape (d, d): the scatter divided by count - 1.

        Raises:
            StatisticsError: it was not collected, or there are fewer than two rows.
        """
        if self.count < 2:
            raise StatisticsError("the covariance of a single row is not defined; collect at least two")
        return self.scatter.div_(self.count - 1)

    @property
    def scatter(self) -> Float[Tensor, "d d"]:
        """The sum of (x - mean)(x - mean)ᵀ over the rows, shape (d, d)."""
        return whole(self._sums().second)

    @property
    def fourth(self) -> Float[Tensor, ""]:
        """The sum of ‖x - mean‖⁴ over the rows, 0-dim; nan if the moments were made from a scatter alone."""
        return self._sums().fourth.clone()

    def _sums(self) -> Scatter:
        if self._scatter is None:
            raise StatisticsError("no covariance was collected; collect with covariance=True")
        return self._scatter

    # --- growing -------------------------------------------------------------------------------------------------
    def update(self, rows: Float[Tensor, "n d"]) -> Moments:
        """Take in more rows, in place and in blocks; returns itself.

        Raises:
            ShapeError: not rows of d features.
        """
        if rows.ndim != 2 or rows.shape[1] != self.d:
            raise ShapeError(f"expected rows of shape (n, {self.d}), got {tuple(rows.shape)}; is it the same model?")
        if len(rows):
            self._unshare()
        for block in rows.detach().split(BLOCK):
            if len(block):
                self._absorb(_exact(block).to(self._origin.device))
        return self

    def merge(self, other: Moments) -> Moments:
        """The moments of both parts together; without a scatter, unless both have one or one is empty.

        Raises:
            ShapeError: other features.
        """
        if self.d != other.d:
            raise ShapeError(f"{self.d} features against {other.d}; were they collected on one model?")
        if not (self.count and other.count):
            return (other if other.count else self).copy()
        device = self._origin.device
        count = self.count + other.count
        moved = (other._origin.to(device) - self._origin) + (other._offset.to(device) - self._offset)
        merged = Moments(count, self._origin)
        merged._offset = self._offset + moved * (other.count / count)
        if self._scatter is not None and other._scatter is not None:
            ours, theirs = (self._scatter, self.count), (other._scatter.to(device), other.count)
            third, fourth = moved_sums(*ours, -moved * (other.count / count))
            more_third, more_fourth = moved_sums(*theirs, moved * (self.count / count))
            second = ours[0].second + theirs[0].second
            second.addr_(moved, moved * (self.count * other.count / count))
            merged._scatter = Scatter(second, third + more_third, fourth + more_fourth)
        return merged

    def copy(self) -> Moments:
        """The same moments; its tensors become its own when either is updated."""
        copied = Moments.__new__(Moments)
        copied.count, copied._origin, copied._offset = self.count, self._origin, self._offset
        copied._scatter = self._scatter
        copied._shared = self._shared = True
        return copied

    def __neg__(self) -> Moments:
        """The moments of the negated rows."""
        negated = Moments(self.count, -self._origin)
        negated._offset = -self._offset
        if (sums := self._scatter) is not None:
            negated._scatter = Scatter(sums.second.clone(), -sums.third, sums.fourth.clone())
        return negated

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, d={self.d}, covariance={self.has_covariance})"

    @torch.inference_mode(mode=False)
    def _unshare(self) -> None:
        if self._shared:
            self._origin, self._offset = self._origin.clone(), self._offset.clone()
            self._scatter = None if self._scatter is None else self._scatter.clone()
            self._shared = False

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _absorb(self, rows: Float[Tensor, "n d"]) -> None:
        if not self.count:
            self._origin = rows.mean(dim=0)
        rows = rows - self._origin  # exact for rows within a factor of two of the origin
        count = self.count + len(rows)
        shift = rows.mean(dim=0)
        moved = shift - self._offset
        if (sums := self._scatter) is not None:
            rows -= shift
            third, fourth = moved_sums(sums, self.count, -moved * (len(rows) / count))
            squares = rows.square().sum(dim=1)
            block_third, block_fourth = squares @ rows, squares.square().sum()
            delta = moved * (self.count / count)
            along, square = rows @ delta, delta.square().sum()
            total = squares.sum()
            third += block_third + 2 * (along @ rows) + (len(rows) * square + total) * delta
            fourth += block_fourth + 4 * (along.square().sum() + block_third @ delta)
            fourth += len(rows) * square.square() + 2 * total * square
            weighted = torch.cat([rows, moved[None] * (self.count * len(rows) / count)])
            add_product(sums.second, weighted, torch.cat([rows, moved[None]]))
            self._scatter = Scatter(sums.second, third, fourth)
        self._offset = self._offset + moved * (len(rows) / count)
        self.count = count


def moved_sums(sums: Scatter, count: int, shift: Float[Tensor, " d"]) -> tuple[Tensor, Tensor]:
    """The third and fourth sums of the same rows once `shift` is added to each of them."""
    if not count:
        return sums.third.clone(), sums.fourth.clone()
    product, trace, square = times(sums.second, shift), sums.second.diagonal().sum(), shift.square().sum()
    third = sums.third + 2 * product + (count * square + trace) * shift
    fourth = sums.fourth + 4 * (shift @ product + sums.third @ shift) + count * square**2 + 2 * trace * square
    return third, fourth


def _exact(tensor: Tensor) -> Tensor:
    """In float64, on a device that has it."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
