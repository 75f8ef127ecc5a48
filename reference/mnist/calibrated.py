"""`python -m reference.mnist.calibrated`: calibrate beside the suite's own search, and on labels that mean nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from actsteer import (
    Calibration,
    LayerMean,
    MeanDifference,
    OutputMetric,
    Steerer,
    SteeringVector,
    WhitenedMeanDifference,
    align,
    calibrate,
    collect,
    fit,
    record,
)
from reference.mnist.cross import paired
from reference.mnist.data import Mnist, Source, load
from reference.mnist.model import SITES, train_autoencoder, train_classifier
from reference.mnist.scores import balance
from reference.mnist.study import BUDGETS, STRENGTHS, Edit, Study

NEW, OLD = 9, tuple(range(9))
FITTED = WhitenedMeanDifference(shrinkage=0.1)
DOSES = [sign * 0.02 * 1.15**power for sign in (1, -1) for power in range(44)]
"""From 0.02 to 8 typical norms in steps of 15 %, either sign: as fine as the suite's own search."""


def fixed(study: Study, data: Mnist) -> dict[str, SteeringVector]:
    """The vectors of the fixed methods of the experiments self and cross."""
    model, seed, epochs = study.model, study.seed, study.budget.epochs
    nines, others = data.train.of(NEW), data.train.of(*OLD)
    of_a = collect(model, data.train.x, by=data.train.y, sites=SITES, progress=False)
    teacher = train_autoencoder(nines, seed=seed + 1000, epochs=epochs)
    of_b = collect(teacher, data.train.x, by=data.train.y, sites=SITES, covariance=True, progress=False)
    plain = collect(model, others.x, sites=SITES, progress=False)
    from_b_to_a = align(of_b.rest(NEW), plain, paired(teacher, model, others.x))
    within_b = MeanDifference()(positive=of_b[NEW], negative=of_b.rest(NEW))
    return {
        "self: layer_mean": LayerMean()(positive=of_a[NEW], negative=of_a.rest(NEW)),
        "self: mean_difference": MeanDifference()(positive=of_a[NEW], negative=of_a.rest(NEW)),
        "cross: layer_mean": LayerMean()(positive=of_b[NEW], negative=plain),
        "cross: mean_difference": MeanDifference()(positive=of_b[NEW], negative=plain),
        "cross: mapped_mean_difference": within_b.transport(from_b_to_a),
    }


def against_search(data: Mnist, *, seed: int, source: Source = "bundled") -> list[dict[str, Any]]:
    """For each fixed method the balance that either search reaches, on held-out images, which choose, and on test."""
    budget = BUDGETS[source]
    study = Study(train_classifier(data.train.of(*OLD), seed=seed, epochs=budget.epochs), data, (NEW,), seed, budget)
    rows: list[dict[str, Any]] = []
    for name, vector in fixed(study, data).items():
        edit, _ = study.strongest(vector, STRENGTHS)
        found = calibrate(
            study.model,
            vector,
            evaluate=lambda model: balance(study.held_out(model)),
            retain=data.held_out.of(*OLD).x,
            budget=math.inf,
            controls=0,
            doses=DOSES,
            progress=False,
        )
        row = found.chosen
        assert row is not None
        chosen = Edit(vector, row["c"])
        with Steerer(study.model, vector, c=row["c"], sites=list(row["sites"])):
            ours = balance(study.held_out(study.model)), balance(study.test(study.model))
        theirs = balance(study.judged(edit)), balance(study.report(edit))
        rows.append(
            {"method": name, "seed": seed, "sites": row["sites"], "c": chosen.c, "ours": ours, "theirs": theirs}
        )
    return rows


def shuffled(data: Mnist, *, seed: int, controls: int = 99, count: int = 200, means: bool = False) -> Calibration:
    """A calibrated direction from other digits to 3, that is to turn fives into threes; of shuffled labels, unless they
    are to mean something.
    """
    generator = torch.Generator().manual_seed(seed)
    model = train_classifier(data.train.of(*OLD), seed=0, epochs=10)
    sides = data.train.of(3).x, data.train.of(*(digit for digit in OLD if digit != 3)).x
    both = torch.cat([_some(side, count, generator) for side in sides])
    if not means:
        both = both[torch.randperm(len(both), generator=generator)]
    positive, negative = both.split(count)
    v = fit(model, positive=positive, negative=negative, sites=SITES[-1], estimator=FITTED, progress=False)
    rows = [record(model, own, sites=SITES[-1], progress=False) for own in (positive, negative)]
    return calibrate(
        model,
        v,
        evaluate=OutputMetric(inputs=data.held_out.of(5).x[:count], score=lambda out: out.log_softmax(dim=1)[:, 3]),
        retain=_some(data.held_out.of(0, 1, 2, 4, 6, 7, 8).x, count, generator),
        budget=0.1,
        rows=(rows[0], rows[1]),
        estimator=FITTED,
        controls=controls,
        generator=generator,
        progress=False,
    )


def _some(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=generator)[:count]]


def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many models are searched.")] = 3,
    shuffles: Annotated[int, typer.Option(min=0, help="How many sets of shuffled labels are calibrated.")] = 20,
    controls: Annotated[int, typer.Option(min=1, help="How many controls of each kind.")] = 99,
    data: Annotated[Source, typer.Option(help="The bundled sample, or all of MNIST.")] = "bundled",
    data_root: Annotated[Path | None, typer.Option(help="Where full MNIST is.")] = None,
) -> None:
    """Print what calibrate reaches beside the suite's own search, and how often it is taken in by shuffled labels."""
    console, digits = Console(width=120), load(data, data_root)
    table = Table(title="balance of retained and acquired: calibrate, the suite's search", box=None)
    for column in ("method", "seed", "sites", "c", "held-out", "the suite's", "test", "the suite's"):
        table.add_column(column, justify="left" if column in ("method", "sites") else "right")
    for seed in range(seeds):
        for row in against_search(digits, seed=seed, source=data):
            pairs = [f"{own:.3f}" for place in (0, 1) for own in (row["ours"][place], row["theirs"][place])]
            table.add_row(row["method"], str(seed), " ".join(row["sites"]), f"{row['c']:.3g}", *pairs)
    console.print(table)
    real = shuffled(digits, seed=0, controls=controls, means=True)
    console.print(f"labels that mean something: {real.verdict}")
    zero = sum(not shuffled(digits, seed=seed, controls=controls).found for seed in range(shuffles))
    console.print(f"shuffled labels: c = 0 for {zero} of {shuffles}")


if __name__ == "__main__":
    typer.run(main)
