"""Experiment 1, sentiment: a mean difference makes good words likelier than bad ones, by as much as c says.

The block and the strength are those that `calibrate` chooses on other prompts than those on which both are reported,
and beside them stands c = ±1, the raw mean difference, at a block that is fixed beforehand. Controls are directions
that mean nothing: random ones, drawn like activations and as long as the vector, and mean differences of the same pairs
of which one half is turned round, as they are and stretched to the length of the vector.
"""

from __future__ import annotations

from typing import Any

import torch

from actsteer import Calibration, Steerer, SteeringVector, calibrate, record, sweep
from reference.controls import as_long_as
from reference.language.data import CHOOSE, ENDINGS, KEPT, PAIRS, PROMPTS, REPORT
from reference.language.study import DEPTH, Study

DEPTHS = (0.5, DEPTH, 0.8)
BUDGET = 0.1
"""Of the cost on neutral text, KL(unsteered ‖ steered) in nats for a token."""


def run(study: Study) -> dict[str, Any]:
    """The sentiment against c, beside controls and prompts."""
    v, strengths = study.sentiment, study.budget.strengths
    mood = Mood(study)
    result = calibrated(study)
    chosen = {}
    if result.chosen is not None:
        with Steerer(study.model, result.best, c=result.chosen["c"]):
            chosen = {"site": result.chosen["sites"][0], "c": result.chosen["c"], **mood()}
    nothing = directions_that_mean_nothing(study, v)
    controls = {kind: [curve(study, other, mood, [1])[0] for other in own] for kind, own in nothing.items()}
    return {
        "site": v.sites[0],
        "cosines": {kind: [float(other.cosine(v)) for other in own] for kind, own in nothing.items()},
        "unsteered": mood(),
        "curve": curve(study, v, mood, strengths),
        "controls": controls,
        "prompts": {name: mood(prefix) for name, prefix in PROMPTS.items()},
        "calibrated": chosen | {"verdict": result.verdict, "found": result.found},
    }


class Mood:
    """How happy the model is, and what that costs: log-odds, the share of happy endings, perplexity."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._begins, self._happy, self._unhappy = zip(*study.some(ENDINGS), strict=True)

    def __call__(self, prefix: str = "") -> dict[str, float]:
        """Of the study's model as it is steered now, or after a prompt."""
        study = self._study
        begins = [prefix + begin for begin in self._begins]
        happier = study.of_ends(begins, self._happy) - study.of_ends(begins, self._unhappy)
        odds = study.log_odds([prefix + prompt for prompt in study.some(REPORT)])(study.model)
        return {
            "log_odds": float(odds.mean()),
            "endings": float(happier.mean()),
            "happy": float((happier > 0).double().mean()),
            "perplexity": study.perplexity(prefix),
        }


def curve(study: Study, vector: SteeringVector, mood: Mood, strengths: Any) -> list[dict[str, Any]]:
    """The mood at every strength."""
    return sweep(study.model, vector, c=strengths, evaluate=lambda _: mood(), progress=False)


def calibrated(study: Study) -> Calibration:
    """The block and the strength that are best on the prompts that choose."""
    sites = list(dict.fromkeys(study.site(depth) for depth in DEPTHS))
    return calibrate(
        study.model,
        study.mean_difference(sites),
        evaluate=study.log_odds(study.some(CHOOSE)),
        retain=study.batches(study.some(KEPT)),
        budget=BUDGET,
        rows=_sides(study, sites),
        controls=study.budget.controls,
        groups=[[site] for site in sites],
        doses=(0.1, 0.2),
        refine=1,
        steps=2,
        progress=False,
    )


def directions_that_mean_nothing(study: Study, v: SteeringVector) -> dict[str, list[SteeringVector]]:
    """Controls: random ones as long as the vector, shuffled ones as they are fitted, and these as long as it too."""
    (site,) = v.sites
    happy, unhappy = (side[site] for side in _sides(study, [site]))
    half = torch.arange(len(happy)) < len(happy) // 2
    random, shuffled = [], []
    for seed in range(2 * study.budget.controls):  # its negative is as likely as each of them: c = 1 is enough
        generator = torch.Generator().manual_seed(seed)
        turned = half[torch.randperm(len(half), generator=generator)]
        shuffled.append(SteeringVector({site: (torch.where(turned[:, None], -1, 1) * (happy - unhappy)).mean(dim=0)}))
        random.append(study.random_direction(v, generator))
    return {"random": random, "shuffled": shuffled, "stretched": [as_long_as(own, v) for own in shuffled]}


def _sides(study: Study, sites: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    happy, unhappy = zip(*study.some(PAIRS), strict=True)
    return (
        record(study.model, study.batches(happy), sites=sites, positions="last", progress=False),
        record(study.model, study.batches(unhappy), sites=sites, positions="last", progress=False),
    )
