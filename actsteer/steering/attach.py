"""attach_all: put a plan's edits on the model, each by its backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import nn

from actsteer.errors import SteeringNotApplied, UnsupportedModelError
from actsteer.sites import tap
from actsteer.sites.listen import likely_cause
from actsteer.sites.place import Place, Side
from actsteer.sites.resolve import are_there, path_to
from actsteer.sites.shards import is_sharded
from actsteer.sites.wrappers import uncompiled
from actsteer.steering import in_bias
from actsteer.steering.choose import Backend, Choice, Mechanism, choose
from actsteer.steering.edit import Fired, SiteEdit
from actsteer.steering.handles import Handles
from actsteer.steering.plan import Plan
from actsteer.steering.scope import Presence
from actsteer.tokens import generate, passes

_FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # run a fused kernel unless a module in them has a hook
_WHEN = {"in": "before", "out": "after"}


@runtime_checkable
class Steers(Protocol):
    """A Steerer, to those that must not know the class."""

    def edits_at(self, module: nn.Module, side: Side) -> list[SiteEdit]:
        """Its edits of what a module takes, or gives."""
        ...


Owner = TypeVar("Owner", bound=Steers)


@final
class Watch:
    """Notes that the model ran."""

    def __init__(self) -> None:
        self.ran = False
        self.leave: Callable[[], None] | None = None

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the model's forward pass; one is proof enough, and the others need not pay."""
        self.ran = True
        if not torch.compiler.is_compiling() and self.leave is not None:
            self.leave()


def choices(plan: Plan, *, backend: Backend) -> dict[str, Choice]:
    """Site -> the backend that would serve it now, and why.

    Raises:
        UnsupportedModelError: one was asked for that would not be honoured there.
    """
    chosen = {site: choose(plan.model, edit.place, backend=backend) for site, edit in plan.edits.items()}
    for site, choice in chosen.items():
        place, host = plan.edits[site].place, plan.edits[site].passes.host
        is_host = place.module is uncompiled(host) and _has_passes(plan)
        if is_host and choice.mechanism == "hook" and not is_sharded(place.module):
            chosen[site] = replace(choice, mechanism="tap", reason="its pass is a call of the module's forward")
        if choice.mechanism == "fold" and (reason := in_bias.obstacle(plan.edits[site], plan.model)) is not None:
            raise UnsupportedModelError(f"site {site!r} cannot be folded: {reason}; use another backend")
    return chosen


def attach_all(
    handles: Handles,
    plan: Plan,
    watch: Watch,
    chosen: Mapping[str, Choice],
    *,
    backend: Backend,
    presence: Presence | None,
    owner: Steers,
) -> None:
    """Attach the passes, the gates, the edits and the watch at the model itself; `handles` takes them off again.

    Args:
        presence: of a steering of one context alone.
        owner: the Steerer.
    """

    def put(module: nn.Module, when: str, callback: Callable[..., Any], by: tap.By = "tap") -> Callable[[], None]:
        if presence is not None and callback is not tap.idle:
            callback = presence.only(callback, around=when not in ("before", "after"))
        remove = partial(_take_off, module, when, callback)
        handles.add(remove)
        tap.put(module, when, callback, owner=owner, by=by)
        return remove

    def put_at(place: Place, callback: Callable[..., Any], by: tap.By) -> None:
        if any(isinstance(outer, _FUSED) for outer in path_to(plan.model, place.name)[:-1]):
            put(place.module, "after", tap.idle, "hook")
        put(place.module, _WHEN[place.side], callback, by)

    if presence is not None:
        handles.add(presence.end)
        presence.begin()
    for module, around in passes.taps(plan.passes) if _has_passes(plan) else ():
        put(uncompiled(module), "around", around)
    if any(own.sees_inputs for own in plan.passes):
        for module, name, around in generate.taps(uncompiled(plan.model), plan.passes):
            put(module, name, around)
    for reader in plan.readers:
        handles.add(reader.begin)
        reader.begin()
        if reader.is_inline:
            continue
        by: tap.By = "hook"
        if backend != "hook" and choose(plan.model, reader.place, backend="auto").mechanism == "tap":
            by = "tap"
        put_at(reader.place, reader, by)
    if backend == "buffer":
        handles.add(plan.release)
        plan.hold()
    for site, edit in plan.edits.items():
        mechanism = chosen[site].mechanism
        _check_order(edit, mechanism)
        if mechanism == "fold":
            handles.add(partial(in_bias.take_off, edit))
            in_bias.put(edit, plan.model, owner=owner)
        else:
            put_at(edit.place, edit.on_input if edit.place.side == "in" else edit.on_output, mechanism)
    if any(choice.mechanism != "fold" for choice in chosen.values()):  # a folded model may be scripted
        leave = put(uncompiled(plan.model), "after", watch.after)
        watch.leave = None if backend == "buffer" else leave  # what is installed serves later blocks too


