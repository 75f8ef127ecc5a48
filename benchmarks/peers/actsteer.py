"""actsteer: a `Steerer` around a `SteeringVector`, as the README shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from actsteer import Steerer, SteeringVector
from actsteer.integrations.transformers import fit_pairs


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[nn.Module]:
    """With all defaults."""
    with Steerer(model, SteeringVector(directions), c=c):
        yield model


def extract(
    model: nn.Module, tokenizer: Any, positive: list[str], negative: list[str], sites: list[str]
) -> dict[str, Tensor]:
    """With all defaults."""
    pairs = list(zip(positive, negative, strict=True))
    v = fit_pairs(model, tokenizer, pairs, sites=sites, progress=False)
    return {site: v[site] for site in v.sites}
