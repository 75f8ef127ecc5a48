"""Evaluation mode: run a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from actsteer.private_names import dynamo


@contextmanager
def eval_mode(model: nn.Module, *, frozen: bool = False) -> Iterator[None]:
    """The model in evaluation mode and eager, if `frozen` without gradients to its parameters; left as it was found."""
    modules = list(model.modules())
    training = [(module, module.training) for module in modules]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad] if frozen else []
    configs: list[Any] = [module.__dict__.get("config") for module in modules]
    cached = {id(config): config for config in configs if _keeps_cache(config)}
    synchronized = [m for m in modules if isinstance(m, DistributedDataParallel) and m.require_forward_param_sync]
    try:
        _switch((module, False) for module in modules)
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in synchronized:
            module.require_forward_param_sync = False  # each process runs as many batches as it has
        for config in cached.values():
            config.use_cache = False  # which only generation needs
        with _eager():
            yield
    finally:
        _switch(training)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in synchronized:
            module.require_forward_param_sync = True
        for config in cached.values():
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


def _switch(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        if module.training != mode:  # to set it costs more than to look
            module.training = mode


def _keeps_cache(config: Any) -> bool:
    """Whether it is the configuration of a model of transformers that has a key-value cache, and uses it."""
    return config is not None and getattr(config, "use_cache", None) is True


def _eager() -> AbstractContextManager[Any]:
    """Compiled code stands aside: it would ignore the hooks."""
    if dynamo() is None:  # nothing is compiled
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
