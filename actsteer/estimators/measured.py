"""Measured: the loss on one batch of a steered model, with all that the loss asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from actsteer.collecting.batches import call
from actsteer.errors import ShapeError, StatisticsError
from actsteer.estimators.retention import unsteered
from actsteer.estimators.stream import Loss, asked_for
from actsteer.sites.axes import layouts
from actsteer.sites.lens import Lens
from actsteer.sites.listen import likely_cause, listen
from actsteer.sites.resolve import Sites, find_sites, resolve
from actsteer.steering.steerer import Steerer


@final
class Measured:
    """The loss of the answers to a batch or, with `reads`, of the activations at these sites.

    Args:
        compares: whether the loss is given a target.
        steerer: of the model; attached while it is called.
    """

    def __init__(self, loss: Loss, *, compares: bool, steerer: Steerer, reads: Sites | None) -> None:
        self._loss, self._compares, self._steerer = loss, compares, steerer
        self._asked = asked_for(loss)
        self._activations = None if reads is None else _Activations(steerer.model, reads)

    def attached(self) -> AbstractContextManager[None]:
        """A block in which it hears what it reads, after the steering, which is attached already."""
        return nullcontext() if self._activations is None else self._activations.heard()

    def __call__(self, batch: Any, target: Any) -> Tensor:
        """The loss at the steerer's strength."""
        told: dict[str, Any] = {"c": self._steerer.c} if "c" in self._asked else {}
        if "plain" in self._asked:
            with unsteered(self._steerer):
                told["plain"] = self._seen(batch)
        seen = self._seen(batch)
        return self._loss(seen, target, **told) if self._compares else self._loss(seen, **told)

    def _seen(self, batch: Any) -> Any:
        model = self._steerer.model
        return call(model, batch) if self._activations is None else self._activations.on(model, batch)


@final
class _Activations:
    """Site -> the activation of one call of the model, in its own shape with the features last, with gradients."""

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        places = resolve(model, find_sites(model, sites))
        layout_of = layouts(model, places, axis=None)
        self._lenses = {site: Lens(place, layout_of[site]) for site, place in places.items()}
        self._parts: dict[str, list[Tensor]] = {}

    @contextmanager
    def heard(self) -> Iterator[None]:
        with ExitStack() as stack:
            for site, lens in self._lenses.items():
                stack.callback(listen(lens.place, partial(self._keep, site, lens)))
            yield

    def _keep(self, site: str, lens: Lens, module: nn.Module, args: Any, last: Any) -> None:
        view = lens.heard(module, args, last)
        if view.raw.is_nested or view.packed is not None:
            raise ShapeError(
                f"site {site!r}: a nested or packed activation has no one shape; let the loss read another"
            )
        self._parts.setdefault(site, []).extend(whole for whole, _ in view.rows())

    def on(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        self._parts = {}
        call(model, batch)
        for site, lens in self._lenses.items():
            if site not in self._parts:
                raise StatisticsError(
                    f"site {site!r}, which the loss reads, never ran: {likely_cause(model, lens.place)}"
                )
        return {site: torch.cat(self._parts[site]) for site in self._lenses}
