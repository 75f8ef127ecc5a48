"""steering-vectors: `SteeringVector.apply`, with the layers named by a matcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from steering_vectors import SteeringVector, train_steering_vector
from torch import Tensor, nn


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[Any]:
    """It adds to (batch, tokens, features); where the model has no tokens, each row is given as a text of one."""
    sites = list(directions)
    vector = SteeringVector(dict(enumerate(directions.values())))
    layers: Any = {"decoder_block": lambda model, n: sites[n] if n < len(sites) else ""}
    with vector.apply(model, layer_config=layers, multiplier=c):
        yield model if hasattr(model, "generate") else lambda x: model(x[:, None])[:, 0] if x.ndim == 2 else model(x)


def extract(
    model: nn.Module, tokenizer: Any, positive: list[str], negative: list[str], sites: list[str]
) -> dict[str, Tensor]:
    """In batches of 32; without `batch_size` it takes one pair after the other."""
    blocks = {int(site.rpartition(".")[2]): site for site in sites}
    pairs = list(zip(positive, negative, strict=True))
    vector = train_steering_vector(model, tokenizer, pairs, layers=list(blocks), batch_size=32)
    return {blocks[n]: direction for n, direction in vector.layer_activations.items()}
