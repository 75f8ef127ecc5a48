"""Experiment 4, an edit of rank 4: good words where a prompt is about cooking, bad ones elsewhere; 64 prompts teach it.

No constant vector can do that: what is added has to depend on the activation. A vector that is trained in the same way,
on the same prompts, says how far one comes. Other sentences are to stay. Reported on prompts of other templates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from actsteer import LowRank, Retain, Steerer, SteeringVector, optimize
from reference.language.data import COOKING, COOKING_HELD_OUT, OTHER, OTHER_HELD_OUT, OTHER_KEPT
from reference.language.study import Study
from reference.language.topic import prompts

DEPTH, RANK, PROMPTS, BATCH = 0.5, 4, 64, 8


def run(study: Study) -> dict[str, Any]:
    """The unsteered model, a trained vector, and a trained edit."""
    edits = {"vector": None, "low_rank": LowRank(rank=RANK)}
    document: dict[str, Any] = {"site": study.site(DEPTH), "rank": RANK, "unsteered": measured(study)}
    for name, start in edits.items():
        with Steerer(study.model, trained(study, start)):
            document[name] = measured(study)
    return document | {"prompts": 2 * len(_taught(study)[0])}


def trained(study: Study, start: LowRank | None) -> SteeringVector | LowRank:
    """A vector, or an edit, that lowers softplus(-s · log-odds), s = 1 for cooking and -1 for the rest.

    Whole sentences are to stay as they are: without that the edit, which acts on every token, ruins other texts.
    """
    both = [pair for pairs in zip(*_taught(study), strict=True) for pair in pairs]  # alternating: a batch has both
    batches, targets = [], []
    for first in range(0, len(both), BATCH):
        own = study.batches(both[first : first + BATCH])
        batches += list(own)
        last = torch.tensor([len(ids) - 1 for ids in own.ids])
        targets.append(torch.stack([last, 1 - 2 * (torch.arange(len(last)) % 2)]))

    def loss(output: Any, target: Tensor) -> Tensor:
        last, sign = target
        return softplus(-sign * study.odds(output, last)).mean()

    return optimize(
        study.model,
        batches,
        targets=targets,
        sites=study.site(DEPTH),
        loss=loss,
        train=start,
        retain=Retain(study.batches([text + "." for text in study.some(OTHER_KEPT)], batch_size=BATCH)),
        steps=study.budget.steps,
        lr=0.05,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )


def measured(study: Study) -> dict[str, Any]:
    """The log-odds on held-out prompts of both kinds, the share that has the right sign, and what that costs."""
    odds = {
        kind: study.log_odds(prompts(study, texts))(study.model)
        for kind, texts in {"cooking": COOKING_HELD_OUT, "other": OTHER_HELD_OUT}.items()
    }
    right = (odds["cooking"] > 0).double().mean() + (odds["other"] < 0).double().mean()
    return {
        **{kind: own.tolist() for kind, own in odds.items()},
        "right": float(right / 2),
        "perplexity": study.perplexity(),
    }


def _taught(study: Study) -> list[list[str]]:
    return [prompts(study, texts)[: PROMPTS // 2] for texts in (COOKING, OTHER)]
