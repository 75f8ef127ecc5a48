"""Experiment 1, cross-model steering: model B teaches model A, trained on 0-8, the digit 9.

Published: B is an autoencoder of nines with A's hidden design, v = mean activations of B on nines minus those of A on
0-8. A and B live in different bases, so here the same means are also carried over by a linear map between the two
models' activations. And other ways to use another model: its gate carried over, or its verdicts as the labels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsteer import (
    CrossMoments,
    LayerMean,
    MeanDifference,
    ProjectionAbove,
    SteeringVector,
    WhitenedMeanDifference,
    align,
    collect,
    collect_pairs,
    fit,
    record,
)
from reference.mnist.data import Mnist, Split
from reference.mnist.model import SITES, train_autoencoder, train_classifier
from reference.mnist.portrait import portrait
from reference.mnist.scores import predict
from reference.mnist.study import STRENGTHS, Budget, Edit, Study

NEW = 9
OLD = tuple(range(9))
LAST = SITES[-1]


def run(data: Mnist, *, seed: int, budget: Budget) -> dict[str, Any]:
    """All methods on one seed."""
    model = train_classifier(data.train.of(*OLD), seed=seed, epochs=budget.epochs)
    study = Study(model, data, (NEW,), seed, budget)
    nines, others = data.train.of(NEW), data.train.of(*OLD)
    autoencoder = train_autoencoder(nines, seed=seed + 1000, epochs=budget.epochs)
    expert = train_classifier(
        Split(data.train.x, (data.train.y == NEW).long()), seed=seed + 2000, epochs=budget.epochs, outputs=2
    )
    edits: dict[str, list[Edit]] = {}
    curves: dict[str, Any] = {}
    of_b = collect(autoencoder, data.train.x, by=data.train.y, sites=SITES, covariance=True, progress=False)
    of_a = collect(model, others.x, sites=SITES, progress=False)
    from_b_to_a = align(of_b.rest(NEW), of_a, paired(autoencoder, model, others.x))
    within_b = MeanDifference()(positive=of_b[NEW], negative=of_b.rest(NEW))
    fixed: dict[str, SteeringVector] = {
        "layer_mean": LayerMean()(positive=of_b[NEW], negative=of_a),
        "mean_difference": MeanDifference()(positive=of_b[NEW], negative=of_a),
        "mapped_mean_difference": within_b.transport(from_b_to_a),
    }
    for name, vector in fixed.items():
        edit, curves[name] = study.strongest(vector, STRENGTHS)
        edits[name] = [edit]
    edits["mapped_gate"] = [mapped_gate(study, expert, nines.x, others.x)]
    edits["autoencoder_teacher"] = taught(study, recognised(autoencoder, nines.x, data.train.x), stages=False)
    edits["expert_teacher"] = taught(study, predict(expert, data.train.x) == 1, stages=True)
    return {
        "unsteered": study.report(),
        "methods": {name: study.report(*chosen) for name, chosen in edits.items()},
        "curves": curves,
        "portrait": portrait(study, edits, "expert_teacher"),
    }


def paired(source: nn.Module, target: nn.Module, x: Tensor) -> dict[tuple[str, str], CrossMoments]:
    """What both models make of the same images, at sites of the same depth."""
    return collect_pairs(source, target, x, sites={site: site for site in SITES}, batch_size=2048, progress=False)


def mapped_gate(study: Study, expert: nn.Module, nines: Tensor, others: Tensor) -> Edit:
    """The expert's own direction for nines, read off A's activations through a map fitted on 0-8 alone.

    With b ≈ a W + const, the expert's projection b · w is a · (W w): the gate is carried over by the map's transpose.
    What is added where it fires is trained on those rows, all called nine: labels choose the threshold, no more.
    """
    lda = WhitenedMeanDifference(shrinkage=1e-3)
    w = fit(expert, positive=nines, negative=others, sites=LAST, estimator=lda, progress=False)
    ours, theirs = (
        collect(m, others, sites=SITES, covariance=True, batch_size=2048, progress=False) for m in (study.model, expert)
    )
    direction = w.transport(align(ours, theirs, paired(study.model, expert, others)).T)
    everything = record(study.model, study.data.train.x, sites=LAST, batch_size=2048, progress=False)[LAST]
    gate = ProjectionAbove(direction, 0.0)
    projections = gate.projection(everything)
    gate = ProjectionAbove(direction, float(projections.quantile(0.9)))
    fires = gate(everything)
    rows = Split(study.data.train.x[fires], torch.full((int(fires.sum()),), NEW))
    vector = study.trained(rows, sites=[LAST], steps=study.budget.stage_steps, concept="nine")
    return study.best_threshold(Edit(vector, gate=gate), width=2 * float(projections.std()))


def recognised(autoencoder: nn.Module, own: Tensor, x: Tensor) -> Tensor:
    """What the autoencoder takes for its own: images that it reproduces as well as 95 % of those it was trained on."""

    def error(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return F.mse_loss(autoencoder(images), images, reduction="none").mean(dim=1).clone()

    return error(x) < error(own).quantile(0.95)


def taught(study: Study, is_nine: Tensor, *, stages: bool) -> list[Edit]:
    """Trained without labels: what B takes for a nine is one, and of the rest A's own unsteered verdict stands.

    As everywhere, labels of held-out images decide which stages of the cascade stay.
    """
    x = study.data.train.x
    lesson = Split(x, torch.where(is_nine, NEW, predict(study.model, x)))
    constant = Edit(study.trained(lesson, concept="nine"))
    return study.cascade(lesson, on=[constant], stages=study.budget.stages) if stages else [constant]
