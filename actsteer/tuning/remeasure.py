"""remeasured: what evidence says of effect and cost, measured again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from actsteer.collecting.batches import Batches
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import Steering
from actsteer.tuning.budget import KL
from actsteer.tuning.candidates import as_read
from actsteer.tuning.doses import Doses
from actsteer.tuning.evidence import Evidence, Figure, Held
from actsteer.tuning.intervals import Sample
from actsteer.tuning.metrics import Metric, figures
from actsteer.tuning.retained import Retained
from actsteer.tuning.told import digests_of
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector


def remeasured(
    model: nn.Module,
    steering: Steering | VectorBank | SteeringVector,
    known: Evidence,
    *,
    retain: Batches | None = None,
    evaluate: Metric | None = None,
    batch_size: int = 256,
) -> Iterator[Held]:
    """The costs on `retain`, and the effect by `evaluate`, beside what was recorded, where the data are those.

    They hold where the intervals overlap. Of other data nothing is said, for nothing was recorded.

    Args:
        steering: of vectors the strength is the recorded one.
    """
    given = steering if isinstance(steering, Steering) else Steering(steering, c=float(known.steering["c"]))
    bounded = [name for name in KL if name in known.costs]
    if retain is not None and bounded:
        sites = [site for _, vector in given.vectors.items() for site in vector]
        retained = Retained(
            model,
            retain,
            dict.fromkeys(sites),
            controls=0,
            where={},
            mask=None,
            batch_size=batch_size,
            generator=torch.Generator(),
            keep_outputs=True,
            progress=False,
        )
        if retained.digest == known.data.get("retain"):
            with Steerer(model, replace(given, positions=as_read(given.positions))):
                (lost,) = retained.kl(Doses(model, batch_size=batch_size), [0.0])  # at the strength as it is
            sample = Sample(retained.owners, torch.ones(int(retained.owners.max()) + 1, dtype=torch.bool), seed=0)
            for name in bounded:
                now = Figure(sample.of(lost, name), *(sample.interval(lost, name) or ()))
                yield Held(f"cost ({name})", str(known.costs[name]), str(now), now.overlaps(known.costs[name]))
    if evaluate is not None and digests_of(evaluate).get("effect") == known.data.get("effect"):
        with Steerer(model, given):
            found = figures(evaluate(model))
        recorded = {known.measure: ("effect", known.effect)}
        recorded |= {name: (f"cost ({name})", own) for name, own in known.costs.items() if name not in KL}
        for measure, row in found.items():
            if measure in recorded:
                what, before = recorded[measure]
                sample = Sample.of_all(len(row))
                now = Figure(sample.of(row, "mean"), *(sample.interval(row, "mean") or ()))
                yield Held(what, str(before), str(now), now.overlaps(before))
