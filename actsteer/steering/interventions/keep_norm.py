"""KeepNorm: another intervention, whose result is scaled to the norm that the activation had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.steering.alone import load_edit, save_edit
from actsteer.steering.interventions.intervention import (
    Edit,
    Intervention,
    PerSite,
    at_site,
    check_intervention,
    prepared,
)
from actsteer.steering.norms import norms
from actsteer.vectors.vector import SteeringVector


@final
@dataclass(frozen=True)
class KeepNorm:
    """g · ‖h‖ / ‖g‖ with g what the intervention inside makes of h; a g of zero stays zero.

    Around an edit that has its sites, such as `LowRank`, it is one too: `Steerer(model, KeepNorm(edit))`.

    Raises:
        TypeError: what is inside is no intervention.

    Source: norm-preserving steering, as in angular steering, Vu and Nguyen 2025.

    >>> from actsteer import Add
    >>> h, v = torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, 1.0])
    >>> KeepNorm(Add())(h, v, torch.tensor(-4.0))
    tensor([[5., 0.]])
    """

    intervention: Intervention | PerSite

    def __post_init__(self) -> None:
        check_intervention(self.intervention, by="KeepNorm")

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """What the intervention inside makes of the activation, of the activation's norm."""
        return _scaled(self._inside(activation, direction, c), activation)

    def prepare(
        self, direction: Float[Tensor, " d"], c: Float[Tensor, ""]
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
        """The intervention inside is prepared, and what it makes is scaled."""
        edited = prepared(self._inside, direction, c)
        return lambda activation: _scaled(edited(activation), activation)

    def at(self, site: str) -> KeepNorm:
        """Around the intervention of one site."""
        return KeepNorm(at_site(self.intervention, site))

    @property
    def constant(self) -> SteeringVector:
        """That of the edit inside.

        Raises:
            TypeError: what is inside has no sites.
        """
        return self._edit.constant

    save = save_edit

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module | None = None, *, kinds: Iterable[type] = ()) -> KeepNorm:
        """Read what `save` wrote; see `Steering.load`, also for errors."""
        return load_edit(cls, path, model, kinds=kinds)

    def described(self, metadata: Mapping[str, str]) -> KeepNorm:
        """Around the edit inside with this metadata."""
        return KeepNorm(self._edit.described(metadata))

    @property
    def _inside(self) -> Intervention:
        if not isinstance(self.intervention, Intervention):
            raise TypeError(f"{self!r} is another intervention at each site; call what at(site) gives")
        return self.intervention

    @property
    def _edit(self) -> Edit:
        if not isinstance(self.intervention, Edit):
            raise TypeError(f"{self!r} has no sites; give the Steerer vectors, and this as intervention=")
        return self.intervention


def _scaled(edited: Float[Tensor, "*batch d"], activation: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """The direction of the one and the norm of the other; divided first, so that no quotient of norms overflows."""
    norm, wanted = norms(edited), norms(activation)
    return edited / torch.where(norm > 0, norm, 1).to(edited.dtype) * wanted.to(edited.dtype)
