"""Passes: what the edits and gates of a Steerer know about the forward pass that runs now."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
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
from actsteer.steering.strength import Schedule, strength_at
from actsteer.steering.tokens import Tokens

PerToken = Tensor | Schedule
"""A strength (B, S), one for each row and position; or one for each step of the generation."""


@final
class Now:
    """One forward pass: its tokens, and how much of each concept each of them gets.

    Args:
        tokens: where they stand; None if the inputs do not show it, and the activation's own positions count.
        real: which of them are not pads, (B, S); None: all.
        doses: (B, S) or (1, S) for each concept; None where every token gets the same.
    """

    def __init__(self, tokens: Tokens | None, real: Tensor | None, doses: list[Tensor | None]) -> None:
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

    def __init__(self, host: nn.Module, positions: Sequence[Positions | None], *, is_encoder: bool = False) -> None:
        self.host = host
        self.positions = tuple(positions)
        self.is_encoder = is_encoder
        self._by_column: list[Tensor | None] = [None] * len(self.positions)  # (B, S)
        self._schedules: list[Schedule | None] = [None] * len(self.positions)
        self.generating: PerThread[Generating] = PerThread()
        self.readers: list[Notices] = []  # what decides anew when a pass begins
        self.edits: list[Notices] = []
        self.is_read = False  # whether a gate reads in the module
        self._first: list[Tensor | None] = [None] * len(self.positions)  # what the schedule says of step 0
        self._now: PerThread[Now] = PerThread()
        self._runs: PerThread[bool] = PerThread()
        self._announced: PerThread[bool] = PerThread()  # the next pass is known already
        try:
            self._names = list(inspect.signature(type(unwrapped(host)).forward).parameters)[1:]
        except (TypeError, ValueError):
            self._names = []
        # whether the module may be told of pads, a cache or positions
        self.sees_inputs = any(KNOWN.search(name) for name in self._names) or "kwargs" in self._names
        places = [self._names.index(name) for name in MASKS if name in self._names]
        self._unmasked = min(places, default=len(self._names))  # how many arguments come before any mask

    def asks(self, concept: int) -> bool:
        """Whether tokens of one row may get different strengths of a concept."""
        varies = self._by_column[concept] is not None or self._first[concept] is not None
        return varies or self.positions[concept] is not None

    @torch.inference_mode(mode=False)
    def set_strengths(self, strengths: Sequence[PerToken | None]) -> None:
        """New strengths per token, from the next pass on."""
        self._by_column = [own if isinstance(own, Tensor) else None for own in strengths]
        self._schedules = [own if callable(own) else None for own in strengths]
        self._first = [None if not callable(own) else strength_at(own, 0) for own in strengths]

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
        """PositionsError if a part of a model is called by itself, where nobody sees what the model would be given."""
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
        asks = any(self.asks(index) for index in range(len(self.positions))) or self.is_read
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
        return Now(tokens, real, [self._dose(index, tokens) for index in range(len(self.positions))])

    def _dose(self, index: int, tokens: Tokens) -> Tensor | None:
        positions = self.positions[index]
        where = None if positions is None else chosen(positions, tokens)
        amounts = self._amounts(index, tokens)
        if amounts is None:
            return where
        return amounts if where is None else torch.where(where, amounts, 0.0)

    def _amounts(self, index: int, tokens: Tokens) -> Float[Tensor, "_ S"] | None:
        by_column, first = self._by_column[index], self._first[index]
        if by_column is not None:
            return _columns_of(by_column, tokens).to(tokens.device)
        if first is None:
            return None
        if self.generating.get() is None or self.is_encoder:
            tokens.check_known()
            return first.to(tokens.device).expand(1, tokens.length)
        schedule = self._schedules[index]  # a function, which compiled code must not see, or each is compiled anew
        assert schedule is not None
        amounts = torch.stack([first if step == 0 else strength_at(schedule, step) for step in tokens.steps])
        return amounts.to(tokens.device)[None]


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
