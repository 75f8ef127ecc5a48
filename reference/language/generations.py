"""Experiment 6, side by side: what the model answers as it is, with the sentiment vector, and to a prompt that asks.

Greedily, so that it can be made again; at twice the raw mean difference, either way.
"""

from __future__ import annotations

from typing import Any

from actsteer import Steerer, TextMetric
from reference.language.data import PROMPTS, QUESTIONS
from reference.language.study import Study

STRENGTH = 2.0


def run(study: Study) -> dict[str, Any]:
    """Every question with its answers."""
    questions = study.some(QUESTIONS)
    answers = {"unsteered": written(study, questions)}
    for c in (STRENGTH, -STRENGTH):
        with Steerer(study.model, study.sentiment, c=c):
            answers[f"c = {c:g}"] = written(study, questions)
    asks = "answer cheerfully"
    answers[asks] = written(study, [PROMPTS[asks] + question for question in questions])
    return {"site": study.sentiment.sites[0], "questions": questions, "answers": answers}


def written(study: Study, questions: list[str]) -> list[str]:
    """What the model answers to questions."""
    return TextMetric(
        tokenizer=study.tokenizer,
        prompts=questions,
        score=lambda texts: [0.0] * len(texts),
        max_new_tokens=study.budget.tokens,
        chat=True,
    ).continuations(study.model)
