"""Read the activation inside what a module takes or gives, and put an edited one back in its place."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from actsteer.errors import OutputError
from actsteer.sites.place import Place
from actsteer.sites.wrappers import unwrapped


class Arguments(NamedTuple):
    """What a module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def locate(place: Place, value: Any) -> tuple[Any, ...]:
    """The keys that lead to the activation inside a module's output or its `Arguments`.

    Without keys in the site's name: the tensor itself, the only floating tensor among the members, or the first
    member, where no other one has the same rank. A 0-dim tensor, such as a loss, is no activation.

    Raises:
        OutputError: no floating tensor there, or several that could be meant.
    """
    keys: list[Any] = []
    for asked in place.path:
        key = _key(place, value, asked)
        keys.append(key)
        value = _member(value, key)
    while not isinstance(value, Tensor):
        key = _only_key(place, value, keys)
        keys.append(key)
        value = _member(value, key)
    if not value.is_floating_point():
        raise OutputError(f"site {place.site!r}: expected floating activations, got {value.dtype}")
    return tuple(keys)


def get(value: Any, keys: tuple[Any, ...]) -> Any:
    """The member of a (nested) value to which the keys lead."""
    for key in keys:
        value = _member(value, key)
    return value


def put(value: Any, keys: tuple[Any, ...], activation: Tensor) -> Any:
    """A value of the same type with the member replaced; what came in is not changed."""
    if not keys:
        return activation
    key, rest = keys[0], keys[1:]
    member = put(_member(value, key), rest, activation)
    if isinstance(value, Arguments):
        if isinstance(key, str):
            return Arguments(value.args, {**value.kwargs, key: member})
        return Arguments((*value.args[:key], member, *value.args[key + 1 :]), value.kwargs)
    if (names := _field_names(value)) is not None:  # a named tuple, PackedSequence among them
        return value._replace(**{names[key]: member})
    if isinstance(value, tuple | list):
        return type(value)([*value[:key], member, *value[key + 1 :]])
    if isinstance(value, MappingProxyType):
        return MappingProxyType({**value, key: member})
    changed = copy.copy(value)
    if isinstance(value, Mapping):
        changed[key] = member
    else:
        object.__setattr__(changed, key, member)  # a frozen dataclass is as good as another: the copy is ours
    return changed


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
            stack += reversed([member for _, member in _members(part)])


def members(activation: Tensor) -> list[Tensor]:
    """The activation as tensors that have a shape: itself, or each member of a nested one as a batch of one."""
    return [member[None] for member in activation.unbind()] if activation.is_nested else [activation]


def padded(activation: Tensor, *, site: str = "") -> Tensor:
    """A nested activation as an ordinary one, filled up with zeros; any other as it is.

    Raises:
        OutputError: a jagged one with holes, or whose ragged axis is not the second.
    """
    if activation.is_nested and activation.layout is torch.jagged:
        jagged: Any = activation
        if jagged._ragged_idx != 1 or jagged.lengths() is not None:
            raise OutputError(
                f"site {site!r}: expected a nested tensor of shape (rows, ragged, ...) without holes; choose a module "
                "before it was transposed or narrowed"
            )
    return torch.nested.to_padded_tensor(activation, 0.0) if activation.is_nested else activation


def unpadded(activation: Tensor, like: Tensor) -> Tensor:
    """The inverse of `padded`, in the layout of the nested tensor that it was made from."""
    if not like.is_nested:
        return activation
    parts = [row[tuple(map(slice, member.shape))] for row, member in zip(activation, like.unbind(), strict=True)]
    if like.layout is torch.jagged:
        offsets: Tensor = like.offsets()  # type: ignore[attr-defined]
        return torch.nested.nested_tensor_from_jagged(torch.cat(parts), offsets)
    return torch.nested.as_nested_tensor(parts)


def _member(value: Any, key: Any) -> Any:
    if isinstance(value, Arguments):
        return value.kwargs[key] if isinstance(key, str) else value.args[key]
    return value[key] if isinstance(value, tuple | list | Mapping) else getattr(value, key)


def _members(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Arguments):
        yield from enumerate(value.args)
        yield from value.kwargs.items()
    elif isinstance(value, PackedSequence):
        yield 0, value.data
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
    elif isinstance(value, Mapping):
        yield from value.items()
    elif dataclasses.is_dataclass(value):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def _key(place: Place, value: Any, asked: str) -> Any:
    """The key of the member that the site's name asks for."""
    members = [key for key, _ in _members(value)]
    if isinstance(value, Arguments):
        key = int(asked) if asked.isdigit() else asked
        key = key if key in members else _other_name(place.module, value, key)
        if key is not None:
            return key
    names = getattr(type(value), "__match_args__", ()) if isinstance(value, tuple) else ()  # torch.return_types too
    if asked in names:
        return names.index(asked)
    if asked in members:
        return asked
    if asked.isdigit() and int(asked) in members:
        return int(asked)
    if asked.isdigit() and int(asked) < len(members) and dataclasses.is_dataclass(value) and isinstance(value, Mapping):
        return members[int(asked)]  # of transformers, which numbers its outputs too
    raise OutputError(f"site {place.site!r}: {_described(value)} has no part {asked!r}; there are {_parts(value)}")


def _field_names(value: Any) -> tuple[str, ...] | None:
    """The names of a named tuple's members; None for anything else."""
    return getattr(value, "_fields", None) if isinstance(value, tuple) else None


def _other_name(module: nn.Module, value: Arguments, key: Any) -> Any:
    """The keyword of an argument asked for by its position, or its position when asked for by name."""
    parameters = inspect.signature(type(unwrapped(module)).forward).parameters  # of the class: forward may be patched
    if isinstance(key, int):
        names = list(parameters)[1:]
        return names[key] if key < len(names) and names[key] in value.kwargs else None
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    return names.index(key) if key in names[: len(value.args)] else None


def _only_key(place: Place, value: Any, before: list[Any]) -> Any:
    """The key of the one member that can only be meant."""
    floating = {
        key: member
        for key, member in _members(value)
        if isinstance(member, PackedSequence)
        or (isinstance(member, Tensor) and member.is_floating_point() and (member.is_nested or member.ndim > 0))
    }
    if not floating:
        wanted = "a floating tensor, or something that holds one"
        raise OutputError(
            f"site {place.site!r}: expected {wanted}, got {_described(value)}; choose a module inside it that "
            f"returns a tensor, or name the part, one of {_parts(value)}"
        )
    key = next(iter(floating))
    ranks = [member.ndim if isinstance(member, Tensor) else 0 for member in floating.values()]
    if ranks.count(ranks[0]) > 1 or (len(floating) > 1 and key != next(iter(_members(value)))[0]):
        side = ".".join((f"{place.name}:{place.side}", *map(str, before)))
        raise OutputError(
            f"site {place.site!r}: {_described(value)} holds several activations; name the one that is meant, one of "
            f"{[f'{side}.{other}' for other in floating]}"
        )
    return key


def _parts(value: Any) -> list[str]:
    return [str(key) for key, member in _members(value) if isinstance(member, Tensor | tuple | list | Mapping)]


def _described(value: Any) -> str:
    """What kind of value it is and what its members are."""
    members = ", ".join(f"{key}: {type(member).__name__}" for key, member in _members(value))
    name = "the input" if isinstance(value, Arguments) else f"a {type(value).__name__}"
    return f"{name} ({members})" if members else name
