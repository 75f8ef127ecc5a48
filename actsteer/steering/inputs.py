"""Inputs: what a model is called with, as far as it tells where the tokens of a pass stand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from actsteer.sites.wrappers import unwrapped
from actsteer.steering.tokens import Tokens

_PADDING = ("src_key_padding_mask", "key_padding_mask")  # of torch.nn: true where there is a pad
_CACHE = re.compile(r"^(past_key_values?|past_kv_cache|past|layer_past|cache|cache_params|kv_cache|mems)$")
MASKS = ("attention_mask", "decoder_attention_mask", *_PADDING)
KNOWN = re.compile(rf"{_CACHE.pattern}|^(decoder_)?attention_mask$|^position_ids$|^{'$|^'.join(_PADDING)}$")
"""The names of the arguments that tell of pads, of a cache, or of positions."""
_HINT = (
    "; use model.generate, choose positions from the start of the text (an index, or a slice), or run without a cache"
)


def tokens_of(named: Mapping[str, Any], host: nn.Module, *, is_encoder: bool, strict: bool) -> Tokens | None:
    """The tokens of a call with these arguments; None where no tensor shows rows and positions.

    Args:
        strict: whether more than pads is asked for; then a mask or a cache that cannot be understood is made known.
    """
    decodes = not is_encoder and getattr(getattr(unwrapped(host), "config", None), "is_encoder_decoder", False)
    prefix = "decoder_" if decodes else ""
    found = _tokens(named, prefix, decodes=bool(decodes))
    if found is None:
        return None
    shape = found.shape[0], found.shape[1]
    mask = _mask(named, f"{prefix}attention_mask", shape, padding=not decodes)
    start, unknown = _start(named, shape[1], mask) if strict or mask is not None else (0, "")
    if mask is None and isinstance(given := named.get(f"{prefix}attention_mask"), Tensor):
        start = None
        unknown = (
            f"positions: the attention mask is {given.dtype} of shape {tuple(given.shape)}, and it cannot be told "
            f"which tokens are pads; pass one of shape {shape} with 1 for a token and 0 for a pad"
        )
    return Tokens(
        *shape,
        start=start,
        mask=mask,
        prompt=shape[1] if isinstance(start, int) and start == 0 else None,
        batch=named if isinstance(start, int) and start == 0 else None,
        unknown=unknown,
        device=found.device,
    )


def _tokens(named: Mapping[str, Any], prefix: str, *, decodes: bool) -> Tensor | None:
    """A tensor whose first axes are rows and positions."""
    for name in ("input_ids", "inputs_embeds", *(("labels",) if decodes else ())):
        found = named.get(name if name == "labels" else prefix + name)
        if isinstance(found, Tensor) and found.ndim >= 2:
            return found
    if decodes:
        return None
    first: Any = next((value for value in named.values() if isinstance(value, Tensor)), None)
    if first is None or first.ndim != 2 or first.is_floating_point():
        masks = (named[name] for name in ("attention_mask", *_PADDING) if isinstance(named.get(name), Tensor))
        return next((mask for mask in masks if mask.ndim == 2), None)
    tokens: Tensor = first
    return tokens


def _mask(named: Mapping[str, Any], name: str, shape: tuple[int, int], *, padding: bool) -> Bool[Tensor, "B T"] | None:
    """Where there are tokens and not pads; None if all are, or if the mask is of another kind."""
    mask: Any = named.get(name)
    if isinstance(mask, Tensor):
        ours = mask.ndim == 2 and len(mask) == shape[0] and mask.shape[1] >= shape[1]
        return mask.bool() if ours and (not mask.is_floating_point() or _counts(mask)) else None
    found: Any = next((named[key] for key in _PADDING if isinstance(named.get(key), Tensor)), None) if padding else None
    if found is None or tuple(found.shape) != shape:
        return None
    real: Tensor = ~found if found.dtype is torch.bool else found == 0
    return real


def _counts(mask: Tensor) -> bool:
    """Whether a floating mask is one of ones and zeros, as far as one can tell without waiting for another device."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(((mask == 0) | (mask == 1)).all()) and bool(mask.any())


def _start(named: Mapping[str, Any], length: int, mask: Tensor | None) -> tuple[int | Tensor | None, str]:
    """How many columns lie in the cache, and what to say where that, or the end of the prompt, is not known."""
    name, cache = cache_in(named)
    if cache is not None:
        seen = cached(cache)
        if seen is None and mask is not None and mask.shape[1] > length:
            seen = mask.shape[1] - length
        if seen is None:
            return None, f"positions: {name!r} holds what was computed before, and it cannot be told how much{_HINT}"
        if isinstance(seen, int) and seen == 0:
            return 0, ""
        return seen, f"positions: with {name!r}, it cannot be told where the prompt ended{_HINT}"
    places = named.get("position_ids")
    if isinstance(places, Tensor) and places.ndim == 2 and places.shape[1] == length and mask is None:
        if torch.compiler.is_compiling() or bool((places == torch.arange(length, device=places.device)).all()):
            return 0, ""
        first = places[:, 0]
        if bool((first == first[0]).all()) and bool((places.diff(dim=1) == 1).all()):
            begin = int(first[0])
            return begin, f"positions: 'position_ids' begin at {begin}, and the end of the prompt is not known{_HINT}"
        return (
            None,
            f"positions: 'position_ids' do not count up by one, as in one text per row; pass an attention_mask{_HINT}",
        )
    return 0, ""


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of a model that has a decoder too, if it is a module in it."""
    inner = unwrapped(model)
    if not getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return None
    get = getattr(inner, "get_encoder", None)
    encoder = get() if callable(get) else None
    inside = any(module is encoder for module in inner.modules())
    return encoder if isinstance(encoder, nn.Module) and encoder is not inner and inside else None


def cache_in(named: Mapping[str, Any]) -> tuple[str, Any]:
    """The cache among arguments, and its name, which differs from library to library and from version to version."""
    return next(
        ((name, value) for name, value in named.items() if _CACHE.match(name) and value is not None), ("", None)
    )


def cached(cache: Any) -> int | Tensor | None:
    """The number of columns in a cache; None if it does not say."""
    if callable(length := getattr(cache, "get_seq_length", None)):
        try:
            seen = length()
        except (TypeError, ValueError, RuntimeError, AttributeError):  # one without attention layers
            return None
        return seen if isinstance(seen, int | Tensor) else None
    while isinstance(cache, tuple | list) and cache:
        cache = cache[0]
    return cache.shape[-2] if isinstance(cache, Tensor) and cache.ndim == 4 else None
