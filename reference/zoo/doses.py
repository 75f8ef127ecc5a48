"""Doses: every direction at every strength, as rows of a table and as lines of a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from torch import Tensor, nn

from actsteer import Edit, VectorBank, sweep
from reference.style import CONTROL, STEERED, TRUTH, UNSTEERED
from reference.zoo.finding import Row

STYLES = {"random": ":", "shuffled": "-."}
"""How the controls are drawn; any other line is of a direction that means something."""


def doses(
    model: nn.Module,
    steerings: Mapping[str, VectorBank | Edit],
    *,
    c: Sequence[float],
    evaluate: Callable[[nn.Module], Mapping[str, Any]],
    each_row: Callable[[float], float | dict[str, Tensor]] = float,
    positions: Literal["all", "last"] = "all",
) -> list[Row]:
    """The unsteered model, then each steering at each strength.

    Args:
        each_row: what the strength is for every concept and row of the batch; the strength itself unless given.
    """
    rows: list[Row] = [{"steering": "none", "c": 0.0, **evaluate(model)}]
    for name, own in steerings.items():
        strengths = [each_row(strength) for strength in c]
        swept = sweep(model, own, c=strengths, evaluate=evaluate, positions=positions, progress=False)
        rows += [{"steering": name, **row, "c": strength} for strength, row in zip(c, swept, strict=True)]
    return rows


def draw_doses(axes: Axes, rows: Sequence[Row], column: str, *, label: str) -> None:
    """One column against c, a line for each steering; rows without a strength are levels."""
    none = rows[0]
    for name in dict.fromkeys(row["steering"] for row in rows[1:] if row["c"] is not None):
        points = sorted((row["c"], row[column]) for row in rows if row["steering"] in ("none", name))
        color = CONTROL if name in STYLES else STEERED
        axes.plot(*zip(*points, strict=True), STYLES.get(name, "-"), marker=".", color=color, label=name)
    axes.axhline(none[column], color=UNSTEERED, lw=1, ls="--", label="not steered")
    for row in rows:
        if row["c"] is None:
            axes.axhline(row[column], color=TRUTH, lw=1, ls="--", label=row["steering"])
    axes.set_xlabel("strength c")
    axes.set_ylabel(label)
