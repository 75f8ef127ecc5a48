"""Masks: where the sequences of a batch have tokens and where pads, found in what the model is called with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actsteer.errors import BatchError, ShapeError
from actsteer.sites.place import split_site
from actsteer.sites.wrappers import unwrapped

_PADDING = ("src_key_padding_mask", "key_padding_mask")  # of torch.nn: true where there is a pad
_ANSWERS = {"lm_head", "proj_out", "logits"}  # what follows the decoder
_CROSS = re.compile(r"cross|encdec|encoder_attn|encoder_decoder", re.IGNORECASE)


class TokenMasks:
    """The token masks of one batch, (B, S) each: the encoder's or only one, and the decoder's."""

    def __init__(self, model: nn.Module, batch: Any, *, explicit: bool = False) -> None:
        arguments = _named(model, batch)
        self._explicit = explicit  # whether the positions themselves say where
        self._own = _found(arguments, explicit=explicit)
        self._decoder = _decoder(model, arguments)
        if self._decoder is not None and self._own is None:
            self._own = _ones(arguments, "input_ids", "inputs_embeds", "input_features")

    @property
    def by_site(self) -> bool:
        """Whether the tokens of one site may be others than those of another of the same shape."""
        return self._decoder is not None

    @property
    def rows(self) -> int | None:
        """How many sequences there are, if a mask tells."""
        return None if self._own is None else len(self._own)

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
            ", and it cannot be told which of its positions are pads; pass positions=mask, or feed batches without pads"
        )

    def _for(self, site: str, shape: tuple[int, ...]) -> Tensor | None:
        if self._own is None or self._decoder is None:
            return self._own if self._decoder is None else self._decoder
        name, _, path = split_site(site)
        within = {*name.split("."), *(path[:1] if not name else ())}
        if "encoder" in within or any(part.startswith("encoder_") for part in within):
            return self._own
        both = (self._own, self._decoder)
        if ("decoder" in within and not _CROSS.search(name)) or within & _ANSWERS:
            return self._decoder
        fitting = [mask for mask in both if shape in (tuple(mask.shape), (mask.numel(),))]
        if len(fitting) == 2 and not torch.equal(*fitting):
            raise ShapeError(
                f"site {site!r}: the inputs and the outputs have one length, and its activations may be of either; "
                "pass positions=mask"
            )
        return next((mask for mask in fitting or both if fitting or not bool(mask.all())), self._own)


def _decoder(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """The decoder's mask; all tokens, where there is none. None without a decoder."""
    mask, labels = arguments.get("decoder_attention_mask"), arguments.get("labels")
    if isinstance(mask, Tensor):
        return mask.bool()
    ones = _ones(arguments, "decoder_input_ids", "decoder_inputs_embeds")
    config = getattr(unwrapped(model), "config", None)
    if ones is None and getattr(config, "is_encoder_decoder", False) and isinstance(labels, Tensor):
        return labels != -100  # from which transformers makes the decoder's inputs
    return ones


def _ones(arguments: Mapping[str, Any], *names: str) -> Tensor | None:
    found = next((arguments[name] for name in names if isinstance(arguments.get(name), Tensor)), None)
    return None if found is None else torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)


def _found(arguments: Mapping[str, Any], *, explicit: bool) -> Tensor | None:
    mask = arguments.get("attention_mask")
    padding = next((arguments[name] for name in _PADDING if isinstance(arguments.get(name), Tensor)), None)
    if not isinstance(mask, Tensor):
        return None if padding is None else ~padding if padding.dtype is torch.bool else padding == 0
    if mask.ndim != 2 and explicit:
        return None
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        raise BatchError(
            "attention_mask: expected 1 for a token and 0 for a pad, got other numbers; pass positions=mask"
        )
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
