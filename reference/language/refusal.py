"""Experiment 3, apologies: the direction along which the model says sorry is taken out of all that writes the stream.

A harmless stand-in for refusals: SmolLM2 tends to begin with "I'm sorry" where it is asked to do what a text cannot do.
The direction is the difference of the means of such requests and of others at the prompt's last token, at the block of
which the ablation lowers the apology most on the requests by which it was fitted (Arditi et al. 2024); what is reported
is of other requests. The controls are random directions, drawn like activations, taken out at the same places.
"""

from __future__ import annotations

from typing import Any

import torch

from actsteer import Ablate, Steerer, SteeringVector, TextMetric, fit, residual_writers
from reference.language.data import (
    APOLOGY,
    IMPOSSIBLE,
    IMPOSSIBLE_HELD_OUT,
    POSSIBLE,
    POSSIBLE_HELD_OUT,
)
from reference.language.study import Study

DEPTHS = (0.4, 0.5, 0.6, 0.7)


def run(study: Study) -> dict[str, Any]:
    """What is left of the apologies, and what else has changed."""
    sites = list(dict.fromkeys(study.site(depth) for depth in DEPTHS))
    asked: dict[str, Any] = {
        "positive": study.batches(study.some(IMPOSSIBLE), chat=True),
        "negative": study.batches(study.some(POSSIBLE), chat=True),
    }
    v = fit(study.model, **asked, sites=sites, positions="last", concept="sorry", progress=False)
    tried = {site: _apology(study, v.select(site)) for site in sites}
    site = min(tried, key=lambda own: tried[own])
    generator = torch.Generator().manual_seed(0)
    others = [study.random_direction(v.select(site), generator) for _ in range(min(study.budget.controls, 3))]
    with Steerer(study.model, v.select(site)):
        added = measured(study)
    return {
        "site": site,
        "tried": tried,
        "unsteered": measured(study),
        "ablated": ablated(study, v.select(site)),
        "added": added,
        "random": [ablated(study, other) for other in others],
    }


def everywhere(study: Study, v: SteeringVector) -> Steerer:
    """A Steerer that takes the direction out of everything that writes the residual stream."""
    (direction,) = (v[site] for site in v.sites)
    writers = residual_writers(study.model)
    return Steerer(study.model, SteeringVector(dict.fromkeys(writers, direction)), intervention=Ablate())


def ablated(study: Study, v: SteeringVector) -> dict[str, Any]:
    """The measures without the direction."""
    with everywhere(study, v):
        return measured(study)


def measured(study: Study) -> dict[str, Any]:
    """How likely an apology is, how many answers hold one, and the perplexity of neutral text."""
    asked = {"impossible": study.some(IMPOSSIBLE_HELD_OUT), "possible": study.some(POSSIBLE_HELD_OUT)}
    return {
        **{kind: float(study.of_ends(own, [APOLOGY] * len(own), chat=True).mean()) for kind, own in asked.items()},
        **{f"sorry {kind}": float(_sorry(study, own)(study.model).mean()) for kind, own in asked.items()},
        "perplexity": study.perplexity(),
    }


def _sorry(study: Study, prompts: list[str]) -> TextMetric:
    return TextMetric(
        tokenizer=study.tokenizer,
        prompts=prompts,
        score=lambda texts: [float("sorry" in text.lower()) for text in texts],
        max_new_tokens=min(study.budget.tokens, 12),
        chat=True,
    )


def _apology(study: Study, v: SteeringVector) -> float:
    own = study.some(IMPOSSIBLE)
    with everywhere(study, v):
        return float(study.of_ends(own, [APOLOGY] * len(own), chat=True).mean())
