"""Place: where an activation is read and written: a module, its side, the tensor that is meant, and its features."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

Side: TypeAlias = Literal["in", "out"]

_SUFFIX = re.compile(r":(?P<side>in|out)(?P<path>(?:\.\w+)*)$")
_FEATURES = re.compile(r"\[(-?\d*:[-:\d]*|head=[^\[\]]*)\]$")


@dataclass(frozen=True)
class Place:
    """What a site's name stands for.

    Args:
        site: the name as it was given, such as "layers.3:in.hidden_states".
        name: the module's name, "layers.3".
        module: the module.
        side: whether its input or its output is meant.
        path: the keys that lead to the activation inside it, ("hidden_states",); empty if there is only one.
        features: the first of the features that are meant and the one after the last, (64, 128); None: all of them.
    """

    site: str
    name: str
    module: nn.Module
    side: Side = "out"
    path: tuple[str, ...] = ()
    features: tuple[int, int] | None = None

    @property
    def size(self) -> int | None:
        """How many features its name asks for; None: all of them."""
        return None if self.features is None else self.features[1] - self.features[0]


def split_site(site: str) -> tuple[str, Side, tuple[str, ...]]:
    """A site's name in three: the module's name or a pattern for it, the side, and the keys; without its features.

    >>> split_site("layers.*:out.0"), split_site("head"), split_site("attn.o_proj:in[head=2]")
    (('layers.*', 'out', ('0',)), ('head', 'out', ()), ('attn.o_proj', 'in', ()))
    """
    site, _ = split_features(site)
    found = _SUFFIX.search(site)
    if found is None:
        return site, "out", ()
    side: Side = "in" if found["side"] == "in" else "out"
    return site[: found.start()], side, tuple(found["path"].split(".")[1:])


def split_features(site: str) -> tuple[str, str]:
    """A site's name in two: that of the whole activation, and what the brackets at its end say of the features.

    Brackets hold features if there is a colon between numbers in them, or "head="; others are a glob's.

    >>> split_features("attn.o_proj:in[64:128]"), split_features("layers.[0-3]")
    (('attn.o_proj:in', '64:128'), ('layers.[0-3]', ''))
    """
    found = _FEATURES.search(site)
    return (site, "") if found is None else (site[: found.start()], found[1])
