"""Place: where an activation is read and written: a module, its input or output side, and the part of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

Side: TypeAlias = Literal["in", "out"]

_SUFFIX = re.compile(r":(?P<side>in|out)(?P<path>(?:\.\w+)*)$")


@dataclass(frozen=True)
class Place:
    """What a site's name stands for.

    Args:
        site: the name as it was given, such as "layers.3:in.hidden_states".
        name: the module's name, "layers.3".
        module: the module.
        side: whether its input or its output is meant.
        path: the keys that lead to the activation inside it, ("hidden_states",); empty if there is only one.
    """

    site: str
    name: str
    module: nn.Module
    side: Side = "out"
    path: tuple[str, ...] = ()


def split_site(site: str) -> tuple[str, Side, tuple[str, ...]]:
    """A site's name in three: the module's name or a pattern for it, the side, and the keys.

    >>> split_site("layers.*:out.0"), split_site("head")
    (('layers.*', 'out', ('0',)), ('head', 'out', ()))
    """
    found = _SUFFIX.search(site)
    if found is None:
        return site, "out", ()
    side: Side = "in" if found["side"] == "in" else "out"
    return site[: found.start()], side, tuple(found["path"].split(".")[1:])
