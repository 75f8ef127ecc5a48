"""Evaluation mode: run a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from actsteer.private_names import dynamo


@contextmanager
def eval_mode(model: nn.Module, *, frozen: bool = False) -> Iterator[None]:
    """The model in evaluation mode and eager, if `frozen` without gradients to its parameters; left as it was found."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if frozen and parameter.requires_grad]
    cached = [config for config in {id(c): c for c in _configurations(model)}.values() if config.use_cache is True]
    synchronized = [
        m for m in model.modules() if isinstance(m, DistributedDataParallel) and m.require_forward_param_sync
    ]
    try:
        for module, _ in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in synchronized:
            module.require_forward_param_sync = False  # each process runs as many batches as it has
        for config in cached:
            config.use_cache = False  # which only generation needs
        with _eager():
            yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in synchronized:
            module.require_forward_param_sync = True
        for config in cached:
            config.use_cache = True


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """The buffers, which a forward pass may count in, as they were."""
    held = [(m, key, own) for m in model.modules() for key, own in m._buffers.items() if own is not None]
    before = [(*one, one[2].clone(), one[2]._version) for one in held if not (one[2].is_meta or one[2].is_inference())]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, key, own, value, version in before:
                if module._buffers.get(key) is not own:
                    module._buffers[key] = own
                if own._version != version:
                    own.copy_(value)


def _configurations(model: nn.Module) -> list[Any]:
    """The configurations of transformers' models that have a key-value cache."""
    found = [module.__dict__.get("config") for module in model.modules()]
    return [config for config in found if hasattr(config, "use_cache")]


def _eager() -> AbstractContextManager[Any]:
    """Compiled code stands aside: it would ignore the hooks."""
    if dynamo() is None:  # nothing is compiled
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
