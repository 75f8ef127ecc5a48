"""Bound: the edit of one site for activations of one shape, with all that does not depend on them done once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError, StrengthError, ZeroDirectionError
from actsteer.private_names import is_functorch_wrapped
from actsteer.sites.device import brought
from actsteer.sites.lens import Frame, View
from actsteer.steering.at_tokens import at_tokens
from actsteer.steering.interventions.intervention import Intervention, Placed, prepared
from actsteer.steering.strength import weighted, without_autocast
from actsteer.tokens.passes import Pass
from actsteer.tokens.positions import Positions
from actsteer.tokens.real import real_at

_is_compiling = torch.compiler.is_compiling
Decide: TypeAlias = Callable[[Tensor, Pass | None], Tensor]
"""The activation, and what is known of the pass -> what a gate decides, (B,) or (B, S)."""
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
        decide: what its gate decides of the activation.
        place: its place in the bank, under which a pass has its dose.
        is_by_token: whether a pass has one.
        at: its positions.
    """

    __slots__ = ("at", "c", "decide", "is_by_token", "place")

    def __init__(self, c: Tensor, decide: Decide | None, *, place: int, is_by_token: bool, at: Positions) -> None:
        self.c, self.decide, self.place, self.is_by_token, self.at = c, decide, place, is_by_token, at

    @property
    def is_number(self) -> bool:
        """Whether its strength is one number, at which one can look without waiting for another device."""
        alone = self.c.ndim == 0 and self.c.device.type == "cpu"
        return alone and not _is_compiling() and not is_functorch_wrapped(self.c)

    @property
    def is_alone(self) -> bool:
        """Whether its gate, or its positions, alone decide who gets its strength, which is one number."""
        return self.c.ndim == 0 and (self.decide is None) == self.is_by_token and not _is_compiling()

    def of(self, h: Tensor, frame: Frame, now: Pass | None) -> Tensor:
        """The amount: 0-dim or, of the activation's rank, per row or per token."""
        share = self.share(h, frame, now)
        c = frame.by_row(self.c, copies=copies_in(now)) if self.c.ndim else self.c
        return c if share is None else share * (brought(c, share.device) if c.ndim else c)

    def share(self, h: Tensor, frame: Frame, now: Pass | None) -> Tensor | None:
        """The amount at strength 1, a bool or a weight per row or token; None where it is 1 for all."""
        decided = dose = None
        if self.decide is not None:
            weights = self.decide(h, now)
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
            given = now.doses[self.place]
            if isinstance(given, bool):
                frame.check_tokens(now.tokens.rows, now.tokens.length)
                dose = None if given else torch.zeros([1] * len(frame.shape), dtype=torch.bool, device=h.device)
            else:
                dose = frame.needs_tokens(given, rows=now.tokens.rows)
        elif self.is_by_token:  # its strength is younger than the pass, and waits for the next one
            dose = torch.zeros([1] * len(frame.shape), dtype=torch.bool, device=h.device)
        if decided is None or dose is None:
            return dose if decided is None else decided
        return dose * decided.to(dose.device)


def copies_in(now: Pass | None) -> int:
    """How many rows were made from one of the caller's."""
    return 1 if now is None or now.tokens is None else max(1, now.tokens.copies)


def has_no_pads(now: Pass | None) -> bool:
    """Whether all tokens of a pass are known to be real."""
    return now is None or (now.real is None and now.doubt is None)


def _real(frame: Frame, now: Pass | None, device: torch.device) -> Tensor | None:
    """Where there are tokens and not pads; pads are not steered."""
    if now is None or has_no_pads(now):
        return None
    real = real_at(frame, now)
    return None if real is None else brought(real, device)


def summed(view: View, constant: Tensor | None, amounts: Sequence[Amount], directions: Tensor | None) -> Bound:
    """h + Σ c_k v_k, the sum in float32 at least and rounded once; where all amounts are 0, and at pads, h itself.

    Args:
        view: an opened one of the activation.
        constant: (d,) or (B, d), what neither gates nor positions change.
        amounts, directions: of the rest.
    """
    frame, dtype, device, is_nested = view.frame, view.part.dtype, view.part.device, view.raw.is_nested
    unusual = None if view.is_whole else view  # for what is kept must not hold an activation
    constant = None if constant is None else brought(constant, device)
    fixed = None if constant is None or constant.ndim == 2 else frame.vectors(constant)
    terms = [_term(amount, directions[i], frame) for i, amount in enumerate(amounts) if directions is not None]
    rounded = None if fixed is None or terms else view.share(fixed.to(dtype))

    def run(h: Tensor, now: Pass | None) -> Tensor:
        if rounded is not None and has_no_pads(now):
            return h + rounded
        total = fixed
        if constant is not None and total is None:
            total = frame.vectors(constant, copies=copies_in(now))
        for term in terms:
            part = term(h, now)
            total = part if total is None else total.to(part.device) + part
        assert total is not None
        total = total.to(dtype=dtype, device=device)
        if not is_nested and (real := _real(frame, now, device)) is not None:
            total = torch.where(real, total, -0.0)
        return h + (total if unusual is None else unusual.share(total))

    if directions is not None and unusual is None and constant is None and len(amounts) == 1 and amounts[0].is_alone:
        full = _full(amounts[0], directions[0], frame)
        if full.dtype is dtype and full.device == device:
            return Bound((_placed if amounts[0].decide is None else _gated)(run, amounts[0], full, frame))
    return Bound(run, rounded)


