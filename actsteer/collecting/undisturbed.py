"""Undisturbed: run a model without leaving a trace in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
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


def inference_for(model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
    """Inference mode; for a model that FSDP shards, only without gradients: its buffers would not work afterwards."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return (
        torch.no_grad
        if any(kind.__module__.startswith("torch.distributed.") for kind in kinds)
        else torch.inference_mode
    )


@contextmanager
def usable_later(model: nn.Module) -> Iterator[None]:
    """What the model keeps from inference mode, such as a table made at its first call, works in autograd later."""
    before = {id(tensor): tensor for tensor in _kept(model)}
    try:
        yield
    finally:
        if any(id(tensor) not in before for tensor in _kept(model)):
            with torch.inference_mode(mode=False):
                _release(model, dict(before))


def _holders(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from (module._parameters, module._buffers)
        yield {key: value for key, value in module.__dict__.items() if key not in _OWN}


_OWN = vars(nn.Module())  # what every module has; its parameters and buffers are looked at by themselves
_DEPTH = 5


def _kept(model: nn.Module) -> list[Tensor]:
    """The inference tensors that modules hold, in containers and plain objects too."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            if value.is_inference():
                found[id(value)] = value
        elif depth and id(value) not in seen and not isinstance(value, nn.Module | type):
            members = _members(value)
            if members:
                seen.add(id(value))
            for member in members:
                look(member, depth - 1)

    for holder in _holders(model):
        for value in holder.values():
            look(value, _DEPTH)
    return list(found.values())


def _members(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    return list(_attributes(value).values())


def _attributes(value: Any) -> dict[str, Any]:
    """Of a plain object; torch's own, modules of Python, and what can be called are left alone."""
    foreign = isinstance(value, ModuleType) or type(value).__module__.partition(".")[0] in ("torch", "builtins")
    return {} if foreign or callable(value) else getattr(value, "__dict__", {})


def _release(model: nn.Module, memo: dict[int, Tensor]) -> None:
    """Put ordinary tensors in the place of those that were made in inference mode; `memo` holds what stays."""
    seen: set[int] = set()

    def ordinary(value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            if not value.is_inference():
                return value
            if id(value) not in memo:
                made = value.clone()
                memo[id(value)] = nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made
            return memo[id(value)]
        if not depth or isinstance(value, nn.Module | type) or id(value) in seen:
            return value
        if isinstance(value, tuple):
            members = [ordinary(member, depth - 1) for member in value]
            if all(a is b for a, b in zip(members, value, strict=True)):
                return value
            return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
        seen.add(id(value))
        replace(value if isinstance(value, dict | list) else _attributes(value), depth - 1)
        return value

    def replace(holder: Any, depth: int) -> None:
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            changed = ordinary(value, depth)
            if changed is not value:
                holder[key] = changed

    for module in model.modules():
        replace(module._parameters, _DEPTH)
        replace(module._buffers, _DEPTH)
        for key in module.__dict__.keys() - _OWN.keys():
            changed = ordinary(module.__dict__[key], _DEPTH)
            if changed is not module.__dict__[key]:
                module.__dict__[key] = changed


def _eager() -> AbstractContextManager[Any]:
    """Compiled code stands aside: it would ignore the hooks."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
