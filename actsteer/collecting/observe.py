"""Observation: run a model over batches, and hand on what is seen at its sites, as rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from actsteer.collecting.batches import call, first_shape, rows_in
from actsteer.collecting.eval_mode import eval_mode
from actsteer.collecting.masks import TokenMasks
from actsteer.collecting.positions import Positions, check, chosen, mean
from actsteer.collecting.processes import is_alone
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

_NONE = torch.zeros(0, dtype=torch.long)


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
        keep_shape: hand on each activation whole, with the features last, and not its rows.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        *,
        axis: Axes | None,
        positions: Positions,
        stop: bool,
        keep_shape: bool = False,
    ) -> None:
        check(positions)
        if keep_shape and not (isinstance(positions, str) and positions == "all"):
            raise ValueError(f"keep_shape: an activation in its own shape has all positions, got {positions!r}")
        self.model, self._positions = model, positions
        modules = list(model.modules())
        said = [getattr(kind, "batch_first", None) for kind in {type(module) for module in modules}]
        said += [vars(module).get("batch_first") for module in modules]  # `getattr` is slow where there is none
        self.sequence_first = False in said
        """Whether some module of the model has the positions on the first axis, and the rows on the second."""
        self.axes: dict[str, int] = {}
        """Site -> the axis along which its features lay."""
        self.asked: _Asked | None = None
        """What the pass that runs is to give; None where the model runs for another reason, as to make a batch."""
        self._places = resolve(model, names)
        self.sites = tuple(self._places)
        self.stopper = Stopper(self._places, allowed=stop and not must_finish(model))
        layout_of = layouts(model, self._places, axis=axis)
        self._listeners = [
            _Listener(self, place, layout_of[site], keeps_shape=keep_shape) for site, place in self._places.items()
        ]

    def run(self, steps: Iterable[Step]) -> None:
        """Run one step after another; each is taken once the one before it is over.

        Raises:
            StatisticsError: a site has never run, or runs more often than in the first pass.
        """
        with eval_mode(self.model), ExitStack() as handles:
            for listener in self._listeners:
                handles.callback(listen(listener.place, listener))
            for batch, keep, rows in steps:
                positions = self._positions(batch) if callable(self._positions) else self._positions
                check(positions)
                masks = TokenMasks(self.model, batch, explicit=isinstance(positions, Tensor))
                given = None if self.sequence_first else rows_in(batch)
                tokens = () if self.sequence_first else first_shape(batch)[:2]
                self.stopper.begin()
                self.asked = _Asked(keep, positions, masks, given, tokens, rows, {})
                try:
                    with suppress(Stop), torch.no_grad():
                        call(self.model, batch)
                finally:
                    self.asked = None
                self.stopper.end()
        silent = [
            f"{site!r} ({likely_cause(self.model, p)})" for site, p in self._places.items() if site not in self.axes
        ]
        if silent and self.stopper.passes:
            raise StatisticsError(f"these sites never ran: {'; '.join(silent)}")


class _Asked(NamedTuple):
    """What is asked of one pass."""

    keep: Keep
    positions: Positions
    masks: TokenMasks
    given: int | None
    """The number of its rows, as far as its length tells."""
    tokens: tuple[int, ...]
    """Its rows and positions, as far as its shape tells."""
    rows: int | None
    """The number of its rows, if it matters from which each activation is."""
    choices: dict[Any, _Choice]
    """Those that were made, for the shapes and devices of activations; sites of one shape share them."""


class _Choice(NamedTuple):
    """Where in an activation of some shape the rows are that count."""

    row_axis: int
    where: Int[Tensor, " n"] | None
    """Which of all of them in a line, the batch's rows first; None: every one."""
    owners: Int[Tensor, " n"]
    mean_of: tuple[int, int] | None = None
    """The rows and positions, where each row counts by its mean."""
    real: Tensor | None = None

    def of(self, whole: Float[Tensor, "*shape d"]) -> Float[Tensor, "n d"]:
        """The rows that count."""
        line = (whole.movedim(self.row_axis, 0) if self.row_axis else whole).reshape(-1, whole.shape[-1])
        if self.mean_of is not None:
            return mean(line.unflatten(0, self.mean_of), self.real)
        return line if self.where is None else line.index_select(0, self.where)


