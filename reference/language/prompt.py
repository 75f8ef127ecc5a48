"""Experiment 5, a prompt as an edit: the model without a prompt is to answer as it does with one.

The prompted model writes answers. Of the same answers with the prompt in front and without it each token has a pair of
activations, of which `PairedMap` fits what the prompt adds: of rank 1 h + a(h) v, with a(h) affine in h (PSR, arXiv
2605.03907). The constant vector is the mean difference of the same pairs. Reported on other questions, as
KL(prompted ‖ not prompted) at the tokens of the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actsteer import PairedMap, Steerer, SteeringVector, TextMetric, collect_joint
from actsteer.integrations.transformers import Answering
from reference.language.data import ASKED, SYSTEM, TAUGHT
from reference.language.study import Study

DEPTH = 0.5
MAPS = {"rank 1": PairedMap(rank=1), "rank 8": PairedMap(rank=8), "full rank": PairedMap()}
Conversation = list[dict[str, str]]


def run(study: Study) -> dict[str, Any]:
    """The KL that is left with each edit, on questions by which it was fitted and on others."""
    where = Answering(study.tokenizer)
    sets = {name: answered(study, study.some(own)) for name, own in {"taught": TAUGHT, "asked": ASKED}.items()}
    goal = {name: said(study, [pair[0] for pair in pairs], where) for name, pairs in sets.items()}

    def left() -> dict[str, float]:
        """How far the model as it is now is from the prompted one."""
        return {
            name: apart(goal[name], said(study, [pair[1] for pair in pairs], where)) for name, pairs in sets.items()
        }

    document: dict[str, Any] = {"site": study.site(DEPTH), "prompt": SYSTEM, "kl": {"unsteered": left()}}
    document["answers"] = {name: len(pairs) for name, pairs in sets.items()}
    site = document["site"]
    prompted, alone = (study.batches(side, chat=True) for side in zip(*sets["taught"], strict=True))
    joint = collect_joint(study.model, prompted, alone, sites=site, positions=where, progress=False)  # once for all
    toward, away = joint[site].mean.chunk(2)
    edits: dict[str, Any] = {"constant": SteeringVector({site: (toward - away).float()})}
    edits |= {name: fitted(positive=joint, negative=joint) for name, fitted in MAPS.items()}
    for name, edit in edits.items():
        with Steerer(study.model, edit, positions=where):
            document["kl"][name] = left()
    return document


def answered(study: Study, questions: Sequence[str]) -> list[tuple[Conversation, Conversation]]:
    """Conversations with the prompt and without it, each with the answer that the prompted model gives."""
    system = {"role": "system", "content": SYSTEM}
    asked = [{"role": "user", "content": question} for question in questions]
    metric = TextMetric(
        tokenizer=study.tokenizer,
        prompts=[[system, own] for own in asked],
        score=lambda texts: [0.0] * len(texts),
        max_new_tokens=study.budget.tokens,
        chat=True,
    )
    answers = [{"role": "assistant", "content": text} for text in metric.continuations(study.model)]
    return [
        ([system, own, answer], [own, answer])
        for own, answer in zip(asked, answers, strict=True)
        if answer["content"].strip()
    ]


@torch.no_grad()
def said(study: Study, conversations: Sequence[Conversation], where: Answering) -> Tensor:
    """The log-probabilities (tokens, words) at the tokens of the answers."""
    known: Any = study.model
    return torch.cat(
        [
            known(**batch).logits[where(batch) & batch["attention_mask"].bool()].log_softmax(dim=-1)
            for batch in study.batches(conversations, chat=True)
        ]
    )


def apart(goal: Tensor, given: Tensor) -> float:
    """The mean KL of the goal's answers and the given ones, in nats for a token."""
    return float((goal.exp() * (goal - given)).sum(dim=-1).mean())
