"""Whose: which tokens a site has, told by where it is in architectures that are known, else by the user."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias, final

from torch import nn

from actsteer.errors import SiteNotFoundError, close_names
from actsteer.sites.place import Place
from actsteer.tokens.inputs import Mask

Masks: TypeAlias = Mask | Mapping[str, Mask | None]
"""The mask of the call for every site, or site -> mask; None: the tokens of this site are not those of the call."""
Kind: TypeAlias = Literal["call", "answers", "encoder", "memory", "none"]

_TOWER = re.compile(r"^((vision|visual|image|audio|speech)(_\w+)?|multi_modal_projector|mm_projector)$")
_CROSS = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)(\.self)?\.(k|v|key|value|k_proj|v_proj)$"
)
_MEMORY = {"encoder_hidden_states", "key_value_states", "memory"}  # arguments
_ANSWERS = {"lm_head", "proj_out", "logits", "embed_out", "output_projection"}


@final
class Whose(NamedTuple):
    """The tokens of a site.

    Args:
        kind: those of the call; those of them that a head is to answer at; those that an encoder is called with; the
            encoder's, as the decoder's cross-attention reads them; or others than the call's.
        mask: where the user says that their mask is.
    """

    kind: Kind
    mask: Mask | None = None


def whose(place: Place, encoder: nn.Module | None, said: Mapping[str, Mask | None], *, reads: bool) -> Whose:
    """Which tokens a site has, in a model with this encoder; `reads`: whether it reads what an encoder gives."""
    if place.site in said:
        mask = said[place.site]
        return Whose("none") if mask is None else Whose("call", mask)
    parts = {*place.name.split("."), *(place.path[:1] if not place.name else ())}
    if any(map(_TOWER.match, parts)):
        return Whose("none")
    if encoder is not None:
        inside = any(module is place.module for module in encoder.modules())
        if inside or any(part == "encoder" or part.startswith("encoder_last") for part in parts - {place.name}):
            return Whose("encoder")
    if reads and (_CROSS.search(place.name) or (place.side == "in" and _MEMORY.intersection(place.path))):
        return Whose("memory")
    return Whose("answers") if _ANSWERS.intersection(parts) else Whose("call")


def said_of(mask: Masks | None, sites: Mapping[str, Place]) -> dict[str, Mask | None]:
    """Site -> what the user says of its mask, for those of which anything is said.

    Raises:
        SiteNotFoundError: it names another site.
        TypeError: it is no mask.
    """
    if mask is None:
        return {}
    given: dict[str, Mask | None] = {}
    given |= mask if isinstance(mask, Mapping) else dict.fromkeys(sites, mask)
    for site, own in given.items():
        if site not in sites:
            raise SiteNotFoundError(f"mask names no site in use: {site!r}. {close_names(site, sites)}")
        if not (own is None or isinstance(own, str) or callable(own)):
            raise TypeError(
                f"mask: expected the name of an argument, a path, a callable of the inputs, or None for site {site!r}, "
                f"got {own!r}"
            )
    return given
