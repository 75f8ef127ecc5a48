"""Choose: which backend serves a site, and why."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from actsteer.errors import UnsupportedModelError
from actsteer.sites.place import Place
from actsteer.sites.resolve import path_to
from actsteer.sites.shards import is_sharded

Backend: TypeAlias = Literal["auto", "hook", "patch", "buffer", "fold"]
Mechanism: TypeAlias = Literal["hook", "patch", "fold"]
Scope: TypeAlias = Literal["process", "thread"]


@dataclass(frozen=True)
class Choice:
    """The backend of a site's edit, by what it is attached, and the reason."""

    backend: Literal["hook", "patch", "buffer", "fold"]
    mechanism: Mechanism
    reason: str


def check(backend: str, scope: str) -> None:
    """ValueError unless both are known words that go together."""
    for name, value, known in (("backend", backend, get_args(Backend)), ("scope", scope, get_args(Scope))):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    if scope == "thread" and backend in ("fold", "buffer"):
        raise ValueError(f"scope='thread' isolates hooks, and the {backend} backend changes what all threads read")


def choose(model: nn.Module, place: Place, *, backend: Backend, scope: Scope = "process") -> Choice:
    """The backend for a place.

    Raises:
        UnsupportedModelError: one was asked for that compiled code would ignore.
    """
    compiled = _compiled(model, place)
    sharded = is_sharded(place.module)
    if compiled is not None and scope == "thread":
        raise UnsupportedModelError(
            f"site {place.site!r}: {compiled}, and compiled code knows no threads; use scope='process'"
        )
    if compiled is not None and backend != "fold" and getattr(_stance(), "skip_guard_eval_unsafe", False):
        raise UnsupportedModelError(
            f"site {place.site!r}: {compiled}, and under skip_guard_eval_unsafe compiled code sees no edit; "
            "attach outside of that stance, or use backend='fold'"
        )
    if backend == "hook" and compiled is not None:
        raise UnsupportedModelError(
            f"site {place.site!r}: {compiled}, and compiled code ignores hooks that come later; use backend='auto' or "
            "'patch', or call torch.compiler.reset()"
        )
    if backend == "patch" and sharded:
        raise UnsupportedModelError(
            f"site {place.site!r}: its parameters are sharded, and hooks of their own must run before the edit; use "
            "backend='auto' or 'hook'"
        )
    if backend in ("fold", "hook", "patch"):
        return Choice(backend, backend, "as asked for")
    mechanism: Literal["hook", "patch"] = "hook"
    if sharded:
        reason = "its parameters are sharded, and hooks of their own must run first"
    elif compiled is not None:
        mechanism, reason = "patch", compiled
    elif backend == "buffer":
        mechanism, reason = "patch", "it is to be compiled"
    else:
        reason = "nothing is compiled yet"
    return Choice(mechanism if backend == "auto" else "buffer", mechanism, reason)


def _compiled(model: nn.Module, place: Place) -> str | None:
    """Why this place may sit in code that is compiled already; None if it cannot."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or _stance().stance == "force_eager":
        return None
    for module in (*path_to(model, place.name), place.module):
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            return f"{type(getattr(module, '_orig_mod', module)).__name__} is compiled"
    if getattr(dynamo.convert_frame, "FRAME_COUNTER", 1):  # where it is not counted, assume the worst
        return "code has been compiled in this process"
    return None


def _stance() -> Any:
    """What `torch.compiler.set_stance` has set."""
    return sys.modules["torch._dynamo"].eval_frame._stance
