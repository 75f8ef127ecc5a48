"""Limits: what an edit cannot do in a dtype, or with a direction; found before anything is edited."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError, StrengthError, ZeroDirectionError
from actsteer.steering.interventions.intervention import Intervention, Prepared


def check_dtype(dtype: torch.dtype, *, site: str) -> None:
    """ShapeError if nothing can be added to activations of this dtype."""
    if dtype.itemsize == 1:
        raise ShapeError(
            f"site {site!r}: expected an activation in float16, bfloat16, float32 or float64, got {dtype}, which torch "
            "cannot add to and whose scale is kept elsewhere; steer a site before it is quantised or after it is wide "
            "again, such as the block around it"
        )


def check_sum(shift: Float[Tensor, "*B d"], dtype: torch.dtype, *, site: str) -> None:
    """StrengthError unless Σ c_k v_k is finite in the dtype in which it is added; looked at on the CPU alone."""
    if shift.device.type != "cpu":
        return
    cast = shift.detach().to(dtype)
    # one that is not finite shows in the sum, which is the quicker; but the sum of large ones may be infinite too
    if not (math.isfinite(float(cast.sum())) or bool(cast.isfinite().all())):
        largest = float(shift.detach().double().abs().max())
        raise StrengthError(
            f"site {site!r}: expected c · v within the range of {dtype}, in which it is added, up to "
            f"{torch.finfo(dtype).max:.4g}, got {largest:.4g}; give a smaller c, or scale the vector"
        )


def check_strength(c: Float[Tensor, "*B"], dtype: torch.dtype, *, site: str) -> None:
    """StrengthError unless a strength is finite in the dtype in which it is used; looked at on the CPU alone."""
    if c.device.type == "cpu" and not bool(c.to(dtype).isfinite().all()):
        raise StrengthError(
            f"site {site!r}: expected c within the range of {dtype}, in which it is used, up to "
            f"{torch.finfo(dtype).max:.4g}, got {float(c.double().abs().max()):.4g}"
        )


def check_direction(intervention: Intervention, direction: Float[Tensor, " d"], *, where: str) -> None:
    """ZeroDirectionError if the direction is zero and the intervention, which says so as it prepares, needs one.

    It waits for the direction's device, once.
    """
    if isinstance(intervention, Prepared):
        wide = direction.cpu().to(torch.promote_types(direction.dtype, torch.float32))
        try:
            intervention.prepare(wide, torch.ones(()))
        except ZeroDirectionError as error:
            raise ZeroDirectionError(f"{where}: {error}") from None
