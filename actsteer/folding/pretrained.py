"""Pretrained: a folded Hugging Face model is saved so that `from_pretrained` alone loads it again, or not at all."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, combinations
from typing import Any, NoReturn

import torch
from torch import nn

from actsteer.errors import UnsupportedModelError
from actsteer.folding.layers import made_bias
from actsteer.folding.undo import Undo
from actsteer.sites.tap import plain_class

_FLAGS = ("mlp_bias", "attention_bias", "use_bias", "bias", "qkv_bias", "use_mlp_bias", "add_bias_linear")
_TIES, _TIED = "tie_word_embeddings", "all_tied_weights_keys"  # what a config asks for, and what a model knows of it


def adapt(model: nn.Module, undo: Undo, *, untied: Sequence[str]) -> None:
    """Have the config ask for the biases that a fold has created, and for no ties where heads are `untied`.

    Biases that come with these are created, of zeros. Where the architecture makes something else of its config,
    `save_pretrained` raises from now on: of the model, and of the models that are parts of it.
    """
    hosts: list[tuple[str, Any]] = [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if hasattr(module, "save_pretrained") and hasattr(module, "config")
    ]
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    biases = [name for name in undo.created if name in there]
    adapted: list[tuple[str, Any]] = []
    for prefix, host in hosts:  # the outer ones first
        created, parted = ([n for n in names if n.startswith(prefix)] for names in (biases, untied))
        if not created + parted or any(prefix.startswith(other) and host.config is outer for other, outer in adapted):
            continue
        if (why := _adapted(host, created, parted, undo)) is None:
            adapted.append((prefix, host.config))
        else:
            undo.then(partial(host.__dict__.pop, "save_pretrained", None))
            host.__dict__["save_pretrained"] = partial(_refuse, why)


def _adapted(host: Any, created: list[str], parted: list[str], undo: Undo) -> str | None:
    """Have the config ask for all the biases, and the ties, that there are; or why none of its class does."""
    have = set(host.state_dict())
    flags = [flag for flag in _FLAGS if getattr(host.config, flag, None) is False]
    why = _homeless(host, created) if created else _tied(host, parted)
    for asked in chain.from_iterable(combinations(flags, count) for count in (0, 1, 2)):
        config = copy.deepcopy(host.config)
        for own, name, value in _asking(config, asked, unties=bool(parted)):
            setattr(own, name, value)
        made = _made(host, config)
        shapes = {} if made is None else {name: tensor.shape for name, tensor in made.state_dict().items()}
        missing = shapes.keys() - have
        if made is None or not have <= shapes.keys() or not all(_can_create(host, name) for name in missing):
            continue
        if parted and _ties(made) != _ties(host):
            why = _tied(host, parted)
            continue
        for name in sorted(missing):
            _create(host, name, shapes[name], undo)
        changes = _asking(host.config, asked, unties=bool(parted))
        if parted and hasattr(host, _TIED):
            changes.append((host, _TIED, getattr(made, _TIED)))
        for own, name, value in changes:
            undo.then(partial(setattr, own, name, getattr(own, name)))
            setattr(own, name, value)
        return None
    return why


def _asking(config: Any, flags: Iterable[str], *, unties: bool) -> list[tuple[Any, str, object]]:
    """What is to be set in a config, and in that of its text model."""
    asked: list[tuple[Any, str, object]] = [(config, flag, True) for flag in flags]
    if unties:
        parts = {id(own): own for own in (config, getattr(config, "get_text_config", lambda: config)())}
        asked += [(own, _TIES, False) for own in parts.values() if getattr(own, _TIES, False)]
    return asked


def _homeless(host: nn.Module, created: list[str]) -> str:
    return (
        f"a {type(host).__name__} has no place for the biases {', '.join(created)}, so that from_pretrained would "
        "leave the steering out. Save the vector for llama.cpp instead, v.save('name.gguf', model=model), or for "
        "actsteer as .safetensors; torch.save, torch.export and ONNX keep the biases"
    )


def _tied(host: nn.Module, parted: list[str]) -> str:
    return (
        f"a {type(host).__name__} that is made of its config has {', '.join(parted)} tied whatever that says, so that "
        "from_pretrained would undo untie=True, and the steering with it; torch.save, torch.export and ONNX keep it"
    )


def _ties(model: nn.Module) -> set[frozenset[str]]:
    """The names that parameters have, of those that have several."""
    names: defaultdict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return {frozenset(own) for own in names.values() if len(own) > 1}


def _refuse(why: str, *_: object, **__: object) -> NoReturn:
    raise UnsupportedModelError(why)


def _made(model: Any, config: Any) -> nn.Module | None:
    """A model of this class as from_pretrained makes it of the config, without its numbers; None if there is none."""
    try:
        with torch.device("meta"):
            made: nn.Module = plain_class(model)(type(config).from_dict(config.to_dict()))
            return made
    except Exception:  # a constructor of the user's
        return None


def _can_create(model: nn.Module, name: str) -> bool:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return key == "bias" and "bias" in module._parameters and module._parameters["bias"] is None


def _create(model: nn.Module, name: str, shape: torch.Size, undo: Undo) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    undo.keep(module, name.rpartition(".")[0], "bias")
    made_bias(module, shape.numel())
