"""Experiment 2, a condition: the same vector, but only where the prompt is about cooking.

Two gates read a prompt's last token half-way up, a logistic probe and the cosine with the mean difference; all prompts
end in the same words. `calibrate_gate` sets their thresholds on prompts about other things. Precision and recall are
those on prompts of other templates, the last of which have the words of a kitchen and another topic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from actsteer import CosineAbove, LogisticDirection, MeanDifference, ProbeAbove, Steerer, calibrate_gate, fit, record
from reference.language.data import COOKING, COOKING_HELD_OUT, OTHER, OTHER_HELD_OUT, OTHER_KEPT, TAIL
from reference.language.study import Study

DEPTH = 0.5
RATE = 0.05
"""The share of prompts about other things for which a gate may fire, where its threshold is set."""


def run(study: Study) -> dict[str, Any]:
    """Both gates, and what the sentiment vector does behind each."""
    sides: dict[str, Any] = {
        "positive": study.batches(prompts(study, COOKING)),
        "negative": study.batches(prompts(study, OTHER)),
    }
    how: dict[str, Any] = {"sites": study.site(DEPTH), "positions": "last", "concept": "cooking", "progress": False}
    probe = fit(study.model, **sides, estimator=LogisticDirection(), **how)
    mean = fit(study.model, **sides, estimator=MeanDifference(), **how)
    gates: dict[str, Any] = {"probe": ProbeAbove(probe), "cosine": CosineAbove(mean, 0.0)}
    retain = study.batches([text + TAIL for text in OTHER_KEPT])
    document: dict[str, Any] = {"site": study.site(DEPTH), "asked for": RATE, "gates": {}}
    for name, gate in gates.items():
        found = calibrate_gate(study.model, gate, retain=retain, false_positive_rate=RATE, progress=False)
        cooking, other = (scores(study, gate, texts) for texts in (COOKING_HELD_OUT, OTHER_HELD_OUT))
        document["gates"][name] = {
            "rate": found.rate,
            "interval": found.interval,
            "threshold": found.threshold,
            **told(cooking, other, found.threshold),
            **behind(study, found.gate),
        }
    return document


def prompts(study: Study, texts: Sequence[str]) -> list[str]:
    """The texts, so many as the budget allows, with the words in which all end."""
    return [text + TAIL for text in study.some(texts)]


def scores(study: Study, gate: Any, texts: Sequence[str]) -> Tensor:
    """What a gate compares with its threshold, for each text."""
    rows = record(study.model, study.batches(prompts(study, texts)), sites=gate.site, positions="last", progress=False)
    found: Tensor = gate.score(rows[gate.site])
    return found


def told(cooking: Tensor, other: Tensor, threshold: float) -> dict[str, Any]:
    """Precision, recall, and the scores themselves, less the threshold."""
    right, wrong = (int((own > threshold).sum()) for own in (cooking, other))
    return {
        "precision": right / (right + wrong) if right + wrong else 0.0,
        "recall": right / len(cooking),
        "fires wrongly": wrong,
        "texts": [len(cooking), len(other)],
        "scores": {"cooking": (cooking - threshold).tolist(), "other": (other - threshold).tolist()},
    }


def behind(study: Study, gate: Any) -> dict[str, Any]:
    """How far the sentiment vector moves the log-odds behind the gate, and without one, on either kind of prompt."""
    shifts: dict[str, Any] = {}
    for kind, texts in {"cooking": COOKING_HELD_OUT, "other": OTHER_HELD_OUT}.items():
        own = prompts(study, texts)
        before = study.log_odds(own)(study.model)
        with Steerer(study.model, study.sentiment, gate=gate):
            moved = study.shift(own, before)
        with Steerer(study.model, study.sentiment):
            ungated = study.shift(own, before)
        shifts[kind] = {
            "gated": float(moved.mean()),
            "ungated": float(ungated.mean()),
            "left alone": float((moved == 0).double().mean()),
        }
    return {"shift": shifts}
