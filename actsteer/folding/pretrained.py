"""Pretrained: a folded Hugging Face model is saved so that `from_pretrained` alone loads it again, or not at all."""

from __future__ import annotations

import copy
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


def adapt(model: nn.Module, undo: Undo) -> None:
    """Have the config ask for the biases that a fold has created, and create those that come with them, of zeros.

    Where the architecture has no place for them, `save_pretrained` raises from now on: of the model, and of the models
    that are parts of it.
    """
    hosts: list[tuple[str, Any]] = [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if hasattr(module, "save_pretrained") and hasattr(module, "config")
    ]
    adapted: list[tuple[str, Any]] = []
    for prefix, host in hosts:  # the outer ones first
        created = [name for name in undo.created if name.startswith(prefix)]
        if not created or any(prefix.startswith(other) and host.config is outer for other, outer in adapted):
            continue
        if _adapted(host, undo):
            adapted.append((prefix, host.config))
        else:
            _refuse_to_save(host, created, undo)


def _adapted(host: Any, undo: Undo) -> bool:
    """Whether a config of this class asks for all the biases that there are; then it does now."""
    have = set(host.state_dict())
    flags = [flag for flag in _FLAGS if getattr(host.config, flag, None) is False]
    for asked in chain.from_iterable(combinations(flags, count) for count in (0, 1, 2)):
        shapes = _shapes(host, asked)
        missing = shapes.keys() - have
        if have <= shapes.keys() and all(_can_create(host, name) for name in missing):
            for name in sorted(missing):
                _create(host, name, shapes[name], undo)
            for flag in asked:
                setattr(host.config, flag, True)
                undo.then(partial(setattr, host.config, flag, False))
            return True
    return False


def _refuse_to_save(host: nn.Module, created: list[str], undo: Undo) -> None:
    why = (
        f"a {type(host).__name__} has no place for the biases {', '.join(created)}, so that from_pretrained would "
        "leave the steering out. Save the vector for llama.cpp instead, v.save('name.gguf', model=model), or for "
        "actsteer as .safetensors; torch.save, torch.export and ONNX keep the biases"
    )
    host.__dict__["save_pretrained"] = partial(_refuse, why)
    undo.then(partial(host.__dict__.pop, "save_pretrained", None))


def _refuse(why: str, *_: object, **__: object) -> NoReturn:
    raise UnsupportedModelError(why)


def _shapes(model: Any, flags: tuple[str, ...]) -> dict[str, torch.Size]:
    """The names and shapes of a model of this class whose config has these flags; none if there cannot be one."""
    config = copy.deepcopy(model.config)
    for flag in flags:
        setattr(config, flag, True)
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in plain_class(model)(config).state_dict().items()}
    except Exception:  # a constructor of the user's
        return {}


def _can_create(model: nn.Module, name: str) -> bool:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return key == "bias" and "bias" in module._parameters and module._parameters["bias"] is None


def _create(model: nn.Module, name: str, shape: torch.Size, undo: Undo) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    undo.keep(module, name.rpartition(".")[0], "bias")
    made_bias(module, shape.numel())
