"""Names -> modules: which sites a model has, and which of them a pattern selects."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, TypeAlias, final

import torch
from torch import nn

from actsteer.errors import SiteNotFoundError, UnsupportedModelError, close_names
from actsteer.sites.features import heads, numbers
from actsteer.sites.place import Place, split_features, split_site
from actsteer.sites.shards import replicas
from actsteer.sites.wrappers import (
    class_name,
    inside_adapters,
    named_modules,
    slot,
    slot_of_class,
    uncompiled,
    unwrapped,
    without_prefixes,
)

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Sites: TypeAlias = str | nn.Module | Predicate | Iterable[str | nn.Module | Predicate]
"""An exact name, a glob, a regular expression, a module, a predicate on (name, module), or several of them."""

_FIRST_RESULT = (nn.RNNBase, nn.MultiheadAttention)  # of a tuple whose first member is, by torch's word, the output


def find_sites(model: nn.Module, sites: Sites) -> tuple[str, ...]:
    """The exact names of the sites that `sites` selects, in module order.

    A name is the module's dotted one; prefixes that wrappers add (`_orig_mod.`, DDP's `module.`, FSDP's, checkpoint's,
    peft's `base_model.model.`) do not belong to it. Without a suffix, or with `:out`, it stands for its output,
    with `:in` for its input. Where these hold several tensors, keys lead to one: "h.0.attn:out.0",
    ":out.last_hidden_state", "layers.0.self_attn:in.hidden_states". What peft has put into a layer is selected by its
    exact name alone.

    Brackets at the end name a part of the features: "layers.0.self_attn.o_proj:in[64:128]" those from 64 to 127, and
    "layers.*.self_attn.o_proj:in[head=2]", or `[head=*]`, one attention head, or each, by its exact name, which has
    numbers. How many heads there are, and their size, is what the config of a Hugging Face model says; where none
    does, or the layer has another size, it is refused. Each such site is one of its own; its edit copies the activation
    once. A module whose name ends in such brackets is found by its name.

    Args:
        model: any module; a TransformerLens model by its hook names too.
        sites: an exact name; a glob, as of paths, with dots: `*` stays between two dots ("layers.*.mlp"), and `**` is
            any number of names ("**.relu", "layers.3.**"); a regular expression that matches the whole name
            ("re:layers\\\\.[0-3]\\\\.mlp"), each with a suffix or without; a module of the model; a predicate
            `(name, module) -> bool`; or several of these. A module that has several names is found once by a pattern
            or a predicate, and under every name when named exactly. For the usual places of a transformer there are
            `residual_sites`, `residual_writers`, `attention_sites` and `mlp_sites`.

    Raises:
        SiteNotFoundError: something that selects nothing; the message has the close names. Features that are none, or
            heads of a module that has none.
        UnsupportedModelError: heads of which no config says what they are.

    Warns:
        UserWarning: a glob or a regular expression selects a module and modules inside it.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> find_sites(model, lambda name, module: isinstance(module, nn.Linear))
    ('0', '2')
    >>> find_sites(model, "[12]"), find_sites(model, "re:0|2:in"), find_sites(model, model[1])
    (('1', '2'), ('0:in', '2:in'), ('1',))
    >>> find_sites(model, ["*:in[0:2]", "0[2:3]"])
    ('0:in[0:2]', '0[2:3]', '1:in[0:2]', '2:in[0:2]')
    """
    found: dict[str, int] = {}
    for item, own in found_by(model, sites):
        found |= own
        if isinstance(item, str) and (inside := _inside_one_another(item, own)) is not None:
            warnings.warn(inside, UserWarning, stacklevel=2)
    return tuple(sorted(found, key=found.__getitem__))


def found_by(model: nn.Module, sites: Sites) -> list[tuple[str | nn.Module | Predicate, dict[str, int]]]:
    """Each item of `sites`, with the sites that it selects: site -> the place of its module in the model's order."""
    modules = named_sites(model)
    order = {name: number for number, name in enumerate(modules)}
    found = []
    for item in items(sites):
        pattern, suffix, features = item, "", ""
        if isinstance(item, str) and item not in modules:
            whole, features = split_features(item)
            pattern = split_site(whole)[0]
            suffix = whole[len(pattern) :]
        own: dict[str, int] = {}
        for name in _matched(modules, pattern, owner=class_name(model)):
            own |= dict.fromkeys(_parts_of(model, modules, name + suffix, features), order[name])
        found.append((item, own))
    return found


