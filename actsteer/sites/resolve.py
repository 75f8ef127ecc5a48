"""Names -> modules: which sites a model has, and which of them a pattern selects."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import nn

from actsteer.errors import SiteNotFoundError, UnsupportedModelError, close_names

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Sites: TypeAlias = str | Iterable[str] | Predicate
"""One exact name or glob, several of them, or a predicate on (name, module)."""


def find_sites(model: nn.Module, sites: Sites) -> tuple[str, ...]:
    """The exact names of the modules that `sites` selects, in module order.

    Args:
        model: any module; a TransformerLens model by its hook names too.
        sites: an exact dotted name; a glob, whose `*` crosses dots ("*.relu"); an iterable of either; or a
            predicate `(name, module) -> bool`. A module that has several names is found once by a glob or a
            predicate, and under every name when named exactly.

    Raises:
        SiteNotFoundError: a name or a glob that selects nothing; the message has the close names.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> find_sites(model, lambda name, module: isinstance(module, nn.Linear))
    ('0', '2')
    >>> find_sites(model, "[12]")
    ('1', '2')
    """
    return select(named_sites(model), sites, owner=_name(model))


def select(modules: Mapping[str, nn.Module], sites: Sites, *, owner: str) -> tuple[str, ...]:
    """The names among `modules` that `sites` selects, in their order; `owner` is who has them, for the errors."""
    first = {id(module): name for name, module in reversed(list(modules.items())) if name}
    candidates = [
        name
        for name, module in modules.items()
        if first.get(id(module)) == name and not isinstance(module, nn.ModuleList | nn.ModuleDict)  # never called
    ]
    if callable(sites):
        found = {name for name in candidates if sites(name, modules[name])}
        if not found:
            raise SiteNotFoundError(f"the predicate selects none of the {len(candidates)} sites of {owner}")
    else:
        found = set()
        for pattern in [sites] if isinstance(sites, str) else sites:
            if not isinstance(pattern, str):
                raise TypeError(f"a site is a module's name, a str; got {pattern!r}")
            matched = {pattern} & modules.keys() or {name for name in candidates if fnmatchcase(name, pattern)}
            if not matched:
                raise SiteNotFoundError(f"{owner} has no site {pattern!r}. {close_names(pattern, candidates)}")
            found |= matched
        if not found:
            raise SiteNotFoundError(f"no sites were named; {owner} has {len(candidates)}")
    return tuple(name for name in modules if name in found)


def resolve(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Exact names -> modules, all or nothing.

    Raises:
        SiteNotFoundError: a name that the model lacks, or a container that is never called.
        UnsupportedModelError: a scripted or compiled model, in which a hook would be silently ignored.
    """
    modules = named_sites(model)
    resolved: dict[str, nn.Module] = {}
    for name in names:
        if name not in modules:
            raise SiteNotFoundError(f"{_name(model)} has no site {name!r}. {close_names(name, modules)}")
        module = modules[name]
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise SiteNotFoundError(
                f"site {name!r}: a {_name(module)} is never called; name its members, "
                f"{close_names(name, (f'{name}.{child}' for child, _ in module.named_children()))}"
            )
        resolved[name] = module
    return resolved


def named_sites(model: nn.Module) -> dict[str, nn.Module]:
    """Every name by which a module of the model can be a site, a TransformerLens model's hook names among them."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(f"{_name(module)} is scripted and ignores hooks; steer the eager model")
        if _name(module) == "OptimizedModule" or module._compiled_call_impl is not None:
            raise UnsupportedModelError(
                f"{_name(module)} is compiled, and compiled code ignores hooks that come later; "
                "steer the eager model (the compiled one's _orig_mod)"
            )
    return dict(model.named_modules(remove_duplicate=False)) | hook_points(model)


def hook_points(model: nn.Module) -> dict[str, nn.Module]:
    """A TransformerLens model's own names for its HookPoints; empty for any other model."""
    points: dict[str, nn.Module] = getattr(model, "hook_dict", {})
    return dict(points)


def fingerprint(model: nn.Module) -> str:
    """The model's class, parameter count, and a hash of its parameters' names and shapes; its numbers do not count."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{_name(model)}:{count}:{hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]}"


def _name(model: nn.Module) -> str:
    return type(model).__name__
