"""By hand: a forward hook at each site that adds a constant, registered before and removed after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from benchmarks import extraction
from benchmarks.peers.language import batches


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[nn.Module]:
    """Hooks that return `output + delta`, or that of the first entry of a tuple."""
    with ExitStack() as handles:
        for site, direction in directions.items():
            hook = _adding(c * direction)
            handles.callback(model.get_submodule(site).register_forward_hook(hook).remove)
        yield model


def extract(
    model: nn.Module, tokenizer: Any, positive: list[str], negative: list[str], sites: list[str]
) -> dict[str, Tensor]:
    """Hooks that sum the last tokens in float64, the last of which ends the pass."""
    toward, away = (extraction.by_hand(model, batches(tokenizer, texts), sites) for texts in (positive, negative))
    return {site: toward[site] - away[site] for site in sites}


def _adding(delta: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    return hook
