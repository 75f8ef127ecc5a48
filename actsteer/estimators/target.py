"""Target: what a direction is to move, the activation at a later site."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.batches import arguments, call
from actsteer.errors import ShapeError, StatisticsError
from actsteer.sites.axes import layouts
from actsteer.sites.lens import Frame, Lens
from actsteer.sites.listen import likely_cause
from actsteer.sites.resolve import resolve
from actsteer.sites.wrappers import unwrapped
from actsteer.tokens.inputs import signature_of
from actsteer.tokens.passes import Pass, groups
from actsteer.tokens.positions import Positions, chosen
from actsteer.tokens.real import real_at
from actsteer.tokens.tokens import Tokens


@final
class Target:
    """The activation at a site, with the features last and gradients to what it was made from; a listener."""

    def __init__(self, model: nn.Module, site: str, positions: Positions) -> None:
        self.place = resolve(model, [site])[site]
        self._model, self._positions = model, positions
        self._lens = Lens(self.place, layouts(model, {site: self.place}, axis=None)[site])
        self._now: Pass
        self._seen: list[Tensor] = []

    def read(self, batch: Any) -> Float[Tensor, "n d"]:
        """The activations on one batch, of each call of the site, in float32 at least; pads are left out."""
        self._seen.clear()
        _, passes = groups(unwrapped(self._model), {self.place.site: self.place}, {}, data=True)
        self._now = passes[self.place.site].begun(*arguments(batch), signature_of(self._model))
        call(self._model, batch)
        if not self._seen:
            raise StatisticsError(f"site {self.place.site!r} never ran: {likely_cause(self._model, self.place)}")
        return torch.cat(self._seen)

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        view = self._lens.heard(module, args, last)
        for whole, frame in view.rows():
            counted = self._counted(frame, is_nested=view.raw.is_nested)
            rows = whole.reshape(-1, whole.shape[-1])
            if counted is not None:
                rows = rows[counted.movedim(frame.axis, -1).expand(*whole.shape[:-1], 1).flatten().to(rows.device)]
            self._seen.append(rows.to(torch.promote_types(rows.dtype, torch.float32)))

    def _counted(self, frame: Frame, *, is_nested: bool) -> Tensor | None:
        """Which of an activation's tokens count, on the axes of its rows and tokens; None where all do."""
        real = None if is_nested else real_at(frame, self._now)
        if isinstance(self._positions, str) and self._positions in ("all", "prompt"):
            return real
        if is_nested:
            raise ShapeError(f"site {frame.site!r}: a nested activation has no positions to choose from; take 'all'")
        tokens = self._now.tokens
        if tokens is None:
            rows, length = frame.rows_and_length
            tokens = Tokens(rows, length, prompt=length, batch=self._now.named)
        return frame.needs_tokens(chosen(self._positions, tokens), rows=tokens.rows)
