"""nnsight: `+=` on a module's output inside a trace, as its steering pattern shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nnsight import NNsight
from torch import Tensor, nn


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[Any]:
    """A trace for each call; for `generate`, in which the loop over its steps must be bounded, one per answer."""
    yield _Traced(model, {site: c * direction for site, direction in directions.items()})


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
