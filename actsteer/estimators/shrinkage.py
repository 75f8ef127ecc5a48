"""Shrinkage: a covariance on its way to a multiple of the identity."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from actsteer.errors import StatisticsError


def check_shrinkage(shrinkage: float | None) -> None:
    """Raise ValueError unless it is a share, or None for the one of least expected error."""
    if shrinkage is not None and not 0.0 <= shrinkage <= 1.0:
        raise ValueError(f"shrinkage: expected a number in [0, 1] or None, got {shrinkage}")


def shrunk(
    scatter: Float[Tensor, "d d"], fourth: Float[Tensor, ""], *, rows: int, degrees: int, shrinkage: float | None
) -> Float[Tensor, "d d"]:
    """(1 - ρ) S + ρ (tr S / d) I with S = scatter / degrees, in the memory of the scatter.

    Args:
        fourth: Σ ‖x‖⁴ over the centred rows.
        shrinkage: ρ; None takes the one of least expected error (Ledoit & Wolf 2004).

    Raises:
        StatisticsError: ρ is to be found, and the fourth powers are not known.
    """
    rho = _ledoit_wolf(scatter, float(fourth), rows) if shrinkage is None else shrinkage
    covariance = scatter.div_(degrees)
    level = covariance.trace() / len(covariance)
    covariance.mul_(1 - rho).diagonal().add_(rho * level)
    return covariance


def _ledoit_wolf(scatter: Tensor, fourth: float, n: int) -> float:
    """The shrinkage of the covariance of n centred rows x, from Σ xxᵀ and Σ ‖x‖⁴."""
    if fourth != fourth:  # nan
        raise StatisticsError(
            "these moments were made from a scatter alone, which does not tell how sure it is; pass shrinkage="
        )
    d = len(scatter)
    square = float(scatter.square().sum()) / n**2
    apart = square - (float(scatter.trace()) / n) ** 2 / d  # how far the covariance is from a multiple of the identity
    error = (fourth / n - square) / n  # how far it is, in expectation, from that of all data
    return min(1.0, max(0.0, error / apart)) if apart > 0 else 1.0
