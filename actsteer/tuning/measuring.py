"""Measuring: effect and cost of a candidate at several strengths, halved for choosing and for reporting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import nn

from actsteer.steering.plan import interventions_of
from actsteer.steering.steerer import Steerer
from actsteer.tuning.budget import KL, Budget, share
from actsteer.tuning.candidates import Candidate
from actsteer.tuning.doses import Doses
from actsteer.tuning.intervals import Interval, Of, Sample, halves
from actsteer.tuning.memory import Memory
from actsteer.tuning.metrics import Figures, Found, Metric, OutputMetric, figures
from actsteer.tuning.retained import Retained
from actsteer.tuning.search import Point

_KL = "kl"  # beside the names of the metrics


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
        together: bool,
        generator: torch.Generator,
        memory: Memory,
    ) -> None:
        self._model, self._retained, self._budget = model, retained, budget
        self._evaluate, self._confirm, self._where, self._memory = evaluate, confirm, where, memory
        self._batch_size, self._together = batch_size, together
        self._plain = memory.once("unsteered", lambda: figures(evaluate(model)))
        if taken := [name for name in self._plain if name in (*KL, _KL)]:
            raise ValueError(f"evaluate: {taken} are names of what is lost on retain; give the metrics other names")
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

    def unsteered(self) -> tuple[float, Interval | None]:
        """The effect of the model as it is, as it is reported."""
        return self._of_half(self._plain) if self._confirm is None else self._confirmed(self._confirm)

    def measure(self, candidate: Candidate, doses: Sequence[float], *, remember: bool = True) -> list[Point]:
        """The candidate at each of these doses; the effect of those alone that are within the budget."""
        keys = [f"{candidate.name} at {dose!r}" for dose in doses]
        known = [self._memory.get(key) for key in keys] if remember else []
        found = [own for own in known if own is not None]
        if len(found) < len(doses):
            found = self._measured(candidate, doses)
            for key, own in zip(keys, found, strict=True):
                if remember:
                    self._memory.keep(key, own)
        return [self._point(candidate, dose, own) for dose, own in zip(doses, found, strict=True)]

    def _measured(self, candidate: Candidate, doses: Sequence[float]) -> list[Figures]:
        strengths = [candidate.c(dose) for dose in doses]
        found: list[Figures] = [{} for _ in doses]
        if self._budget.of_kl:
            with candidate.steerer(self._model, self._where, on_texts=True) as steerer:
                lost = self._retained.kl(self._doses(candidate, steerer, self._batch_size), strengths)
                found = [{_KL: own} for own in lost]
                if candidate.steers_alike_on_texts:
                    self._evaluated(candidate, steerer, strengths, found)
                    return found
        with candidate.steerer(self._model, self._where) as steerer:
            self._evaluated(candidate, steerer, strengths, found)
        return found

    def _doses(self, candidate: Candidate, steerer: Steerer, batch_size: int) -> Doses:
        axis = self._where["row_axis"]
        together = self._together and axis is None and not candidate.is_of_a_batch
        return Doses(
            self._model,
            steerer,
            batch_size=batch_size,
            together=together,
            row_axis=axis if isinstance(axis, int) else 0,
        )

    def _evaluated(
        self, candidate: Candidate, steerer: Steerer, strengths: Sequence[float], found: list[Figures]
    ) -> None:
        """Add what `evaluate` gives at the strengths that are within the budget so far."""
        rest = [place for place, own in enumerate(found) if self._spent(own, self._chooses) <= 1.0]
        if isinstance(self._evaluate, OutputMetric) and rest:
            doses = self._doses(candidate, steerer, self._evaluate.batch_size)
            given: Iterable[Found] = self._evaluate.at(doses, [strengths[own] for own in rest])
        else:
            given = map(partial(self._at, steerer), (strengths[own] for own in rest))
        for place, own in zip(rest, given, strict=True):
            by = f"evaluate, at c = {strengths[place]:.4g} and sites {list(candidate.sites)}"
            new = figures(own, by=by)
            sizes = ({name: len(row) for name, row in each.items()} for each in (self._plain, new))
            if len({tuple(sorted(each.items())) for each in sizes}) > 1:
                raise ValueError(f"{by}: expected what the unsteered model has, the same names and as many numbers")
            found[place] |= new

    def _at(self, steerer: Steerer, c: float) -> Found:
        steerer.c = c
        return self._evaluate(self._model)

    def _point(self, candidate: Candidate, dose: float, found: Figures) -> Point:
        effect = self._chooses[self.effect].of(found[self.effect], "mean") if self.effect in found else -math.inf
        return Point(candidate, dose, effect, self._spent(found, self._chooses), found)

    def _spent(self, found: Figures, samples: Mapping[str, Sample]) -> float:
        """The largest share of a bound that is used up, by the upper ends of intervals, as far as it was measured."""
        costs = self._costs(found, samples, intervals=True)
        return max(
            (
                share(value if interval is None else interval[1], self._budget.bounds[name])
                for name, (value, interval) in costs.items()
            ),
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

    def _of_half(self, found: Figures) -> tuple[float, Interval | None]:
        """The effect on the half that reports."""
        sample = self._reports[self.effect]
        return sample.of(found[self.effect], "mean"), sample.interval(found[self.effect], "mean")

    def _confirmed(self, confirm: Metric) -> tuple[float, Interval | None]:
        """The effect on the data of `confirm`, of the model as it is now."""
        row = figures(confirm(self._model), by="confirm")[self.effect]
        sample = Sample.of_all(len(row))
        return sample.of(row, "mean"), sample.interval(row, "mean")

    def reported(self, point: Point) -> tuple[float, Interval | None]:
        """The effect at a point as it is reported."""
        if self._confirm is None:
            return self._of_half(point.figures)
        with point.candidate.steerer(self._model, self._where) as steerer:
            steerer.c = point.candidate.c(point.dose)
            return self._confirmed(self._confirm)

    def row(self, point: Point, *, is_best: bool = False) -> dict[str, Any]:
        """The point as a row of the table, with the figures of the half that reports."""
        effect: tuple[float | None, Interval | None] = (None, None)
        if self.effect in point.figures:
            effect = self.reported(point) if is_best else self._of_half(point.figures)
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
