"""brought: a tensor on the device where it is needed."""

from __future__ import annotations

import torch
from torch import Tensor


def brought(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on this device; one from the CPU is sent after what is computed there, and nobody waits for it.

    But for mps, where torch may read the memory of a tensor that is gone by then:
    https://github.com/pytorch/pytorch/issues/189690
    """
    dtype = tensor.dtype if dtype is None else dtype
    waits = tensor.device.type != "cpu" or (device is not None and device.type == "mps")
    return tensor.to(device=device, dtype=dtype, non_blocking=not waits)
