"""Choose: which backend serves a site, by what its module is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from actsteer.errors import UnsupportedModelError
from actsteer.private_names import skips_guards
from actsteer.sites.place import Place
from actsteer.sites.resolve import path_to
from actsteer.sites.shards import is_sharded
from actsteer.sites.wrappers import uncompiled
from actsteer.steering.scope import Scope

Backend: TypeAlias = Literal["auto", "tap", "hook", "buffer", "fold"]
Mechanism: TypeAlias = Literal["tap", "hook", "fold"]
_RENAMED = {"patch": "tap", "thread": "context"}


@dataclass(frozen=True)
class Choice:
    """The backend of a site's edit, by what it is attached, and the reason."""

    backend: Literal["tap", "hook", "buffer", "fold"]
    mechanism: Mechanism
    reason: str


def check(backend: str, scope: str) -> None:
    """ValueError unless both are known words that go together."""
    for name, value, known in (("backend", backend, get_args(Backend)), ("scope", scope, get_args(Scope))):
        if value not in known:
            renamed = f"; it is called {_RENAMED[value]!r} now" if value in _RENAMED else ""
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}{renamed}")
    if scope == "context" and backend in ("fold", "buffer"):
        raise ValueError(
            f"scope='context' is for what is called, and the {backend} backend changes what all threads read"
        )


def choose(model: nn.Module, place: Place, *, backend: Backend) -> Choice:
    """The backend for a place.

    Raises:
        UnsupportedModelError: one was asked for that would not be honoured there.
    """
    site = place.site
    if backend != "fold" and skips_guards():
        raise UnsupportedModelError(
            f"site {site!r}: under the stance skip_guard_eval_unsafe compiled code sees no edit; attach outside of "
            "that stance, or use backend='fold'"
        )
    if backend == "hook" and (compiled := _compiled(model, place)) is not None:
        raise UnsupportedModelError(
            f"site {site!r}: {compiled} is compiled, and compiled code ignores hooks that come later; use "
            "backend='auto'"
        )
    if backend == "tap" and is_sharded(place.module):
        raise UnsupportedModelError(
            f"site {site!r}: its parameters are sharded, and hooks of the module's must run before the edit; use "
            "backend='auto' or 'hook'"
        )
    if backend == "tap" and isinstance(place.module, LazyModuleMixin):
        raise UnsupportedModelError(
            f"site {site!r}: it is lazy, and changes its class at its first call; run the model once, or use "
            "backend='auto'"
        )
    if backend in ("fold", "hook", "tap"):
        return Choice(backend, backend, "as asked for")
    mechanism: Literal["tap", "hook"] = "hook"
    if is_sharded(place.module):
        reason = "its parameters are sharded, and hooks of the module's must run first"
    elif isinstance(place.module, LazyModuleMixin):
        reason = "it is lazy, and changes its class at its first call"
    else:
        mechanism, reason = "tap", "a call of the module's forward" if backend == "auto" else "it is to be compiled"
    return Choice(mechanism if backend == "auto" else "buffer", mechanism, reason)


def _compiled(model: nn.Module, place: Place) -> str | None:
    """The class of a module around the place that is compiled."""
    for module in (*path_to(model, place.name), place.module):
        if uncompiled(module) is not module or module._compiled_call_impl is not None:
            return type(getattr(module, "_orig_mod", module)).__name__
    return None
