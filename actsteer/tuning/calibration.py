"""Calibration: what was measured of a steering at every site and strength, and the point that was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any, final

import actsteer.html as html
from actsteer.steering.interventions.add import Add
from actsteer.steering.steering import Steering
from actsteer.tuning.intervals import Interval
from actsteer.tuning.text_table import lines


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Calibration:
    """What `calibrate` has found.

    Every figure is of the half of the data by which nothing was chosen, with the interval in which 95 % of bootstrap
    draws lie, None where there is one number for all data. With `confirm` the effects of the chosen point, of the model
    as it is, and of controls are of its data.

    Args:
        best: the chosen steering, with its evidence; of strength 0 where nothing was found that can be trusted.
        table: a row for every point that was measured, in the order in which it was: "sites", "intervention",
            "positions"; "c", the strength of a Steerer, and "dose", the same in units of the typical norm; "effect",
            None where it was not measured for the cost was over the budget, and "effect_interval"; "cost", what the
            budget bounds first, and "cost_interval"; "costs", all that it bounds; "feasible", by the half that chooses.
        chosen: the row of the best point; None if none is within the budget.
        unsteered: the effect of the model as it is, and `unsteered_interval`.
        controls: the effects at the points that were chosen for the random and the shuffled directions.
        percentile: how many of them, in %, lie below the chosen point's effect; None without controls.
        budget: bound by name.
        reported_on_choice: whether the effect is of the same data by which the point was chosen.
    """

    best: Steering
    table: list[dict[str, Any]]
    chosen: dict[str, Any] | None
    unsteered: float
    unsteered_interval: Interval | None
    controls: tuple[float, ...]
    percentile: float | None
    budget: dict[str, float]
    reported_on_choice: bool

    @property
    def found(self) -> bool:
        """Whether a strength was found that does more than not steering, and than every control."""
        return bool(self.best.c != 0)

    @property
    def pareto(self) -> list[dict[str, Any]]:
        """The rows to which no other is preferable, with a larger effect at no more cost; cheapest first."""
        known = [row for row in self.table if row["effect"] is not None]
        kept: list[dict[str, Any]] = []
        for row in sorted(known, key=lambda row: (row["cost"], -row["effect"])):
            if not kept or row["effect"] > kept[-1]["effect"]:
                kept.append(row)
        return kept

    @property
    def verdict(self) -> str:
        """What was found, in a sentence."""
        if self.chosen is None:
            return "c = 0: no strength is within the budget"
        where = f"at site{'s' * (len(self.chosen['sites']) > 1)} {said_of(self.chosen)}, c = {self.chosen['c']:.4g}"
        effect = f"effect {_with(self.chosen['effect'], self.chosen['effect_interval'])} {where}"
        said = f"{effect}, unsteered {_with(self.unsteered, self.unsteered_interval)}"
        note = "; chosen and reported on the same data, for which evaluate gives one number" * self.reported_on_choice
        if self.percentile is None:
            against = "no controls were asked for, so that any direction might do the same"
        else:
            against = f"percentile {self.percentile:.1f} of {len(self.controls)} controls"
        over = [f"{name} {value:.4g}" for name, (value, _) in self.chosen["costs"].items() if value > self.budget[name]]
        note += f"; on the half that reports the cost is over the budget: {', '.join(over)}" if over else ""
        if self.found:
            return f"{said}; {against}{note}"
        as_much = sum(own >= self.chosen["effect"] for own in self.controls)
        why = "no more than unsteered" if self.chosen["effect"] <= self.unsteered else f"{as_much} of them do as much"
        return f"c = 0: the best within the budget is {said}; {against}: {why}{note}"

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw effect against cost, the Pareto front and the controls, as PNG, SVG or PDF by the suffix.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from actsteer.tuning.picture import draw

        draw(self, path)

    def __str__(self) -> str:
        rows = [_cells(row, chosen=row is self.chosen) for row in self._shown()]
        return "\n".join([*lines([_HEADS, *rows]), "", self.verdict])

    def _repr_html_(self) -> str:
        rows = self._shown()
        gains = [0.0 if row["effect"] is None else row["effect"] - self.unsteered for row in rows]
        cells = (
            (*_cells(row, chosen=row is self.chosen), html.bar(gain, of=max(gains)))
            for row, gain in zip(rows, gains, strict=True)
        )
        return html.table(self.verdict, [*_HEADS, "effect over unsteered"], cells, total=len(rows))

    def _shown(self) -> list[dict[str, Any]]:
        """The best row of every place and way, in the order of the table, and the chosen one."""
        best: dict[Any, dict[str, Any]] = {}
        for row in self.table:
            key = place_of(row)
            rank = (row["feasible"], row["effect"] if row["effect"] is not None else float("-inf"), -row["cost"])
            if key not in best or rank > best[key]["_rank"]:
                best[key] = {"_rank": rank, "row": row}
        if self.chosen is not None:
            best[place_of(self.chosen)]["row"] = self.chosen
        return [own["row"] for own in best.values()]

    def __repr__(self) -> str:
        return f"Calibration(best={self.best!r}, points={len(self.table)}, controls={len(self.controls)})"


_HEADS = ("", "sites", "c", "dose", "effect", "cost")


def _cells(row: dict[str, Any], *, chosen: bool) -> tuple[str, ...]:
    effect = "over the budget" if row["effect"] is None else _with(row["effect"], row["effect_interval"])
    return (
        "*" * chosen,
        said_of(row),
        f"{row['c']:.4g}",
        f"{row['dose']:.3g}",
        effect,
        _with(row["cost"], row["cost_interval"]),
    )


def _with(value: float, interval: Interval | None) -> str:
    return f"{value:.4g}" if interval is None else f"{value:.4g} ({interval[0]:.4g} to {interval[1]:.4g})"


def place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where and how a row steers, which tells it from rows at other places."""
    return (row["sites"], row["intervention"], repr(row["positions"]))


def said_of(row: dict[str, Any]) -> str:
    """The same in a few words."""
    sites = row["sites"]
    named = sites[0] if len(sites) == 1 else f"{sites[0]} … {sites[-1]} ({len(sites)})"
    return " ".join(
        [
            named,
            *(str(row[key]) for key in ("intervention", "positions") if row[key] not in (repr(Add()), "all")),
        ]
    )
