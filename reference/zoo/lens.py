"""Lens: a language model in TransformerLens is fitted and steered as it is without it.

SmolLM2 three times: of transformers, as a `TransformerBridge`, and as a `HookedRootModule` of its parts. The truth: the
logits of the first, steered with the vector that was fitted there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from actsteer import Steerer, VectorBank, fit, residual_sites
from reference.controls import beside
from reference.language.model import load
from reference.style import CONTROL, STEERED, UNSTEERED
from reference.zoo.finding import Finding, Row

BLOCK, STRENGTHS = 12, (0.0, 0.25, 0.5, 1.0)
PAIRS = (
    ("The waves broke over the deck", "The wind blew over the field"),
    ("Fishermen sail out to sea", "Workers drive out to the office"),
    ("The ocean is full of whales", "The garden is full of flowers"),
    ("We dived down to the reef", "We walked down to the shop"),
    ("The captain found a new island", "The teacher found a new book"),
    ("A dolphin swam beside the ship", "A dog ran beside the car"),
)
PROMPTS = (
    "They spent the whole day at the",
    "From the window she could see the",
    "In the picture there is a big",
    "He wrote a story about a",
)
SEA, LAND = (
    (" sea", " ocean", " ship", " boat", " fish", " beach"),
    (" city", " road", " car", " house", " tree", " field"),
)


def bridged(model: Any) -> Any:
    """The model in a `TransformerBridge`, which takes its parts over."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def hooked(model: Any) -> Any:
    """A `HookedRootModule` with a hook point behind every block."""
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class Hooked(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.inside = model
            self.behind = nn.ModuleList(HookPoint() for _ in model.model.layers)
            self.setup()  # type: ignore[no-untyped-call]

        def forward(self, tokens: Tensor) -> Tensor:
            inner = self.inside.model
            h = inner.embed_tokens(tokens)
            turns = inner.rotary_emb(h, position_ids=torch.arange(tokens.shape[1])[None])
            for block, hook in zip(inner.layers, self.behind, strict=True):
                h = hook(block(h, position_embeddings=turns))
            logits: Tensor = self.inside.lm_head(inner.norm(h))
            return logits

    return Hooked().eval()


def run() -> Finding:
    """Fit and steer all three in the same way."""
    model, tokenizer = load()
    tokens = partial(tokenizer, return_tensors="pt")
    sea, land = ([tokens(text).input_ids for text in side] for side in zip(*PAIRS, strict=True))
    prompts = [tokens(text).input_ids for text in PROMPTS]
    words = [torch.tensor([tokenizer(word).input_ids[0] for word in own]) for own in (SEA, LAND)]
    ways = {
        "transformers": (model, residual_sites(model, BLOCK)),
        "HookedRootModule": (hooked(load()[0]), f"behind.{BLOCK}"),
        "TransformerBridge": (bridged(load()[0]), f"blocks.{BLOCK}.hook_resid_post"),
    }
    rows: list[Row] = []
    truth: dict[tuple[str, float], Tensor] = {}
    for way, (own, sites) in ways.items():
        v = fit(own, positive=sea, negative=land, sites=sites, positions="last", concept="sea", progress=False)
        bank = VectorBank({"sea": v})
        for name, vectors in {"sea": bank, "random": beside(bank, bank)["random"]}.items():
            for c in STRENGTHS:
                with Steerer(own, vectors, c=c):
                    logits = _logits(own, prompts)
                meant = truth.setdefault((name, c), logits)
                odds = [logits[:, ids].logsumexp(dim=1) for ids in words]
                rows.append(
                    {
                        "steering": name,
                        "c": c,
                        "in": way,
                        "log-odds of sea words": float((odds[0] - odds[1]).mean()),
                        "furthest from the first": float((logits - meant).abs().max()),
                    }
                )
    return Finding("a language model, three ways to run it", rows, partial(_draw, rows))


@torch.inference_mode()
def _logits(model: nn.Module, prompts: Sequence[Tensor]) -> Tensor:
    """Those of the next token, (prompts, vocabulary)."""
    outputs = [model(ids) for ids in prompts]
    return torch.cat([getattr(output, "logits", output)[:, -1] for output in outputs]).double()


def _draw(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    looks = {"transformers": "-", "HookedRootModule": "o", "TransformerBridge": "x"}
    for name, color in {"sea": STEERED, "random": CONTROL}.items():
        for way, style in looks.items():
            own = [row for row in rows if row["steering"] == name and row["in"] == way]
            odds = [row["log-odds of sea words"] for row in own]
            axes.plot([row["c"] for row in own], odds, style, color=color, ms=9, mfc="none", label=f"{name}, {way}")
    axes.axhline(rows[0]["log-odds of sea words"], color=UNSTEERED, lw=1, ls="--", label="not steered")
    axes.set_xlabel("strength c")
    axes.set_ylabel("log-odds of sea words to land words")
    axes.legend(fontsize="small")
    return figure
