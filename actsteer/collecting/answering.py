"""Answering: the tokens of a conversation that its answer depends on, whatever comes before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Bool
from torch import Tensor

from actsteer.errors import BatchError


@final
class Answering:
    """Positions: where a conversation's last answer is written, alike after any prompt.

    They begin with the last token of what the tokenizer's chat template puts before an answer, from which the first
    token of the answer is predicted. So the two sides of a pair that differ in what comes before the same answer have
    as many, of the same tokens. For `collect`, `fit` and `fit_pairs`, and for steering, where the texts have the
    template's form, generated ones included.

    Args:
        tokenizer: one of transformers with a chat template.

    Raises:
        BatchError: the template puts nothing before an answer; when called, a text without it.

    >>> class Letters:  # a tokenizer, in short: <question> is "q", <answer> "a"
    ...     def apply_chat_template(self, messages, *, add_generation_prompt, **options):
    ...         return {"input_ids": [17, 2, 1] if add_generation_prompt else [17, 2]}
    >>> Answering(Letters())({"input_ids": torch.tensor([[17, 3, 1, 5], [17, 1, 5, 6]])})
    tensor([[False, False,  True,  True],
            [False,  True,  True,  True]])
    """

    def __init__(self, tokenizer: Any) -> None:
        plain, asked = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}], tokenize=True, return_dict=True, add_generation_prompt=adds
            )["input_ids"]
            for adds in (False, True)
        )
        if asked[: len(plain)] != plain or len(asked) == len(plain):
            raise BatchError("the chat template puts nothing before an answer by which to find it; give a bool mask")
        self._begins = torch.tensor(asked[len(plain) :], dtype=torch.long)
        self.__qualname__ = f"answering after {self._begins.tolist()}"  # in the metadata of statistics

    def __call__(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "B S"]:
        """The mask of a batch with `input_ids`."""
        ids: Tensor = inputs["input_ids"]
        begins = self._begins.to(ids.device)
        places = torch.arange(ids.shape[1], device=ids.device)
        if ids.shape[1] < len(begins):
            ends = ids.new_full((len(ids),), -1)
        else:
            found = (ids.unfold(1, len(begins), 1) == begins).all(dim=2)
            ends = torch.where(found, places[len(begins) - 1 :], -1).amax(dim=1)
        if bool((ends < 0).any()):
            row = int((ends < 0).int().argmax())
            raise BatchError(
                f"positions: row {row} of the batch has no answer that the chat template began; make the texts with "
                "chat=True, and let conversations end with the assistant's message"
            )
        return places >= ends[:, None]
