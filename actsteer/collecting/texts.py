"""Texts: strings and conversations, turned into batches of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from actsteer.errors import BatchError

Text: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A text or, for `chat`, the messages of a conversation: mappings with "role" and "content"."""


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


def input_device(model: nn.Module) -> torch.device | None:
    """Where the model takes its inputs; None if its first parameter is elsewhere until it is needed."""
    known: Any = model
    embeddings = known.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model
    first = next(iter(embeddings.parameters()), None)
    return None if first is None or first.is_meta else first.device


def _ids(tokenizer: Any, text: Text, *, chat: bool) -> Tensor:
    if not chat:
        if not isinstance(text, str):
            raise BatchError(f"texts: expected a string, got {type(text).__name__}; pass chat=True for conversations")
        return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
    answers = messages[-1]["role"] != "assistant"
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=answers, tokenize=True, return_dict=True)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)
