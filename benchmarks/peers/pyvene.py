"""pyvene: an `IntervenableModel` with an `AdditionIntervention` of a constant at each site."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pyvene
import torch
from torch import Tensor, nn

from benchmarks.peers.language import batches


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[Any]:
    """At every token of the prompt and of the answer: no `unit_locations`, which would name some."""
    if not hasattr(model, "config"):
        model.config = SimpleNamespace()  # type: ignore[assignment]  # which it reads of any model
    places = [
        {
            "component": f"{site}.output",
            "intervention": pyvene.AdditionIntervention(source_representation=c * direction),
        }
        for site, direction in directions.items()
    ]
    yield _Intervened(pyvene.IntervenableModel(places, model=model))


def extract(
    model: nn.Module, tokenizer: Any, positive: list[str], negative: list[str], sites: list[str]
) -> dict[str, Tensor]:
    """A `CollectIntervention` at each site, told each text's last position."""
    places = [{"component": f"{site}.output", "intervention": pyvene.CollectIntervention()} for site in sites]
    collecting: Any = pyvene.IntervenableModel(places, model=model)
    means = []
    for texts in (positive, negative):
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches(tokenizer, texts):
            last = [[int(length) - 1] for length in batch["attention_mask"].sum(dim=1)]
            found = collecting(batch, unit_locations={"base": [last] * len(sites)})[0][-1]
            total = total + torch.stack(found).flatten(2).double().sum(dim=1)
        means.append(total / len(texts))
    return dict(zip(sites, means[0] - means[1], strict=True))


class _Intervened:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.first = next(iter(inspect.signature(model.model.forward).parameters))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(self._base(args) | kwargs)[1]

    def generate(self, *args: Any, attention_mask: Tensor, **options: Any) -> Any:
        base = self._base(args) | {"attention_mask": attention_mask}
        return self.model.generate(base, intervene_on_prompt=True, **options)[1]

    def _base(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip((self.first,), args, strict=False))
