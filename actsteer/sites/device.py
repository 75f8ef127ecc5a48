"""brought: a tensor on the device where it is needed."""

from __future__ import annotations

import torch
from torch import Tensor


def brought(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on this device; one from the CPU is sent after what is computed there, and nobody waits for it."""
    dtype = tensor.dtype if dtype is None else dtype
    return tensor.to(device=device, dtype=dtype, non_blocking=tensor.device.type == "cpu")
