"""tdhook: `SteeringVectors`, prepared around the model and called with a TensorDict."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tdhook.latent import ActivationCaching, SteeringVectors
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.peers.language import batches, last_tokens


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[Any]:
    """The model itself has the hooks meanwhile: it is called with what is more than one tensor, and for `generate`."""
    deltas = {site: c * direction for site, direction in directions.items()}

    def add(*, module_key: str, output: Any) -> Any:
        return output + deltas[module_key]

    language = hasattr(model, "generate")
    keys = {"in_keys": ["input_ids"], "out_keys": ["logits"]} if language else {}
    with SteeringVectors(modules_to_steer=list(directions), steer_fn=add).prepare(model, **keys) as hooked:
        yield _Called(hooked, model)


def extract(
    model: nn.Module, tokenizer: Any, positive: list[str], negative: list[str], sites: list[str]
) -> dict[str, Tensor]:
    """Cached, of each text the last token alone; its `ActivationAddition` knows no pads."""
    means, mask = [], torch.empty(0)

    def last(*, output: Any, **kwargs: Any) -> Tensor:
        return last_tokens(output, mask)

    caching = ActivationCaching(f"^({'|'.join(map(re.escape, sites))})$", callback=last)
    with caching.prepare(model, in_keys=["input_ids", "attention_mask"], out_keys=["logits"]) as hooked:
        cache = hooked.hooking_context.cache
        for texts in (positive, negative):
            total = dict.fromkeys(sites, torch.zeros((), dtype=torch.float64))
            for batch in batches(tokenizer, texts):
                mask = batch["attention_mask"]
                hooked(TensorDict(batch, batch_size=len(mask)))
                total = {site: total[site] + cache[site].double().sum(dim=0) for site in sites}
            means.append({site: total[site] / len(texts) for site in sites})
    return {site: means[0][site] - means[1][site] for site in sites}


class _Called:
    def __init__(self, hooked: Any, model: nn.Module) -> None:
        self.hooked = hooked
        self.model = model
        self.generate = getattr(model, "generate", None)

    def __call__(self, x: Tensor, **kwargs: Any) -> Any:
        if kwargs:
            return self.model(x, **kwargs)
        return self.hooked(TensorDict({self.hooked.in_keys[0]: x}, batch_size=len(x)))[self.hooked.out_keys[0]]