def _take_off(module: nn.Module, when: str, callback: Callable[..., Any]) -> None:
    is_watch = isinstance(getattr(callback, "__self__", None), Watch)  # which changes nothing
    if tap.take_off(module, when, callback) and not is_watch:
        warnings.warn(
            f"the forward of {type(module).__name__} was replaced while it was steered, and what lies there now may "
            "not have been",
            UserWarning,
            stacklevel=5,
        )


def check_applied(plan: Plan) -> None:
    """Raise SteeringNotApplied if a site did not run though the model did, or its module was replaced since it had."""
    places = [edit.place for edit in plan.edits.values()]
    silent = [edit.place for edit in plan.edits.values() if edit.fired is Fired.NO]
    if silent:
        kinds = {place.site: tap.plain_class(place.module).__name__ for place in silent}
        causes = {place.site: likely_cause(plan.model, place) for place in silent}
        why = "; ".join(f"{site!r}: {cause}" for site, cause in causes.items())
        raise SteeringNotApplied(f"the model ran, but these sites did not: {kinds}. {why}. Or pass strict=False")
    if gone := [place.site for place in places if not are_there(plan.model, [place])]:
        raise SteeringNotApplied(
            f"the modules at {gone} were replaced while they were steered, and what ran since was not; replace "
            "them before the Steerer is attached, or pass strict=False"
        )


def owners_at(module: nn.Module) -> list[Steers]:
    """The Steerers that have something at a module, in the order entered."""
    if not (entries := tap.entries_of(module)) and not in_bias.is_folded(module):
        return []
    owners = [entry.owner for entry in entries if entry.callback is not tap.idle]  # which all share
    owners += in_bias.owners_at(module)
    return [owner for owner in dict.fromkeys(owners) if isinstance(owner, Steers)]


def others_at(edit: SiteEdit, *, but: Owner) -> list[Owner]:
    """The other Steerers that edit what this edit edits."""
    module, side = edit.place.module, edit.place.side
    same = [owner for owner in owners_at(module) if owner is not but and isinstance(owner, type(but))]
    return [owner for owner in same if owner.edits_at(module, side)]


def _has_passes(plan: Plan) -> bool:
    """Whether it matters what is known of a pass."""
    return not all(own.is_inline for own in plan.readers) or any(
        own.sees_inputs or own.positions for own in plan.passes
    )


def _check_order(edit: SiteEdit, by: Mechanism) -> None:
    """Steerers that nest edit in the order entered, which a hook, a tap and a bias of one module may not keep.

    It matters only to edits that do not commute, which is to say, not to sums.

    Raises:
        UnsupportedModelError: the site is steered already, and this edit would come before that one.
    """
    module, side = edit.place.module, edit.place.side
    runs_first = by == "fold" or by == ("tap" if side == "out" else "hook")
    for entry in tap.entries_of(module):
        if entry.when != _WHEN[side] or entry.by == by or not runs_first or not isinstance(entry.owner, Steers):
            continue
        if entry.callback is tap.idle:  # which keeps a fused kernel away, and edits nothing
            continue
        if not all(other.is_sum for other in (edit, *entry.owner.edits_at(module, side))):
            raise UnsupportedModelError(
                f"site {edit.place.site!r} is steered already, and by {by} this edit would come before that; enter "
                "them in the other order, or give both the same backend"
            )
