"""Masks: where the sequences of a batch have tokens and where pads, found in what the model is called with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actsteer.errors import BatchError, ShapeError
from actsteer.sites.wrappers import unwrapped

_PADDING = ("src_key_padding_mask", "key_padding_mask")  # of torch.nn: true where there is a pad
_CROSS = re.compile(r"cross|encdec|encoder_attn|encoder_decoder", re.IGNORECASE)


class TokenMasks:
    """The token masks of one batch, (B, S) each: the encoder's or only one, and the decoder's."""

    def __init__(self, model: nn.Module, batch: Any, *, explicit: bool = False) -> None:
        arguments = _named(model, batch)
        self._explicit = explicit  # whether the positions themselves say where
        self._own = _found(arguments, explicit=explicit)
        decoded = arguments.get("decoder_input_ids")
        self._decoder = arguments.get("decoder_attention_mask")
        if self._decoder is None and isinstance(decoded, Tensor):
            self._decoder = torch.ones_like(decoded, dtype=torch.bool)
        self._decoder = None if self._decoder is None else self._decoder.bool()

    def at(self, site: str, shape: tuple[int, ...]) -> Tensor | None:
        """The mask (B, S) that belongs to activations of shape (rows, positions) or (rows,) at a site; None if all of
        them are real.

        Raises:
            ShapeError: there are pads, and no telling where in such an activation.
        """
        mask = self._for(site, shape)
        if mask is None or tuple(mask.shape) == shape:
            return mask
        if len(shape) == 1 and shape[0] in (len(mask), mask.numel(), int(mask.sum())):
            return mask if len(mask) != shape[0] == mask.numel() else None  # or one per sequence, or without the pads
        if self._explicit or bool(mask.all()):
            return None
        raise ShapeError(
            f"site {site!r}: the attention mask has shape {tuple(mask.shape)}, the activation {shape} (rows, positions)"
            ", and nobody can tell which of its positions are pads; pass positions=mask, or feed batches without pads"
        )

    def _for(self, site: str, shape: tuple[int, ...]) -> Tensor | None:
        if self._decoder is None or self._own is None or "decoder" not in site.split("."):
            return self._own if self._own is not None or "decoder" not in site.split(".") else self._decoder
        fitting = [mask for mask in (self._own, self._decoder) if tuple(mask.shape) == shape]
        if len(fitting) == 2 and not torch.equal(*fitting) and _CROSS.search(site):
            raise ShapeError(
                f"site {site!r}: the inputs and the outputs have one length, and its activations may be of either; "
                "pass positions=mask"
            )
        return self._own if fitting == [self._own] else self._decoder


def _found(arguments: Mapping[str, Any], *, explicit: bool) -> Tensor | None:
    mask = arguments.get("attention_mask")
    padding = next((arguments[name] for name in _PADDING if isinstance(arguments.get(name), Tensor)), None)
    if not isinstance(mask, Tensor):
        return None if padding is None else ~padding if padding.dtype is torch.bool else padding == 0
    if mask.ndim != 2 and explicit:
        return None
    if mask.ndim != 2:
        raise BatchError(
            f"attention_mask: expected shape (B, S), got {tuple(mask.shape)}, which does not say which tokens are "
            "pads; pass positions=mask"
        )
    return mask.bool()


def _named(model: nn.Module, batch: Any) -> Mapping[str, Any]:
    """What the model's forward is called with, by name."""
    if isinstance(batch, Mapping):
        return batch
    try:
        signature = inspect.signature(type(unwrapped(model)).forward)
        return signature.bind_partial(None, *((batch,) if isinstance(batch, Tensor) else batch)).arguments
    except (TypeError, ValueError):
        return {}
