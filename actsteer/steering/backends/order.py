"""Order: Steerers that nest edit in the order entered, which a hook and a patch on one module may not keep."""

from __future__ import annotations

from actsteer.errors import UnsupportedModelError
from actsteer.steering.backends.choose import Mechanism
from actsteer.steering.backends.patch import Patch
from actsteer.steering.edit import SiteEdit
from actsteer.steering.interventions import Add


def check_order(edit: SiteEdit, mechanism: Mechanism) -> None:
    """A patch runs inside of all hooks. That matters only to edits that do not commute, which is to say, not to sums.

    Raises:
        UnsupportedModelError: the site is steered already, and this edit would not come after that one.
    """
    module, side = edit.place.module, edit.place.side
    hooks = module._forward_hooks if side == "out" else module._forward_pre_hooks
    holder = getattr(module.__dict__.get("forward"), "__self__", None)
    patched = holder.callbacks[side] if isinstance(holder, Patch) else []
    earlier = {"hook": patched if side == "in" else [], "patch": list(hooks.values()) if side == "out" else []}
    for callback in earlier.get(mechanism, [*hooks.values(), *patched]):
        other = getattr(getattr(callback, "callback", callback), "__self__", None)  # of one thread, perhaps
        if isinstance(other, SiteEdit) and not (
            isinstance(edit.intervention, Add) and isinstance(other.intervention, Add)
        ):
            raise UnsupportedModelError(
                f"site {edit.place.site!r} is steered already, and by {mechanism} this edit would come before that; "
                "enter them in the other order, or give both the same backend"
            )
