"""Containers: find the activation in what a module takes or gives, read it, and put an edited one in its place.

Tuples, lists, mappings, named tuples and dataclasses are known. Any other class of the user's own, and one of these
that cannot be rebuilt from its parts, becomes a container by its registration with torch,
`torch.utils._pytree.register_pytree_node(Output, flatten, unflatten)`; with `flatten_with_keys_fn` its parts have
names, without they are numbered.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from actsteer.errors import OutputError
from actsteer.sites.place import Place
from actsteer.sites.wrappers import unwrapped

Keys: TypeAlias = tuple[Any, ...]
"""What leads to a part of a nested container, from the outside in."""


class Arguments(NamedTuple):
    """What a module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def locate(place: Place, value: Any) -> Keys:
    """The keys that lead to the activation inside a module's output or its `Arguments`.

    Without keys in the site's name: the tensor itself, the only floating tensor among the parts, or the first part,
    where no other one has the same rank. A 0-dim tensor, such as a loss, is no activation.

    Raises:
        OutputError: no floating tensor there, or several that could be meant.
    """
    keys: list[Any] = []
    for asked in place.path:
        key = _key(place, value, asked)
        keys.append(key)
        value = get(value, (key,))
    while not isinstance(value, Tensor):
        key = _only_key(place, value, keys)
        keys.append(key)
        value = get(value, (key,))
    if not value.is_floating_point():
        raise OutputError(
            f"site {place.site!r}: expected floating activations, got {value.dtype}; choose a later module"
        )
    return tuple(keys)


def get(value: Any, keys: Keys) -> Any:
    """The part of a nested value to which the keys lead."""
    for key in keys:
        value = _parts(value)[key]
    return value


def put(value: Any, keys: Keys, activation: Tensor) -> Any:
    """A value of the same type with the part replaced; what came in is not changed."""
    if not keys:
        return activation
    parts = _parts(value)
    return _rebuilt(value, parts, keys[0], put(parts[keys[0]], keys[1:], activation))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a module's output or its `Arguments`, however deep, once."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        part = stack.pop()
        if id(part) in seen or part is None or isinstance(part, str | int | float):
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            yield part
        else:
            stack += reversed(_parts(part).values())


def is_opaque(value: Any) -> bool:
    """Whether there is something in a module's output that `tensors_in` cannot look into: a number, or an object."""
    stack, seen = [value], set[int]()
    while stack:
        part = stack.pop()
        if isinstance(part, Tensor | str | None) or id(part) in seen:
            continue
        seen.add(id(part))
        parts = _parts(part)
        if not parts and not (isinstance(part, tuple | list | Mapping) and not len(part)):
            return True
        stack += parts.values()
    return False


def _parts(value: Any) -> dict[Any, Any]:
    """Key -> part, one level deep; none of what is no container."""
    if isinstance(value, Arguments):
        return {**dict(enumerate(value.args)), **value.kwargs}
    if (node := _registered(value)) is not None:
        if node.flatten_with_keys_fn is None:
            return dict(enumerate(node.flatten_fn(value)[0]))
        return {_name(key): part for key, part in node.flatten_with_keys_fn(value)[0]}
    if isinstance(value, PackedSequence):
        return {0: value.data}
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def _rebuilt(value: Any, parts: Mapping[Any, Any], key: Any, part: Any) -> Any:
    """A container like this one with another part."""
    if isinstance(value, Arguments):
        if isinstance(key, str):
            return Arguments(value.args, {**value.kwargs, key: part})
        return Arguments((*value.args[:key], part, *value.args[key + 1 :]), value.kwargs)
    if (node := _registered(value)) is not None:
        changed = [part if other == key else own for other, own in parts.items()]
        return node.unflatten_fn(changed, node.flatten_fn(value)[1])
    kind = type(value)
    try:
        if isinstance(value, tuple) and hasattr(kind, "_fields"):  # a named tuple, PackedSequence too
            return value._replace(**{kind._fields[key]: part})  # type: ignore[attr-defined]
        if isinstance(value, tuple | list):
            return kind([*value[:key], part, *value[key + 1 :]])
        if isinstance(value, MappingProxyType):
            return MappingProxyType({**value, key: part})
        rebuilt = _copied(value, key, part)
    except TypeError as error:
        raise OutputError(
            f"{_described(value)} cannot be rebuilt with another part ({error}); {_register(kind)}"
        ) from None
    if _parts(value)[key] is not parts[key]:  # a copy that shares what it holds
        _assign(value, key, parts[key])
        raise OutputError(f"{_described(value)} shares its parts with its copies; {_register(kind)}")
    return rebuilt


def _copied(value: Any, key: Any, part: Any) -> Any:
    """A copy of a mapping or a dataclass with another part; nothing that was computed from the old one is kept."""
    copied = copy.copy(value)
    attributes = vars(copied) if hasattr(copied, "__dict__") else {}
    for name in [name for name in attributes if isinstance(getattr(type(value), name, None), cached_property)]:
        del attributes[name]
    if isinstance(value, Mapping) and key in attributes:  # which has its parts as attributes too
        attributes[key] = part
    _assign(copied, key, part)
    return copied


