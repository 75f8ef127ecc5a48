"""Undo: what a fold has changed, and how it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from actsteer.errors import NotFoldable
from actsteer.files.sealed import digest
from actsteer.sites import fingerprint


class Undo:
    """The parameters that were changed, as they were; taken back from the last to the first."""

    def __init__(self) -> None:
        self.created: list[str] = []
        """The names of the biases that were not there before."""
        self._steps: list[tuple[Callable[[], None], int]] = []
        self._kept: list[tuple[nn.Module, str, str]] = []
        self._left: list[tuple[nn.Module, str, str, Tensor | None, str]] = []

    def keep(self, module: nn.Module, name: str, *keys: str) -> None:
        """Remember a module's parameters of these names, before they are changed."""
        for key in keys:
            own = module._parameters.get(key)
            value = None if own is None else own.detach().clone()
            self.remember(module, key)
            self.then(lambda key=key, own=own, value=value: _restore(module, key, own, value))  # type: ignore[misc]
            self.watch(module, name, key)
            if key == "bias" and own is None:
                self.created.append(f"{name}.bias" if name else "bias")

    def remember(self, module: nn.Module, key: str, *, counts: bool = True) -> None:
        """Have fingerprints made of the parameter as it is now or, where it does not count, without it."""
        if fingerprint.remember(module, key, counts=counts):
            self.then(partial(fingerprint.forget, module, key))

    def watch(self, module: nn.Module, name: str, key: str) -> None:
        """Take nothing back once this parameter is changed by others."""
        self._kept.append((module, name, key))

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

    def leave(self) -> None:
        """Remember how the fold has left the parameters."""
        found = {(id(module), key): (module, name, key) for module, name, key in self._kept}
        self._left = [(*one, own := one[0]._parameters.get(one[2]), _digest(own)) for one in found.values()]

    def check(self) -> None:
        """NotFoldable, if the parameters were changed or replaced since: that work would be lost."""
        for module, name, key, own, numbers in self._left:
            now = module._parameters.get(key)
            if (now is None) != (own is None) or _digest(now) != numbers:
                raise NotFoldable(
                    f"{name}.{key} was changed or replaced after the fold, and to unfold would undo that too; load the "
                    "plain weights instead"
                )


def _digest(parameter: Tensor | None) -> str:
    return "" if parameter is None else digest({"": parameter.detach().cpu()})


@torch.no_grad()
def _restore(module: nn.Module, key: str, own: Tensor | None, value: Tensor | None) -> None:
    now = module._parameters.get(key)
    if own is None or value is None:
        module._parameters[key] = None
    else:
        (own if now is None else now).copy_(value)
