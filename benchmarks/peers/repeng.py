"""repeng: a `ControlModel` around the model, with the control vectors set as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from repeng import ControlModel, ControlVector, DatasetEntry
from torch import Tensor, nn

from benchmarks.peers.peer import Cannot


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[Any]:
    """At the outputs of blocks alone, which it wraps; afterwards the model is unwrapped."""
    blocks = {int(last): c * v for site, v in directions.items() for last in [site.rpartition(".")[2]]}
    try:
        control: Any = ControlModel(model, list(blocks))
    except ValueError as error:
        raise Cannot(f"it wraps the blocks of transformers' models alone: {error} (control.py)") from error
    control.set_raw_control(blocks)
    try:
        yield control
    finally:
        control.unwrap()


def extract(
    model: nn.Module, tokenizer: Any, positive: list[str], negative: list[str], sites: list[str]
) -> dict[str, Tensor]:
    """Its default, for it has no mean: the first principal component of the pairs' differences, of length 1."""
    blocks = {int(site.rpartition(".")[2]): site for site in sites}
    pairs = [DatasetEntry(*pair) for pair in zip(positive, negative, strict=True)]
    vector = ControlVector.train(model, tokenizer, pairs, hidden_layers=list(blocks))
    return {blocks[n]: torch.from_numpy(direction) for n, direction in vector.directions.items()}
