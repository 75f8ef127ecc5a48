"""Fingerprint: for which architecture, and for which weights, something was made."""

from __future__ import annotations

import ctypes
import hashlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from actsteer.errors import ModelMismatchError, UnsupportedModelError
from actsteer.sites.wrappers import class_name, named_modules, unwrapped

KEYS = ("model", "body", "weights", "layers", "model_type")
"""What metadata says of the model."""

_FINGERPRINT = re.compile(r".+:\d+:[0-9a-f]{16}")
_SAMPLES = 16  # of every parameter
_ALIKE = re.compile("Dropout|DropPath|Identity|BatchNorm")
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
        for name, parameter, _ in _parameters(inner, adapters=False)
        if id(parameter) in first or id(parameter) not in last
    ]
    return f"{class_name(inner)}:{_hash_of_shapes(shapes)}"


def weights(model: nn.Module) -> str | None:
    """A hash of some numbers of every parameter, in each dtype to which they can be rounded; None where it is unknown.

    So that a model is the same whether it is loaded in float32 or in bfloat16, and another one after a training step.
    """
    samples: list[Tensor] = []
    common: set[torch.dtype] = set(_HELD_BY)
    for _, parameter, before in _parameters(model):
        if type(parameter) not in (Tensor, nn.Parameter) or parameter.is_meta:
            return None  # sharded, offloaded, fake, not made yet
        if parameter.dtype in _HELD_BY:
            samples.append(_sampled(parameter.detach()) if before is None else before.to(parameter))
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

    They tell apart what has the same parameters and computes something else; what does not in evaluation, dropout and
    the kinds of BatchNorm, is not counted.

    >>> layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    'Linear:2 ReLU:1'
    """
    found = {id(module): module for _, module in named_modules(unwrapped(model), adapters=False)}
    counts = Counter(class_name(module) for module in found.values() if not module._modules)
    return " ".join(f"{name}:{count}" for name, count in sorted(counts.items()) if not _ALIKE.search(name))


def described(model: nn.Module) -> dict[str, str]:
    """What metadata says of the model: "model", "weights", "layers"; of a Hugging Face one "body", "model_type" too."""
    known = {"model": fingerprint(model), "body": body(model), "weights": weights(model), "layers": layers(model)}
    known |= {"model_type": model_type(model)}
    return {key: value for key, value in known.items() if value is not None}


def remember(module: nn.Module, key: str, *, counts: bool = True) -> bool:
    """Keep what a parameter is like before a steering writes into it: fingerprints are made of that from now on.

    One that does not count is left out of them: it was another module's before.

    Returns:
        Whether nothing was kept of it before; whoever is told True calls `forget` once its own writing is undone.
    """
    known = _before.setdefault(module, {})
    if key in known:
        return False
    parameter = module._parameters.get(key) if counts else None
    known[key] = None if parameter is None or is_lazy(parameter) else _sampled(parameter.detach()).clone()
    return True


def forget(module: nn.Module, key: str) -> None:
    """The parameter is as it was before."""
    _before.get(module, {}).pop(key, None)


_before: WeakKeyDictionary[nn.Module, dict[str, Tensor | None]] = WeakKeyDictionary()
"""Module -> some numbers of the parameters that a steering has written into, as they were; None: it had none."""


def model_type(model: nn.Module) -> str | None:
    """What a Hugging Face model's config calls its architecture, "llama"; None for any other model."""
    found = getattr(vars(unwrapped(model)).get("config"), "model_type", None)
    return found if isinstance(found, str) and found else None


def check(model: nn.Module, made_for: Mapping[str, str], *, what: str) -> None:
    """Whether `made_for`, the metadata of a vector, means this model, as `check_each` has it."""
    check_each(model, [(what, made_for)])


