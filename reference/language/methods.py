"""`python -m reference.language.methods`: estimators and interventions side by side on one language model.

All are fitted on the same pairs of happy and unhappy texts, at one block of SmolLM2, and act on all tokens of a text
but the first. Directions are made as long as the mean difference, so that where they point is compared. Measured on
texts that nothing was fitted on: how far the log-odds of good against bad words move after neutral beginnings; the gap,
how much higher they are after happy texts than after unhappy ones, which erasing is to close; and the perplexity.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from actsteer import (
    Ablate,
    Add,
    Chain,
    Clamp,
    ConceptErasure,
    Conceptor,
    GaussianMap,
    KeepNorm,
    LayerMean,
    LogisticDirection,
    MeanDifference,
    NullSpace,
    PairedMap,
    PrincipalDirection,
    RidgeDirection,
    Rotate,
    Steerer,
    WhitenedMeanDifference,
    fit,
    optimize,
    record,
)
from reference.controls import as_long_as
from reference.language.data import CHOOSE, PAIRS, REPORT
from reference.language.model import load
from reference.language.study import DEPTH, Study
from reference.printed import console, table

FITTED, HELD_OUT = PAIRS[:72:2], PAIRS[72::2]  # of six openings, and of the two others
DIRECTIONS = {
    "MeanDifference": MeanDifference(),
    "WhitenedMeanDifference": WhitenedMeanDifference(),
    "PrincipalDirection": PrincipalDirection(),
    "PrincipalDirection, paired": PrincipalDirection(paired=True),
    "RidgeDirection": RidgeDirection(alpha=1.0),
    "LogisticDirection": LogisticDirection(),
    "LogisticDirection, paired": LogisticDirection(paired=True),
    "LayerMean": LayerMean(),
}
EDITS = {
    "GaussianMap": GaussianMap(),
    "GaussianMap, diagonal": GaussianMap(diagonal=True),
    "PairedMap": PairedMap(),
    "PairedMap, rank 1": PairedMap(rank=1),
    "ConceptErasure": ConceptErasure(),
    "ConceptErasure, shrinkage=1": ConceptErasure(shrinkage=1),
}


def steerings(study: Study) -> dict[str, Callable[[], Any]]:
    """Name -> what makes it: vectors or an edit, and perhaps an intervention."""
    site = study.site(DEPTH)
    sides = [study.batches([pair[side] for pair in FITTED]) for side in (0, 1)]
    how: dict[str, Any] = {"sites": site, "positions": "last", "progress": False}
    happy, unhappy = (record(study.model, side, **how)[site] for side in sides)

    def fitted(estimator: Any, *, swapped: bool = False) -> Any:
        positive, negative = reversed(sides) if swapped else sides
        return fit(study.model, positive=positive, negative=negative, estimator=estimator, **how)

    def trained() -> Any:
        batch = study.batches(CHOOSE, batch_size=len(CHOOSE))
        last = torch.tensor([len(ids) - 1 for ids in batch.ids])
        own: dict[str, Any] = {"sites": site, "max_norm": float(v.norm()), "steps": 40, "lr": 0.5, "progress": False}
        return optimize(study.model, batch, targets=[last], loss=lambda out, at: -study.odds(out, at).mean(), **own)

    v = fitted(MeanDifference())
    middle, norm = torch.cat([happy, unhappy]).mean(dim=0), float(happy.norm(dim=1).mean())
    along = float((happy @ v.unit()[site]).mean())
    alike = Conceptor(aperture=10 / norm)
    interventions = {
        "Rotate": Rotate(float(v.norm()) / norm),
        "KeepNorm(Add())": KeepNorm(Add()),
        "Clamp": Clamp(along),
        "Chain(Ablate(around=...), Add())": Chain(Ablate(around=middle), Add()),
        "Ablate": Ablate(),
        "Ablate, around": Ablate(around=middle),
    }
    return (
        {"random": lambda: study.random_direction(v, torch.Generator().manual_seed(0))}
        | {name: lambda own=own: as_long_as(fitted(own), v) for name, own in DIRECTIONS.items()}
        | {"optimize": trained}
        | {name: lambda own=own: (v, own) for name, own in interventions.items()}
        | {name: lambda own=own: fitted(own) for name, own in EDITS.items()}
        | {"NullSpace": lambda: fitted(NullSpace(v, tolerance=1e-3))}
        | {"Conceptor, happy & ~unhappy": lambda: fitted(alike) & ~fitted(alike, swapped=True)}
    )


def main() -> None:
    """Print one row for each."""
    study = Study(*load())
    texts = [REPORT[::3], *map(list, zip(*HELD_OUT, strict=True))]
    neutral, happy, unhappy = map(study.log_odds, texts)

    def measured() -> tuple[float, float, float]:
        gap = float((happy(study.model) - unhappy(study.model)).mean())
        return float(neutral(study.model).mean()), gap, study.perplexity()

    plain = measured()
    rows = [["none", "", f"{plain[0]:.2f}", f"{plain[1]:.2f}", f"{plain[2]:.1f}"]]
    for name, make in steerings(study).items():
        start = time.process_time()
        made = make()
        seconds = time.process_time() - start
        vectors, intervention = made if isinstance(made, tuple) else (made, None)
        with Steerer(study.model, vectors, c=1.0, intervention=intervention, positions=slice(1, None)):
            odds, gap, perplexity = measured()
        cost = f"{seconds:.1f}"
        rows.append([name, cost, f"{odds - plain[0]:+.2f}", f"{gap:.2f}", f"x {perplexity / plain[2]:.2f}"])
    columns = ("steering", "made in, s", "log-odds", "gap", "perplexity")
    console.print(table(f"sentiment at {study.site(DEPTH)}, c = 1", columns, rows))


if __name__ == "__main__":
    main()
