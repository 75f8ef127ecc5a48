"""Told: what tells a steering, a metric, a model and data from others, in words and digests."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.resume import code_of, digest_of
from actsteer.files.sealed import VERSION
from actsteer.sites.wrappers import unwrapped
from actsteer.steering import saving
from actsteer.steering.plan import gates_of, interventions_of
from actsteer.steering.steering import Steering
from actsteer.tuning.metrics import Metric, OutputMetric
from actsteer.tuning.retained import digest
from actsteer.tuning.text_metric import TextMetric

PROJECTIONS = 8


def told_of(steering: Steering) -> dict[str, str]:
    """How and where it steers, in words that are alike where it does the same."""
    positions, gates = steering.positions, gates_of(steering.vectors, steering.gate)
    named = positions if isinstance(positions, Mapping) else dict.fromkeys(steering.concepts, positions)
    every = {concept: "all" if named.get(concept) is None else named[concept] for concept in steering.concepts}
    acts = dict(zip(steering.concepts, interventions_of(steering.vectors, steering.intervention), strict=True))
    return {
        "positions": _alike({concept: _said(own) for concept, own in every.items()}),
        "intervention": _alike({concept: _said(own) for concept, own in acts.items()}),
        "gate": _alike({concept: _said(gates.get(concept)) for concept in steering.concepts}),
    }


def _said(own: Any) -> str:
    """What an object shows of itself and, if it holds tensors, a digest of it; of a function its name."""
    if isinstance(own, str):
        return own
    if isinstance(own, FunctionType):
        return f"{own.__module__}.{own.__qualname__}"
    _, mark = saving.told(own)
    return repr(own) + (f" #{mark[:8]}" if mark else "")


def _alike(told: Mapping[str, str]) -> str:
    return (
        next(iter(told.values()))
        if len({*told.values()}) == 1
        else ", ".join(f"{c}: {own}" for c, own in sorted(told.items()))
    )


def projections(direction: Float[Tensor, " d"]) -> Float[Tensor, " 8"]:
    """The unit direction on eight random ones of norm sqrt(d), the same for ever: what tells it from any other."""
    own = direction.double().cpu()
    generator = torch.Generator().manual_seed(len(own))
    fixed = torch.randint(0, 2, (PROJECTIONS, len(own)), generator=generator).double() * 2 - 1
    unit: Tensor = own / own.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return fixed @ unit


def name_of(metric: Metric) -> str:
    """module:function of what makes the numbers."""
    own: Any = metric.score if isinstance(metric, OutputMetric | TextMetric) else metric
    return f"{getattr(own, '__module__', '')}:{getattr(own, '__qualname__', type(own).__qualname__)}"


def digests_of(metric: Metric) -> dict[str, str]:
    """Of the data of the effect, where the metric says which they are."""
    if isinstance(metric, TextMetric):
        return {"effect": digest_of([list(metric.prompts), metric.max_new_tokens, metric.chat])}
    if not isinstance(metric, OutputMetric):
        return {}
    return {"effect": digest_of([digest(metric.inputs, metric.inputs), metric.targets])}


def code_of_metric(metric: Metric | None) -> str:
    """A digest of what a metric does, by its code and what it holds."""
    if metric is None:
        return ""
    own: Any = metric.score if isinstance(metric, OutputMetric | TextMetric) else metric
    held = dict(getattr(metric, "__dict__", {}))
    return f"{name_of(metric)} {code_of(own)} {digest_of([held])} {digests_of(metric)}"


def name_and_revision(model: nn.Module) -> dict[str, str]:
    """The name and the revision of a Hugging Face model."""
    config = vars(unwrapped(model)).get("config")
    name = str(getattr(config, "name_or_path", None) or "")
    name = Path(name).name if Path(name).is_dir() else name  # where it lies here is nobody else's matter
    found = {"name": name, "revision": str(getattr(config, "_commit_hash", None) or "")}
    return {key: own for key, own in found.items() if own}


def versions() -> dict[str, str]:
    found = {"format": str(VERSION), "python": platform.python_version()}
    for package in ("actsteer", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # transformers is not needed
            continue
    return found
