"""Observation: run a model over batches, and hand on what is seen at its sites, as rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actsteer.collecting.batches import arguments, call, first_shape
from actsteer.collecting.eval_mode import eval_mode
from actsteer.collecting.stop import Stop, Stopper, must_finish
from actsteer.errors import BatchError, ShapeError, StatisticsError
from actsteer.sites.axes import Axes, Layout, layouts
from actsteer.sites.lens import Frame, Lens, packed_rows
from actsteer.sites.listen import likely_cause, listen
from actsteer.sites.place import Place
from actsteer.sites.resolve import resolve
from actsteer.sites.shards import is_alone
from actsteer.sites.wrappers import unwrapped
from actsteer.tokens.inputs import signature_of
from actsteer.tokens.order import places
from actsteer.tokens.passes import Pass, Passes, groups
from actsteer.tokens.positions import Positions, check
from actsteer.tokens.real import real_at
from actsteer.tokens.tokens import Tokens
from actsteer.tokens.whose import Masks, said_of

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
    take: Callable[[Any], None] | None = None
    """Who is given what the model returns, of a pass that does not end early."""
    fills_cache: bool = False
    """Whether the model writes into the cache that the batch has, and not into a copy."""


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
        axis: Axes | None = None,
        row_axis: Axes | None = None,
        token_axis: Axes | None = None,
        mask: Masks | None = None,
        positions: Positions,
        stop: bool,
        keep_shape: bool = False,
    ) -> None:
        check(positions, steers=False)
        if keep_shape and not (isinstance(positions, str) and positions == "all"):
            raise ValueError(f"keep_shape: an activation in its own shape has all positions, got {positions!r}")
        self.model, self._positions = model, positions
        self.axes: dict[str, int] = {}
        """Site -> the axis along which its features lay."""
        self.asked: _Asked | None = None
        """What the pass that runs is to give; None where the model runs for another reason, as to make a batch."""
        self._places = resolve(model, names)
        self.sites = tuple(self._places)
        self.stopper = Stopper(self._places, allowed=stop and not must_finish(model))
        layout_of = layouts(model, self._places, axis=axis, row_axis=row_axis, token_axis=token_axis)
        self._passes, passes_of = groups(unwrapped(model), self._places, said_of(mask, self._places), data=True)
        self._signature = signature_of(model)
        self._listeners = [
            _Listener(self, place, layout_of[site], passes_of[site], keeps_shape=keep_shape)
            for site, place in self._places.items()
        ]

    def run(self, steps: Iterable[Step]) -> None:
        """Run one step after another; each is taken once the one before it is over.

        Raises:
            StatisticsError: a site has never run, or runs more often than in the first pass.
        """
        with eval_mode(self.model), ExitStack() as handles:
            for listener in self._listeners:
                handles.callback(listen(listener.place, listener))
            for batch, keep, rows, take, fills_cache in steps:
                args, kwargs = arguments(batch)
                begun = {own: own.begun(args, kwargs, self._signature) for own in self._passes if own.modules}
                self.stopper.begin()
                self.asked = _Asked(keep, self._positions, begun, first_shape(batch)[:2], rows, {})
                try:
                    with suppress(Stop), torch.no_grad():
                        output = call(self.model, batch, fills_cache=fills_cache)
                        if take is not None:
                            take(output)
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
    begun: dict[Passes, Pass]
    """What is known of it, for sites with these tokens."""
    tokens: tuple[int, ...]
    """Its rows and positions, as far as its shape tells."""
    rows: int | None
    """The number of its rows, if it matters from which each activation is."""
    choices: dict[Any, _Choice]
    """Those that were made, for the shapes and devices of activations; sites of one shape share them."""


class _Choice(NamedTuple):
    """Where in an activation of some shape the rows are that count."""

    order: tuple[int, ...]
    """Its axes: those of the rows, of the tokens, then any others, and the features."""
    where: Int[Tensor, " n"] | None
    """Which of its tokens in a line, the batch's rows first; None: every one."""
    owners: Int[Tensor, " n"]
    others: int = 1
    """How many rows there are for each token."""
    mean_of: _Texts | None = None
    """Where texts count by their means: these."""

    def of(self, whole: Float[Tensor, "*shape d"]) -> Float[Tensor, "n d"]:
        """The rows that count."""
        line = whole.permute(self.order).reshape(-1, self.others, whole.shape[-1])
        if self.mean_of is not None:
            return self.mean_of.mean(line)
        return (line if self.where is None else line.index_select(0, self.where)).reshape(-1, whole.shape[-1])


class _Texts(NamedTuple):
    """Where the tokens of each of T texts are among all tokens in a line, and which of L places are filled."""

    places: Int[Tensor, "T L"]
    filled: Bool[Tensor, "T L"]

    def mean(self, line: Float[Tensor, "tokens others d"]) -> Float[Tensor, "T d"]:
        """The mean over the tokens of every text."""
        cells = line.to(torch.promote_types(line.dtype, torch.float32))[self.places]
        total = torch.where(self.filled[..., None, None], cells, 0).sum(dim=(1, 2))
        return (total / (self.filled.sum(dim=1, keepdim=True) * line.shape[1])).to(line.dtype)