@final
class _Listener:
    """A hook that hands the activations of a site on, as rows."""

    def __init__(self, observation: Observation, place: Place, layout: Layout, *, keeps_shape: bool) -> None:
        self.place, self._observation, self._keeps_shape = place, observation, keeps_shape
        self._lens = Lens(place, layout)
        self._frame: Frame | None = None  # the last one, whose axis is noticed
        self._doubtful = observation.sequence_first and layout.row_axis == 0
        """Whether the first axis may hold the positions and not the rows."""
        is_converted = getattr(place.module, "hook_conversion", None) is not None
        self._is_plain = place.side == "out" and not place.path and not is_converted and is_alone()
        """Whether a tensor that the module gives is the activation, as its users see it."""

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        """`last` is the output or, at an input, the keyword arguments."""
        asked = self._observation.asked
        if asked is None:
            return
        if torch.is_inference_mode_enabled():  # of the caller's own
            with torch.inference_mode(mode=False):
                self._hear(asked, module, args, last)
        else:
            self._hear(asked, module, args, last)
        self._observation.stopper.ran(self.place.site)

    def _hear(self, asked: _Asked, module: nn.Module, args: Any, last: Any) -> None:
        if self._is_plain and last.__class__ is Tensor and last.is_floating_point() and not last.is_nested:
            frame = self._lens.frame(last.shape)  # what a view would come to, without one
            self._take(asked, last if frame.is_last else last.movedim(frame.axis, -1), frame)
            return
        view = self._lens.heard(module, args, last)
        nested, packed = view.raw.is_nested, view.packed
        for index, (whole, frame) in enumerate(view.rows()):
            if not nested and packed is None:
                self._take(asked, whole, frame)
                continue
            self._notice_axis(frame)
            if self._keeps_shape:
                raise ShapeError(f"site {self.place.site!r}: a nested or packed activation has no one shape to keep")
            if packed is not None:
                rows, owners = self._everything(asked.positions, _plain(whole), "is packed"), packed_rows(packed)
            else:
                choice = self._choice(asked, whole, frame, nested=True)
                rows, owners = choice.of(_plain(whole)), choice.owners + index
            if rows.shape[0]:
                asked.keep(self.place.site, rows, owners)

    def _take(self, asked: _Asked, whole: Float[Tensor, "*shape d"], frame: Frame) -> None:
        """Hand on an ordinary activation, features last."""
        site, whole = self.place.site, _plain(whole)
        if frame is not self._frame:
            self._notice_axis(frame)
        if self._keeps_shape:
            asked.keep(site, whole, _NONE)
            return
        whose = site if asked.masks.by_site else None
        key = (whole.shape, whole.device, frame.row_axis, frame.axis, self._doubtful, whose)
        choice = asked.choices.get(key)
        if choice is None:
            choice = asked.choices[key] = self._choice(asked, whole, frame, nested=False)
        rows = choice.of(whole)
        if rows.shape[0]:
            asked.keep(site, rows, choice.owners)

    def _notice_axis(self, frame: Frame) -> None:
        known, self._frame = self._lens.layout.axis, frame
        self._observation.axes[self.place.site] = known if known is not None else -1 if frame.is_last else frame.axis

    def _choice(self, asked: _Asked, whole: Float[Tensor, "*shape d"], frame: Frame, *, nested: bool) -> _Choice:
        """Which of the activations are asked for, and of which row each is."""
        site, positions = self.place.site, asked.positions
        ordered = isinstance(positions, str) and positions in ("all", "prompt")
        row_axis = self._row_axis(asked, whole, frame, nested=nested, matters=not ordered or asked.rows is not None)
        others = [size for axis, size in enumerate(whole.shape[:-1]) if axis != row_axis]
        by_row = (1 if row_axis is None else whole.shape[row_axis], math.prod(others))
        real = None if nested or whole.ndim > 3 else asked.masks.at(site, by_row if whole.ndim > 2 else by_row[:1])
        if real is not None and real.shape != by_row:  # the tokens of all rows in a line
            by_row = (real.shape[0], real.shape[1])
        if asked.rows not in (None, by_row[0]) and not nested:
            if whole.ndim != 2 or asked.tokens[:1] != (asked.rows,) or by_row[0] != math.prod(asked.tokens):
                raise BatchError(
                    f"by: {asked.rows} labels, and {by_row[0]} rows at site {site!r} in an activation of shape "
                    f"{tuple(whole.shape)}; give one label per row, or choose a site with a row for each"
                )
            by_row = (asked.rows, by_row[0] // max(1, asked.rows))
        alone = whole.ndim < 3 and asked.given in (None, by_row[0])  # one activation for each row
        in_order = whole.ndim == 3 or real is not None or isinstance(positions, Tensor)
        is_mean = isinstance(positions, str) and positions == "mean"
        if not (ordered or nested or in_order or (is_mean and (alone or whole.ndim > 3))):
            self._everything(positions, whole, f"has shape {tuple(whole.shape)}")
        first = row_axis or 0
        if is_mean:
            return _Choice(first, None, torch.arange(by_row[0]), by_row, real)
        if ordered and (real is None or bool(real.all())):
            return _Choice(first, None, torch.arange(by_row[0]).repeat_interleave(by_row[1]))
        owners, where = chosen(by_row, real, positions, device=whole.device)
        return _Choice(first, owners * by_row[1] + where, owners)

    def _row_axis(self, asked: _Asked, whole: Tensor, frame: Frame, *, nested: bool, matters: bool) -> int | None:
        """The axis of the batch's rows in an activation with the features last; None if it is one row alone."""
        row_axis = 0 if nested else frame.row_axis
        if self._doubtful and matters and not nested and whole.ndim == 3 and frame.row_axis != frame.axis:
            rows = asked.rows if asked.rows is not None else asked.masks.rows
            if rows not in whole.shape[:2] or whole.shape[0] == whole.shape[1]:
                raise ShapeError(
                    f"site {self.place.site!r}: the model has modules with batch_first=False, and it cannot be told "
                    f"which axis of an activation of shape {tuple(whole.shape)} holds the rows; choose a site inside "
                    "of them"
                )
            return whole.shape.index(rows)
        if row_axis is None or row_axis == frame.axis or whole.ndim < 2:
            return None
        return row_axis - (row_axis > frame.axis)

    def _everything(self, positions: Positions, whole: Tensor, why: str) -> Tensor:
        if isinstance(positions, str) and positions in ("all", "prompt"):
            return whole
        raise ShapeError(
            f"site {self.place.site!r}: positions={positions!r} of an activation that {why}; choose a site whose "
            "activation has the shape (rows, positions, d), or positions='all'"
        )


def _plain(tensor: Tensor) -> Tensor:
    """An ordinary tensor without history."""
    return tensor if type(tensor) is Tensor and not tensor.requires_grad else tensor.detach().as_subclass(Tensor)
