"""Undo: what a fold has changed, and how it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class Undo:
    """The parameters that were changed, as they were; taken back from the last to the first."""

    def __init__(self, model: nn.Module) -> None:
        self.created: list[str] = []
        """The names of the biases that were not there before."""
        self._steps: list[tuple[Callable[[], None], int]] = []

    def keep(self, module: nn.Module, name: str) -> None:
        """Remember a module's own parameters, before they are changed."""
        kept = {key: None if own is None else (own, own.detach().clone()) for key, own in module._parameters.items()}
        self.then(lambda: _restore(module, kept))
        if "bias" in module._parameters and module._parameters["bias"] is None:
            self.created.append(f"{name}.bias" if name else "bias")

    def then(self, step: Callable[[], None]) -> None:
        """Remember how to take back something else."""
        self._steps.append((step, len(self.created)))

    def mark(self) -> int:
        """How much has been done so far."""
        return len(self._steps)

    def run(self, mark: int = 0) -> None:
        """Take everything back that was done since."""
        while len(self._steps) > mark:
            step, created = self._steps.pop()
            step()
            del self.created[created:]


@torch.no_grad()
def _restore(module: nn.Module, kept: Mapping[str, tuple[Tensor, Tensor] | None]) -> None:
    for key, was in kept.items():
        if was is None:
            module._parameters[key] = None
        else:
            parameter, value = was
            parameter.copy_(value)
