"""What the tests of the kinds share: the backends, small models of text, and plain hooks that add what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsteer import ActsteerError, Steerer, SteeringVector

BACKENDS = ("auto", "tap", "hook", "buffer")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_backend_and_fold = pytest.mark.parametrize("backend", [*BACKENDS, "fold"])


class Text(nn.Module):
    """Two features per token: an embedding "e", a module "a" that gives what it takes, and a site "b" with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(9, 2), nn.Identity(), identity()
        with torch.no_grad():
            self.e.weight.copy_(torch.arange(18.0).view(9, 2) / 64)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Tensor:
        return self.b(self.a(self.e(input_ids)))


def steerer(model: nn.Module, site: str = "b", *, d: int = 2, **options: Any) -> Steerer:
    """A Steerer that adds ones at one site."""
    return Steerer(model, SteeringVector({site: torch.ones(d)}), **options)


def identity() -> nn.Linear:
    """A module that gives what it takes, and whose class says that the features come last."""
    module = nn.Linear(2, 2)
    nn.init.eye_(module.weight)
    nn.init.zeros_(module.bias)
    return module


def ids(rows: int, length: int) -> Tensor:
    """Numbers of tokens, none of them that of a pad."""
    return torch.arange(rows * length).view(rows, length) % 7 + 1


def moved(steered: Tensor, plain: Tensor) -> list[Any]:
    """1 where a token's features were moved, 0 where not."""
    found: list[Any] = (steered - plain).abs().amax(-1).gt(0.5).int().tolist()
    return found


def right_or_refused(call: Callable[[], Any], want: Any) -> None:
    """What the call gives is right, or it raises one of the library's errors; a wrong number fails."""
    try:
        got = call()
    except ActsteerError:
        return
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want)
    else:
        assert got == want


Delta = Callable[[Tensor, int], Tensor] | Tensor
"""What is added: a tensor, or a function of the activation and of the number of the call."""


@contextmanager
def added(model: nn.Module, site: str, delta: Delta) -> Iterator[list[tuple[int, ...]]]:
    """A plain hook that adds to what a module gives; the shapes that it saw."""
    shapes: list[tuple[int, ...]] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        new = h + (delta if isinstance(delta, Tensor) else delta(h, len(shapes)))
        shapes.append(tuple(h.shape))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.get_submodule(site).register_forward_hook(hook)
    try:
        yield shapes
    finally:
        handle.remove()


@contextmanager
def listening(model: nn.Module, site: str) -> Iterator[list[Tensor]]:
    """What the module at `site` is called with first, call for call: what the one before it gave, steering and all."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else next(iter(kwargs.values()))).detach().clone())

    handle = model.get_submodule(site).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