@final
class _Listener:
    """A hook that hands the activations of a site on, as rows."""

    def __init__(
        self, observation: Observation, place: Place, layout: Layout, passes: Passes, *, keeps_shape: bool
    ) -> None:
        self.place, self._observation, self._keeps_shape = place, observation, keeps_shape
        self._lens, self._passes = Lens(place, layout), passes
        self._frame: Frame | None = None  # the last one, whose axis is noticed
        is_converted = getattr(place.module, "hook_conversion", None) is not None
        is_whole = not place.path and place.features is None
        self._is_plain = place.side == "out" and is_whole and not is_converted and is_alone()
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
                self._check_everything(asked.positions, whole, packed=True)
                rows, owners = _plain(whole), packed_rows(packed)
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
        lies = (frame.row_axis, frame.token_axis, frame.axis, frame.rows_by, frame.is_step)
        key = (whole.shape, whole.device, lies, self._passes)
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
        positions, now = asked.positions, Pass() if nested else asked.begun[self._passes]
        ordered, is_mean = (isinstance(positions, str) and positions in own for own in (("all", "prompt"), ("mean",)))
        explicit = isinstance(positions, Tensor) or callable(positions)  # the positions themselves say where
        if not nested and (asked.rows is not None or not ordered):
            frame.check_rows(now.rows if asked.rows is None else asked.rows)
        if not explicit:
            real_at(frame, now)  # where pads cannot be told, it is refused
        order, rows, length, others = self._order(asked, whole, frame, now.tokens, nested=nested)
        tokens = now.tokens
        fits = tokens is not None and (tokens.rows, tokens.length) == (rows, length)
        if tokens is None or not fits:
            tokens = Tokens(rows, length, prompt=length, batch=now.named, device=whole.device)
        elif now.real is None:
            tokens = tokens.but(mask=None) if tokens.start == 0 else tokens
        in_order = nested or fits or whole.ndim == 3 or frame.token_axis is not None
        alone = whole.ndim > 3 or (whole.ndim < 3 and now.rows in (None, rows))  # one, or one image, for each row
        if frame.is_step or not (in_order or explicit or (is_mean and alone)):
            self._check_everything(positions, whole)
        if asked.rows not in (None, rows) and not nested:
            raise BatchError(
                f"by: {asked.rows} labels, and {rows} rows at site {self.place.site!r} in an activation of shape "
                f"{tuple(whole.shape)}; give one label per row, or choose a site with a row for each"
            )
        owners = torch.arange(rows, device=whole.device).repeat_interleave(length)
        if is_mean:
            texts = _texts(tokens, device=whole.device)
            return _Choice(order, None, owners[texts.places[:, 0]], others, texts)
        if ordered and tokens.real is None:
            return _Choice(order, None, owners.repeat_interleave(others), others)
        where = places(positions, tokens).to(whole.device)
        return _Choice(order, where, owners[where].repeat_interleave(others), others)

    def _order(
        self, asked: _Asked, whole: Tensor, frame: Frame, tokens: Tokens | None, *, nested: bool
    ) -> tuple[tuple[int, ...], int, int, int]:
        """The axes in the order of rows, tokens, others, features; and how many rows, tokens and others there are."""
        rank, rows = whole.ndim, 0 if nested else frame.row_axis
        if rows is None or rows == frame.axis or rank < 2:
            return tuple(range(rank)), 1, math.prod(whole.shape[:-1]), 1
        if rank == 2:
            count, batch, length = whole.shape[0], whole.shape[0], 1
            if tokens is not None and count == tokens.rows * tokens.length:
                batch, length = tokens.rows, tokens.length
            elif asked.rows is not None and asked.tokens[:1] == (asked.rows,) and count == math.prod(asked.tokens):
                batch, length = asked.tokens[0], count // max(1, asked.rows)
            return (0, 1), batch, length, 1
        first, *rest = frame.order[:-1]
        if frame.token_axis is None:
            return frame.order, whole.shape[first], math.prod(whole.shape[own] for own in rest), 1
        tokens_at, *rest = rest
        return frame.order, whole.shape[first], whole.shape[tokens_at], math.prod(whole.shape[own] for own in rest)

    def _check_everything(self, positions: Positions, whole: Tensor, *, packed: bool = False) -> None:
        if not (isinstance(positions, str) and positions in ("all", "prompt")):
            what = "is packed" if packed else f"has shape {tuple(whole.shape)}"
            raise ShapeError(
                f"site {self.place.site!r}: positions={positions!r} of an activation that {what}; choose a site whose "
                "activation has the shape (rows, positions, d), or positions='all'"
            )


def _texts(tokens: Tokens, *, device: torch.device) -> _Texts:
    """The tokens of every text, which a packed row has several of."""
    if tokens.texts is not None:
        index, filled = tokens.grid
    else:
        index = torch.arange(tokens.rows * tokens.length, device=device).view(tokens.rows, tokens.length)
        filled = torch.ones_like(index, dtype=torch.bool) if tokens.real is None else tokens.real
    if short := (filled.sum(dim=1) == 0).nonzero().flatten().tolist():
        raise BatchError(
            f"positions='mean': row {short[0]} of the batch has 0 tokens, and 1 are needed; leave it out, or choose "
            "other positions"
        )
    return _Texts(index.to(device), filled.to(device))


def _plain(tensor: Tensor) -> Tensor:
    """An ordinary tensor without history."""
    return tensor if type(tensor) is Tensor and not tensor.requires_grad else tensor.detach().as_subclass(Tensor)
