"""Untrusted: tensors from a file, looked at before anything is computed with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def not_dense(tensor: Tensor) -> str | None:
    """Why a tensor has no numbers to compute with, one for each place; None if it has.

    >>> not_dense(torch.empty(3, device="meta"))
    'expected a tensor with numbers, it is on meta'
    """
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        layout = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else str(tensor.layout)[6:]
        return f"expected a dense tensor, it is {layout}"
    if tensor.is_meta:
        return "expected a tensor with numbers, it is on meta"
    if tensor.dtype not in DTYPES:
        wanted = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        return f"expected one of {wanted}, got {str(tensor.dtype)[6:]}"
    return None


def not_plain(tensor: Tensor) -> str | None:
    """Why a tensor is not a plain one, whose numbers all lie in memory; None if it is.

    A tensor with a stride of 0 has any shape in a file of a few bytes: its storage must hold all its numbers.

    >>> not_plain(torch.ones(1).expand(10**6))
    'expected a storage of 4000000 bytes for its shape (1000000,), it has 4'
    """
    if (problem := not_dense(tensor)) is not None:
        return problem
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"expected a plain tensor, it is a {type(tensor).__name__}"
    if (held := tensor.untyped_storage().nbytes()) < (needed := tensor.numel() * tensor.itemsize):
        return f"expected a storage of {needed} bytes for its shape {tuple(tensor.shape)}, it has {held}"
    return None


def not_a_direction(tensor: Tensor) -> str | None:
    """Why a tensor is not a finite direction of shape (d,); None if it is.

    >>> not_a_direction(torch.ones(2, 3)), not_a_direction(torch.ones(3))
    ('expected a finite direction (d,), got float32 of shape (2, 3)', None)
    """
    if (problem := not_plain(tensor)) is not None:
        return problem
    if tensor.ndim != 1:
        return f"expected a finite direction (d,), got {str(tensor.dtype)[6:]} of shape {tuple(tensor.shape)}"
    if not bool(tensor.isfinite().all()):
        return "expected a finite direction (d,), got numbers that are not finite"
    return None