def check_each(model: nn.Module, made_for: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Whether each (what, metadata of a vector) means this model; what metadata does not say is not checked.

    Raises:
        ModelMismatchError: another architecture.

    Warns:
        UserWarning: the same architecture with other weights, without layers of a class that it had, another head, or
            another vocabulary; or, where nothing but the type of the model is known, another type.
    """
    distinct = {tuple(map(meant.get, KEYS)): (what, meant) for what, meant in made_for}
    for what, meant in distinct.values():
        if _FINGERPRINT.fullmatch(meant.get("model", "")):
            _check(model, meant, what)
        elif (theirs := meant.get("model_type")) and (ours := model_type(model)) and theirs != ours:
            warnings.warn(f"{what} was made for a {theirs}, the model is a {ours}", UserWarning, stacklevel=4)


def _check(model: nn.Module, meant: Mapping[str, str], what: str) -> None:
    kind, count, shapes = meant["model"].rsplit(":", 2)
    own_kind, own_count, own_shapes = fingerprint(model).rsplit(":", 2)
    quantised = bool(getattr(unwrapped(model), "is_quantized", False))  # whose parameters are packed
    if kind != own_kind or (not quantised and (count, shapes) != (own_count, own_shapes)):
        if meant.get("body") is not None and meant["body"] == body(model):
            warnings.warn(
                f"{what} was made for a {kind} with {count} parameters, the model is a {own_kind} with {own_count}: "
                "only the head or the vocabulary differ; it may mean something else here",
                UserWarning,
                stacklevel=5,
            )
            return
        raise ModelMismatchError(
            f"{what} was made for a {kind} with {count} parameters (shapes {shapes}), and the model is a {own_kind} "
            f"with {own_count} (shapes {own_shapes}); load that model, carry the vector over with align and transport, "
            "or, if you know better, make a new one of its directions: SteeringVector({site: v[site] for site in v})"
        )
    if quantised:
        return
    had, has = _counts(meant.get("layers")), _counts(layers(model) if "layers" in meant else None)
    if gone := [name for name in had if has.get(name, 0) < had[name]]:  # what was added, a loss perhaps, is no matter
        changed = sorted({*gone, *(name for name in has if has[name] > had.get(name, 0))})
        then, now = (", ".join(f"{own.get(name, 0)} {name}" for name in changed) for own in (had, has))
        warnings.warn(
            f"{what} was made for a {kind} with {then} among its layers, and the model has {now}; it may mean "
            "something else here",
            UserWarning,
            stacklevel=5,
        )
    hashes, own_hashes = _hash_by_dtype(meant.get("weights")), _hash_by_dtype(weights(model))
    shared = next((name for name in hashes if name in own_hashes), None)
    if shared is not None and hashes[shared] != own_hashes[shared]:
        warnings.warn(
            f"{what} was made for a {kind} of this architecture with other weights; it may mean something else here",
            UserWarning,
            stacklevel=5,
        )


def _parameters(model: nn.Module, *, adapters: bool = True) -> list[tuple[str, Tensor, Tensor | None]]:
    """Every parameter with its first name, a shared one once, and some of its numbers before a steering wrote into it.

    Of layers with adapters only what was there before, if so asked; what a steering has made is left out.
    """
    host = unwrapped(model)
    found: dict[int, tuple[str, Tensor, Tensor | None]] = {}
    every: Mapping[nn.Module, Mapping[str, Tensor | None]] = _before if len(_before) else {}
    for name, module in named_modules(host, adapters=adapters):
        written = every.get(module, {})
        for key, parameter in module._parameters.items():
            before = written.get(key)
            if parameter is not None and (before is not None or key not in written):
                found.setdefault(id(parameter), (f"{name}.{key}" if name else key, parameter, before))
    return list(found.values())


def _shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    found = _parameters(model, adapters=False)
    if lazy := [name for name, parameter, _ in found if is_lazy(parameter)]:
        raise UnsupportedModelError(f"the shapes of {lazy} are not known yet; run {class_name(model)} on a batch first")
    return [(name, tuple(parameter.shape)) for name, parameter, _ in found]


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
