"""Inputs: what a module is called with, by name, and what that says of its tokens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, final

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from actsteer.errors import BatchError
from actsteer.sites.wrappers import unwrapped
from actsteer.tokens.tokens import Tokens

Mask: TypeAlias = str | Callable[[Mapping[str, Any]], Tensor]
"""Where a call has its token mask, 1 for a token and 0 for a pad: the name of an argument, a dotted path such as
"batch.attention_mask" or "args.1", or a callable of the inputs by name that makes it."""

_MASK = re.compile(r"^(decoder_)?attention_mask$")
_PADDING = (
    "src_key_padding_mask",
    "tgt_key_padding_mask",
    "key_padding_mask",
)  # of torch.nn: true where there is a pad
_UNSURE = ("padding_mask", "pad_mask", "lengths", "input_lengths", "seq_lengths", "seq_lens")
_CACHE = re.compile(r"^(past_key_values?|past_kv_cache|past|layer_past|cache|cache_params|kv_cache|mems|state)$")
_HOLDS = {"batch", "inputs", "features", "encoding"}  # arguments that may be a mapping of the others
_ENCODERS = {"input_ids", "inputs_embeds", "attention_mask", "src", "src_key_padding_mask"}
_HINT = (
    "; use model.generate of the model that the Steerer is on, choose positions from the start of the text (an index, "
    "or a slice), or run without a cache"
)
SAY = (
    "say it: mask= the name of the argument that has 1 for a token and 0 for a pad, a path into it, or a callable of "
    "the inputs; or mask={site: None} where the tokens of a site are not those of the call"
)


@final
class Signature(NamedTuple):
    """The names of the arguments of a module's forward, and the name under which it takes any others."""

    names: tuple[str, ...]
    star: str | None
    is_open: bool
    """Whether it takes keyword arguments that it does not name."""
    has_decoder: bool = False
    """Whether the module says that it has a decoder beside an encoder."""

    @property
    def tells(self) -> bool:
        """Whether it may be told of pads, of a cache or of positions."""
        return self.is_open or any(map(_tells, self.names)) or bool(_HOLDS.intersection(self.names[:1]))

    @property
    def unmasked(self) -> int:
        """How many arguments come before any mask, or anything that holds one."""
        places = [place for place, name in enumerate(self.names) if _is_mask(name) or (not place and name in _HOLDS)]
        return min(places, default=0 if self.star else len(self.names))

    def prefix(self, named: Mapping[str, Any]) -> str:
        """What the names of the tokens of a call begin with: those of a decoder, where there is one."""
        given = any(named.get(f"decoder_{name}") is not None for name in ("input_ids", "inputs_embeds"))
        return "decoder_" if given or (self.has_decoder and "decoder_input_ids" in self.names) else ""

    @property
    def may_go_on(self) -> bool:
        """Whether a later call may go on with the texts of this one."""
        return self.is_open or any(map(_CACHE.match, self.names))

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; those in a mapping that is the first of them, too."""
        found = dict(zip(self.names, args, strict=False))
        if self.star is not None and args:
            found[self.star] = tuple(args)
        found |= kwargs
        first = next(iter(found.values()), None)
        return {**first, **found} if isinstance(first, Mapping) else found


def signature_of(module: nn.Module) -> Signature:
    """What the module's forward takes; of a wrapper that hands all on to one module, what that takes."""
    inner = unwrapped(module)
    found = _signature(type(inner).forward)
    if found.star is not None and not found.names:
        children = [child for child in inner._modules.values() if child is not None]
        if len(children) == 1:
            return signature_of(children[0])._replace(star=found.star)
    return found._replace(has_decoder=True) if _has_decoder(inner) else found


def _has_decoder(module: nn.Module) -> bool:
    """Whether its configuration says so, as those of transformers do."""
    return getattr(vars(module).get("config"), "is_encoder_decoder", False) is True


@lru_cache(maxsize=256)
def _signature(forward: Callable[..., Any]) -> Signature:
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        parameters = []
    kinds = {parameter.kind: parameter.name for parameter in parameters}
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = tuple(parameter.name for parameter in parameters if parameter.kind not in stars)
    return Signature(names, kinds.get(stars[0]), stars[1] in kinds)


