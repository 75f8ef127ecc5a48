"""Measuring: effect and cost of a candidate at several strengths, halved for choosing and for reporting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import nn

from actsteer.steering.plan import interventions_of
from actsteer.steering.steerer import Steerer
from actsteer.tuning.budget import Budget, share
from actsteer.tuning.candidates import Candidate
from actsteer.tuning.doses import Doses
from actsteer.tuning.intervals import Interval, Of, Sample, halves
from actsteer.tuning.memory import Memory
from actsteer.tuning.metrics import Figures, Metric, OutputMetric, figures
from actsteer.tuning.retained import Retained
from actsteer.tuning.search import Point

_KL = "kl on retain"  # beside the names of the metrics


@final
class Measuring:
    """Measures candidates against an unsteered model.

    Args:
        evaluate, confirm, budget: as for `calibrate`.
        where: the axes and the mask, as for `Steerer`.
        generator: of the halves.
    """

    def __init__(
        self,
        model: nn.Module,
        retained: Retained,
        *,
        evaluate: Metric,
        confirm: Metric | None,
        budget: Budget,
        where: Mapping[str, Any],
        batch_size: int,
        generator: torch.Generator,
        memory: Memory,
    ) -> None:
        self._model, self._retained, self._budget = model, retained, budget
        self._evaluate, self._confirm, self._where, self._memory = evaluate, confirm, where, memory
        self._doses: dict[str, Any] = {"batch_size": batch_size, "one_by_one": where["row_axis"] is not None}
        self._plain = memory.once("unsteered", lambda: figures(evaluate(model)))
        self.effect = budget.effect(list(self._plain))
        seed = int(torch.randint(2**31, (), generator=generator))
        sizes = {name: torch.arange(len(row)) for name, row in self._plain.items()}
        owners = sizes | ({_KL: retained.owners} if budget.of_kl else {})
        split = {rows: halves(rows, generator) for rows in sorted({int(own.max()) + 1 for own in owners.values()})}
        self._chooses, self._reports = (
            {name: Sample(own, split[int(own.max()) + 1][side], seed=seed) for name, own in owners.items()}
            for side in (0, 1)
        )

    @property
    def is_halved(self) -> bool:
        """Whether the effect is reported on other data than those by which it is chosen."""
        return len(self._plain[self.effect]) > 1 or self._confirm is not None

    def unsteered(self) -> float:
        """The effect of the model as it is, as it is reported."""
        return self._effect_of(
            self._plain if self._confirm is None else figures(self._confirm(self._model), by="confirm")
        )[0]

    def measure(self, candidate: Candidate, doses: Sequence[float], *, remember: bool = True) -> list[Point]:
        """The candidate at each of these doses; the effect of those alone that are within the budget."""
        keys = [f"{candidate.name} at {dose!r}" for dose in doses]
        if remember and all(map(self._memory.knows, keys)):
            found = [self._memory.once(key, dict) for key in keys]
        else:
            found = self._measured(candidate, doses)
            if remember:
                found = [self._memory.once(key, lambda own=own: own) for key, own in zip(keys, found, strict=True)]  # type: ignore[misc]
        return [self._point(candidate, dose, own) for dose, own in zip(doses, found, strict=True)]

    def _measured(self, candidate: Candidate, doses: Sequence[float]) -> list[Figures]:
        strengths = [candidate.c(dose) for dose in doses]
        found: list[Figures] = [{} for _ in doses]
        if self._budget.of_kl:
            with candidate.steerer(self._model, self._where, on_texts=True) as steerer:
                lost = self._retained.kl(Doses(self._model, steerer, **self._doses), strengths)
                found = [{_KL: own} for own in lost]
                if candidate.steers_alike_on_texts:
                    self._evaluated(steerer, strengths, found)
                    return found
        with candidate.steerer(self._model, self._where) as steerer:
            self._evaluated(steerer, strengths, found)
        return found

    def _evaluated(self, steerer: Steerer, strengths: Sequence[float], found: list[Figures]) -> None:
        """Add what `evaluate` gives at the strengths that are within the budget so far."""
        rest = [place for place, own in enumerate(found) if self._spent(own, self._chooses) <= 1.0]
        if isinstance(self._evaluate, OutputMetric) and rest:
            rows = self._evaluate.at(Doses(self._model, steerer, **self._doses), [strengths[own] for own in rest])
            for place, row in zip(rest, rows, strict=True):
                found[place] |= figures(row)
            return
        for place in rest:
            steerer.c = strengths[place]
            found[place] |= figures(self._evaluate(self._model))

    def _point(self, candidate: Candidate, dose: float, found: Figures) -> Point:
        effect = self._chooses[self.effect].of(found[self.effect], "mean") if self.effect in found else -math.inf
        return Point(candidate, dose, effect, self._spent(found, self._chooses), found)

    def _spent(self, found: Figures, samples: Mapping[str, Sample]) -> float:
        """The largest share of a bound that is used up, as far as it was measured."""
        return max(
            (share(value, self._budget.bounds[name]) for name, (value, _) in self._costs(found, samples).items()),
            default=0.0,
        )

    def _costs(
        self, found: Figures, samples: Mapping[str, Sample], *, intervals: bool = False
    ) -> dict[str, tuple[float, Interval | None]]:
        asked: list[tuple[str, str, Of]] = [(name, _KL, name) for name in self._budget.of_kl]
        asked += [(name, name, "mean") for name in self._budget.of_metrics]
        return {
            name: (samples[row].of(found[row], of), samples[row].interval(found[row], of) if intervals else None)
            for name, row, of in asked
            if row in found
        }

    def _effect_of(self, found: Figures) -> tuple[float, Interval | None]:
        row = found[self.effect]
        known = (
            self._reports[self.effect]
            if self._confirm is None
            else Sample(torch.arange(len(row)), torch.ones(len(row), dtype=torch.bool), seed=0)
        )
        return known.of(row, "mean"), known.interval(row, "mean")

    def confirmed(self, point: Point) -> tuple[float, Interval | None]:
        """The effect at a point as it is reported."""
        if self._confirm is None:
            return self._effect_of(point.figures)
        with point.candidate.steerer(self._model, self._where) as steerer:
            steerer.c = point.candidate.c(point.dose)
            return self._effect_of(figures(self._confirm(self._model), by="confirm"))

    def row(self, point: Point, *, confirm: bool = False) -> dict[str, Any]:
        """The point as a row of the table, with the figures of the half that reports."""
        effect: tuple[float | None, Interval | None] = (None, None)
        if self.effect in point.figures:
            effect = self.confirmed(point) if confirm or self._confirm is None else (point.effect, None)
        costs = self._costs(point.figures, self._reports, intervals=True)
        first = next(iter(costs.values()))
        steering = point.candidate.steering
        return {
            "sites": point.candidate.sites,
            "intervention": ", ".join(
                dict.fromkeys(repr(own) for own in interventions_of(steering.vectors, steering.intervention))
            ),
            "positions": "all" if steering.positions is None else steering.positions,
            "c": point.candidate.c(point.dose),
            "dose": point.dose,
            "effect": effect[0],
            "effect_interval": effect[1],
            "cost": first[0],
            "cost_interval": first[1],
            "costs": costs,
            "feasible": point.feasible,
        }