def _parts_of(model: nn.Module, modules: Modules, whole: str, features: str) -> list[str]:
    """The exact names of the sites that are meant by what the brackets behind a site's name say."""
    if not features:
        return [whole]
    site = f"{whole}[{features}]"
    if not features.startswith("head="):
        start, stop = numbers(site, features)
        return [f"{whole}[{start}:{stop}]"]
    place = _place(model, modules, whole)
    return [f"{whole}[{own}]" for own in heads(site, features, place, around=path_to(model, place.name))]


def _inside_one_another(pattern: str, found: Iterable[str]) -> str | None:
    """What is to be said if a pattern has found a module and modules inside it; None if it has not."""
    names = {split_site(site)[0]: site for site in found}
    for name, site in names.items():
        parents = [name[:place] for place, letter in enumerate(name) if letter == "." and name[:place] in names]
        if parents:
            return (
                f"{pattern!r} selects {len(names)} sites, some of them inside others, as {site!r} in "
                f"{names[parents[0]]!r}; if all are meant, name them, or give a predicate; if not, residual_sites, "
                "attention_sites and mlp_sites name the usual places"
            )
    return None


def select(modules: Mapping[str, nn.Module], sites: Sites, *, owner: str, model: nn.Module) -> tuple[str, ...]:
    """The names among `modules` that `sites` selects, in their order; `owner` is who has them, for the errors."""
    found: set[str] = set()
    for item in items(sites):
        if not isinstance(item, str) or item in modules or not split_features(item)[1]:
            found.update(_matched(modules, item, owner=owner, every=True))
            continue
        parts = [name for _, own in found_by(model, item) for name in own if name in modules]
        if not parts:
            raise SiteNotFoundError(f"{owner} has no site {item!r}. {close_names(item, modules)}")
        found.update(parts)
    return tuple(name for name in modules if name in found)


def resolve(model: nn.Module, sites: Iterable[str], *, modules: Modules | None = None) -> dict[str, Place]:
    """Exact names -> places, all or nothing; `modules` is `named_sites(model)`, if that is known.

    Raises:
        SiteNotFoundError: a name that the model lacks, or a container that is never called.
        UnsupportedModelError: a scripted module, or one that an exported graph never calls; a part of the features
            where each process holds others.
    """
    modules = named_sites(model) if modules is None else modules
    places = {site: _place(model, modules, site) for site in sites}
    part = next((site for site, place in places.items() if place.features is not None), None)
    if part is not None and len(replicas(model)) > 1:
        raise UnsupportedModelError(
            f"site {part!r}: under tensor parallelism a process may hold some of the features alone, and which ones "
            "are meant by a part of them is not known; name the whole activation"
        )
    return places


@final
class Modules(dict[str, nn.Module]):
    """Name -> module, of a whole model, as one walk over it finds them."""

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        names: dict[int, list[str]] = {}
        for name, module in self.items():
            wraps = slot_of_class(type(module)) is not None  # type: ignore[arg-type]
            names.setdefault(id(unwrapped(module) if wraps else module), []).append(name)
        return names

    def names_of(self, module: nn.Module) -> list[str]:
        """Every name of a module, wrapped or not."""
        return self._names.get(id(unwrapped(module)), [])


def are_there(model: nn.Module, places: Iterable[Place]) -> bool:
    """Whether `resolve` would find these places again, as it does unless a module was replaced."""
    points = hook_points(model)
    return all(points.get(place.name, _at(model, place.name)) is place.module for place in places)


