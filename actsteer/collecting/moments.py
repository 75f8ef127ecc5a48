"""Moments: what a pass over the data leaves behind at one site, in memory that does not grow with the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.symmetric import add_square, times, whole
from actsteer.errors import ShapeError, StatisticsError

Covariance: TypeAlias = bool | Literal["diagonal"]
"""What is kept beside the mean: nothing, the variance of each feature, O(d), or the covariance of all, O(d^2)."""

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
        """The same numbers in other tensors."""
        return Scatter(self.second.clone(), self.third.clone(), self.fourth.clone())

    def to(self, device: torch.device) -> Scatter:
        """The same numbers on this device."""
        return Scatter(self.second.to(device), self.third.to(device), self.fourth.to(device))


@final
class Moments:
    """Count, mean and, when asked for, variance or covariance of the activations at one site, in float64.

    Parts merge exactly as if their rows had been seen together (Chan, Golub & LeVeque 1979):

        n = n_a + n_b,   δ = mean_b - mean_a,   mean = mean_a + δ n_b / n,   S = S_a + S_b + δ δᵀ n_a n_b / n

    S is the scatter Σ (x - mean)(x - mean)ᵀ; with covariance="diagonal" its diagonal alone is kept.

    The mean is held as an origin, that of the first rows, and the sum of x - origin. So the differences δ, and with
    them the scatter, stay exact where the mean is a billion times the spread.

    >>> m = Moments.empty(2, covariance=True).update(torch.tensor([[0.0, 2.0], [4.0, 2.0]]))
    >>> m.count, m.mean.tolist(), m.covariance.tolist()
    (2, [2.0, 2.0], [[8.0, 0.0], [0.0, 0.0]])
    >>> Moments.of(torch.tensor([[0.0, 2.0], [4.0, 2.0]]), covariance="diagonal").variance.tolist()
    [8.0, 0.0]
    """

    __slots__ = ("_buffer", "_origin", "_scatter", "_shared", "_squares", "_total", "count", "d", "dtype")

    @torch.inference_mode(mode=False)  # what is kept must work in autograd later
    def __init__(
        self, count: int, mean: Float[Tensor, " d"], scatter: Float[Tensor, "d d"] | Float[Tensor, " d"] | None = None
    ) -> None:
        shapes = [tuple(tensor.shape) for tensor in (mean, scatter) if tensor is not None]
        if mean.ndim != 1 or shapes[-1] not in ((len(mean),), (len(mean), len(mean))):
            raise ShapeError(
                f"expected a mean of shape (d,), and a scatter of shape (d, d) or its diagonal, (d,); got {shapes}"
            )
        self.count = count
        self.d: int = mean.shape[0]
        """The number of features."""
        self.dtype: torch.dtype | None = mean.dtype if count else None
        """The dtype of the rows; None before there are any."""
        self._buffer: Tensor | None = None
        self._origin = exact(mean).clone()
        self._total = torch.zeros_like(self._origin)  # of x - origin
        self._scatter: Scatter | None = None
        self._squares: Tensor | None = None  # the diagonal of the scatter, where it is kept alone
        if scatter is not None and scatter.ndim == 1:
            self._squares = exact(scatter).clone()
        elif scatter is not None:  # the higher moments, by which estimators judge how sure it is, are not known
            unknown = torch.full_like(self._origin, torch.nan)
            self._scatter = Scatter(exact(scatter).clone(), unknown, unknown.sum())
        self._shared = False

    @classmethod
    @torch.inference_mode(mode=False)
    def empty(cls, d: int, *, covariance: Covariance = False, device: torch.device | str | None = None) -> Moments:
        """The moments of no rows of d features, 0 if that is not known: they change no others by merging."""
        if not isinstance(covariance, bool) and covariance != "diagonal":
            raise ValueError(f"covariance: expected False, True or 'diagonal', got {covariance!r}")
        made = cls(0, torch.zeros(d, dtype=torch.float64, device=device))
        made._scatter = Scatter.zero(made._origin) if covariance is True else None
        made._squares = torch.zeros_like(made._origin) if covariance == "diagonal" else None
        return made

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"], *, covariance: Covariance = False) -> Moments:
        """The moments of these rows."""
        if rows.ndim != 2:
            raise ShapeError(f"expected rows of shape (n, d), got {tuple(rows.shape)}")
        device = "cpu" if rows.device.type == "mps" else rows.device  # which has no float64
        return cls.empty(rows.shape[1], covariance=covariance, device=device).update(rows)

    # --- reading -------------------------------------------------------------------------------------------------
    @property
    def kept(self) -> Covariance:
        """What was collected beside the mean: False, "diagonal" or True, as `collect(covariance=)` takes it."""
        return "diagonal" if self._squares is not None else self._scatter is not None

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
    def _offset(self) -> Float[Tensor, " d"]:
        """The mean less the origin."""
        return self._total / max(1, self.count)

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """The unbiased variance of each feature, shape (d,): the diagonal of the covariance, or what was kept of it.

        Raises:
            StatisticsError: it was not collected, or there are fewer than two rows.
        """
        squares = self._sums().second.diagonal() if self._squares is None else self._squares
        return squares / self._degrees("variance")

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance, shape (d, d): the scatter divided by count - 1.

        Raises:
            StatisticsError: it was not collected, or there are fewer than two rows.
        """
        return self.scatter.div_(self._degrees("covariance"))

    @property
    def rms_norm(self) -> float:
        """The root of the mean of ‖x‖², sqrt(‖mean‖² + tr S / n); a few huge activations make it large.

        Raises:
            StatisticsError: no variance was collected, or there are no rows.
        """
        squares = self._sums().second.diagonal() if self._squares is None else self._squares
        return float((self.mean.square().sum() + squares.sum() / self.count).sqrt())

    @property
    def scatter(self) -> Float[Tensor, "d d"]:
        """The sum of (x - mean)(x - mean)ᵀ over the rows, shape (d, d)."""
        return whole(self._sums().second)

    @property
    def fourth(self) -> Float[Tensor, ""]:
        """The sum of ‖x - mean‖⁴ over the rows, 0-dim; nan if the moments were made from a scatter alone."""
        return self._sums().fourth.clone()

    @property
    def is_finite(self) -> bool:
        """Whether the mean is, and what was collected beside it: sums of squares overflow before their terms do."""
        squares = self._squares if self._scatter is None else self._scatter.second.diagonal()  # the largest, by Cauchy
        parts = [self._origin, self._total] if squares is None else [self._origin, self._total, squares]
        return all(bool(part.isfinite().all()) for part in parts)

    def _degrees(self, name: str) -> int:
        if self.count < 2:
            raise StatisticsError(f"the {name} of a single row is not defined; collect at least two")
        return self.count - 1

    def _sums(self) -> Scatter:
        if self._squares is not None:
            raise StatisticsError(
                "the variances alone were collected, with covariance='diagonal'; collect with covariance=True"
            )
        if self._scatter is None:
            raise StatisticsError("no covariance was collected; collect with covariance=True")
        return self._scatter

    # --- growing -------------------------------------------------------------------------------------------------
    def update(self, rows: Float[Tensor, "n d"]) -> Moments:
        """Take in more rows, in place and in blocks; returns itself.

        Raises:
            ShapeError: not rows of d features.
        """
        shape = rows.shape
        if len(shape) != 2 or shape[1] != self.d:
            raise ShapeError(f"expected rows of shape (n, {self.d}), got {tuple(shape)}; is it the same model?")
        if count := shape[0]:
            if rows.dtype is not self.dtype:
                self.dtype = rows.dtype if self.dtype is None else wider(self.dtype, rows.dtype)
            if self._shared:
                self._unshare()
            if type(rows) is not Tensor or rows.requires_grad:
                rows = rows.detach().as_subclass(Tensor)
            if self._scatter is None and self._squares is None:
                self._absorb_mean(rows, count)
            else:
                for block in rows.split(BLOCK):
                    self._absorb(exact(block).to(self._origin.device))
        return self

    def merge(self, other: Moments) -> Moments:
        """The moments of both parts together; no rows merge with any other without changing it.

        Raises:
            ShapeError, StatisticsError: other features; a covariance on one side alone.
        """
        if self.d != other.d and self.d and other.d:
            raise ShapeError(f"{self.d} features against {other.d}; were they collected on one model?")
        if not (self.count and other.count):
            return (other if other.count or not self.d else self).copy()
        if self.kept != other.kept:
            raise StatisticsError(
                f"one part has covariance={self.kept!r}, the other {other.kept!r}; collect both alike"
            )
        device = self._origin.device
        count = self.count + other.count
        moved = (other._origin.to(device) - self._origin) + (other._offset.to(device) - self._offset)
        merged = Moments(count, self._origin)
        merged.dtype = wider(self.dtype or torch.float64, other.dtype or torch.float64)
        further = (other._origin.to(device) - self._origin) * other.count
        merged._total = self._total + (further + other._total.to(device))
        if self._scatter is not None and other._scatter is not None:
            ours, theirs = (self._scatter, self.count), (other._scatter.to(device), other.count)
            third, fourth = moved_sums(*ours, -moved * (other.count / count))
            more_third, more_fourth = moved_sums(*theirs, moved * (self.count / count))
            second = ours[0].second + theirs[0].second
            second.addr_(moved, moved * (self.count * other.count / count))
            merged._scatter = Scatter(second, third + more_third, fourth + more_fourth)
        if self._squares is not None and other._squares is not None:
            between = moved.square() * (self.count * other.count / count)
            merged._squares = self._squares + other._squares.to(device) + between
        return merged

    def copy(self) -> Moments:
        """The same moments; the two share their tensors until either is updated."""
        copied = Moments.__new__(Moments)
        copied.count, copied.d, copied.dtype, copied._buffer = self.count, self.d, self.dtype, None
        copied._origin, copied._total = self._origin, self._total
        copied._scatter, copied._squares = self._scatter, self._squares
        copied._shared = self._shared = True
        return copied

    def __neg__(self) -> Moments:
        """The moments of the negated rows."""
        negated = Moments(self.count, -self._origin)
        negated._total, negated.dtype = -self._total, self.dtype
        if (sums := self._scatter) is not None:
            negated._scatter = Scatter(sums.second.clone(), -sums.third, sums.fourth.clone())
        negated._squares = None if self._squares is None else self._squares.clone()
        return negated

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, d={self.d}, covariance={self.kept!r})"

    @torch.inference_mode(mode=False)
    def _unshare(self) -> None:
        self._origin, self._total = self._origin.clone(), self._total.clone()
        self._scatter = None if self._scatter is None else self._scatter.clone()
        self._squares = None if self._squares is None else self._squares.clone()
        self._shared = False

    def _absorb_mean(self, rows: Float[Tensor, "n d"], count: int) -> None:
        """In place, in a buffer that is kept: it costs little more than the sum of the rows."""
        origin, buffer = self._origin, self._buffer
        if buffer is None:
            with torch.inference_mode(mode=False):
                buffer = self._buffer = torch.empty_like(origin)
        if rows.device != origin.device:
            rows = exact(rows).to(origin.device)
        torch.sum(rows, 0, dtype=torch.float64, out=buffer)
        if self.count:
            self._total.add_(buffer.sub_(origin, alpha=count))
        else:
            torch.div(buffer, count, out=origin)
        self.count += count

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _absorb(self, rows: Float[Tensor, "n d"]) -> None:
        if not self.count:
            self._origin = rows.mean(dim=0)
        number = len(rows)
        count = self.count + number
        buffer = rows.new_empty(number + 1, self.d)
        rows = torch.sub(rows, self._origin, out=buffer[:number])  # exact within a factor of two of the origin
        shift = rows.mean(dim=0)
        moved = shift - self._offset
        if (sums := self._scatter) is not None:
            rows -= shift
            third, fourth = moved_sums(sums, self.count, -moved * (number / count))
            squares = rows.square().sum(dim=1)
            block_third, block_fourth = squares @ rows, squares.square().sum()
            delta = moved * (self.count / count)
            along, square = rows @ delta, delta.square().sum()
            total = squares.sum()
            third += block_third + 2 * (along @ rows) + (number * square + total) * delta
            fourth += block_fourth + 4 * (along.square().sum() + block_third @ delta)
            fourth += number * square.square() + 2 * total * square
            torch.mul(moved, (self.count * number / count) ** 0.5, out=buffer[number])  # in one product with the rows
            add_square(sums.second, buffer)
            self._scatter = Scatter(sums.second, third, fourth)
        if self._squares is not None:
            within = (rows - shift).square_().sum(dim=0)
            self._squares = self._squares + within + moved.square() * (self.count * number / count)
        self._total = self._total + shift * number
        self.count = count


