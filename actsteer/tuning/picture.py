"""Pictures: effect against cost of all that was calibrated, and what patching recovered at every site and position."""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

from actsteer.tuning.calibration import Calibration, said_of
from actsteer.tuning.patched import Patched


def draw(calibration: Calibration, path: str | PathLike[str]) -> None:
    """Write effect against cost, with the front of what is worth choosing; the suffix tells the kind of picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(7.2, 4.5)
    axes = figure.add_subplot()
    known = [row for row in calibration.table if row["effect"] is not None]
    axes.scatter(*_xy(known), s=14, color="#9aa5b1", linewidths=0, label="measured")
    front = calibration.pareto
    axes.plot(*_xy(front), color="#1f6f8b", marker="o", markersize=4, linewidth=1.5, label="no other is preferable")
    name, bound = next(iter(calibration.budget.items()))
    if math.isfinite(bound):
        axes.axvline(bound, color="#b3541e", linewidth=1, linestyle="--", label="budget")
    axes.axhline(calibration.unsteered, color="#6b7280", linewidth=1, linestyle=":", label="unsteered")
    if calibration.controls:
        left, right = axes.get_xlim()
        axes.hlines(
            calibration.controls,
            right - (right - left) * 0.03,
            right,
            color="#b3541e",
            linewidth=0.8,
            alpha=0.6,
            label=f"{len(calibration.controls)} controls",
        )
        axes.set_xlim(left, right)
    if calibration.chosen is not None:
        row = calibration.chosen
        label = "chosen" if calibration.found else "best within the budget; c = 0 is chosen"
        axes.scatter([row["cost"]], [row["effect"]], s=110, marker="*", color="#b3541e", zorder=3, label=label)
        for index, side in enumerate((row["effect_interval"], row["cost_interval"])):
            if side is not None:
                span: Any = ([row["cost"]] * 2, side) if index == 0 else (side, [row["effect"]] * 2)
                axes.plot(*span, color="#b3541e", linewidth=1)
        axes.set_title(f"{said_of(row)}, c = {calibration.best.c:.4g}", fontsize=10, loc="left")
    unit = " KL, nats" if name in ("mean", "p95") else ""
    axes.set_xlabel(f"cost ({name}{unit})")
    axes.set_ylabel("effect")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def draw_shares(patched: Patched, path: str | PathLike[str]) -> None:
    """Write the recovered shares as a map, one hue below 0 and another above it, full at -1 and 1.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(2.6 + 0.35 * len(patched.positions), 1.4 + 0.22 * len(patched.sites))
    from matplotlib.colors import LinearSegmentedColormap

    axes = figure.add_subplot()
    hues = LinearSegmentedColormap.from_list("shares", ["#2f7ed8", "#ffffff", "#e8710a"])
    image = axes.imshow(patched.recovered.tolist(), cmap=hues, vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(patched.positions)), patched.positions, fontsize=7, rotation=45, ha="right")
    axes.set_yticks(range(len(patched.sites)), patched.sites, fontsize=7)
    axes.set_xlabel("positions")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="share recovered", extend="both")
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib; pip install 'actsteer[look]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _xy(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["cost"] for row in rows], [row["effect"] for row in rows]
