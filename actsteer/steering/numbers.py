"""Numbers: what a user gives as one, as a float."""

from __future__ import annotations

import math


def finite(number: float, name: str) -> float:
    """The number as a float.

    Raises:
        ValueError: it is infinite or nan, or an integer beyond the range of a float.
    """
    given = _float(number, name)
    if not math.isfinite(given):
        raise ValueError(f"{name}: expected a finite number, got {given}")
    return given


def bound(number: float, name: str) -> float:
    """The number as a float, which may be infinite: everything lies below, or above.

    Raises:
        ValueError: it is nan, or an integer beyond the range of a float.
    """
    given = _float(number, name)
    if math.isnan(given):
        raise ValueError(f"{name}: expected a number, got nan, which nothing exceeds")
    return given


def check_flag(flag: bool, name: str) -> None:
    """TypeError unless it is True or False."""
    if type(flag) is not bool:
        raise TypeError(f"{name}: expected True or False, got {flag!r}")


def _float(number: float, name: str) -> float:
    if isinstance(number, str):
        raise TypeError(f"{name}: expected a number, got {number!r}")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name}: expected a number within the range of a float, got one beyond it") from None
