"""Fingerprint: for which architecture, and for which weights, something was made."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from actsteer.errors import ModelMismatchError
from actsteer.sites.wrappers import class_name, named_modules, unwrapped

_FINGERPRINT = re.compile(r".+:\d+:[0-9a-f]{16}")
_SAMPLES = 16  # of every parameter
_HELD_BY = {  # a dtype -> those whose numbers all its own can be rounded to, itself first
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}


def fingerprint(model: nn.Module) -> str:
    """The model's class, parameter count, and a hash of its parameters' names and shapes; its numbers do not count."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in _parameters(model)]
    count = sum(parameter.numel() for _, parameter in _parameters(model))
    return f"{class_name(model)}:{count}:{hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]}"


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
            flat = parameter.detach().reshape(-1)
            samples.append(flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].cpu())
            common &= set(_HELD_BY[parameter.dtype])
    if not samples or not common:
        return None
    rows = torch.cat([sample.to(torch.float64) for sample in samples])
    return " ".join(f"{str(dtype)[6:]}:{_hash(rows.to(dtype))}" for dtype in _HELD_BY if dtype in common)


def described(model: nn.Module) -> dict[str, str]:
    """What metadata says of the model: "model", "weights" and, of a Hugging Face model, "model_type"."""
    known = {"model": fingerprint(model), "weights": weights(model), "model_type": model_type(model)}
    return {key: value for key, value in known.items() if value is not None}


def model_type(model: nn.Module) -> str | None:
    """What a Hugging Face model's config calls its architecture, "llama"; None for any other model."""
    found = getattr(getattr(unwrapped(model), "config", None), "model_type", None)
    return found if isinstance(found, str) and found else None


def check(model: nn.Module, made_for: Mapping[str, str], *, what: str) -> None:
    """Whether `made_for`, the metadata of what came from a file, means this model; what it does not say is not checked.

    Raises:
        ModelMismatchError: another architecture.

    Warns:
        UserWarning: the same architecture with other weights.
    """
    meant = made_for.get("model", "")
    if not _FINGERPRINT.fullmatch(meant):
        return
    present = fingerprint(model)
    kind, count, shapes = meant.rsplit(":", 2)
    own_kind, own_count, own_shapes = present.rsplit(":", 2)
    quantised = bool(getattr(unwrapped(model), "is_quantized", False))  # whose parameters are packed
    if kind != own_kind or (not quantised and (count, shapes) != (own_count, own_shapes)):
        raise ModelMismatchError(
            f"{what} was made for a {kind} with {count} parameters (shapes {shapes}), and the model is a {own_kind} "
            f"with {own_count} (shapes {own_shapes}); load that model, carry the vector over with align and transport, "
            "or, if you know better, make a new one of its directions: SteeringVector({site: v[site] for site in v})"
        )
    known, own = _hashes(made_for.get("weights")), {} if quantised else _hashes(weights(model))
    shared = next((name for name in known if name in own), None)
    if shared is not None and known[shared] != own[shared]:
        warnings.warn(
            f"{what} was made for a {kind} of this architecture with other weights; it may mean something else here",
            UserWarning,
            stacklevel=3,
        )


def _parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter with its first name, a shared one once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in named_modules(unwrapped(model)):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (f"{name}.{key}" if name else key, parameter))
    return list(found.values())


def _hash(rows: Tensor) -> str:
    return hashlib.sha256(bytes(rows.contiguous().view(torch.uint8).tolist())).hexdigest()[:16]


def _hashes(text: str | None) -> dict[str, str]:
    """ "float32:ab12 float16:cd34" -> {"float32": "ab12", "float16": "cd34"}, the widest first."""
    return dict(part.split(":", 1) for part in (text or "").split() if ":" in part)
