"""steerers and detach_all: what is attached to a model, whoever lost the name, and taking it off."""

from __future__ import annotations

from torch import nn

from actsteer.errors import SteeringNotApplied
from actsteer.sites import tap
from actsteer.steering.attach import owners_at
from actsteer.steering.steerer import Steerer


def steerers(model: nn.Module) -> tuple[Steerer, ...]:
    """The Steerers that are attached to a model, or to a part of it, in the order in which they are met in it.

    >>> import torch
    >>> from actsteer import SteeringVector
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> _ = Steerer(model, SteeringVector({"0": torch.ones(2)})).attach()  # whose name is lost
    >>> len(steerers(model))
    1
    >>> detach_all(model)
    >>> steerers(model)
    ()
    """
    found = dict.fromkeys(owner for module in model.modules() for owner in owners_at(module))
    return tuple(owner for owner in found if isinstance(owner, Steerer))


def detach_all(model: nn.Module) -> None:
    """Take off all that `steerers` lists, the last first, and what they installed.

    Raises:
        SteeringNotApplied: as `Steerer.detach`, after all are off.
    """
    failed: SteeringNotApplied | None = None
    for steerer in reversed(steerers(model)):
        try:
            steerer.uninstall()
        except SteeringNotApplied as error:
            failed = failed or error
    for module in model.modules():
        tap.tidy(module)
    if failed is not None:
        raise failed
