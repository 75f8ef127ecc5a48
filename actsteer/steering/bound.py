"""Bound: the edit of one site for activations of one shape, with all that does not depend on them done once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError, StrengthError
from actsteer.private_names import is_functorch_wrapped
from actsteer.sites.lens import Frame, View
from actsteer.steering.interventions.intervention import Intervention
from actsteer.steering.reader import Reader
from actsteer.steering.strength import weighted, without_autocast
from actsteer.tokens.passes import Pass
from actsteer.tokens.real import real_at

_is_compiling = torch.compiler.is_compiling
Run: TypeAlias = Callable[[Tensor, Pass | None], Tensor]
"""The activation, as this process holds it, and what is known of the pass -> the edited activation."""


class Bound(NamedTuple):
    """The edit of activations of one shape, dtype and device."""

    run: Run
    shift: Tensor | None = None
    """What `run` adds where there are no pads, if that is all that it does."""


@final
class Amount:
    """How much of one concept there is: its strength, times what its gate decides, times what its positions say.

    Args:
        c: its strength, () or (B,).
        reader: of its gate.
        place: its place in the bank, under which a pass has its dose.
        is_by_token: whether a pass has one.
    """

    __slots__ = ("c", "is_by_token", "place", "reader")

    def __init__(self, c: Tensor, reader: Reader | None, *, place: int, is_by_token: bool) -> None:
        self.c, self.reader, self.place, self.is_by_token = c, reader, place, is_by_token

    @property
    def is_number(self) -> bool:
        """Whether it is one number for all, at which one can look without waiting for another device."""
        alone = self.reader is None and not self.is_by_token and self.c.ndim == 0
        return alone and self.c.device.type == "cpu" and not _is_compiling() and not is_functorch_wrapped(self.c)

    def of(self, frame: Frame, now: Pass | None) -> Tensor:
        """The amount: 0-dim or, of the activation's rank, per row or per token."""
        share = self.share(frame, now)
        c = frame.by_row(self.c, copies=copies_in(now)) if self.c.ndim else self.c
        return c if share is None else share * (c.to(share.device) if c.ndim else c)

    def share(self, frame: Frame, now: Pass | None) -> Tensor | None:
        """The amount at strength 1, a bool or a weight per row or token; None where it is 1 for all."""
        decided = dose = None
        if self.reader is not None:
            weights = self.reader.weights_for(frame.site)
            copies = copies_in(now)
            if self.c.ndim and len(self.c) not in (len(weights), len(weights) // copies):
                raise StrengthError(
                    f"site {frame.site!r}: {len(self.c)} rows of strength, and a gate that decides for "
                    f"{len(weights)}; give one strength per row"
                )
            if weights.ndim == 2:
                decided = frame.needs_tokens(weights, rows=len(weights))
            else:
                decided = frame.by_row(weights, copies=copies)
        if now is not None and now.tokens is not None and self.place in now.doses:
            dose = frame.needs_tokens(now.doses[self.place], rows=now.tokens.rows)
        if decided is None or dose is None:
            return dose if decided is None else decided
        return dose * decided.to(dose.device)


def copies_in(now: Pass | None) -> int:
    """How many rows were made from one of the caller's."""
    return 1 if now is None or now.tokens is None else max(1, now.tokens.copies)


def _real(view: View, now: Pass | None, device: torch.device) -> Tensor | None:
    """Where there are tokens and not pads; pads are not steered."""
    if now is None or (now.real is None and now.doubt is None) or view.raw.is_nested:
        return None
    real = real_at(view.frame, now)
    return None if real is None else real.to(device)


def summed(view: View, constant: Tensor | None, amounts: Sequence[Amount], directions: Tensor | None) -> Bound:
    """h + Σ c_k v_k, the sum in float32 at least and rounded once; where all amounts are 0, and at pads, h itself.

    Args:
        view: an opened one of the activation.
        constant: (d,) or (B, d), what neither gates nor positions change.
        amounts, directions: of the rest.
    """
    frame, dtype, device, is_plain = view.frame, view.part.dtype, view.part.device, view.is_plain
    fixed = None if constant is None or constant.ndim == 2 else frame.vectors(constant)
    terms = [_term(amount, directions[i], frame) for i, amount in enumerate(amounts) if directions is not None]
    rounded = None if fixed is None or terms else view.share(fixed.to(dtype=dtype, device=device))

    def run(h: Tensor, now: Pass | None) -> Tensor:
        if rounded is not None and (now is None or (now.real is None and now.doubt is None)):
            return h + rounded
        total = fixed
        if constant is not None and total is None:
            total = frame.vectors(constant, copies=copies_in(now))
        for term in terms:
            part = term(now)
            total = part if total is None else total.to(part.device) + part
        assert total is not None
        total = total.to(dtype=dtype, device=device)
        if (real := _real(view, now, device)) is not None:
            total = torch.where(real, total, -0.0)
        return h + (total if is_plain else view.share(total))

    return Bound(run, rounded)


def _term(amount: Amount, direction: Float[Tensor, " d"], frame: Frame) -> Callable[[Pass | None], Tensor]:
    """What is added of one concept; minus zero where its amount is 0, because h + (-0.0) is h bit for bit."""
    if amount.c.ndim:
        spread = frame.vectors(direction)

        def by_row(now: Pass | None) -> Tensor:
            c = amount.of(frame, now).to(spread)
            return torch.where(c == 0, -0.0, c * spread)

        return by_row
    full = frame.vectors(weighted(amount.c.to(direction)[None], direction[None]))

    def part(now: Pass | None) -> Tensor:
        share = amount.share(frame, now)
        if share is None:
            return full
        share = share.to(full.device)
        if share.dtype is torch.bool:
            return torch.where(share, full, -0.0)
        return torch.where(share == 0, -0.0, share.to(full.dtype) * full)

    return part


def applied(
    view: View,
    interventions: Sequence[Intervention],
    amounts: Sequence[Amount],
    directions: Float[Tensor, "k d"] | None,
) -> Bound:
    """What the interventions make of h one after another, in float32 at least and rounded once."""
    if directions is None:
        return Bound(lambda h, now: h)
    frame, dtype, is_plain = view.frame, view.part.dtype, view.is_plain
    wide, kind = torch.promote_types(dtype, torch.float32), view.part.device.type
    directions = directions.to(view.part.device, wide)
    known = [_known(*each) for each in zip(interventions, directions, amounts, strict=True)]
    casts = kind != "meta" and (_is_compiling() or torch.amp.is_autocast_available(kind))
    turned = not (is_plain and frame.is_last)

    def edited(last: Tensor, now: Pass | None) -> Tensor:
        real = _real(view, now, last.device)
        for intervention, direction, amount, function in zip(interventions, directions, amounts, known, strict=True):
            if function is not None and real is None:
                last = checked(function(last), last, intervention)
                continue
            c = amount.of(frame, now)
            c = c if real is None else torch.where(real, c.to(last.device), 0.0)
            if c.ndim:  # a number for all stays on the CPU: reading it waits for no other device
                c = c.to(last).movedim(frame.axis, -1)
            last = edited_by(intervention, last, direction, c)
        return last

    def run(h: Tensor, now: Pass | None) -> Tensor:
        last = h if not turned else h.movedim(frame.axis, -1) if is_plain else view.features_last()
        last = last.to(wide)
        if casts and (_is_compiling() or torch.is_autocast_enabled(kind)):
            with without_autocast(kind):
                last = edited(last, now)
        else:
            last = edited(last, now)
        if not turned:
            return last.to(dtype)
        return last.movedim(-1, frame.axis).to(dtype) if is_plain else view.part_of(last)

    return Bound(run)


def _known(intervention: Intervention, direction: Tensor, amount: Amount) -> Callable[[Tensor], Tensor] | None:
    """The edit as a function of h alone, where the amount is one number."""
    if not amount.is_number:
        return None
    if not amount.c:
        return _same
    return partial(_call, intervention, direction, amount.c)


def _same(h: Tensor) -> Tensor:
    return h


def _call(intervention: Intervention, direction: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return intervention(h, direction, c)


def edited_by(
    intervention: Intervention,
    activation: Float[Tensor, "*batch d"],
    direction: Float[Tensor, " d"],
    c: Float[Tensor, ...],
) -> Float[Tensor, "*batch d"]:
    """What the intervention makes of the activation; where c is 0, the activation as it is, bit for bit."""
    edited = checked(intervention(activation, direction, c), activation, intervention)
    return torch.where(c == 0, activation, edited)


def checked(edited: Tensor, activation: Tensor, intervention: Intervention) -> Tensor:
    """What an intervention gave.

    Raises:
        ShapeError: it has not the activation's shape.
    """
    if not isinstance(edited, Tensor) or edited.shape != activation.shape:
        got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise ShapeError(
            f"intervention {intervention!r}: expected an activation of the shape that it was given, "
            f"{tuple(activation.shape)}, got {got}"
        )
    return edited
