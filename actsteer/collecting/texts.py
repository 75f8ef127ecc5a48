"""Texts: strings and conversations, turned into batches of token ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeAlias, final, overload, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from actsteer.errors import BatchError, close_names

Text: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A text or, for `chat`, the messages of a conversation: mappings with "role" and "content"."""


GREEDY: Mapping[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
"""What makes `generate` take the likeliest token each time, whatever a model's own configuration says."""


@runtime_checkable
class Dataset(Protocol):
    """A dataset of Hugging Face `datasets`, in memory or streamed."""

    column_names: Any

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Its rows, column -> value."""
        ...


@overload
def text_batches(
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    batch_size: int = ...,
    chat: bool = ...,
    continue_final_message: bool | None = ...,
    truncation: int | None = ...,
    column: str = ...,
    device: torch.device | str | None = ...,
) -> TextBatches: ...


@overload
def text_batches(
    tokenizer: Any,
    texts: Dataset,
    *,
    batch_size: int = ...,
    chat: bool = ...,
    continue_final_message: bool | None = ...,
    truncation: int | None = ...,
    column: str = ...,
    device: torch.device | str | None = ...,
) -> TextStream: ...


def text_batches(
    tokenizer: Any,
    texts: Sequence[Text] | Dataset,
    *,
    batch_size: int = 32,
    chat: bool = False,
    continue_final_message: bool | None = None,
    truncation: int | None = None,
    column: str = "text",
    device: torch.device | str | None = None,
) -> TextBatches | TextStream:
    """Texts as batches for `collect`, `fit` and the rest: token ids and attention masks, in the order of the texts.

    Padded on the right, whatever side the tokenizer pads on: so every token has the position that it has alone, and the
    activations of the real ones do not depend on the batch. A tokenizer without a pad token will do.

    Args:
        tokenizer: any of transformers.
        texts: strings; with `chat` also conversations. Or a dataset of Hugging Face `datasets`, which is read and
            tokenized batch by batch, however large it is: `load_dataset(..., streaming=True)`.
        chat: apply the tokenizer's chat template, a string as the user's message, and end where the model is to answer;
            a conversation whose last message is the assistant's ends with the last token of that answer.
        continue_final_message: whether a conversation ends within its last message, without what the template puts
            after it; as it is the assistant's, unless said. False keeps the template's end.
        truncation: the number of tokens after which a text is cut off.
        column: where a dataset has its texts.
        device: where the tensors go.

    Raises:
        BatchError: no texts, or one without a token; no such column.

    >>> class Letters:  # a tokenizer, in short
    ...     pad_token_id = None
    ...     def __call__(self, text):
    ...         return {"input_ids": [ord(letter) - 96 for letter in text]}
    >>> for batch in text_batches(Letters(), ["abc", "b"]):
    ...     batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[1, 2, 3], [2, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    """
    if isinstance(tokenizer, nn.Module):
        raise TypeError(
            f"expected a tokenizer, got the model {type(tokenizer).__name__}; text_batches(tokenizer, texts)"
        )
    if batch_size < 1:
        raise BatchError(f"batch_size: expected 1 or more, got {batch_size}")
    if truncation is not None and truncation < 1:
        raise BatchError(f"truncation: expected a number of tokens, 1 or more, got {truncation}")
    encode = partial(ids_of, tokenizer, chat=chat, continues=continue_final_message, truncation=truncation)
    if isinstance(texts, Dataset):
        return TextStream(texts, column, encode, batch_size, device)
    if isinstance(texts, str) or not texts:
        raise BatchError(f"texts: expected a sequence of one or more, got {texts!r}")
    return TextBatches([encode(text) for text in texts], batch_size, device)


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
            yield _padded(self.ids[start : start + self._batch_size], self._device)


@final
class TextStream:
    """The same of a dataset, which is read and tokenized as it is gone over."""

    def __init__(
        self,
        dataset: Dataset,
        column: str,
        encode: Callable[[Text], Tensor],
        batch_size: int,
        device: torch.device | str | None,
    ) -> None:
        if dataset.column_names is not None:
            _check_column(column, dataset.column_names)
        self._dataset, self._column, self._encode = dataset, column, encode
        self._batch_size, self._device = batch_size, device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = iter(self._dataset)
        while own := [self._encode(self._text(row)) for row in islice(rows, self._batch_size)]:
            yield _padded(own, self._device)

    def _text(self, row: Mapping[str, Text]) -> Text:
        _check_column(self._column, row)  # a streamed dataset may not know its columns before
        return row[self._column]

    def share(self, number: int, of: int) -> TextStream:
        """Every so many batches of a dataset in memory; of a streamed one, what `datasets` lets one process read."""
        dataset: Any = self._dataset
        if hasattr(dataset, "select"):
            starts = range(number * self._batch_size, len(dataset), of * self._batch_size)
            own = [index for start in starts for index in range(start, min(start + self._batch_size, len(dataset)))]
            part = dataset.select(own)
        else:
            from datasets.distributed import split_dataset_by_node

            part = split_dataset_by_node(dataset, rank=number, world_size=of)
        return TextStream(part, self._column, self._encode, self._batch_size, self._device)


def _padded(ids: Sequence[Tensor], device: torch.device | str | None) -> dict[str, Tensor]:
    mask = pad_sequence([torch.ones_like(own) for own in ids], batch_first=True)
    batch = {"input_ids": pad_sequence(list(ids), batch_first=True), "attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def pad_of(tokenizer: Any) -> int | None:
    """The token that fills up what is generated: the tokenizer's pad or, without one, its end of a text."""
    pad: int | None = getattr(tokenizer, "pad_token_id", None)
    return getattr(tokenizer, "eos_token_id", None) if pad is None else pad


def input_device(model: nn.Module) -> torch.device | None:
    """Where the model takes its inputs; None if its first parameter is elsewhere until it is needed."""
    known: Any = model
    embeddings = known.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model
    first = next(iter(embeddings.parameters()), None)
    return None if first is None or first.is_meta else first.device


def ids_of(
    tokenizer: Any, text: Text, *, chat: bool, continues: bool | None = None, truncation: int | None = None
) -> Tensor:
    """The token ids of a text, as `text_batches` describes.

    Raises:
        BatchError: it has none.
    """
    if not chat:
        if not isinstance(text, str):
            raise BatchError(f"texts: expected a string, got {type(text).__name__}; pass chat=True for conversations")
        found = tokenizer(text)["input_ids"]
    else:
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
        answered = messages[-1]["role"] == "assistant"
        options: dict[str, Any] = {"add_generation_prompt": not (answered or continues)}
        if answered if continues is None else continues:
            options["continue_final_message"] = True
        made = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        found = made["input_ids"]
    if not len(found):
        raise BatchError(f"texts: {text!r} has no tokens")
    return torch.tensor(found[:truncation], dtype=torch.long)


def _check_column(column: str, columns: Collection[str]) -> None:
    if column not in columns:
        raise BatchError(f"texts: the dataset has no column {column!r}. {close_names(column, columns)}")
