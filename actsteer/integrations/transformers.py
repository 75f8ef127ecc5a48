"""Hugging Face transformers: texts as batches, and vectors from pairs of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from actsteer.collecting.positions import Positions
from actsteer.errors import BatchError
from actsteer.estimators.fit import Fits, fit
from actsteer.estimators.mean_difference import MeanDifference
from actsteer.integrations.prefixes import collect_pairs_by_prefix
from actsteer.sites.resolve import Sites
from actsteer.steering.interventions.low_rank import LowRank
from actsteer.vectors.vector import SteeringVector

Text: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A text or, for `chat`, the messages of a conversation: mappings with "role" and "content"."""
Result = TypeVar("Result", SteeringVector, LowRank)


def text_batches(
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    batch_size: int = 32,
    chat: bool = False,
    device: torch.device | str | None = None,
) -> TextBatches:
    """Texts as batches for `collect`, `fit` and the rest: token ids and attention masks, in the order of the texts.

    Padded on the right, whatever side the tokenizer pads on: so every token has the position that it has alone, and the
    activations of the real ones do not depend on the batch. A tokenizer without a pad token will do.

    Args:
        tokenizer: any of transformers.
        texts: strings; with `chat` also conversations.
        chat: apply the tokenizer's chat template, a string as the user's message, and end where the model is to answer.
        device: where the tensors go.

    Raises:
        BatchError: no texts, or one without a token.

    >>> class Letters:  # a tokenizer, in short
    ...     pad_token_id = None
    ...     def __call__(self, text):
    ...         return {"input_ids": [ord(letter) - 96 for letter in text]}
    >>> for batch in text_batches(Letters(), ["abc", "b"]):
    ...     batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[1, 2, 3], [2, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    """
    if isinstance(texts, str) or not texts:
        raise BatchError(f"texts: expected a sequence of one or more, got {texts!r}")
    if batch_size < 1:
        raise BatchError(f"batch_size: expected 1 or more, got {batch_size}")
    ids = [_ids(tokenizer, text, chat=chat) for text in texts]
    if empty := [text for text, own in zip(texts, ids, strict=True) if not len(own)]:
        raise BatchError(f"texts: {empty[0]!r} has no tokens")
    return TextBatches(ids, batch_size, device)


@final
class TextBatches:
    """Token ids and attention masks, batch by batch, as often as they are gone over."""

    def __init__(self, ids: Sequence[Tensor], batch_size: int, device: torch.device | str | None) -> None:
        self.ids = list(ids)
        """The token ids of every text, without pads."""
        self._batch_size, self._device = batch_size, device

    def __len__(self) -> int:
        return -(-len(self.ids) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.ids), self._batch_size):
            own = self.ids[start : start + self._batch_size]
            mask = pad_sequence([torch.ones_like(ids) for ids in own], batch_first=True)
            batch = {"input_ids": pad_sequence(own, batch_first=True), "attention_mask": mask}
            yield {name: tensor.to(self._device) for name, tensor in batch.items()}


def fit_pairs(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[Text, Text]],
    *,
    sites: Sites,
    estimator: Fits[Result] | None = None,
    positions: Positions = "last",
    concept: str | None = None,
    batch_size: int = 32,
    chat: bool = False,
    share_prefix: bool = False,
    progress: bool = True,
) -> Result:
    """The vector that points from the second texts of the pairs to the first, as `fit` finds it.

    The result depends on neither the batch size nor the side on which the tokenizer pads, but for rounding.

    Args:
        pairs: (positive text, negative text).
        sites: names, globs or a predicate, as for `find_sites`.
        estimator: `MeanDifference()` unless another is given.
        positions: which tokens count; the last of each text, as contrastive activation addition has it, unless others
            are asked for.
        share_prefix: compute the tokens with which both texts of a pair begin, and those with which all texts of a
            batch begin, once, in a key-value cache. The same result, but for rounding; for causal models with such a
            cache, estimators on statistics, and `positions="last"`.

    Raises:
        BatchError: no pairs, or texts without tokens; else as `fit`.

    Source: contrastive activation addition (CAA), Rimsky et al. 2023.
    """
    if not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise BatchError("pairs: expected one or more of (positive text, negative text)")
    device = _device(model)
    positive, negative = (
        text_batches(tokenizer, [pair[side] for pair in pairs], batch_size=batch_size, chat=chat, device=device)
        for side in (0, 1)
    )
    if not share_prefix:
        return fit(
            model,
            positive=positive,
            negative=negative,
            sites=sites,
            estimator=estimator,
            concept=concept,
            positions=positions,
            progress=progress,
        )
    chosen = cast("Fits[Result]", estimator or MeanDifference())
    if positions != "last" or getattr(chosen, "paired", False) or getattr(chosen, "needs_rows", False):
        raise ValueError(
            "share_prefix: expected positions='last' and an estimator on the statistics of two sides; the tokens that "
            "are shared are not seen on each side by itself"
        )
    toward, away = collect_pairs_by_prefix(
        model,
        positive.ids,
        negative.ids,
        sites=sites,
        covariance=getattr(chosen, "needs_covariance", False),
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    found = chosen(positive=toward, negative=away)
    metadata = found.metadata | ({} if concept is None else {"concept": concept})
    if isinstance(found, LowRank):
        return LowRank({site: found[site] for site in found.sites}, metadata=metadata)
    return SteeringVector({site: found[site] for site in found}, metadata=metadata)


def _ids(tokenizer: Any, text: Text, *, chat: bool) -> Tensor:
    if not chat:
        if not isinstance(text, str):
            raise BatchError(f"texts: expected a string, got {type(text).__name__}; pass chat=True for conversations")
        return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
    answers = messages[-1]["role"] != "assistant"
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=answers, tokenize=True, return_dict=True)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def _device(model: nn.Module) -> torch.device | None:
    """Where the model takes its inputs; None if its first parameter is elsewhere until it is needed."""
    known: Any = model
    embeddings = known.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model
    first = next(iter(embeddings.parameters()), None)
    return None if first is None or first.is_meta else first.device
