"""GateDirection: the direction that a gate reads, where it was fitted, and what the gate is to read therefore."""

from __future__ import annotations

import warnings
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError
from actsteer.sites.device import brought
from actsteer.steering.gates.gate import Per, check_per
from actsteer.vectors.vector import SteeringVector

_LAST = ("last", "-1", "[-1]")  # as metadata says it
READS = {"sequence": "the mean over the prompt", "last": "the prompt's last token", "token": "each token"}
"""What a gate reads, in words."""


@final
class GateDirection:
    """The direction at a gate's site; in the dtype and on the device of the rows that it met last, it is kept.

    Args:
        vector: the direction, at one site.
        unit: whether it is scaled to norm 1.

    Raises:
        ShapeError: the vector has several sites, or none.
        ZeroDirectionError: the direction is zero, and is to be scaled.
    """

    __slots__ = ("_kept", "exact", "fitted", "metadata", "site", "vector")

    def __init__(self, vector: SteeringVector, *, unit: bool) -> None:
        if len(vector) != 1:
            raise ShapeError(f"a gate reads one site, the vector has {vector.sites}; choose one with vector.select")
        self.site, self.vector = vector.sites[0], vector
        self.metadata = vector.metadata
        self.fitted = self.metadata.get("positions")
        with torch.inference_mode(mode=False):  # so that it works in autograd later
            self.exact = (vector.unit() if unit else vector)[self.site]
        self._kept = self.exact

    def like(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, " d"]:
        """The direction in the rows' dtype and device.

        Raises:
            ShapeError: the rows have another size.
        """
        if torch.compiler.is_compiling():
            return self._fitting(rows)
        kept = self._kept
        if kept.dtype is not rows.dtype or kept.device != rows.device or rows.shape[-1] != kept.shape[0]:
            with torch.inference_mode(mode=False):
                kept = self._kept = self._fitting(rows)
        return kept

    def _fitting(self, rows: Tensor) -> Tensor:
        if rows.shape[-1] != len(self.exact):
            raise ShapeError(
                f"gate at site {self.site!r}: the activation has {rows.shape[-1]} features, the gate's direction "
                f"{len(self.exact)}; was it fitted on another model?"
            )
        return brought(self.exact, rows.device, rows.dtype)

    def per(self, given: Per | None) -> Per:
        """What the gate is to read: as given, else what the direction was fitted at.

        Numbers of a mean and those of single tokens spread differently, so that a threshold for one is wrong for the
        other: a UserWarning says where the two do not agree.
        """
        if given is not None:
            check_per(given)
        per: Per = given or ("last" if self.fitted in _LAST else "sequence")
        if self.fitted is not None and not self._agrees(per):
            warnings.warn(
                f"gate at site {self.site!r}: it reads {READS[per]}, and its vector was fitted at positions "
                f"{self.fitted!r}; fit it where it is to be read, or give another per=",
                UserWarning,
                stacklevel=3,
            )
        return per

    def _agrees(self, per: Per) -> bool:
        if per == "token":
            return self.fitted != "mean"  # whatever else is chosen are single tokens
        return self.fitted in (_LAST if per == "last" else ("mean",))


def shown(per: Per) -> str:
    """The end of a gate's repr."""
    return "" if per == "sequence" else f", per={per!r}"
