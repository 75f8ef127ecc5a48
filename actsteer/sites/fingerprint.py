"""Fingerprint: for which architecture, and for which weights, something was made."""

from __future__ import annotations

import ctypes
import hashlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from actsteer.errors import ModelMismatchError, UnsupportedModelError
from actsteer.sites.wrappers import class_name, named_modules, unwrapped

KEYS = ("model", "body", "weights", "layers", "model_type")
"""What metadata says of the model."""

_FINGERPRINT = re.compile(r".+:\d+:[0-9a-f]{16}")
_SAMPLES = 16  # of every parameter
_HELD_BY = {  # a dtype -> the dtypes to which its numbers can be rounded, itself first
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}


def fingerprint(model: nn.Module) -> str:
    """The model's class, parameter count, and a hash of its parameters' names and shapes; its numbers do not count.

    Adapters that peft has added, LoRA and the like, do not count either.
    """
    shapes = _shapes(model)
    count = sum(math.prod(shape) for _, shape in shapes)
    return f"{class_name(model)}:{count}:{_hash_of_shapes(shapes)}"


def body(model: nn.Module) -> str | None:
    """The class, and a hash of the names and shapes, of a model without its head and the size of its vocabulary.

    A Hugging Face model says itself which part that is (`base_model_prefix`), and which are its embeddings; of any
    other model it is None.
    """
    host: Any = unwrapped(model)
    prefix = getattr(host, "base_model_prefix", None)
    if not isinstance(prefix, str):
        return None
    inner = getattr(host, prefix, host) if prefix else host
    try:
        inputs, outputs = host.get_input_embeddings(), host.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    first, last = _parameter_ids(inputs), _parameter_ids(outputs)
    shapes = [
        (name, tuple(parameter.shape[1:]) if id(parameter) in first else tuple(parameter.shape))
        for name, parameter in _parameters(inner, adapters=False)
        if id(parameter) in first or id(parameter) not in last
    ]
    return f"{class_name(inner)}:{_hash_of_shapes(shapes)}"


def weights(model: nn.Module) -> str | None:
    """A hash of some numbers of every parameter, in each dtype to which they can be rounded; None where it is unknown.

    So that a model is the same whether it is loaded in float32 or in bfloat16, and another one after a training step.
    """
    samples: list[Tensor] = []
    common: set[torch.dtype] = set(_HELD_BY)
    for _, parameter in _parameters(model):
        if type(parameter) not in (Tensor, nn.Parameter) or parameter.is_meta:
            return None  # sharded, offloaded, fake, not made yet
        if parameter.dtype in _HELD_BY:
            samples.append(_sampled(parameter.detach()))
            common &= set(_HELD_BY[parameter.dtype])
    if not samples or not common:
        return None
    if len({sample.device for sample in samples}) > 1:
        samples = [sample.cpu() for sample in samples]
    rows = torch.cat(samples).cpu().to(torch.float64)  # of several dtypes, in one that holds them all
    return " ".join(f"{str(dtype)[6:]}:{_hash_of_numbers(rows.to(dtype))}" for dtype in _HELD_BY if dtype in common)


