"""Observation: run a model over batches, and hand on what is seen at its sites, as rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from actsteer.collecting.batches import call, first_shape, rows_in
from actsteer.collecting.eval_mode import eval_mode
from actsteer.collecting.masks import TokenMasks
from actsteer.collecting.positions import Positions, check, pick
from actsteer.collecting.stop import Stop, Stopper, must_finish
from actsteer.errors import BatchError, ShapeError, StatisticsError
from actsteer.sites.axes import Axes, Layout, layouts
from actsteer.sites.lens import Frame, Lens, packed_rows
from actsteer.sites.listen import likely_cause, listen
from actsteer.sites.place import Place
from actsteer.sites.resolve import resolve

Keep = Callable[[str, Float[Tensor, "n d"], Int[Tensor, " n"]], None]
"""Called with a site, rows of its activations, and for each of them the row of the batch that it is from; in normal
mode, so that what it makes works in autograd later, with tensors that the model may edit in place afterwards."""


class Step(NamedTuple):
    """A forward pass: on what, and who is given what is seen in it."""

    batch: Any
    keep: Keep
    rows: int | None = None
    """How many rows the batch has, for a caller to whom it matters from which each activation is."""


@final
class Observation:
    """What is seen at the sites when batches run, each of them once and, if `stop`, no further than the last site.

    Args:
        stop: whether a pass may end early; see `Stopper`.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], *, axis: Axes | None, positions: Positions, stop: bool
    ) -> None:
        check(positions)
        self._model, self._positions = model, positions
        self._sequence_first = any(getattr(module, "batch_first", None) is False for module in model.modules())
        self._places = resolve(model, names)
        lies = layouts(model, self._places, axis=axis)
        self.axes: dict[str, int] = {}
        """Site -> the axis along which its features lay."""
        self._stopper = Stopper(self._places, allowed=stop and not must_finish(model))
        self._listeners = [
            _Listener(place, lies[site], self._stopper, self.axes) for site, place in self._places.items()
        ]
        for listener in self._listeners:
            listener.doubtful = self._sequence_first and lies[listener.place.site].row_axis == 0

    def run(self, steps: Iterable[Step]) -> None:
        """Run one step after another; each is taken once the one before it is over.

        Raises:
            StatisticsError: a site has never run, or runs more often than in the first pass.
        """
        with eval_mode(self._model), ExitStack() as handles:
            for listener in self._listeners:
                handles.callback(listen(listener.place, listener))
            for batch, keep, rows in steps:
                positions = self._positions(batch) if callable(self._positions) else self._positions
                check(positions)
                masks = TokenMasks(self._model, batch, explicit=isinstance(positions, Tensor))
                for listener in self._listeners:
                    listener.keep, listener.positions, listener.masks, listener.asked = keep, positions, masks, rows
                    listener.given = None if self._sequence_first else rows_in(batch)
                    listener.tokens = () if self._sequence_first else first_shape(batch)[:2]
                self._stopper.begin()
                with suppress(Stop), torch.no_grad(), self._listening():
                    call(self._model, batch)
                self._stopper.end()
        silent = [
            f"{site!r} ({likely_cause(self._model, p)})" for site, p in self._places.items() if site not in self.axes
        ]
        if silent and self._stopper.passes:
            raise StatisticsError(f"these sites never ran: {'; '.join(silent)}")

    @contextmanager
    def _listening(self) -> Iterator[None]:
        for listener in self._listeners:
            listener.hears = True
        try:
            yield
        finally:
            for listener in self._listeners:
                listener.hears = False


