"""attach_all: put a plan's edits on the model, each by its backend; all of them or, if anything fails, none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from actsteer.errors import UnsupportedModelError
from actsteer.sites.place import Place
from actsteer.sites.resolve import path_to
from actsteer.sites.shards import is_sharded
from actsteer.sites.wrappers import named_modules, uncompiled, unwrapped
from actsteer.steering import generation
from actsteer.steering.backends import bias, buffer, hook, patch
from actsteer.steering.backends.choose import Backend, Choice, Mechanism, Scope, choose
from actsteer.steering.backends.mark import has_own_forward
from actsteer.steering.backends.order import check_order
from actsteer.steering.plan import Plan
from actsteer.steering.watch import Begin, End, InThread, Watch


def choices(plan: Plan, *, backend: Backend, scope: Scope) -> dict[str, Choice]:
    """Site -> the backend that would serve it now, and why.

    Raises:
        UnsupportedModelError: one was asked for that would not be honoured there.
    """
    chosen = {site: choose(plan.model, edit.place, backend=backend, scope=scope) for site, edit in plan.edits.items()}
    for site, choice in chosen.items():
        if choice.mechanism == "fold" and (reason := bias.obstacle(plan.edits[site], plan.model)) is not None:
            raise UnsupportedModelError(f"site {site!r} cannot be folded: {reason}; use another backend")
    return chosen


def attach_all(plan: Plan, watch: Watch, chosen: Mapping[str, Choice], *, backend: Backend, scope: Scope) -> ExitStack:
    """Attach the edits, the gates before them, and the watch at the model itself; returns what removes them again."""
    listens: Backend = backend if backend in ("patch", "buffer") else "auto"
    model = uncompiled(plan.model)
    root = Place("", "", model)
    with ExitStack() as handles:

        def add(place: Place, callback: Callable[..., Any], mechanism: Mechanism) -> Callable[[], None]:
            remove = _attach(plan.model, place, InThread(callback) if scope == "thread" else callback, mechanism)
            handles.callback(remove)
            return remove

        ends: list[tuple[Place, Callable[..., Any], Mechanism]] = []
        for passes in plan.passes:
            if passes.readers or passes.is_read or passes.sees_inputs:
                place = _place_of(plan.model, passes.host)
                mechanism = choose(plan.model, place, backend=listens, scope=scope).mechanism
                add(replace(place, side="in"), Begin(passes), mechanism)
                ends.append((place, End(passes), mechanism))
        if any(passes.sees_inputs for passes in plan.passes):
            handles.callback(generation.attach(model, plan.passes, plan.readers, one_thread=scope == "thread"))
        for reader in plan.readers:
            add(reader.place, reader, choose(plan.model, reader.place, backend=listens, scope=scope).mechanism)
        if backend == "buffer":
            handles.callback(buffer.hold(plan))
        for site, edit in plan.edits.items():
            check_order(edit, chosen[site].mechanism)
            if chosen[site].mechanism == "fold":
                handles.callback(bias.attach(edit, plan.model))
            else:
                add(edit.place, edit.on_input if edit.place.side == "in" else edit.on_output, chosen[site].mechanism)
        for end in ends:  # after an edit of the model's own output
            add(*end)
        watch.leaves = []
        leaves = [add(root, watch, mechanism) for mechanism in _watched_by(plan.model, root, backend)]
        if _nothing_compiled(plan.model, root) and backend != "buffer":
            watch.leaves = leaves
        return handles.pop_all()
    raise AssertionError  # for the type checker, to whom an ExitStack might swallow an exception


def _place_of(model: nn.Module, module: nn.Module) -> Place:
    inside = module is not model and module is not unwrapped(model)
    name = next((name for name, own in named_modules(model) if own is module), "") if inside else ""
    return Place(name, name, module)


def _watched_by(model: nn.Module, root: Place, backend: Backend) -> list[Mechanism]:
    """A patch sees a call of `forward` alone, and compiled code sees it; a hook sees a forward that covers it."""
    if is_sharded(root.module):
        return ["hook"]
    foreign = "forward" in root.module.__dict__ and not has_own_forward(root.module)
    return ["hook", "patch"] if foreign or (_nothing_compiled(model, root) and backend != "buffer") else ["patch"]


def _nothing_compiled(model: nn.Module, root: Place) -> bool:
    return choose(model, root, backend="auto").mechanism == "hook"


def _attach(model: nn.Module, place: Place, callback: Callable[..., Any], mechanism: Mechanism) -> Callable[[], None]:
    if mechanism == "patch":
        return patch.attach(place, callback, around=path_to(model, place.name)[:-1])
    return hook.attach(place, callback)