def _is_mask(name: str) -> bool:
    return _MASK.match(name) is not None or name in _PADDING or name in _UNSURE


def _tells(name: str) -> bool:
    return _is_mask(name) or _CACHE.match(name) is not None or name == "position_ids"


def has_masks(kwargs: Mapping[str, Any]) -> list[Any]:
    """The masks among keyword arguments."""
    return [value for name, value in kwargs.items() if value is not None and _is_mask(name)]


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor among arguments, in tuples and mappings too."""
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, tuple | list | Mapping):
            found = first_tensor(value.values() if isinstance(value, Mapping) else value)
            if found is not None:
                return found
    return None


def tokens_of(named: Mapping[str, Any], *, prefix: str, mask: Mask | None, strict: bool, data: bool) -> Tokens | None:
    """The tokens of a call with these arguments; None where no tensor shows rows and positions.

    Args:
        prefix: "decoder_" for those of a decoder.
        mask: where the user says that the mask is.
        strict: whether more than pads is asked for; then a cache that cannot be understood is made known.
        data: whether all that is fed is prompt, whatever lies in a cache.

    Raises:
        BatchError: a mask that does not say which tokens are pads.
    """
    found = _mask_said(named, mask) if mask is not None else _mask_known(named, prefix)
    shape, device = _shape(named, prefix, found)
    if shape is None:
        return None
    if found is not None and (found.shape[0] != shape[0] or found.shape[1] < shape[1]):
        raise BatchError(f"the mask has shape {tuple(found.shape)}, and the call {shape} rows and positions; {SAY}")
    start, unknown = _start(named, shape[1], found) if strict or found is not None else (0, "")
    texts = None
    if unknown.startswith(_ANEW):
        texts, start, unknown = _texts(named["position_ids"]), 0, ""
    prompt = None
    if isinstance(start, int) and (data or start == 0):
        prompt = start + shape[1]
    batch = named if isinstance(start, int) and start == 0 else None
    return Tokens(
        *shape, start=start, mask=found, prompt=prompt, batch=batch, texts=texts, unknown=unknown, device=device
    )


def _shape(
    named: Mapping[str, Any], prefix: str, mask: Tensor | None
) -> tuple[tuple[int, int] | None, torch.device | None]:
    """The rows and positions of a call, and where its inputs are."""
    names = ("input_ids", "inputs_embeds", *(("input_ids", "labels") if prefix else ()))
    for own in (prefix + name if name != "labels" else name for name in names):
        found = named.get(own)
        if isinstance(found, Tensor) and found.ndim >= 2:
            return (found.shape[0], found.shape[1]), found.device
    if prefix:
        return (None, None) if mask is None else ((mask.shape[0], mask.shape[1]), mask.device)
    first = first_tensor(named.values())
    if first is not None and first.ndim == 2 and not (first.is_floating_point() or first is mask):
        return (first.shape[0], first.shape[1]), first.device
    if mask is None:
        return None, None
    fed = first is not None and first.ndim == 3 and len(first) == len(mask) and first.shape[1] <= mask.shape[1]
    length = first.shape[1] if fed and first is not None else mask.shape[1]
    return (mask.shape[0], length), mask.device


def _mask_known(named: Mapping[str, Any], prefix: str) -> Bool[Tensor, "B T"] | None:
    """The mask under one of the usual names; None where there is none."""
    name = f"{prefix}attention_mask"
    if named.get(name) is not None:
        return as_mask(named[name], name)
    if prefix and isinstance(labels := named.get("labels"), Tensor) and named.get("decoder_input_ids") is None:
        return labels != -100  # from which transformers makes the decoder's inputs
    padding = ("tgt_key_padding_mask",) if "tgt" in named else _PADDING
    for name in padding if not prefix else ():
        if isinstance(found := named.get(name), Tensor):
            return ~found if found.dtype is torch.bool else found == 0
    return None


def unsure(named: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """An argument that may say where pads are, under a name that leaves open how; None if it says nothing anyway."""
    for name in _UNSURE:
        found = named.get(name)
        if isinstance(found, Tensor) and not (_is_eager() and bool((found == found.flatten()[:1]).all())):
            return name, found
    return None


def _is_eager() -> bool:
    return not torch.compiler.is_compiling()


def as_mask(found: Any, name: str) -> Bool[Tensor, "B T"]:
    """A mask (B, T), true at the tokens; BatchError if it does not say which they are."""
    if isinstance(found, Mapping):
        raise BatchError(f"{name}: expected shape (B, S), got a dict of masks, {sorted(map(str, found))}; {SAY}")
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise BatchError(
            f"{name}: expected shape (B, S), got {got}, which does not say which tokens are pads; {SAY}, or "
            "positions= a mask"
        )
    if found.is_floating_point() and not _counts(found):
        raise BatchError(f"{name}: expected 1 for a token and 0 for a pad, got other numbers; {SAY}")
    return found.bool()


def _counts(mask: Tensor) -> bool:
    """Whether a floating mask is one of ones and zeros; zeros alone are an additive mask that hides nothing."""
    return not torch.compiler.is_compiling() and bool(((mask == 0) | (mask == 1)).all()) and bool(mask.any())


def _mask_said(named: Mapping[str, Any], mask: Mask) -> Bool[Tensor, "B T"] | None:
    """The mask where the user says that it is."""
    if not isinstance(mask, str):
        return as_mask(mask(named), "mask")
    found: Any = named
    for key in mask.split("."):
        try:
            if isinstance(found, Mapping):
                found = found[key]
            else:
                found = found[int(key)] if isinstance(found, tuple | list) else getattr(found, key)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError):
            raise BatchError(f"mask={mask!r}: the call has no such input; it has {sorted(named)}; {SAY}") from None
        if found is None:
            return None
    return as_mask(found, f"mask={mask!r}")


_ANEW = "positions: 'position_ids' do not count up by one"


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
    if not isinstance(places, Tensor) or places.ndim != 2 or places.shape[1] != length:
        return 0, ""
    if torch.compiler.is_compiling() or (mask is not None and not bool(mask.all())):
        return 0, ""
    if bool((places == torch.arange(length, device=places.device)).all()):
        return 0, ""
    first = places[:, 0]
    if bool((first == first[0]).all()) and bool((places.diff(dim=1) == 1).all()):
        begin = int(first[0])
        return begin, f"positions: 'position_ids' begin at {begin}, and the end of the prompt is not known{_HINT}"
    if bool((first == 0).all()) and bool(((places.diff(dim=1) == 1) | (places[:, 1:] == 0)).all()):
        return None, _ANEW
    return None, f"positions: 'position_ids' neither count up nor start anew; pass an attention_mask{_HINT}"


def _texts(places: Tensor) -> Tensor:
    """The number of the text of each token, where position_ids start anew with each."""
    return ((places == 0).flatten().cumsum(dim=0) - 1).view(places.shape)


def cache_in(named: Mapping[str, Any]) -> tuple[str, Any]:
    """The cache among arguments, and its name, which differs from library to library and from version to version."""
    for name, value in named.items():
        if _CACHE.match(name) and not (
            value is None or value is False or (isinstance(value, list | tuple) and not value)
        ):
            return name, value
    return "", None


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


def of_the_encoder(named: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model's inputs, what says something of the encoder's tokens."""
    found = {name: value for name, value in named.items() if name in _ENCODERS}
    if named.get("encoder_hidden_states") is not None:
        return {"inputs_embeds": named["encoder_hidden_states"], "attention_mask": named.get("encoder_attention_mask")}
    outputs = named.get("encoder_outputs")
    if outputs is not None and not isinstance(found.get("input_ids"), Tensor):
        found["inputs_embeds"] = first_tensor([outputs if isinstance(outputs, tuple | list) else dict(outputs)])
    return found


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of a model that has a decoder too, if it is a module in it."""
    inner = unwrapped(model)
    if not _has_decoder(inner):
        return None
    get = getattr(inner, "get_encoder", None)
    encoder = get() if callable(get) else None
    inside = any(module is encoder for module in inner.modules())
    return encoder if isinstance(encoder, nn.Module) and encoder is not inner and inside else None
