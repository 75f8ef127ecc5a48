"""nnsight: `+=` on a module's output inside a trace, as its steering pattern shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nnsight import LanguageModel, NNsight
from torch import Tensor, nn


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[Any]:
    """A trace for each call; for `generate`, in which the loop over its steps must be bounded, one per answer."""
    yield _Traced(model, {site: c * direction for site, direction in directions.items()})


def extract(
    model: nn.Module, tokenizer: Any, positive: list[str], negative: list[str], sites: list[str]
) -> dict[str, Tensor]:
    """The last position of each text, which are padded on the left, in batches of 32; it stops behind the last site."""
    language: Any = LanguageModel(model, tokenizer=tokenizer)
    means = []
    for texts in (positive, negative):
        total = dict.fromkeys(sites, torch.zeros((), dtype=torch.float64))
        for start in range(0, len(texts), 32):
            found: dict[str, Tensor] = {}
            with language.trace(texts[start : start + 32]) as tracer:
                for site in sites:
                    found[site] = language.get(site).output[:, -1].save()
                tracer.stop()
            total = {site: total[site] + found[site].double().sum(dim=0) for site in sites}
        means.append({site: total[site] / len(texts) for site in sites})
    return {site: means[0][site] - means[1][site] for site in sites}


class _Traced:
    def __init__(self, model: Any, deltas: dict[str, Tensor]) -> None:
        self.model: Any = NNsight(model)
        self.generated = getattr(model, "generate", None)  # as `TransformersModel` runs it, which wants a tokenizer
        self.places = [(self.model.get(site), delta) for site, delta in deltas.items()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.model.trace(*args, **kwargs):
            for place, delta in self.places:
                place.output[:] += delta
            output = self.model.output.save()
        return output  # noqa: RET504 - the block is run elsewhere; nothing can return from it

    def generate(self, ids: Tensor, *, max_new_tokens: int, **options: Any) -> Any:
        options |= {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens}
        with self.model.trace(ids, fn=self.generated, **options) as tracer:
            for _ in tracer.iter[:max_new_tokens]:
                for place, delta in self.places:
                    place.output[:] += delta
            found = tracer.result.save()
        return found  # noqa: RET504
