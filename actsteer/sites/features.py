"""Features: how many an activation has, and which of them the brackets of a site's name mean: numbers, or heads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from actsteer.errors import ShapeError, SiteNotFoundError, UnsupportedModelError
from actsteer.sites.place import Place, Side
from actsteer.sites.tap import plain_class
from actsteer.sites.wrappers import unwrapped

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
"""What a block calls the module that has heads."""

_NUMBERS = re.compile(r"(\d+):(\d+)")
_HEAD = re.compile(r"head=(\*|\d+)")
_ATTENTION = rf"(?:^|\.)(?:{'|'.join(ATTENTION)})"
_BY_HEADS: dict[Side, re.Pattern[str]] = {  # modules at whose input, or output, the heads lie side by side
    "in": re.compile(rf"{_ATTENTION}(?:\.output)?\.(?:o_proj|out_proj|c_proj|dense|out_lin)$"),
    "out": re.compile(rf"{_ATTENTION}(?:\.self)?\.(?:q_proj|query|q_lin|(?P<kv>k_proj|v_proj|key|value|k_lin|v_lin))$"),
}


def known_size(place: Place) -> int | None:
    """The number of features at a place, where its name, or the module's class, tells before it has run.

    Raises:
        ShapeError: the name asks for features beyond those that the class tells of.
    """
    known = sizes(unwrapped(place.module)) if place.path in ((), ("0",)) else None
    size = None if known is None else known[place.side == "out"] or None  # 0: a lazy module's, until it is called
    if size is not None:
        check_within(place, size)
    return size if place.features is None else place.size


def check_within(place: Place, size: int) -> None:
    """ShapeError, if the features that a place names are not among so many."""
    if place.features is not None and place.features[1] > size:
        raise ShapeError(
            f"site {place.site!r}: it names features up to {place.features[1]}, and the activation has {size}; name "
            f"others, within [0:{size}]"
        )


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """How many features a module takes and gives; None where its class does not tell."""
    match module:
        case nn.Linear():
            return module.in_features, module.out_features
        case nn.LayerNorm() | nn.RMSNorm() if len(module.normalized_shape) == 1:
            return module.normalized_shape[-1], module.normalized_shape[-1]
        case nn.modules.batchnorm._NormBase():
            return module.num_features, module.num_features
        case nn.GroupNorm():
            return module.num_channels, module.num_channels
        case nn.Embedding():
            return module.embedding_dim, module.embedding_dim
        case nn.modules.conv._ConvNd():
            return module.in_channels, module.out_channels
        case _ if is_conv1d(module):
            weight = module._parameters["weight"]
            return None if weight is None else (weight.shape[0], weight.shape[1])
        case _:
            return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer whose weight lies the other way round."""
    kind = plain_class(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def numbers(site: str, features: str) -> tuple[int, int]:
    """ "64:128": the features 64 to 127.

    Raises:
        SiteNotFoundError: anything else, or none of them.

    >>> numbers("head[64:128]", "64:128")
    (64, 128)
    """
    found = _NUMBERS.fullmatch(features)
    if found is None or int(found[1]) >= int(found[2]):
        raise SiteNotFoundError(
            f"site {site!r}: expected features [start:stop] with 0 <= start < stop, both of them numbers, as in "
            f"[64:128], or heads, [head=2] or [head=*], got [{features}]"
        )
    return int(found[1]), int(found[2])


def heads(site: str, features: str, place: Place, *, around: Sequence[nn.Module]) -> list[str]:
    """ "head=2" or "head=*" in numbers: a text "start:stop" for each head that is meant.

    Heads lie side by side in what the attention's output projection takes, and in what its projections of queries,
    keys and values give. The nearest config around the module tells how many there are: `num_attention_heads`, and
    `num_key_value_heads` of keys and values; and their size, `head_dim` or, where it has none, `hidden_size` for all.

    Args:
        place: the module, and its side.
        around: the modules around it, from the model down.

    Raises:
        SiteNotFoundError: there are no heads there, or no such one.
        UnsupportedModelError: no config tells what they are, or the layer has another size than it tells.
    """
    asked, by_heads = _HEAD.fullmatch(features), _BY_HEADS[place.side].search(place.name)
    if asked is None:
        raise SiteNotFoundError(f"site {site!r}: expected a head's number, [head=2], or [head=*], got [{features}]")
    if by_heads is None or place.path not in ((), ("0",)):
        raise SiteNotFoundError(
            f"site {site!r}: heads are known in the input of an attention's output projection, as in "
            f"'self_attn.o_proj:in[{features}]', and in the output of its q_proj, k_proj or v_proj; elsewhere name the "
            "features, [start:stop]"
        )
    configs = (getattr(unwrapped(outer), "config", None) for outer in reversed(around))
    config: Any = next((own for own in configs if own is not None), None)
    count, size = _heads_of(config, kv=by_heads.groupdict().get("kv") is not None)
    whole = known_size(place)
    if not count * size or whole not in (None, count * size):
        told = f"{count} of {size} features, where the layer has {whole}" if count * size else "nothing of them"
        raise UnsupportedModelError(
            f"site {site!r}: how many heads there are, and how large, is what a config says, and that around it tells "
            f"{told}; name the features, [start:stop]"
        )
    if asked[1] != "*" and int(asked[1]) >= count:
        raise SiteNotFoundError(f"site {site!r}: there are the heads 0 to {count - 1}")
    return [f"{head * size}:{(head + 1) * size}" for head in (range(count) if asked[1] == "*" else [int(asked[1])])]


def _heads_of(config: Any, *, kv: bool) -> tuple[int, int]:
    """How many heads a config tells of, and how large they are; 0 where it does not tell.

    One of an encoder and a decoder may mean either.
    """
    if getattr(config, "is_encoder_decoder", False):
        return 0, 0

    def told(key: str) -> int:
        found = getattr(config, key, None)
        return found if isinstance(found, int) else 0

    count, size, width = told("num_attention_heads"), told("head_dim"), told("hidden_size")
    if not size and count and width % count == 0:
        size = width // count
    return (told("num_key_value_heads") or count) if kv else count, size
