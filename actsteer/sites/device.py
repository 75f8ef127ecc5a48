"""brought: a tensor on the device where it is needed."""

from __future__ import annotations

import torch
from torch import Tensor


def brought(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on this device. A copy from the CPU is queued behind the device's work, and the caller does not wait.

    On mps the caller waits, because torch may read memory there that is freed already:
    https://github.com/pytorch/pytorch/issues/189690
    """
    dtype = tensor.dtype if dtype is None else dtype
    waits = tensor.device.type != "cpu" or (device is not None and device.type == "mps")
    return tensor.to(device=device, dtype=dtype, non_blocking=not waits)
