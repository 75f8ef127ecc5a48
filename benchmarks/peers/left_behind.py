"""What a steering leaves on a model, and an interrupt at a place that is chosen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Module by module: its class, its hooks, its tensors, and whether it trains."""
    return {
        name: (
            type(module),
            {key: [*map(id, hooks.values())] for key, hooks in vars(module).items() if key.endswith("hooks") and hooks},
            {key: (tensor.clone(), tensor.requires_grad) for key, tensor in _tensors(module).items()},
            module.training,
        )
        for name, module in model.named_modules()
    }


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        key: tensor
        for part in (module._parameters, module._buffers)
        for key, tensor in part.items()
        if tensor is not None
    }


def differences(before: dict[str, tuple[Any, ...]], model: nn.Module) -> list[str]:
    """What is not as it was, in words."""
    now = state_of(model)
    said = [f"other modules: {sorted(before.keys() ^ now.keys())[:3]}"] if before.keys() != now.keys() else []
    for name in before.keys() & now.keys():
        (kind, hooks, tensors, training), (kind_now, hooks_now, tensors_now, training_now) = before[name], now[name]
        if kind is not kind_now:
            said.append(f"{name} is a {kind_now.__name__}")
        if hooks != hooks_now:
            said.append(f"hooks on {name}")
        if training != training_now:
            said.append(f"the mode of {name}")
        same = tensors.keys() == tensors_now.keys() and all(
            torch.equal(tensor, tensors_now[key][0]) and grad == tensors_now[key][1]
            for key, (tensor, grad) in tensors.items()
        )
        if not same:
            said.append(f"tensors of {name}")
    return sorted(said)[:2] + ([f"{len(said) - 2} more"] if len(said) > 2 else [])


class Interrupt:
    """Raises KeyboardInterrupt where the n-th Python function is entered or left; for n = 0 it counts these places."""

    def __init__(self, n: int) -> None:
        self.n, self.count = n, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_lines = False
        if event in ("call", "return"):
            self.count += 1
            if self.count == self.n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    def during(self, block: Callable[[], None]) -> int:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            block()
        except BaseException:
            if not self.n:
                raise
        finally:
            sys.settrace(before)
        return self.count
