"""The hook backend: a forward hook, or a pre-hook for an input. It composes with everything in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from actsteer.sites.place import Place
from actsteer.sites.shards import is_sharded
from actsteer.steering.backends.mark import mark


def attach(place: Place, callback: Callable[..., Any]) -> Callable[[], None]:
    """Have the module call `callback(module, args, output)`, or with its arguments; returns what removes it again.

    It runs after the module's other hooks, for tensor parallelism's own ones gather the output first; but before the
    ones by which transformers captures hidden states, so that they agree with the logits.
    """
    module = place.module
    if place.side == "in":
        handle = module.register_forward_pre_hook(callback, with_kwargs=True)
    else:
        handle = module.register_forward_hook(callback)
        if not is_sharded(module):
            _put_before_captures(module)
    handles = ExitStack()
    handles.callback(handle.remove)
    handles.callback(mark(module))
    return handles.close  # which may be called twice


def _put_before_captures(module: nn.Module) -> None:
    """Move the hook that captures, and all behind it, behind the one that was registered last."""
    present: Any = module._forward_hooks  # an OrderedDict, whatever torch's annotation says
    hooks = list(present.items())
    names = [getattr(hook, "__name__", "") for _, hook in hooks]
    if "output_capturing_hook" in names:
        for key, _ in hooks[names.index("output_capturing_hook") : -1]:
            present.move_to_end(key)
