"""Strength: what the user gives as `c`, checked and spread over the concepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, TypeAlias, final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ConceptNotFoundError, StrengthError, close_names
from actsteer.steering.numbers import finite

Schedule: TypeAlias = Callable[[int], float]
"""The strength in each step of the generation: 0 for the prompt, 1 for the first token that was generated, ..."""
Strength: TypeAlias = float | Tensor | Schedule
"""One number; a tensor (B,), one per row of the batch, or (B, S), one per row and position; or a schedule."""
Strengths: TypeAlias = (
    Strength | Mapping[str, float] | Mapping[str, Tensor] | Mapping[str, Schedule] | Mapping[str, Strength]
)
"""One strength for every concept, or concept -> strength; a concept that is not named has strength 0."""


@final
class PerConcept:
    """c, checked: the strength of each of K concepts. Nothing writes into it.

    Args:
        numbers: (K,) in float64: the strengths that are one number; 1 where a concept has one per token, and 0 where it
            is in `by_row`.
        by_row: place of a concept -> (B,), one per row of the batch; or (), on another device.
        by_token: place of a concept -> (B, S), one per row and position; or a schedule.
    """

    __slots__ = ("_active", "_parts", "by_row", "by_token", "numbers")

    def __init__(
        self, numbers: Float[Tensor, " K"], by_row: Mapping[int, Tensor], by_token: Mapping[int, Tensor | Schedule]
    ) -> None:
        self.numbers, self.by_row, self.by_token = numbers, by_row, by_token
        self._active: list[int] | None = None
        self._parts: dict[tuple[frozenset[int] | None, bool], tuple[Terms | None, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Tensor | Schedule:
        """The strength of one concept, as it was given."""
        return self.by_token[place] if place in self.by_token else self.at(place)

    def at(self, place: int) -> Tensor:
        """The strength that all tokens of a row share: () or (B,)."""
        return self.by_row[place] if place in self.by_row else self.numbers[place]

    def among(self, places: Sequence[int]) -> PerConcept:
        """The strengths of some of the concepts, in this order."""
        if len(places) == len(self):
            return self
        by_row = {own: self.by_row[place] for own, place in enumerate(places) if place in self.by_row}
        by_token = {own: self.by_token[place] for own, place in enumerate(places) if place in self.by_token}
        return PerConcept(self.numbers[list(places)], by_row, by_token)

    def zero(self) -> PerConcept:
        """Strength 0, in the shapes of these."""
        by_row = {place: torch.zeros_like(strength) for place, strength in self.by_row.items()}
        return PerConcept(torch.zeros_like(self.numbers), by_row, {})

    @property
    def shapes(self) -> dict[int, torch.Size]:
        """Place of a concept -> the shape of its strength, where that is not one number."""
        return {place: strength.shape for place, strength in self.by_row.items()}

    def active(self, *, every: bool = False) -> list[int]:
        """The concepts that have a strength; with `every`, all of them."""
        if every:
            return list(range(len(self)))
        if self._active is None:
            numbers: list[int] = self.numbers.nonzero().flatten().tolist()
            self._active = sorted({*numbers, *self.by_row}) if self.by_row else numbers
        return self._active

    def parts(self, apart: frozenset[int] | None, *, every: bool) -> tuple[Terms | None, tuple[int, ...]]:
        """The concepts that have a strength, in two: those that are summed beforehand, and the others.

        Args:
            apart: those that cannot be summed beforehand, as a strength per token cannot either; None: all of them.
            every: whether a concept of strength 0 counts too.
        """
        if (apart, every) not in self._parts:
            others = active = self.active(every=every)
            summed: list[int] = []
            if apart is not None:
                others = [place for place in active if place in apart or place in self.by_token]
                summed = [place for place in active if not (place in apart or place in self.by_token)]
            self._parts[apart, every] = Terms(tuple(summed), self) if summed else None, tuple(others)
        return self._parts[apart, every]


_WIDE = (torch.float32, torch.float64)


@final
class Terms:
    """Concepts that are summed, Σ c_k v_k, with a strength of () or (B,) each.

    Args:
        places: the concepts.
        strengths: those of all concepts.
    """

    __slots__ = ("_cast", "_numbers", "_strengths", "places")

    def __init__(self, places: tuple[int, ...], strengths: PerConcept) -> None:
        self.places = places
        self._strengths = strengths
        self._numbers: Tensor | None = None  # where they are numbers, and not all zero
        if not any(place in strengths.by_row for place in places):
            every = len(places) == len(strengths)
            numbers = strengths.numbers if every else strengths.numbers[list(places)]
            self._numbers = numbers if bool(numbers.any()) else None
        self._cast: Tensor | None = None  # the strengths as they were last needed

    def sum(self, directions: Float[Tensor, "k d"] | Float[Tensor, " d"]) -> Float[Tensor, "*B d"]:
        """The sum for the directions (k, d) of the concepts, or (d,) of a single one; minus zero where every c is 0.

        In float32 at least, so that c · v is rounded once, to the output's dtype.
        """
        if directions.dtype not in _WIDE:
            directions = directions.to(torch.promote_types(directions.dtype, torch.float32))
        c = self._cast
        if c is None or c.dtype is not directions.dtype or c.device != directions.device:
            c = self._cast = self._cast_to(directions)
        if self._numbers is None:
            return weighted(c, directions if directions.ndim == 2 else directions[None])
        if directions.ndim == 1:
            return c * directions
        with without_autocast(directions.device.type):
            return c @ directions

    def _cast_to(self, directions: Tensor) -> Tensor:
        """(k,) or (k, B) or, of a number for a single direction, ()."""
        if self._numbers is not None:
            c = self._numbers.to(directions)
            return c[0] if directions.ndim == 1 else c
        each = (self._strengths.at(place).to(directions) for place in self.places)
        return torch.stack(torch.broadcast_tensors(*each))


def weighted(c: Tensor, directions: Float[Tensor, "k d"]) -> Float[Tensor, "*rows d"]:
    """Σ c_k v_k with c of shape (k, *rows); minus zero where every c is 0, because h + (-0.0) is h bit for bit."""
    if len(c) == 1:
        total = c[0, ..., None] * directions[0]
    else:
        with without_autocast(directions.device.type):
            total = einsum(c, directions, "k ..., k d -> ... d")
    return torch.where((c == 0).all(dim=0)[..., None], -0.0, total)


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """A block in which products on this kind of device keep their dtype."""
    # compiled code is asked less: before torch 2.12 it knows no is_autocast_available
    known = kind != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(kind)
    casts = known and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if casts else nullcontext()


def kept(c: Strength) -> Strength:
    """A strength that the caller cannot change any more."""
    return c.detach().clone() if isinstance(c, Tensor) else c


def strengths_of(c: Strengths, concepts: Mapping[str, int]) -> PerConcept:
    """The strength of each concept; `concepts` has the place of each.

    Raises:
        ConceptNotFoundError: a concept that is not in the bank.
        StrengthError: not a number, not finite, of another shape, or rows that disagree in number.
    """
    numbers, others = [0.0] * len(concepts), dict[int, Tensor | Schedule]()
    if isinstance(c, Mapping):
        for concept, strength in c.items():
            if concept not in concepts:
                near = close_names(concept, concepts)
                raise ConceptNotFoundError(f"c names no concept of the bank: {concept!r}. {near}")
            checked = _checked(strength, f"c[{concept!r}]")
            if isinstance(checked, float):
                numbers[concepts[concept]] = checked
            else:
                others[concepts[concept]] = checked
    elif isinstance(checked := _checked(c, "c"), float):
        numbers = [checked] * len(concepts)
    else:
        others = dict.fromkeys(range(len(concepts)), checked)
    by_row = {place: own for place, own in others.items() if isinstance(own, Tensor) and own.ndim < 2}
    by_token = {place: own for place, own in others.items() if place not in by_row}
    for place in by_token:
        numbers[place] = 1.0
    rows = {len(own) for own in others.values() if isinstance(own, Tensor) and own.ndim}
    if len(rows) > 1:
        raise StrengthError(f"c has {sorted(rows)} rows for different concepts; give each one strength per row")
    return PerConcept(torch.tensor(numbers, dtype=torch.float64), by_row, by_token)


def strength_at(schedule: Schedule, step: int) -> Tensor:
    """What a schedule says about one step, 0-dim.

    Raises:
        StrengthError: not one finite number, within the range of float32.
    """
    try:
        given = schedule(step)
    except TypeError as error:
        raise StrengthError(f"c({step}): expected a callable of the generation step alone; {error}") from error
    checked = _checked(given, f"c({step})")
    if isinstance(checked, float):
        if abs(checked) > (largest := torch.finfo(torch.float32).max):
            raise StrengthError(
                f"c({step}): expected a number of at most {largest:.4g}, as in float32, got {checked:.4g}"
            )
        return torch.tensor(checked, dtype=torch.float64)
    if not isinstance(checked, Tensor) or checked.ndim:
        raise StrengthError(f"c({step}): expected one number for a step of the generation, got {checked}")
    return checked


def _checked(strength: object, where: str) -> float | Tensor | Schedule:
    """A number, unless it is on another device, which is not waited for; or a copy of a tensor; or a schedule."""
    if isinstance(strength, Real):
        try:
            return finite(strength, where)  # type: ignore[arg-type]  # float() takes any Real
        except ValueError as error:
            raise StrengthError(str(error)) from None
    if not isinstance(strength, Tensor):
        if callable(strength):
            return strength
        several = isinstance(strength, Sequence) and not isinstance(strength, str)
        hint = "; torch.tensor of it is one strength per row, and sweep(model, v, c=...) goes over several"
        raise StrengthError(
            f"{where}: expected a number or a tensor of shape (), (B,) or (B, S), or a callable of the generation "
            f"step, got {strength!r}{hint if several or hasattr(strength, '__array__') else ''}"
        )
    if strength.ndim > 2 or strength.is_complex() or strength.dtype is torch.bool:
        raise StrengthError(
            f"{where}: expected a tensor of shape (), (B,) or (B, S), one strength per row or per row and position, "
            f"got {strength.dtype} of shape {tuple(strength.shape)}"
        )
    if strength.requires_grad:
        raise StrengthError(f"{where}: gradients do not reach c; detach it, or train a vector with optimize")
    if strength.device.type == "cpu" and not bool(torch.isfinite(strength).all()):
        raise StrengthError(f"{where}: expected finite numbers, got {strength}")
    return strength.clone() if strength.ndim or strength.device.type != "cpu" else float(strength)
