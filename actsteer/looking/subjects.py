"""Subjects: what is looked at, texts one by one or rows of one tensor, on its way through both runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actsteer.collecting.batches import call
from actsteer.collecting.texts import GREEDY, input_device, pad_of, text_batches
from actsteer.errors import BatchError, ShapeError, UnsupportedModelError
from actsteer.looking.meter import Measured, measured
from actsteer.looking.words import Token, differing, pieces
from actsteer.steering.steerer import Steerer

ROWS = 200
"""How many rows are shown at most."""

Runs = tuple[Mapping[str, Measured], Mapping[str, Measured]]
"""Site -> what was measured, in the plain run and in the steered one."""


@dataclass(frozen=True)
class SeenText:
    """A text: its prompt, and what the model goes on with in each run."""

    prompt: list[Token]
    plain: list[Token]
    steered: list[Token]
    runs: Runs


@dataclass(frozen=True)
class SeenRows:
    """Rows: the inputs, and the class scores (n, K) in each run, if the model gives such."""

    inputs: Tensor
    answers: tuple[Tensor, Tensor] | None
    runs: Runs


def prompts(inputs: Any, tokenizer: Any, *, chat: bool) -> list[list[int]] | None:
    """The token ids of every text, without pads; None of inputs that are no texts.

    Raises:
        BatchError: texts without a tokenizer, or what is neither texts nor a tensor.
    """
    if isinstance(inputs, Tensor):
        return None if inputs.is_floating_point() else [row.tolist() for row in torch.atleast_2d(inputs)]
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, Mapping):
        inputs = [inputs]
    given = list(inputs) if isinstance(inputs, Iterable) else []
    if given and all(isinstance(own, Mapping) and isinstance(own.get("input_ids"), Tensor) for own in given):
        return [ids for batch in given for ids in _unpadded(batch)]
    if not given or not all(isinstance(own, str | list | tuple) for own in given):
        got = type(inputs).__name__ if not given else f"{type(inputs).__name__} of {type(given[0]).__name__}"
        raise BatchError(
            f"inputs: expected texts, what a tokenizer makes of them, or one tensor with a row for each, got {got}"
        )
    if tokenizer is None:
        raise BatchError("inputs: texts need the model's tokenizer; pass tokenizer=")
    return [ids.tolist() for ids in text_batches(tokenizer, given, chat=chat).ids]


def _unpadded(batch: Mapping[str, Any]) -> list[list[int]]:
    mask = batch.get("attention_mask")
    every = torch.ones_like(batch["input_ids"]) if mask is None else mask
    return [row[own.bool()].tolist() for row, own in zip(batch["input_ids"], every, strict=True)]


def see_text(model: nn.Module, steerer: Steerer, ids: Sequence[int], tokenizer: Any, *, length: int) -> SeenText:
    """Run the model on a text, plain and steered, and have it go on for so many tokens, by the likeliest one each time.

    Raises:
        UnsupportedModelError: the passes of its generation do not add up to its tokens.
    """
    any_model: Any = model
    device = input_device(model)
    batch = {"input_ids": torch.tensor([list(ids)], device=device)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    can = getattr(model, "can_generate", lambda: hasattr(model, "generate"))
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError("a model with a decoder of its own has other tokens there, and is not shown")
    goes_on = length > 0 and can()
    how = {**GREEDY, "use_cache": True, "pad_token_id": pad_of(tokenizer), "max_new_tokens": length}

    def run() -> list[int]:
        if not goes_on:
            call(model, batch)
            return []
        answer: list[int] = any_model.generate(**batch, **how)[0, len(ids) :].tolist()
        return answer

    answers, runs = [], []
    for steered in (False, True):
        answer, seen = measured(model, steerer, run, steered=steered, by_token=True)
        fed = len(ids) + max(0, len(answer) - 1)  # the last one is never fed to it
        for site, own in seen.items():
            if len(own.size) != fed:
                raise UnsupportedModelError(
                    f"site {site!r}: expected an activation for each of {fed} tokens, got {len(own.size)}; choose a "
                    "site that has one for every token, or pass max_new_tokens=0, which shows the prompts alone"
                )
        answers.append(answer)
        runs.append(seen)
    plain, steered_answer = answers
    own_side = differing(plain, steered_answer)
    said = pieces(tokenizer, [*ids, *plain])
    steered_said = pieces(tokenizer, [*ids, *steered_answer])
    start = len(ids)
    return SeenText(
        [Token(said[place], "both", place) for place in range(start)],
        [Token(said[start + place], "plain", start + place, place in own_side[0]) for place in range(len(plain))],
        [
            Token(steered_said[start + place], "steered", start + place, place in own_side[1])
            for place in range(len(steered_answer))
        ],
        (runs[0], runs[1]),
    )


def see_rows(model: nn.Module, steerer: Steerer, inputs: Tensor) -> SeenRows:
    """Run the model on the first rows, plain and steered.

    Raises:
        BatchError: no rows.
        ShapeError: an activation that has not a row for each.
    """
    if inputs.ndim < 2 or not len(inputs):
        raise BatchError(f"inputs: expected a row for each of one or more inputs, got shape {tuple(inputs.shape)}")
    rows = inputs[:ROWS]
    outputs, runs = [], []
    for steered in (False, True):
        output, seen = measured(model, steerer, lambda: call(model, rows.clone()), steered=steered, by_token=False)
        for site, own in seen.items():
            if len(own.size) != len(rows):
                raise ShapeError(
                    f"site {site!r}: expected an activation for each of {len(rows)} rows, got {len(own.size)}; choose "
                    "another site, or pass row_axis="
                )
        outputs.append(_scores(output, len(rows)))
        runs.append(seen)
    before, after = outputs
    answers = None if before is None or after is None else (before, after)
    return SeenRows(rows.detach().cpu(), answers, (runs[0], runs[1]))


def _scores(output: Any, rows: int) -> Tensor | None:
    """The class scores, one row of two or more for each input; None if the model gives something else."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    is_scores = isinstance(found, Tensor) and found.ndim == 2 and found.is_floating_point() and found.shape[1] > 1
    return found.detach().double().cpu() if isinstance(found, Tensor) and is_scores and len(found) == rows else None
