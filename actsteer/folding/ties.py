"""Ties: one parameter in several modules, and how a head gets weights of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from actsteer.folding.layers import kind_of
from actsteer.folding.undo import Undo


@dataclass(frozen=True, eq=False)
class _Sharer:
    """A module that has a parameter, under this key."""

    module: nn.Module
    name: str
    key: str
    parameter: Tensor

    def __str__(self) -> str:
        return f"{self.name}.{self.key}" if self.name else self.key

    @property
    def side(self) -> str | None:
        """Whether it is an embedding or a head; None if it is neither."""
        kind = kind_of(self.module) if self.key == "weight" else None
        return kind if kind in ("embedding", "linear") else None


class Ties:
    """Which parameters of a model lie in several modules, and which of these a fold may part.

    A parameter that embeddings share with linear layers, the heads, can be parted: the heads get weights of their own.
    Embeddings go on sharing what they share with one another, and so do heads; other ties are left alone.

    Args:
        model: the model.
        untie: whether they may be parted.
    """

    def __init__(self, model: nn.Module, *, untie: bool) -> None:
        self._untie = untie
        self._sharers: defaultdict[int, list[_Sharer]] = defaultdict(list)
        self._place: dict[tuple[nn.Module, str], int] = {}
        for name, module in model.named_modules():
            for key, own in module._parameters.items():
                if own is not None and not own.is_meta and type(own.data) is Tensor:
                    place = own.data_ptr() if own.numel() else id(own)
                    self._sharers[place].append(_Sharer(module, name, key, own))
                    self._place[module, key] = place

    def obstacle(self, module: nn.Module, keys: Iterable[str]) -> str | None:
        """Why a module's parameters cannot change without others; None if they can, once they are parted."""
        for key in keys:
            found = self._sharing(module, key)
            if not (others := [own for own in found if own.module is not module]):
                continue
            tied = f"its weights are tied to {others[0]}"
            heads = _heads(found)
            if not heads:
                return tied
            side = next(own.side for own in found if own.module is module)
            if beside := [own for own in others if own.side == side]:
                return f"its weights are tied to {beside[0]}, and untie=True parts embeddings from heads alone"
            if not self._untie:
                return f"{tied}; with untie=True {' and '.join(own.name for own in heads)} would get weights of its own"
        return None

    def part(self, module: nn.Module, undo: Undo) -> None:
        """Give the heads weights of their own, if the module shares its weight with them, or is one."""
        found = self._sharing(module, "weight")
        heads = _heads(found)
        if not heads or _is_parted(found):
            return
        first, shared = found[0], found[0].parameter
        source = next(own for own in found if own.side == "embedding")
        undo.then(partial(_tie, [head.module for head in heads], source.module))
        for head in heads:
            undo.watch(head.module, head.name, "weight")
        undo.remember(first.module, "weight")  # to fingerprints it is one parameter, where it came first
        for own in found:
            if own.side != first.side:
                undo.remember(own.module, "weight", counts=False)
        own_weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        for head in heads:
            head.module._parameters["weight"] = own_weight

    def parted(self) -> list[str]:
        """The names of the weights that heads have of their own by now."""
        return [str(own) for found in self._sharers.values() if _is_parted(found) for own in _heads(found)]

    def _sharing(self, module: nn.Module, key: str) -> list[_Sharer]:
        """All that had the module's parameter when the fold began, in the order of the model."""
        return self._sharers[self._place[module, key]] if (module, key) in self._place else []


def _heads(found: list[_Sharer]) -> list[_Sharer]:
    """The heads among those that share a parameter; none, if it cannot be parted."""
    alike = all(own.parameter is found[0].parameter for own in found)
    if not alike or {own.side for own in found} != {"embedding", "linear"}:
        return []
    return [own for own in found if own.side == "linear"]


def _is_parted(found: list[_Sharer]) -> bool:
    return len({id(own.module._parameters["weight"]) for own in found if _heads(found)}) > 1


def _tie(heads: list[nn.Module], source: nn.Module) -> None:
    for head in heads:
        head._parameters["weight"] = source._parameters["weight"]
