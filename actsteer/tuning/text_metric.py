"""TextMetric: a number for every prompt, of what a language model writes after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.eval_mode import eval_mode
from actsteer.collecting.texts import GREEDY, Text, input_device, pad_of, text_batches
from actsteer.errors import UnsupportedModelError


@final
@dataclass(frozen=True, kw_only=True)
class TextMetric:
    """What a language model writes after prompts, scored: a metric for `calibrate`.

    The model answers greedily, so that the same steering gives the same number.

    Args:
        tokenizer: any of transformers.
        prompts: strings; with `chat` also conversations.
        score: the continuations, in the order of the prompts -> a number for each of them.
        max_new_tokens: how long a continuation may be.
        batch_size: how many are written at a time.
        chat: apply the tokenizer's chat template.

    Raises:
        UnsupportedModelError: the model does not generate text.

    >>> def has_sea(texts):
    ...     return ["sea" in text for text in texts]
    >>> TextMetric(tokenizer=None, prompts=["My dream is"], score=has_sea).max_new_tokens
    32
    """

    tokenizer: Any
    prompts: Sequence[Text]
    score: Callable[[list[str]], Sequence[float] | Tensor]
    max_new_tokens: int = 32
    batch_size: int = 16
    chat: bool = False

    def __call__(self, model: nn.Module) -> Float[Tensor, " n"]:
        """A number for every prompt."""
        texts = self.continuations(model)
        scores = self.score(texts)
        found = (
            scores if isinstance(scores, Tensor) else torch.tensor([float(own) for own in scores], dtype=torch.float64)
        )
        if found.shape != (len(texts),):
            raise TypeError(
                f"TextMetric.score: expected a number for each of {len(texts)} texts, got {tuple(found.shape)}"
            )
        return found

    @torch.no_grad()
    def continuations(self, model: nn.Module) -> list[str]:
        """What the model writes after each prompt."""
        known: Any = model
        if not hasattr(known, "generate"):
            raise UnsupportedModelError(f"{type(model).__name__} generates no text; give a language model")
        device = input_device(model)
        ids = text_batches(self.tokenizer, self.prompts, chat=self.chat).ids
        pad = pad_of(self.tokenizer)
        found: list[str] = []
        for start in range(0, len(ids), self.batch_size):
            own = ids[start : start + self.batch_size]
            length = max(map(len, own))
            batch = torch.full((len(own), length), pad or 0)
            mask = torch.zeros_like(batch)
            for row, text in enumerate(own):  # on the right, where the model goes on
                batch[row, length - len(text) :], mask[row, length - len(text) :] = text, 1
            with eval_mode(model):
                made = known.generate(
                    batch.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=pad,
                    **GREEDY,
                    use_cache=True,
                )
            skipped = 1 if getattr(known.config, "is_encoder_decoder", False) else length
            found += self.tokenizer.batch_decode(made[:, skipped:], skip_special_tokens=True)
        return found
