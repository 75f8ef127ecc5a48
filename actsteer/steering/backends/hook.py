"""The hook backend: a forward hook, or a pre-hook for an input. It composes with everything in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from actsteer.sites.place import Place
from actsteer.sites.shards import is_sharded


def attach(place: Place, callback: Callable[..., Any]) -> Callable[[], None]:
    """Have the module call `callback(module, args, output)`, or with its arguments; returns what removes it again.

    It runs after the module's other hooks, for tensor parallelism's own ones gather the output first; but before the
    ones by which transformers captures hidden states, so that they agree with the logits.
    """
    module = place.module
    if place.side == "in":
        handle = module.register_forward_pre_hook(callback, with_kwargs=True)
    else:
        handle = module.register_forward_hook(callback, prepend=_captures(module) and not is_sharded(module))
    unmark = _mark(module)

    def remove() -> None:
        handle.remove()
        unmark()

    return remove


def _mark(module: nn.Module) -> Callable[[], None]:
    """Put the module's own forward on the instance, which changes nothing but what compiled code guards on.

    Compiled code takes no notice of hooks: what was compiled for another model of this class, without hooks, would
    serve this one too, if that one was first.
    """
    if "forward" in module.__dict__:
        return lambda: None
    mark = MethodType(type(module).forward, module)
    module.__dict__["forward"] = mark

    def unmark() -> None:
        if module.__dict__.get("forward") is mark:
            del module.__dict__["forward"]

    return unmark


def _captures(module: nn.Module) -> bool:
    return any(getattr(hook, "__name__", "") == "output_capturing_hook" for hook in module._forward_hooks.values())
