"""Wrappers: modules that hold another one and add a prefix to all of its names."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from functools import lru_cache

from torch import nn

_SLOTS = {  # by the class's name, so that none of them need be imported
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "PeftModel": "base_model",  # of peft, which holds a tuner that holds the base model
    "BaseTuner": "model",
}
_ADAPTED = {"BaseTunerLayer": "base_layer", "AuxiliaryTrainingWrapper": "original_module"}  # peft's, of one layer
_PREFIX = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)|^(module|base_model\.model)(?=\.)"
)


def slot(module: nn.Module) -> str | None:
    """The name under which a wrapper holds what it wraps; None for any other module."""
    for kind in type(module).__mro__:
        if kind.__name__ in _SLOTS:
            name = _SLOTS[kind.__name__]
            return name if name in module._modules else None  # else a class of the user's that is only called so
    return None


@lru_cache(maxsize=256)
def slot_of_class(kind: type[nn.Module]) -> str | None:
    """`slot`, for walks over thousands of modules; compiled code could not read it."""
    return next((_SLOTS[own.__name__] for own in kind.__mro__ if own.__name__ in _SLOTS), None)


def inside_adapters(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The prefixes of the names of what peft has put into layers, which no pattern selects."""
    kinds = {kind for kind in {type(module) for module in modules.values()} if _adapted(kind) is not None}
    adapted = [(name, module) for name, module in modules.items() if type(module) in kinds] if kinds else []
    return tuple(f"{name}." for name, module in adapted if _adapted(type(module)) in module._modules)


def _adapted(kind: type[nn.Module]) -> str | None:
    """The name under which a layer that peft adapts holds the layer itself; None for any other class."""
    return next((_ADAPTED[base.__name__] for base in kind.__mro__ if base.__name__ in _ADAPTED), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers."""
    while (name := slot(module)) is not None:
        inner = module._modules[name]
        assert inner is not None
        module = inner
    return module


def uncompiled(module: nn.Module) -> nn.Module:
    """What torch.compile has wrapped, which runs whether it is called compiled or not; any other module itself."""
    while type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
        inner = module._modules["_orig_mod"]
        assert inner is not None
        module = inner
    return module


def named_modules(model: nn.Module, *, adapters: bool = True) -> list[tuple[str, nn.Module]]:
    """Every (name, module), a shared one under each of its names; a wrapper and what it wraps have the same name.

    Args:
        adapters: False takes the layer itself in the place of one to which peft has added an adapter.
    """
    found: list[tuple[str, nn.Module]] = []
    _walk(model, "", found, adapters=adapters)
    return found


def _walk(module: nn.Module, name: str, found: list[tuple[str, nn.Module]], *, adapters: bool) -> None:
    adapted = None if adapters else _adapted(type(module))
    base = None if adapted is None or adapted not in module._modules else module._modules[adapted]
    if base is not None:
        _walk(base, name, found, adapters=adapters)
        return
    found.append((name, module))
    inner = slot_of_class(type(module))  # type: ignore[arg-type]
    for key, child in module._modules.items():
        if child is not None:
            _walk(child, name if key == inner else f"{name}.{key}" if name else key, found, adapters=adapters)


def without_prefixes(name: str, known: Container[str] = ()) -> str:
    """A name without the prefixes that wrappers add: one after the other is taken away, until the name is a known one.

    >>> without_prefixes("module._orig_mod.layers.0._checkpoint_wrapped_module.mlp")
    'layers.0.mlp'
    >>> without_prefixes("module.module.mlp", {"module.mlp"})
    'module.mlp'
    """
    while name not in known and (shorter := _PREFIX.sub("", name, count=1).removeprefix(".")) != name:
        name = shorter
    return name


def class_name(module: nn.Module) -> str:
    """The name of the module's class; where FSDP has put a subclass in its place, the name of the class it replaced."""
    kinds = type(unwrapped(module)).__mro__
    return next(kind.__name__ for kind in kinds if "FSDPModule" not in {base.__name__ for base in kind.__mro__})
