"""Experiment 3, multi-vector steering: a model trained on 0-7 is steered to recognise both 8 and 9.

Published: one vector per digit, added with its own strength, shown on single images. Here a `VectorBank` holds a
vector per digit, and the question is what is left when both are added: plain sums interfere, gates keep them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from actsteer import SteeringVector, VectorBank, collect
from reference.mnist.data import Mnist, Split
from reference.mnist.model import SITES, train_classifier
from reference.mnist.portrait import portrait
from reference.mnist.self import FIXED, gated, probed
from reference.mnist.study import Budget, Edit, Study

NEW = {"eight": 8, "nine": 9}
OLD = tuple(range(8))


def run(data: Mnist, *, seed: int, budget: Budget) -> dict[str, Any]:
    """All methods on one seed."""
    model = train_classifier(data.train.of(*OLD), seed=seed, epochs=budget.epochs)
    study = Study(model, data, tuple(NEW.values()), seed, budget)
    by_digit = collect(model, data.train.x, by=data.train.y, sites=SITES, progress=False)  # one pass for all digits
    edits: dict[str, list[Edit]] = {}
    for name, estimator in FIXED.items():
        bank = VectorBank(
            {
                concept: estimator(positive=by_digit[digit], negative=by_digit.only(*OLD))
                for concept, digit in NEW.items()
            }
        )
        edits[name] = [study.strongest(bank, _pairs([float(c) for c in range(-150, 151, 25)]))[0]]
    alone = VectorBank(
        {concept: study.trained(_with(data.train, digit), concept=concept) for concept, digit in NEW.items()}
    )
    edits["plain_sum"] = [study.strongest(alone, _pairs([step / 8 for step in range(13)]))[0]]
    edits["gated"] = [_bank_of(gated, study)]
    edits["probed"] = [_bank_of(probed, study)]
    joint = Edit(study.trained(data.train, concept="eight and nine"))
    edits["joint"] = [joint]
    edits["gated_joint"] = study.cascade(data.train, on=[joint], stages=2 * budget.stages)
    low_rank = study.low_rank(data.train, rank=4, concept="eight and nine")
    edits["low_rank"] = [Edit(low_rank)]
    gates = edits["gated"][0].vectors
    assert isinstance(gates, VectorBank)
    return {
        "unsteered": study.report(),
        "methods": {name: study.report(*chosen) for name, chosen in edits.items()},
        "dependence": study.dependence(low_rank),
        "portrait": portrait(study, edits, "gated_joint"),
        "cosines": {
            "concepts": list(NEW),
            "mean_difference": _cosines(edits["mean_difference"][0].vectors),
            "plain_sum": _cosines(alone),
            "gated": _cosines(gates),
        },
    }


def _pairs(strengths: list[float]) -> list[dict[str, float]]:
    return [dict(zip(NEW, pair, strict=True)) for pair in product(strengths, repeat=2)]


def _with(train: Split, digit: int) -> Split:
    return train.of(*OLD, digit)


def _bank_of(method: Callable[[Study, int], Edit], study: Study) -> Edit:
    """A vector and a gate per digit, each fitted as if the other digit were not there."""
    single = {concept: method(study, digit) for concept, digit in NEW.items()}
    vectors = {concept: edit.vectors for concept, edit in single.items()}
    bank = VectorBank({concept: vector for concept, vector in vectors.items() if isinstance(vector, SteeringVector)})
    return Edit(bank, dict.fromkeys(NEW, 1.0), {concept: edit.gate for concept, edit in single.items()})


def _cosines(bank: Any) -> list[list[float]]:
    cosines: list[list[float]] = bank.cosines().tolist()
    return cosines
