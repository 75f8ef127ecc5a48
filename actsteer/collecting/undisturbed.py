"""Undisturbed: run a model without leaving a trace in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def undisturbed(model: nn.Module, *, frozen: bool = False) -> Iterator[None]:
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


def _configurations(model: nn.Module) -> list[Any]:
    """The configurations of transformers' models that have a key-value cache."""
    found = [module.__dict__.get("config") for module in model.modules()]
    return [config for config in found if hasattr(config, "use_cache")]


@contextmanager
def usable_later(model: nn.Module) -> Iterator[None]:
    """What the model keeps from inference mode, such as a table made at its first call, works in autograd later."""
    before = {id(tensor) for _, _, tensor in _kept(model)}
    try:
        yield
    finally:
        _release(model, before)


def _release(model: nn.Module, before: set[int]) -> None:
    for holder, key, tensor in list(_kept(model)):
        if id(tensor) not in before:
            with torch.inference_mode(mode=False):
                holder[key] = (
                    nn.Parameter(tensor.clone(), tensor.requires_grad) if _is_parameter(tensor) else tensor.clone()
                )


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _kept(model: nn.Module) -> Iterator[tuple[Any, Any, Tensor]]:
    """The inference tensors that modules hold, each with the container and the key where it lies."""
    for module in model.modules():
        for holder in (module._parameters, module._buffers, module.__dict__):
            yield from _in(holder, depth=2)


def _in(holder: Any, *, depth: int) -> Iterator[tuple[Any, Any, Tensor]]:
    for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        if isinstance(value, Tensor) and value.is_inference():
            yield holder, key, value
        elif type(value) in (dict, list) and depth and key not in ("_modules", "_parameters", "_buffers"):
            yield from _in(value, depth=depth - 1)


def _eager() -> AbstractContextManager[Any]:
    """Compiled code stands aside: it would ignore the hooks."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
