"""Chain: several interventions, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from actsteer.steering.interventions.intervention import (
    Intervention,
    PerSite,
    at_site,
    check_intervention,
    prepared,
)


@final
@dataclass(frozen=True, init=False)
class Chain:
    """Several interventions by one direction in the order given, each with the same c.

    With c = 1, `Chain(Ablate(), Add())` replaces what a row has along the direction by the direction itself. The order
    counts where two interventions do not commute.

    >>> import torch
    >>> from actsteer import Ablate, Add
    >>> Chain(Ablate(), Add())(torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 0.0]), torch.tensor(1.0))
    tensor([[2., 4.]])
    """

    interventions: tuple[Intervention | PerSite, ...]

    def __init__(self, *interventions: Intervention | PerSite) -> None:
        for intervention in interventions:
            check_intervention(intervention, by="Chain")
        object.__setattr__(self, "interventions", interventions)

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """What the last one makes of it."""
        for intervention in self._each():
            activation = intervention(activation, direction, c)
        return activation

    def prepare(
        self, direction: Float[Tensor, " d"], c: Float[Tensor, ""]
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
        """Each of them is prepared."""
        edits = [prepared(intervention, direction, c) for intervention in self._each()]

        def edited(activation: Tensor) -> Tensor:
            for edit in edits:
                activation = edit(activation)
            return activation

        return edited

    def _each(self) -> Iterator[Intervention]:
        for intervention in self.interventions:
            if not isinstance(intervention, Intervention):
                raise TypeError(f"{self!r} is another intervention at each site; call what at(site) gives")
            yield intervention

    def at(self, site: str) -> Chain:
        """The chain of the interventions of one site."""
        return Chain(*(at_site(intervention, site) for intervention in self.interventions))