def _sampled(parameter: Tensor) -> Tensor:
    """Some of a parameter's numbers, at equal distances."""
    size = parameter.numel()
    step = max(1, size // _SAMPLES)
    if not parameter.is_contiguous():
        return parameter.reshape(-1)[::step][:_SAMPLES]
    return parameter.as_strided((min(_SAMPLES, -(-size // step)),), (step,), parameter.storage_offset())


def layers(model: nn.Module) -> str:
    """The classes of the layers, of modules that hold no others, and how many there are of each.

    They tell apart what has the same parameters and computes something else.

    >>> layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    'Linear:2 ReLU:1'
    """
    found = {id(module): module for _, module in named_modules(unwrapped(model), adapters=False)}
    counts = Counter(class_name(module) for module in found.values() if not module._modules)
    return " ".join(f"{name}:{count}" for name, count in sorted(counts.items()))


def described(model: nn.Module) -> dict[str, str]:
    """What metadata says of the model: "model", "weights", "layers"; of a Hugging Face one "body", "model_type" too."""
    known = {"model": fingerprint(model), "body": body(model), "weights": weights(model), "layers": layers(model)}
    known |= {"model_type": model_type(model)}
    return {key: value for key, value in known.items() if value is not None}


def model_type(model: nn.Module) -> str | None:
    """What a Hugging Face model's config calls its architecture, "llama"; None for any other model."""
    found = getattr(vars(unwrapped(model)).get("config"), "model_type", None)
    return found if isinstance(found, str) and found else None


def check(model: nn.Module, made_for: Mapping[str, str], *, what: str) -> None:
    """Whether `made_for`, the metadata of a vector, means this model; what it does not say is not checked.

    Raises:
        ModelMismatchError: another architecture.

    Warns:
        UserWarning: the same architecture with other weights, layers of other classes, another head, or another
            vocabulary; or, where nothing but the type of the model is known, another type.
    """
    meant = made_for.get("model", "")
    if not _FINGERPRINT.fullmatch(meant):
        theirs, ours = made_for.get("model_type"), model_type(model)
        if theirs and ours and theirs != ours:
            warnings.warn(f"{what} was made for a {theirs}, the model is a {ours}", UserWarning, stacklevel=3)
        return
    present = fingerprint(model)
    kind, count, shapes = meant.rsplit(":", 2)
    own_kind, own_count, own_shapes = present.rsplit(":", 2)
    quantised = bool(getattr(unwrapped(model), "is_quantized", False))  # whose parameters are packed
    if kind != own_kind or (not quantised and (count, shapes) != (own_count, own_shapes)):
        known = made_for.get("body")
        if known is not None and known == body(model):
            warnings.warn(
                f"{what} was made for a {kind} with {count} parameters, the model is a {own_kind} with {own_count}: "
                "only the head or the vocabulary differ; it may mean something else here",
                UserWarning,
                stacklevel=3,
            )
            return
        raise ModelMismatchError(
            f"{what} was made for a {kind} with {count} parameters (shapes {shapes}), and the model is a {own_kind} "
            f"with {own_count} (shapes {own_shapes}); load that model, carry the vector over with align and transport, "
            "or, if you know better, make a new one of its directions: SteeringVector({site: v[site] for site in v})"
        )
    had_layers, has_layers = ({} if quantised else _counts(text) for text in (made_for.get("layers"), layers(model)))
    changed = sorted(name for name in had_layers | has_layers if had_layers.get(name) != has_layers.get(name))
    if had_layers and changed:
        had, has = (", ".join(f"{own.get(name, 0)} {name}" for name in changed) for own in (had_layers, has_layers))
        warnings.warn(
            f"{what} was made for a {kind} with {had} among its layers, and the model has {has}; it may mean something "
            "else here",
            UserWarning,
            stacklevel=3,
        )
    known_weights, own_weights = (
        _hash_by_dtype(made_for.get("weights")),
        {} if quantised else _hash_by_dtype(weights(model)),
    )
    shared = next((name for name in known_weights if name in own_weights), None)
    if shared is not None and known_weights[shared] != own_weights[shared]:
        warnings.warn(
            f"{what} was made for a {kind} of this architecture with other weights; it may mean something else here",
            UserWarning,
            stacklevel=3,
        )


def _parameters(model: nn.Module, *, adapters: bool = True) -> list[tuple[str, Tensor]]:
    """Every parameter with its first name, a shared one once; of layers with adapters only what was there before."""
    host = unwrapped(model)
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in named_modules(host, adapters=adapters):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (f"{name}.{key}" if name else key, parameter))
    return list(found.values())


def _shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    found = _parameters(model, adapters=False)
    if lazy := [name for name, parameter in found if is_lazy(parameter)]:
        raise UnsupportedModelError(f"the shapes of {lazy} are not known yet; run {class_name(model)} on a batch first")
    return [(name, tuple(parameter.shape)) for name, parameter in found]


def _parameter_ids(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(parameter) for parameter in module.parameters()}


def _hash_of_shapes(shapes: list[tuple[str, tuple[int, ...]]]) -> str:
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


def _hash_of_numbers(rows: Tensor) -> str:
    rows = rows.contiguous()
    return hashlib.sha256(ctypes.string_at(rows.data_ptr(), rows.nbytes)).hexdigest()[:16]


def _counts(text: str | None) -> dict[str, int]:
    """ "Linear:2 ReLU:1" -> {"Linear": 2, "ReLU": 1}."""
    parts = (part.rpartition(":") for part in (text or "").split())
    return {name: int(count) for name, _, count in parts if name and count.isdecimal()}


def _hash_by_dtype(text: str | None) -> dict[str, str]:
    """ "float32:ab12 float16:cd34" -> {"float32": "ab12", "float16": "cd34"}, the widest first."""
    return dict(part.split(":", 1) for part in (text or "").split() if ":" in part)