def _assign(value: Any, key: Any, part: Any) -> None:
    if isinstance(value, Mapping):
        value[key] = part  # type: ignore[index]
    else:
        object.__setattr__(value, key, part)  # a frozen dataclass is as good as another: the copy is ours


_OPENED = frozenset({tuple, list, dict})  # by Python itself, which is faster, and which compiled code knows


def _registered(value: Any) -> pytree.NodeDef | None:
    """How torch's registry opens a class, and rebuilds it; None for what needs no registration.

    Outputs of transformers are registered, but hold more than the registry rebuilds.
    """
    kind = type(value)
    known = kind in _OPENED or (issubclass(kind, Mapping) and dataclasses.is_dataclass(kind))
    return None if known else pytree.SUPPORTED_NODES.get(kind)


def _name(key: Any) -> Any:
    """What stands for a part in the site's name, of one of pytree's key entries."""
    return next(getattr(key, own) for own in ("key", "name", "idx") if hasattr(key, own))


def _key(place: Place, value: Any, asked: str) -> Any:
    """The key of the part that the site's name asks for."""
    keys: Sequence[Any] = list(_parts(value))
    if isinstance(value, Arguments):
        key = int(asked) if asked.isdigit() else asked
        key = key if key in keys else _other_name(place.module, value, key)
        if key is not None:
            return key
    names = getattr(type(value), "__match_args__", ()) if isinstance(value, tuple) else ()  # torch.return_types too
    if asked in names:
        return names.index(asked)
    if asked in keys:
        return asked
    if asked.isdigit() and int(asked) in keys:
        return int(asked)
    if asked.isdigit() and int(asked) < len(keys) and dataclasses.is_dataclass(value) and isinstance(value, Mapping):
        return keys[int(asked)]  # of transformers, which numbers its outputs too
    raise OutputError(f"site {place.site!r}: {_described(value)} has no part {asked!r}; there are {_names(value)}")


def _other_name(module: nn.Module, value: Arguments, key: Any) -> Any:
    """The keyword of an argument asked for by its position, or its position when asked for by name."""
    parameters = inspect.signature(type(unwrapped(module)).forward).parameters  # of the class: forward may be patched
    if isinstance(key, int):
        names = list(parameters)[1:]
        return names[key] if key < len(names) and names[key] in value.kwargs else None
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    return names.index(key) if key in names[: len(value.args)] else None


def _only_key(place: Place, value: Any, before: list[Any]) -> Any:
    """The key of the one part that can only be meant."""
    parts = _parts(value)
    floating = {
        key: part
        for key, part in parts.items()
        if isinstance(part, PackedSequence)
        or (isinstance(part, Tensor) and part.is_floating_point() and (part.is_nested or part.ndim > 0))
    }
    if not floating:
        raise OutputError(
            f"site {place.site!r}: expected a floating tensor, or something that holds one, got {_described(value)}; "
            f"choose a module inside it that returns a tensor, or {_what_next(value)}"
        )
    key = next(iter(floating))
    ranks = [part.ndim if isinstance(part, Tensor) else 0 for part in floating.values()]
    if ranks.count(ranks[0]) > 1 or (len(floating) > 1 and key != next(iter(parts))):
        side = ".".join((f"{place.name}:{place.side}", *map(str, before)))
        raise OutputError(
            f"site {place.site!r}: {_described(value)} holds several activations; name the one that is meant, one of "
            f"{[f'{side}.{other}' for other in floating]}"
        )
    return key


def _what_next(value: Any) -> str:
    if isinstance(value, Tensor | str | int | float | None) or _parts(value):
        return f"name the part, one of {names}" if (names := _names(value)) else "a later one"
    return f"{_register(type(value))}, if it holds the activation"


def _register(kind: type) -> str:
    return f"register {kind.__name__} with torch.utils._pytree.register_pytree_node"


def _names(value: Any) -> list[str]:
    """The parts that a site's name could lead to."""
    parts = _parts(value).items()
    return [
        str(key)
        for key, part in parts
        if isinstance(part, tuple | list | Mapping) or (isinstance(part, Tensor) and part.is_floating_point())
    ]


def _described(value: Any) -> str:
    """What kind of value it is and what its parts are."""
    parts = ", ".join(f"{key}: {_kind(part)}" for key, part in _parts(value).items())
    name = "the input" if isinstance(value, Arguments) else f"a {type(value).__name__}"
    return f"{name} ({parts})" if parts else name


def _kind(part: Any) -> str:
    numbers = f"{str(part.dtype)[6:]} " if isinstance(part, Tensor) and not part.is_floating_point() else ""
    return numbers + type(part).__name__