def _term(amount: Amount, direction: Float[Tensor, " d"], frame: Frame) -> Run:
    """What is added of one concept; minus zero where its amount is 0, because h + (-0.0) is h bit for bit."""
    if amount.c.ndim:
        spread = frame.vectors(direction)

        def by_row(h: Tensor, now: Pass | None) -> Tensor:
            c = brought(amount.of(h, frame, now), spread.device, spread.dtype)
            return torch.where(c.bool(), c * spread, -0.0)

        return by_row
    full = _full(amount, direction, frame)

    def part(h: Tensor, now: Pass | None) -> Tensor:
        share = amount.share(h, frame, now)
        if share is None:
            return full
        share = share.to(full.device)
        if share.dtype is torch.bool:
            return torch.where(share, full, -0.0)
        return torch.where(share.bool(), share.to(full.dtype) * full, -0.0)

    return part


def _full(amount: Amount, direction: Float[Tensor, " d"], frame: Frame) -> Tensor:
    """c · v on the axis of the features."""
    return frame.vectors(weighted(brought(amount.c, direction.device, direction.dtype)[None], direction[None]))


def _gated(run: Run, amount: Amount, full: Tensor, frame: Frame) -> Run:
    """`run`, of a single concept with a gate, in fewer steps where the gate decides for rows or tokens as they lie."""
    assert amount.decide is not None
    decide, shapes = amount.decide, frame.placed

    def gated(h: Tensor, now: Pass | None) -> Tensor:
        if not has_no_pads(now):
            return run(h, now)
        weights = decide(h, now)
        shape = shapes.get(weights.shape)
        if shape is None or weights.device != h.device:
            return run(h, now)
        share = weights.view(shape)
        if share.dtype is torch.bool:
            return torch.where(share, h + full, h)
        return torch.where(share.bool(), h + share.to(h.dtype) * full, h)

    return gated


def _placed(run: Run, amount: Amount, full: Tensor, frame: Frame) -> Run:
    """`run`, of a single concept with positions, in one step where all tokens of a pass are steered, or none."""

    def placed(h: Tensor, now: Pass | None) -> Tensor:
        given = None if now is None or now.tokens is None or not has_no_pads(now) else now.doses.get(amount.place)
        if now is None or now.tokens is None or not isinstance(given, bool):
            return run(h, now)
        frame.check_tokens(now.tokens.rows, now.tokens.length)
        return h + full if given else h

    return placed


def applied(
    view: View,
    interventions: Sequence[Intervention],
    amounts: Sequence[Amount],
    directions: Float[Tensor, "k d"] | None,
) -> Bound:
    """What the interventions make of h one after another, in float32 at least and rounded once."""
    if directions is None:
        return Bound(lambda h, now: h)
    frame, dtype, is_nested = view.frame, view.part.dtype, view.raw.is_nested
    unusual = None if view.is_whole else view  # for what is kept must not hold an activation
    wide, kind = torch.promote_types(dtype, torch.float32), view.part.device.type
    directions = brought(directions, view.part.device, wide)
    known = [_known(*each, site=frame.site) for each in zip(interventions, directions, amounts, strict=True)]
    casts = kind != "meta" and (_is_compiling() or torch.amp.is_autocast_available(kind))
    turned = not (unusual is None and frame.is_last)
    alone = len(known) == 1 and amounts[0].decide is None and not amounts[0].is_by_token
    only = known[0] if alone and not turned and wide is dtype and not _is_compiling() else None  # of h alone

    def edited(h: Tensor, last: Tensor, now: Pass | None) -> Tensor:
        real = None if is_nested else _real(frame, now, last.device)
        for intervention, direction, amount, function in zip(interventions, directions, amounts, known, strict=True):
            if function is not None:
                share = amount.share(h, frame, now)
                if share is None or share.dtype is torch.bool:  # whole or not at all
                    found = checked(function(last), last, intervention)
                    for chosen in (share, real):
                        if chosen is not None:
                            found = torch.where(chosen.to(last.device).movedim(frame.axis, -1), found, last)
                    last = found
                    continue
            c = amount.of(h, frame, now)
            c = c if real is None else torch.where(real, brought(c, last.device), 0.0)
            if c.ndim:  # a number for all stays on the CPU: reading it waits for no other device
                c = brought(c, last.device, last.dtype).movedim(frame.axis, -1)
            if isinstance(intervention, Placed):
                intervention = intervention.placed(partial(at_tokens, frame=frame, now=now, positions=amount.at))
            last = edited_by(intervention, last, direction, c)
        return last

    def run(h: Tensor, now: Pass | None) -> Tensor:
        if only is not None and has_no_pads(now) and not (casts and torch.is_autocast_enabled(kind)):
            edited_h = checked(only(h), h, interventions[0])
            return edited_h if edited_h.dtype is dtype else edited_h.to(dtype)
        last = h if not turned else h.movedim(frame.axis, -1) if unusual is None else unusual.features_last()
        last = last.to(wide)
        if casts and (_is_compiling() or torch.is_autocast_enabled(kind)):
            with without_autocast(kind):
                last = edited(h, last, now)
        else:
            last = edited(h, last, now)
        if not turned:
            return last.to(dtype)
        return last.movedim(-1, frame.axis).to(dtype) if unusual is None else unusual.part_of(last)

    return Bound(run)


def _known(
    intervention: Intervention, direction: Tensor, amount: Amount, *, site: str
) -> Callable[[Tensor], Tensor] | None:
    """The edit as a function of h alone, if the strength is one number; gates and positions say where it holds."""
    if not amount.is_number:
        return None
    if not amount.c:
        return lambda h: h
    if isinstance(intervention, Placed):
        return None
    if direction.requires_grad:
        return lambda h: intervention(h, direction, amount.c)
    try:
        with torch.inference_mode(mode=False), without_autocast(direction.device.type):  # for autograd later
            return prepared(intervention, direction, amount.c)
    except ZeroDirectionError as error:
        raise ZeroDirectionError(f"site {site!r}: in {direction.dtype}, {error}") from None


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