def absorb(sums: dict[str, Moments], site: str, rows: Float[Tensor, "n d"], *, covariance: Covariance) -> None:
    """Take in rows of a site, whose moments may begin with them."""
    if site in sums:
        sums[site].update(rows)
    else:
        sums[site] = Moments.of(rows, covariance=covariance)


def moved_sums(sums: Scatter, count: int, shift: Float[Tensor, " d"]) -> tuple[Tensor, Tensor]:
    """The third and fourth sums of the same rows once `shift` is added to each of them."""
    if not count:
        return sums.third.clone(), sums.fourth.clone()
    product, trace, square = times(sums.second, shift), sums.second.diagonal().sum(), shift.square().sum()
    third = sums.third + 2 * product + (count * square + trace) * shift
    fourth = sums.fourth + 4 * (shift @ product + sums.third @ shift) + count * square**2 + 2 * trace * square
    return third, fourth


def wider(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """A dtype that holds the numbers of both; torch promotes no float8, whose numbers bfloat16 does not lose."""
    if one is other:
        return one
    return torch.promote_types(*(torch.bfloat16 if kind.itemsize == 1 else kind for kind in (one, other)))


def exact(tensor: Tensor) -> Tensor:
    """A plain tensor in float64, on a device that has it."""
    plain = tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)
    return (plain.cpu() if plain.device.type == "mps" else plain).double()
