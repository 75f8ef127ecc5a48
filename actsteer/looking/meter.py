"""Meter: what is measured of the activations at a site while the model runs, plain or steered: numbers, not tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.eval_mode import buffers_kept, eval_mode
from actsteer.collecting.moments import exact
from actsteer.errors import ShapeError, UnsupportedModelError
from actsteer.sites import tap
from actsteer.sites.listen import listen
from actsteer.steering.edit import SiteEdit
from actsteer.steering.reader import readers_in
from actsteer.steering.steerer import Steerer


@dataclass(frozen=True)
class Measured:
    """The numbers of n tokens, or rows, at one site in one run.

    Args:
        along: h·v/‖v‖ of each concept that steers there, by its place in the bank; nan for a direction of zero.
        size: ‖h‖.
        added: ‖h' - h‖ / ‖h‖, of h just before the site's edit and h' just after it; None in a plain run.
        gates: what the gate of a concept decided, by the concept's place in the bank.
    """

    along: Mapping[int, Float[Tensor, " n"]]
    size: Float[Tensor, " n"]
    added: Float[Tensor, " n"] | None
    gates: Mapping[int, Float[Tensor, " n"]]


def measured(
    model: nn.Module, steerer: Steerer, run: Callable[[], Any], *, steered: bool, by_token: bool
) -> tuple[Any, dict[str, Measured]]:
    """What `run` returns, and site -> what was measured while it ran the model; the model is left as it was.

    Args:
        steered: whether the Steerer is attached meanwhile.
        by_token: whether the rows of an activation are the tokens of one text, which may come pass by pass; otherwise
            each is one of the batch's, and where it has several positions, `along` is the mean over them, and the
            norms are those of all of them together.

    Raises:
        ShapeError, UnsupportedModelError: an activation that has no such rows.
        ActsteerError: and what the Steerer raises.
    """
    meters = {site: Meter(edit, by_token=by_token) for site, edit in steerer.edits.items()}
    choices = steerer.choices()
    with ExitStack() as stack:
        for block in (eval_mode(model), buffers_kept(model), torch.no_grad()):
            stack.enter_context(block)
        if steered:
            for site, meter in meters.items():
                when = "before" if meter.edit.place.side == "in" else "after"
                by: tap.By = "hook" if choices[site].mechanism == "hook" else "tap"
                stack.callback(tap.take_off, meter.edit.place.module, when, meter.hold)
                tap.put(
                    meter.edit.place.module, when, meter.hold, owner=None, by=by
                )  # before the edit, which comes now
                for reader in meter.edit.gates.values():
                    for leaf in readers_in(reader):
                        leaf.is_inline = False  # for its decision is asked for
            stack.enter_context(steerer)
        for meter in meters.values():
            stack.callback(listen(meter.edit.place, meter))
        output = run()
    return output, {site: meter.measured() for site, meter in meters.items()}


@final
class Meter:
    """A listener at one site, which keeps a few numbers of every activation that it hears."""

    def __init__(self, edit: SiteEdit, *, by_token: bool) -> None:
        self.edit, self._by_token = edit, by_token
        directions = exact(edit.directions.detach())
        self._units = directions / directions.norm(dim=1, keepdim=True)  # nan of zero
        self._held: Tensor | None = None
        self._parts: list[tuple[Tensor, Tensor, Tensor | None, dict[int, Tensor]]] = []

    def hold(self, module: nn.Module, args: Any, last: Any) -> None:
        """Before the edit: keep the activation, until it is compared."""
        self._held = self._rows(module, args, last).clone()  # the edit may be made in place

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        """After the edit, if there is one."""
        rows, held = self._rows(module, args, last), self._held
        self._held = None
        along = (rows @ self._units.T.to(rows)).mean(dim=1)
        added = None if held is None else (rows - held).flatten(1).norm(dim=1) / held.flatten(1).norm(dim=1)
        gates = {} if held is None else {own: self._decided(own, len(rows)) for own in self.edit.gates}
        self._parts.append((along, rows.flatten(1).norm(dim=1), added, gates))

    def measured(self) -> Measured:
        """All that was heard, one part after another."""
        if not self._parts:
            raise UnsupportedModelError(f"site {self.edit.place.site!r} never ran on these inputs; choose another site")
        alongs, sizes, addeds, gates = zip(*self._parts, strict=True)
        along, added = torch.cat(alongs), [own for own in addeds if own is not None]
        return Measured(
            {place: along[:, own] for own, place in enumerate(self.edit.concepts)},
            torch.cat(sizes),
            torch.cat(added) if added else None,
            {self.edit.concepts[own]: torch.cat([part[own] for part in gates]) for own in gates[0]},
        )

    def _rows(self, module: nn.Module, args: Any, last: Any) -> Float[Tensor, "n others d"]:
        view, site = self.edit.lens.heard(module, args, last), self.edit.place.site
        if view.raw.is_nested or view.packed is not None:
            raise UnsupportedModelError(
                f"site {site!r}: a nested or packed activation is not shown; choose another site"
            )
        ((whole, frame),) = view.rows()
        if self._by_token:
            return exact(whole.detach()).reshape(-1, 1, whole.shape[-1])
        rows = frame.rows_first(exact(whole.detach()))
        if rows is None:
            raise ShapeError(f"site {site!r}: an activation of shape {frame.shape} has no rows; choose another site")
        return rows.reshape(len(rows), -1, rows.shape[-1])

    def _decided(self, own: int, count: int) -> Float[Tensor, " n"]:
        weights = self.edit.gates[own].weights_for(self.edit.place.site).detach()
        weights = exact(weights.to(torch.float32))
        if self._by_token:
            return weights.flatten().expand(count) if weights.numel() == 1 else weights.flatten()
        return weights.reshape(len(weights), -1).mean(dim=1)
