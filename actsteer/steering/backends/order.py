"""Order: Steerers that nest edit in the order entered, which a hook and a patch on one module may not keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from actsteer.errors import UnsupportedModelError
from actsteer.sites.place import Place
from actsteer.steering.backends.choose import Mechanism
from actsteer.steering.backends.patch import Patch
from actsteer.steering.edit import SiteEdit


def check_order(edit: SiteEdit, mechanism: Mechanism) -> None:
    """A patch runs inside of all hooks. That matters only to edits that do not commute, which is to say, not to sums.

    Raises:
        UnsupportedModelError: the site is steered already, and this edit would not come after that one.
    """
    side = edit.place.side
    hooked, patched = _by_mechanism(edit.place)
    earlier = {"hook": patched if side == "in" else [], "patch": hooked if side == "out" else []}
    for other in earlier.get(mechanism, [*hooked, *patched]):
        if not (edit.is_sum and other.is_sum):
            raise UnsupportedModelError(
                f"site {edit.place.site!r} is steered already, and by {mechanism} this edit would come before that; "
                "enter them in the other order, or give both the same backend"
            )


def edits_at(place: Place) -> list[SiteEdit]:
    """The edits that are attached at a place, in the order in which they run."""
    hooked, patched = _by_mechanism(place)
    return [*patched, *hooked] if place.side == "out" else [*hooked, *patched]


def _by_mechanism(place: Place) -> tuple[list[SiteEdit], list[SiteEdit]]:
    """The edits that are attached at a place, by hook and by patch."""
    module, side = place.module, place.side
    hooks = module._forward_hooks if side == "out" else module._forward_pre_hooks
    holder = getattr(module.__dict__.get("forward"), "__self__", None)
    return _edits(hooks.values()), _edits(holder.callbacks[side] if isinstance(holder, Patch) else [])


def _edits(callbacks: Iterable[Any]) -> list[SiteEdit]:
    owners = [getattr(getattr(c, "callback", c), "__self__", None) for c in callbacks]  # of one thread, perhaps
    return [owner for owner in owners if isinstance(owner, SiteEdit)]
