"""Directions: the directions at one site, in the form in which the strengths need them."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.sites.device import brought
from actsteer.steering.strength import Terms
from actsteer.vectors.stack import Stack


@final
class Directions:
    """The directions of a bank at one site; only those of concepts with a strength are stacked, and kept.

    Args:
        stack: the bank's.
    """

    __slots__ = ("_cast", "_nothing", "_others", "_stack", "_summed", "leaf", "others")

    def __init__(self, stack: Stack) -> None:
        self.leaf: Tensor | None = None  # all of them, while they are trained
        self.others: tuple[int, ...] = ()  # the concepts that have a strength and cannot be summed beforehand
        self._stack = stack
        self._others: Tensor | None = None  # their directions
        self._cast: dict[int | None, Tensor] = {}  # the same, as they were last needed
        self._summed: tuple[tuple[int, ...], Tensor] | None = None  # the concepts that are, and their directions
        self._nothing: Tensor | None = None

    @property
    def all(self) -> Float[Tensor, "k d"]:
        """All of them, as they are now; not to be written into."""
        return self._stack.rows() if self.leaf is None else self.leaf

    def train(self) -> Tensor:
        """All of them as a leaf that asks for gradients, from now on the same one."""
        if self.leaf is None:
            with torch.inference_mode(mode=False):
                self.leaf = self._stack.rows().clone().requires_grad_()
        return self.leaf

    def choose(self, others: tuple[int, ...]) -> None:
        """Set which concepts have a strength and cannot be summed beforehand."""
        if others != self.others:
            self.others, self._cast = others, {}
            self._others = self._stack.rows(others) if others else None

    def of(self, terms: Terms) -> Tensor:
        """The directions (k, d) of the concepts that are summed, or (d,) of a single one; the same tensor each time."""
        single = len(terms.places) == 1
        if self.leaf is not None:
            return self.leaf[terms.places[0] if single else list(terms.places)]
        if self._summed is None or self._summed[0] != terms.places:
            rows = self._stack.rows(terms.places)
            self._summed = terms.places, rows[0] if single else rows
        return self._summed[1]

    def zero(self, like: Tensor | None) -> Float[Tensor, " d"]:
        """What is added where no concept has a strength: minus zero, because h + (-0.0) is h bit for bit.

        In the dtype of `like`, which was added before; the same tensor every time.
        """
        if self._nothing is None:
            dtype = torch.promote_types((self._stack.rows((0,)) if like is None else like).dtype, torch.float32)
            self._nothing = torch.full((self._stack.size,), -0.0, dtype=dtype, device=self._stack.device)
        return self._nothing

    def cast(self, which: int | None, dtype: torch.dtype | None, device: torch.device) -> Tensor:
        """The direction (d,) of one of the others, or (k, d) of all of them; the same tensor every time.

        Args:
            dtype: None takes that of the directions, or float32 where it is narrower.
        """
        if torch.compiler.is_compiling() or self.leaf is not None:  # which changes in place
            return self._computed(which, dtype, device)
        kept = self._cast.get(which)
        if kept is None or kept.device != device or dtype not in (None, kept.dtype):
            with torch.inference_mode(mode=False):
                kept = self._cast[which] = self._computed(which, dtype, device)
        return kept

    def _computed(self, which: int | None, dtype: torch.dtype | None, device: torch.device) -> Tensor:
        rows = self._others if self.leaf is None else self.leaf[list(self.others)]
        assert rows is not None
        picked = rows if which is None else rows[which]
        return brought(picked, device, torch.promote_types(rows.dtype, torch.float32) if dtype is None else dtype)
