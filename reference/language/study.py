"""A study: the model, and the measures that several experiments share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer import OutputMetric, SteeringVector, record, residual_sites
from actsteer.integrations.transformers import Text, TextBatches, fit_pairs, text_batches
from reference.controls import as_long_as
from reference.language.data import BAD, GOOD, KEPT, NEUTRAL, PAIRS

T = TypeVar("T")
DEPTH = 0.65
"""Of all blocks: how deep the block lies of which the raw mean difference is reported."""


@dataclass(frozen=True)
class Budget:
    """How much of everything.

    Args:
        texts: how many of each set of texts are used at most.
        controls: how many controls of a kind.
        strengths: the strengths at which the sentiment is measured.
        steps: how many steps are trained.
        tokens: how many tokens are written after a prompt.
    """

    texts: int
    controls: int
    strengths: tuple[float, ...]
    steps: int
    tokens: int


FULL = Budget(texts=60, controls=5, strengths=(-2, -1, -0.5, 0.5, 1, 2), steps=40, tokens=32)
QUICK = Budget(texts=8, controls=1, strengths=(-1, 1), steps=3, tokens=4)


class Study:
    """A language model, its tokenizer, and what is asked of both.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, budget: Budget = FULL) -> None:
        self.model, self.tokenizer, self.budget = model, tokenizer, budget

    def some(self, texts: Sequence[T]) -> list[T]:
        """As many of the texts as the budget allows, from all over the set."""
        return list(texts)[:: -(-len(texts) // self.budget.texts)]

    def batches(self, texts: Sequence[Text], *, chat: bool = False, batch_size: int = 16) -> TextBatches:
        """The texts as batches; `chat` as questions to which the answer is to come."""
        return text_batches(self.tokenizer, texts, chat=chat, batch_size=batch_size)

    def site(self, depth: float) -> str:
        """The residual stream behind the block that lies so deep, from 0 to 1."""
        sites = residual_sites(self.model)
        return sites[round(depth * len(sites))]

    @cached_property
    def sentiment(self) -> SteeringVector:
        """From unhappy to happy: the mean difference of the pairs at the block near `DEPTH`."""
        return self.mean_difference([self.site(DEPTH)])

    def mean_difference(self, sites: Sequence[str]) -> SteeringVector:
        """The same at any sites."""
        pairs = self.some(PAIRS)
        return fit_pairs(self.model, self.tokenizer, pairs, sites=list(sites), concept="happy", progress=False)

    def random_direction(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """A direction drawn like activations of neutral texts, as long as the vector at its one site.

        Without the first tokens: theirs are huge and alike, and what is drawn like them ruins the model.
        """
        (site,) = vector.sites
        batches = self.batches(self.some(KEPT))
        rows = record(self.model, batches, sites=site, positions=slice(1, None), progress=False)[site]
        return drawn_like(rows, vector, generator)

    # --- measures ------------------------------------------------------------------------------------------------
    def log_odds(self, prompts: Sequence[str]) -> OutputMetric:
        """For every prompt log p(a good word comes next) - log p(a bad one), in nats."""
        batches = self.batches(prompts)
        last = torch.tensor([len(ids) - 1 for ids in batches.ids])
        return OutputMetric(inputs=batches, targets=last, score=self.odds)

    def odds(self, output: Any, last: Tensor) -> Float[Tensor, " rows"]:
        """The same of a model's output, where `last` is each row's last token."""
        logp: Tensor = output.logits[torch.arange(len(last)), last].log_softmax(dim=-1)
        good, bad = (logp[:, self._words(words)].logsumexp(dim=1) for words in (GOOD, BAD))
        return good - bad

    def _words(self, words: Sequence[str]) -> list[int]:
        return [int(self.batches([f" {word}"]).ids[0][0]) for word in words]

    def shift(self, prompts: Sequence[str], before: Tensor) -> Float[Tensor, " n"]:
        """How far the model as it is now has moved the log-odds."""
        return self.log_odds(prompts)(self.model) - before

    @torch.no_grad()
    def likelihood(self, batches: TextBatches, counts: Sequence[int]) -> Float[Tensor, " n"]:
        """The log-probability of the last so many tokens of every text."""
        found: list[Tensor] = []
        for batch in batches:
            known: Any = self.model
            ids = batch["input_ids"]
            logp = known(**batch).logits[:, :-1].log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
            ends = batch["attention_mask"].sum(dim=1)
            places = torch.arange(1, ids.shape[1])
            own = torch.tensor(counts[len(found) : len(found) + len(ids)])
            counted = (places >= (ends - own)[:, None]) & (places < ends[:, None])
            found += (logp * counted).double().sum(dim=1)
        return torch.stack(found)

    def of_ends(self, begins: Sequence[str], ends: Sequence[str], *, chat: bool = False) -> Float[Tensor, " n"]:
        """log p(end | beginning) for every pair of them; with `chat` of an answer to a question."""
        pairs = list(zip(begins, ends, strict=True))
        whole: list[Text] = [begin + end for begin, end in pairs]
        if chat:
            whole = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
        before, both = self.batches(begins, chat=chat), self.batches(whole, chat=chat)
        return self.likelihood(both, [len(b) - len(a) for a, b in zip(before.ids, both.ids, strict=True)])

    def perplexity(self, prefix: str = "") -> float:
        """Of neutral text, but for the first token of each; after a prefix that does not count."""
        texts = self.some(NEUTRAL)
        counts = [len(ids) - 1 for ids in self.batches(texts).ids]
        logp = self.likelihood(self.batches([prefix + text for text in texts]), counts)
        return float((-logp.sum() / sum(counts)).exp())


def drawn_like(rows: Float[Tensor, "n d"], vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
    """A random direction with the covariance of the rows, each at norm 1, as long as the vector at its one site."""
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    direction = torch.randn(len(rows), generator=generator, dtype=torch.float64) @ (unit - unit.mean(dim=0))
    (site,) = vector.sites
    return as_long_as(SteeringVector({site: direction.to(vector[site])}), vector)
