"""Passes: what the edits and gates of a Steerer know about the forward pass that runs now."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.positions import Positions
from actsteer.errors import PositionsError, StrengthError
from actsteer.sites.wrappers import unwrapped
from actsteer.steering.generating import Generating
from actsteer.steering.inputs import KNOWN, MASKS, tokens_of
from actsteer.steering.per_thread import PerThread
from actsteer.steering.positions import chosen
from actsteer.steering.strength import PerConcept, Schedule, strength_at
from actsteer.steering.tokens import Tokens


@final
class Now:
    """One forward pass: its tokens, and how much of each concept each of them gets.

    Args:
        tokens: where they stand; None if the inputs do not show it, and the activation's own positions count.
        real: which of them are not pads, (B, S); None: all.
        doses: place of a concept -> (B, S) or (1, S); of those of which tokens get different amounts.
    """

    def __init__(self, tokens: Tokens | None, real: Tensor | None, doses: Mapping[int, Tensor]) -> None:
        self.tokens, self.real, self.doses = tokens, real, doses


@runtime_checkable
class Notices(Protocol):
    """What is told when a pass begins, and when it ends."""

    def notice(self, now: Now | None) -> None:
        """A pass begins, or has ended (None)."""
        ...


@final
class Passes:
    """The forward passes of a module that is called with the tokens: the model or, in it, its encoder."""

    def __init__(self, host: nn.Module, positions: Mapping[int, Positions], *, is_encoder: bool = False) -> None:
        self.host = host
        self.positions = positions  # of the concepts, by their places, that are not steered at all of them
        self.is_encoder = is_encoder
        self._by_column: dict[int, Tensor] = {}  # (B, S)
        self._schedules: dict[int, Schedule] = {}
        self._by_token: tuple[int, ...] = ()  # the concepts of which tokens of one row may get different amounts
        self.generating: PerThread[Generating] = PerThread()
        self.readers: list[Notices] = []  # what decides anew when a pass begins
        self.edits: list[Notices] = []
        self.is_read = False  # whether a gate reads in the module
        self._first: dict[int, Tensor] = {}  # what a schedule says of step 0
        self._now: PerThread[Now] = PerThread()
        self._runs: PerThread[bool] = PerThread()
        self._announced: PerThread[bool] = PerThread()  # the next pass is known already
        # the arguments, and whether the module may be told of pads, a cache or positions
        self._names, self.sees_inputs = _arguments(type(unwrapped(host)).forward)
        places = [self._names.index(name) for name in MASKS if name in self._names]
        self._unmasked = min(places, default=len(self._names))  # how many arguments come before any mask

    @torch.inference_mode(mode=False)
    def set_strengths(self, strengths: PerConcept, *, every: bool) -> None:
        """New strengths, from the next pass on; with `every`, a concept of strength 0 counts too."""
        by_token, self._by_token = strengths.by_token, ()
        self._by_column = {place: own for place, own in by_token.items() if isinstance(own, Tensor)}
        self._schedules = {place: own for place, own in by_token.items() if not isinstance(own, Tensor)}
        self._first = {place: strength_at(own, 0) for place, own in self._schedules.items()}
        if by_token or self.positions:
            active = strengths.active(every=every)
            self._by_token = tuple(place for place in active if place in by_token or place in self.positions)

    def around(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """A call of the module."""
        self.begin(args, kwargs)
        try:
            return forward(*args, **kwargs)
        finally:
            self.end()

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the forward pass: find out about its tokens, unless the generation has told of them already."""
        self._runs.set(True)
        if self._announced.get():
            self._announced.set(None)
        else:
            self._now.set(self._seen(args, kwargs))
        self._tell()

    def end(self) -> None:
        """After the forward pass."""
        self._runs.set(None)
        self._now.set(None)
        self._tell()

    def announce(self, tokens: Tokens) -> None:
        """Tell of the tokens of the pass that comes next."""
        self._now.set(self._about(tokens))
        self._announced.set(True)

    def forget(self) -> None:
        """Nothing was announced, or it did not come to a pass."""
        self._announced.set(None)
        self._runs.set(None)
        self._now.set(None)

    @property
    def now(self) -> Now | None:
        """The pass that runs; None outside of one, or where there is nothing to know."""
        return self._now.get()

    def of_shape(self, rows: int, length: int, device: torch.device) -> Now:
        """What holds for an activation of so many rows and positions, whatever the inputs were."""
        now = self.now
        if now is not None and now.tokens is not None:
            return now
        self.check_runs()
        return self._about(Tokens(rows, length, prompt=length, device=device))

    def check_runs(self) -> None:
        """PositionsError if a part of a model is called by itself, so that what the model is given is not seen."""
        if self.sees_inputs and not self._runs.get():
            name = type(unwrapped(self.host)).__name__
            raise PositionsError(
                f"a part of the {name} was called, and not the {name} itself, so that its masks and its cache were not "
                "seen; call the whole, or make the Steerer on the part that is called"
            )

    def _tell(self) -> None:
        for own in self.readers:
            own.notice(self.now)
        for own in self.edits:
            own.notice(self.now)

    def _seen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Now | None:
        asks = bool(self._by_token) or self.is_read
        if not asks and self._has_no_pads(args, kwargs):
            return None
        named = dict(zip(self._names, args, strict=False)) | dict(kwargs)
        tokens = tokens_of(named, self.host, is_encoder=self.is_encoder, strict=asks)
        if tokens is None:
            return None
        generating = self.generating.get()
        if generating is not None and not self.is_encoder:
            tokens = generating.within(tokens)
        if not asks and (tokens.mask is None or _has_no_pads(tokens.mask)):
            return None
        return self._about(tokens)

    def _has_no_pads(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether that is plain to see, as it is in most passes."""
        if len(args) > self._unmasked:
            return False
        masks = [kwargs[name] for name in MASKS if kwargs.get(name) is not None]
        return not masks or (len(masks) == 1 and masks[0] is kwargs.get("attention_mask") and _has_no_pads(masks[0]))

    def _about(self, tokens: Tokens) -> Now:
        real = tokens.real
        if real is not None and _has_no_pads(real):
            real = None
        return Now(tokens, real, {place: self._dose(place, tokens) for place in self._by_token})

    def _dose(self, place: int, tokens: Tokens) -> Tensor:
        positions = self.positions.get(place)
        where = None if positions is None else chosen(positions, tokens)
        amounts = self._amounts(place, tokens)
        if amounts is None:
            assert where is not None  # or it would not ask
            return where
        return amounts if where is None else torch.where(where, amounts, 0.0)

    def _amounts(self, place: int, tokens: Tokens) -> Float[Tensor, "_ S"] | None:
        by_column, first = self._by_column.get(place), self._first.get(place)
        if by_column is not None:
            return _columns_of(by_column, tokens).to(tokens.device)
        if first is None:
            return None
        if self.generating.get() is None or self.is_encoder:
            tokens.check_known()
            return first.to(tokens.device).expand(1, tokens.length)
        schedule = self._schedules[place]  # a function, which compiled code must not see, or each is compiled anew
        amounts = torch.stack([first if step == 0 else strength_at(schedule, step) for step in tokens.steps])
        return amounts.to(tokens.device)[None]


@lru_cache(maxsize=256)
def _arguments(forward: Callable[..., Any]) -> tuple[list[str], bool]:
    try:
        names = list(inspect.signature(forward).parameters)[1:]
    except (TypeError, ValueError):
        names = []
    return names, any(KNOWN.search(name) for name in names) or "kwargs" in names


def _has_no_pads(mask: Any) -> bool:
    """Whether all are tokens, as far as one can tell without waiting for another device."""
    if not isinstance(mask, Tensor) or mask.is_floating_point():
        return False
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())


def _columns_of(strength: Float[Tensor, "B S"], tokens: Tokens) -> Float[Tensor, "B S"]:
    """The strengths of these tokens, from those of all columns."""
    rows, columns = strength.shape
    tokens.check_known()
    if (
        not isinstance(tokens.start, int)
        or tokens.start + tokens.length > columns
        or rows * tokens.copies != tokens.rows
    ):
        raise StrengthError(
            f"c has {rows} rows of {columns} positions, and the pass {tokens.rows} rows whose tokens go up to position "
            f"{tokens.start + tokens.length if isinstance(tokens.start, int) else '?'}; give a strength for each, or a "
            "callable of the generation step"
        )
    own = strength.repeat_interleave(tokens.copies, dim=0) if tokens.copies > 1 else strength
    return own[:, tokens.start : tokens.start + tokens.length]
