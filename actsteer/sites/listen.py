"""Listen at a place without changing anything, and say why nothing was heard there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from actsteer.sites import tap
from actsteer.sites.place import Place
from actsteer.sites.resolve import path_to


def listen(place: Place, callback: Callable[..., None]) -> Callable[[], object]:
    """Have `callback(module, args, output or kwargs)` called after all steering; returns what removes it again."""
    module = place.module
    if place.side == "out":
        return module.register_forward_hook(callback).remove
    if not any(entry.when == "before" for entry in tap.entries_of(module)):
        return module.register_forward_pre_hook(callback, with_kwargs=True).remove
    tap.put(module, "before", callback, owner=None)  # a steering that edits the input comes after all hooks
    return partial(tap.take_off, module, "before", callback)


def likely_cause(model: nn.Module, place: Place) -> str:
    """Why a site probably did not run though the model did, and what to do."""
    around = path_to(model, place.name)[:-1]
    parent = around[-1] if around else model
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads its out_proj's weights and never calls it; steer the MultiheadAttention itself"
    if type(place.module).__name__ == "HookPoint":
        return "this HookPoint is inactive; switch it on in the model's configuration, or choose another"
    if any(isinstance(outer, torch.fx.GraphModule) for outer in (model, *around)):
        return "an exported graph holds its own code and not these modules; steer the model that it was made from"
    if any(isinstance(outer, nn.TransformerEncoderLayer) for outer in around):
        return "a fused kernel may have taken its place; steer the layer, or the part that is called"
    return (
        "the module is unused on this path, called by its forward() alone, read for its weights, or compiled or traced "
        "before the steering was attached; choose another site"
    )
