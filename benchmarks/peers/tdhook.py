"""tdhook: `SteeringVectors`, prepared around the model and called with a TensorDict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tdhook.latent import SteeringVectors
from tensordict import TensorDict
from torch import Tensor, nn


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[Any]:
    """`generate` is the model's, which has the hooks meanwhile."""
    deltas = {site: c * direction for site, direction in directions.items()}

    def add(*, module_key: str, output: Any) -> Any:
        return output + deltas[module_key]

    language = hasattr(model, "generate")
    keys = {"in_keys": ["input_ids"], "out_keys": ["logits"]} if language else {}
    with SteeringVectors(modules_to_steer=list(directions), steer_fn=add).prepare(model, **keys) as hooked:
        yield _Called(hooked, model)


class _Called:
    def __init__(self, hooked: Any, model: nn.Module) -> None:
        self.hooked = hooked
        self.generate = getattr(model, "generate", None)

    def __call__(self, x: Tensor) -> Any:
        return self.hooked(TensorDict({self.hooked.in_keys[0]: x}, batch_size=len(x)))[self.hooked.out_keys[0]]
