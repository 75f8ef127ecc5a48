"""Experiment 2, self steering: a model trained on 0-8 is steered with its own activations to recognise 9.

Published: v = mean activations on 9 minus those on 0-8, one number per layer, added at all four layers; 61.8 to 65 %
of all ten digits. Here, with one number per unit too, and with directions that are trained rather than averaged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from actsteer import Estimator, LayerMean, MeanDifference, SteeringVector, collect
from reference.mnist.data import Mnist, Split
from reference.mnist.model import SITES, train_classifier
from reference.mnist.portrait import portrait
from reference.mnist.study import STRENGTHS, Budget, Edit, Study

NEW = 9
OLD = tuple(range(9))
FIXED: dict[str, Estimator] = {"layer_mean": LayerMean(), "mean_difference": MeanDifference()}


def run(data: Mnist, *, seed: int, budget: Budget, sigma: float = 0.0) -> dict[str, Any]:
    """All methods on one seed; `sigma` is the noise on the training images of the model."""
    model = train_classifier(data.train.of(*OLD), seed=seed, epochs=budget.epochs, sigma=sigma)
    study = Study(model, data, (NEW,), seed, budget)
    by_digit = collect(model, data.train.x, by=data.train.y, sites=SITES, progress=False)  # one pass for all digits
    edits: dict[str, list[Edit]] = {}
    curves: dict[str, Any] = {}
    for name, estimator in FIXED.items():
        v = estimator(positive=by_digit[NEW], negative=by_digit.rest(NEW))
        edit, curves[name] = study.strongest(v, STRENGTHS)
        edits[name] = [edit]
    v_mean = edits["mean_difference"][0].vectors
    low_rank = study.low_rank(data.train, rank=1, concept="nine")
    edits["low_rank"] = [Edit(low_rank)]
    trained = study.trained(data.train, concept="nine")
    constant = Edit(trained)
    _, curves["gradient"] = study.strongest(trained, [step / 10 for step in range(-10, 31)])
    edits["gradient"] = [constant]
    edits["gated"] = [gated(study, NEW)]
    edits["probed"] = [probed(study, NEW)]
    edits["few_shot"] = [Edit(study.trained(few(data.train, seed=seed), steps=budget.stage_steps))]
    edits["gated_gradient"] = study.cascade(data.train, on=[constant], stages=budget.stages)
    return {
        "unsteered": study.report(),
        "ceiling": study.test(train_classifier(data.train, seed=seed, epochs=budget.epochs)) if sigma == 0 else None,
        "methods": {name: study.report(*chosen) for name, chosen in edits.items()},
        "dependence": study.dependence(low_rank),
        "curves": curves,
        "portrait": portrait(study, edits, "gated_gradient") | {"logits of v": _logits_of(model, v_mean)},
    }


def gated(study: Study, digit: int) -> Edit:
    """A vector trained at the last site on the new digit alone, added where an LDA gate at that site fires."""
    own, old = study.data.train.of(digit), study.data.train.of(*study.old)
    gate = study.discriminant(own.x, old.x, SITES[-1])
    return study.best_threshold(Edit(_at_the_last_site(study, digit), gate=gate))


def probed(study: Study, digit: int) -> Edit:
    """The same vector where nine logistic probes at an early site, the digit against each other one, all fire.

    The site and C are those of the best held-out accuracy.
    """
    vector = _at_the_last_site(study, digit)
    gates = (study.probed(digit, site, C=C) for site in SITES[:2] for C in (0.1, 1.0, 10.0))
    return max((Edit(vector, gate=gate) for gate in gates), key=lambda edit: study.judged(edit)["overall"])


def _at_the_last_site(study: Study, digit: int) -> SteeringVector:
    """A vector trained on one digit alone: it makes the network say that digit, whatever it is shown."""
    own = study.data.train.of(digit)
    return study.trained(own, sites=SITES[-1:], steps=study.budget.last_site_steps, concept=str(digit))


def few(train: Split, *, seed: int, shots: int = 64, each_old: int = 64) -> Split:
    """64 images of the new digit, and 64 of each old one."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat(
        [
            (train.y == digit).nonzero()[:, 0][
                torch.randperm(int((train.y == digit).sum()), generator=generator)[:count]
            ]
            for digit, count in {**dict.fromkeys(OLD, each_old), NEW: shots}.items()
        ]
    )
    return Split(train.x[rows], train.y[rows])


def _logits_of(model: nn.Module, vector: Any) -> list[float]:
    """What the readout makes of the direction at the last site: W v, one number per digit."""
    assert isinstance(vector, SteeringVector)
    head = model.get_submodule("12")
    assert isinstance(head, nn.Linear)
    logits: list[float] = (head.weight @ vector[SITES[-1]]).tolist()
    return logits