@final
class _Listener:
    """A hook that hands the activations of a site on, as rows."""

    hears = False  # not when the model runs for another reason, such as to make the next batch
    keep: Keep
    positions: Positions
    masks: TokenMasks
    doubtful: bool  # whether the first axis may hold the positions and not the rows
    given: int | None  # the number of its rows as far as its length tells
    tokens: tuple[int, ...]  # its rows and positions, as far as its shape tells
    asked: int | None  # the number of its rows, if it matters from which each activation is

    def __init__(self, place: Place, layout: Layout, stopper: Stopper, axes: dict[str, int]) -> None:
        self.place, self._stopper, self._axes = place, stopper, axes
        self._lens = Lens(place, layout)

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        """`last` is the output or, at an input, the keyword arguments."""
        if not self.hears:
            return
        view = self._lens.heard(module, args, last)
        nested, packed = view.raw.is_nested, view.packed
        with torch.inference_mode(mode=False), torch.no_grad():
            for index, (whole, frame) in enumerate(view.rows()):
                self._notice_axis(frame)
                if packed is not None:
                    rows, owners = self._everything(whole, "is packed"), packed_rows(packed)
                else:
                    rows, owners = self._rows(whole, frame, nested=nested)
                if len(rows):
                    self.keep(self.place.site, rows, owners + index if nested else owners)
        self._stopper.ran(self.place.site)

    def _notice_axis(self, frame: Frame) -> None:
        known = self._lens.layout.axis
        self._axes[self.place.site] = known if known is not None else -1 if frame.is_last else frame.axis

    def _rows(self, whole: Float[Tensor, "*shape d"], frame: Frame, *, nested: bool) -> tuple[Tensor, Tensor]:
        """The activations at the positions that are asked for, and their rows."""
        site, ordered = self.place.site, isinstance(self.positions, str) and self.positions in ("all", "prompt")
        by_row = self._by_row(whole, frame, nested=nested, matters=not ordered or self.asked is not None)
        shape = tuple(by_row.shape[:2]) if whole.ndim > 2 else (len(by_row),)
        real = None if nested or whole.ndim > 3 else self.masks.at(site, shape)
        if real is not None and real.shape != by_row.shape[:2]:  # the tokens of all rows in a line
            by_row = rearrange(by_row, "(b s) 1 d -> b s d", b=len(real))
        if self.asked not in (None, len(by_row)) and not nested:
            if whole.ndim != 2 or self.tokens[:1] != (self.asked,) or len(by_row) != math.prod(self.tokens):
                raise BatchError(
                    f"by: {self.asked} labels, and {len(by_row)} rows at site {site!r} in an activation of shape "
                    f"{tuple(whole.shape)}; give one label per row, or choose a site with a row for each"
                )
            by_row = rearrange(by_row, "(b s) 1 d -> b s d", b=self.asked)
        alone = whole.ndim < 3 and self.given in (None, len(by_row))  # one activation for each row
        in_order = whole.ndim == 3 or real is not None or isinstance(self.positions, Tensor)
        if not (ordered or nested or in_order or (self.positions == "mean" and (alone or whole.ndim > 3))):
            self._everything(whole, f"has shape {tuple(whole.shape)}")
        if ordered and (real is None or bool(real.all())):
            owners = torch.arange(len(by_row)).repeat_interleave(by_row.shape[1])
            return rearrange(by_row, "b s d -> (b s) d"), owners
        return pick(by_row, real, self.positions)

    def _by_row(
        self, whole: Float[Tensor, "*shape d"], frame: Frame, *, nested: bool, matters: bool
    ) -> Float[Tensor, "rows s d"]:
        """The activation with the rows first and the positions, however many axes they have, second."""
        if nested:
            frame = replace(frame, row_axis=0)
        if self.doubtful and matters and not nested and whole.ndim == 3 and frame.row_axis != frame.axis:
            rows = self.asked if self.asked is not None else self.masks.rows
            if rows not in whole.shape[:2] or whole.shape[0] == whole.shape[1]:
                raise ShapeError(
                    f"site {self.place.site!r}: the model has modules with batch_first=False, and nobody can tell "
                    f"which axis of an activation of shape {tuple(whole.shape)} holds the rows; choose a site inside "
                    "of them"
                )
            by_row = whole.movedim(whole.shape.index(rows), 0)
        elif (found := frame.rows_first(whole)) is None or whole.ndim < 2:  # one row alone
            return whole.reshape(1, -1, whole.shape[-1])
        else:
            by_row = found
        return by_row[:, None] if by_row.ndim == 2 else by_row.flatten(1, -2)

    def _everything(self, whole: Tensor, why: str) -> Tensor:
        if isinstance(self.positions, str) and self.positions in ("all", "prompt"):
            return whole
        raise ShapeError(
            f"site {self.place.site!r}: positions={self.positions!r} of an activation that {why}; choose a site whose "
            "activation has the shape (rows, positions, d), or positions='all'"
        )