def _at(model: nn.Module, name: str) -> nn.Module | None:
    """The module of this name, as `named_sites` has it."""
    module: nn.Module | None = model
    for key in name.split(".") if name else ():
        while module is not None and (inner := slot(module)) is not None:
            module = module._modules[inner]
        module = module._modules[key] if module is not None and key in module._modules else None
    return None if module is None else uncompiled(module)


def named_sites(model: nn.Module) -> Modules:
    """Every name by which a module of the model can be a site, a TransformerLens model's hook names among them."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"expected a torch.nn.Module, got {type(model).__name__}; steer the module that it was made from, the one "
            "in it, as pipeline.model is, or what is loaded under this name"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(f"{class_name(model)} is scripted and ignores hooks; steer the eager model")
    modules = Modules()
    for name, module in named_modules(model):
        modules.setdefault(name, module)  # a wrapper before what it wraps
    modules.update(hook_points(model))
    return modules


def hook_points(model: nn.Module) -> dict[str, nn.Module]:
    """The names that a TransformerLens model gives its HookPoints; empty for any other model."""
    points: Any = None
    with suppress(Exception):  # a property of the user's that is only called so
        points = getattr(unwrapped(model), "hook_dict", None)
    known = isinstance(points, Mapping) and all(isinstance(point, nn.Module) for point in points.values())
    return dict(points) if known else {}


def path_to(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules from the model down to the one of this name, wrappers included; as far as the name leads."""
    path, last = [model], model
    keys = iter(name.split(".") if name else ())
    while (key := slot(last) or next(keys, None)) is not None and key in last._modules:
        child = last._modules[key]
        if child is None:
            break
        path.append(child)
        last = child
    return path


def runs_torch_code(module: nn.Module) -> bool:
    """Whether the module's class has its forward from torch, and is not overridden outside of torch."""
    home = getattr(getattr(type(module), "forward", None), "__module__", None)
    return isinstance(home, str) and home.startswith("torch.")


