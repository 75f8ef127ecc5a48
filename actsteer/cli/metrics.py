"""Metrics: a function of the user's, and the inputs on which it is to be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from actsteer.cli import factory
from actsteer.cli.examples import batches, read
from actsteer.cli.models import Loaded
from actsteer.tuning.metrics import OutputMetric
from actsteer.tuning.text_metric import TextMetric


def metric(
    name: str, on: Path, loaded: Loaded, *, max_new_tokens: int, batch_size: int, chat: bool
) -> TextMetric | OutputMetric:
    """`module:function` on a file: of texts what the model writes after each, of tensors what it returns.

    Raises:
        typer.BadParameter: no such function.
    """
    score = _function(name)
    found = read(on)
    if isinstance(found, list):
        return TextMetric(
            tokenizer=loaded.tokenizer(),
            prompts=found,
            score=score,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            chat=chat,
        )
    inputs, _ = batches(on, loaded, batch_size=batch_size)
    return OutputMetric(inputs=inputs, score=score, batch_size=batch_size)


def _function(name: str) -> Callable[..., Any]:
    found = factory.attribute(name, hint="--metric")
    if not callable(found) or isinstance(found, type):
        raise typer.BadParameter(f"{name}: expected a function, got {type(found).__name__}", param_hint="--metric")
    function: Callable[..., Any] = found
    return function