def items(sites: Sites) -> list[str | nn.Module | Predicate]:
    """What was given as sites, one by one."""
    if isinstance(sites, str | nn.Module) or (callable(sites) and not isinstance(sites, type)):
        return [sites]
    if isinstance(sites, type):
        raise TypeError(
            f"sites: got the class {sites.__name__}; its modules are lambda name, module: isinstance(module, "
            f"{sites.__name__})"
        )
    if not isinstance(sites, Iterable):
        raise TypeError(
            f"sites: expected names, patterns, modules or a predicate, got {sites!r}; a Sequential's second module is "
            "called '1', and residual_sites(model, 1) names a transformer's second block"
        )
    found = list(sites)
    for item in found:
        if not isinstance(item, str | nn.Module) and not callable(item):
            raise TypeError(f"a site is a module's name, a str, a module, or a predicate; got {item!r}")
    if not found:
        raise SiteNotFoundError("no sites were named; name one, or give a pattern or a predicate")
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a glob selects a name: `*`, `?` and `[...]` between two dots, `**` any number of names.

    >>> matches("layers.3.mlp", "layers.*.mlp"), matches("layers.3.mlp.up", "layers.*"), matches("relu", "**.relu")
    (True, False, True)
    >>> matches("layers.3", "layers.**"), matches("layers", "layers.**")
    (True, False)
    """
    return _fits(tuple(name.split(".")), tuple(pattern.split(".")))


def _fits(names: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    if not patterns:
        return not names
    first, *rest = patterns
    if first != "**":
        return bool(names) and fnmatchcase(names[0], first) and _fits(names[1:], tuple(rest))
    if not rest:
        return bool(names)
    return any(_fits(names[start:], tuple(rest)) for start in range(len(names)))


def _matched(
    modules: Mapping[str, nn.Module], item: str | nn.Module | Predicate, *, owner: str, every: bool = False
) -> list[str]:
    """The names that one item selects, at least one; of a module with several names the first, or every one."""
    if isinstance(item, str) and item in modules:
        return [item]
    inside = inside_adapters(modules)
    candidates = {
        name: module
        for name, module in modules.items()
        if (name or every)
        and not isinstance(module, nn.ModuleList | nn.ModuleDict)  # which are never called
        and not name.startswith(inside)
    }
    match item:
        case str() if item.startswith("re:"):
            expression = _compiled(item)
            found = [name for name in candidates if expression.fullmatch(name)]
        case str() if (name := without_prefixes(item, modules)) in modules:
            return [name]
        case str():
            patterns = (item, without_prefixes(item))
            found = [name for name in candidates if any(matches(name, pattern) for pattern in patterns)]
        case nn.Module():
            found = [name for name, module in modules.items() if module is item or unwrapped(module) is item]
            if not found:
                raise SiteNotFoundError(f"the {type(item).__name__} given as a site is not a module of {owner}")
        case _:
            found = [name for name, module in candidates.items() if item(name, module)]
            if not found:
                raise SiteNotFoundError(f"the predicate selects none of the {len(candidates)} sites of {owner}")
    if not found:
        across = [name for name in candidates if isinstance(item, str) and "*" in item and fnmatchcase(name, item)]
        hint = f"`*` stays between two dots, and `**` does not: {across[:3]}" if across else ""
        raise SiteNotFoundError(f"{owner} has no site {item!r}. {hint or close_names(str(item), candidates)}")
    if every:
        return found
    seen: dict[int, str] = {}
    for name in found:
        seen.setdefault(id(modules[name]), name)  # by the first of its names that matches
    return list(seen.values())


def _compiled(item: str) -> re.Pattern[str]:
    try:
        return re.compile(item.removeprefix("re:"))
    except re.error as error:
        raise SiteNotFoundError(f"site {item!r} is not a regular expression: {error}") from error


def _place(model: nn.Module, modules: Modules, site: str) -> Place:
    whole, features = (site, "") if site in modules else split_features(site)
    if features.startswith("head="):
        names = _parts_of(model, modules, whole, features)
        raise SiteNotFoundError(f"site {site!r} is a pattern for {names[:8]}, and one is needed; see find_sites")
    if features:
        return replace(_place(model, modules, whole), site=site, features=numbers(site, features))
    name, side, path = (site, "out", ()) if site in modules else split_site(site)
    name = without_prefixes(name, modules)
    if name not in modules:
        owner, several = class_name(model), [other for other in modules if other and matches(other, name)]
        if several:
            raise SiteNotFoundError(f"site {site!r} is a pattern for {several[:8]}, and one is needed; see find_sites")
        raise SiteNotFoundError(f"{owner} has no site {site!r}. {close_names(name, modules)}")
    module = modules[name]
    if isinstance(unwrapped(module), nn.ModuleList | nn.ModuleDict):
        members = (f"{name}.{child}" for child, _ in module.named_children())
        raise SiteNotFoundError(
            f"site {site!r}: a {type(module).__name__} is never called; name its members, {close_names(name, members)}"
        )
    around = [*path_to(model, name), module]
    for outer in around:
        if isinstance(outer, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"site {site!r}: {class_name(outer)} is scripted and ignores hooks; steer the eager model"
            )
    if any(isinstance(outer, torch.fx.GraphModule) for outer in around):
        _check_called(modules, name, site)
    if not path and side == "out" and isinstance(unwrapped(module), _FIRST_RESULT):
        path = ("0",) if runs_torch_code(unwrapped(module)) else ()
    return Place(site=site, name=name, module=uncompiled(module), side=side, path=path)


def _check_called(modules: Mapping[str, nn.Module], name: str, site: str) -> None:
    """Raise UnsupportedModelError if an exported graph around a module never calls it."""
    for outer_name, outer in modules.items():
        graph = unwrapped(outer)
        within = name if not outer_name else name.removeprefix(f"{outer_name}.")
        if not isinstance(graph, torch.fx.GraphModule) or not name or (outer_name and within == name):
            continue
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
        if not any(within == target or within.startswith(f"{target}.") for target in called):
            raise UnsupportedModelError(
                f"site {site!r}: the graph of {class_name(graph)} never calls this module, so it would ignore the "
                "edit; steer the model that it was exported from"
            )
