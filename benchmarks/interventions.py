"""Every intervention, gate and choice of positions, each beside its formula in a hook that is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from actsteer import (
    Ablate,
    Add,
    Affine,
    Chain,
    Clamp,
    CosineAbove,
    Gate,
    KeepNorm,
    LowRank,
    ProjectionAbove,
    Rotate,
    Soft,
    Steerer,
    SteeringVector,
    VectorBank,
)
from benchmarks.models import NOISE_FLOOR, Setting, Variant, hooked, plain, steered

ANGLE, TARGET, C = 0.3, 1.5, 0.75
BY_HAND = ", by hand"
Fires: TypeAlias = Callable[[Tensor], Tensor]
"""What a gate decides of the activation that it reads."""


@dataclass(frozen=True)
class Way:
    """What the Steerer is given at all sites, and the same as a formula of the activation h at one of them."""

    options: Callable[[SteeringVector], dict[str, Any]]
    formula: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


def ways(setting: Setting) -> dict[str, Variant]:
    """Name -> a block that gives the model to run: each way beside the one that is written by hand."""
    device = setting.x.device
    v = SteeringVector({site: _numbers(setting.d, seed=index) for index, site in enumerate(setting.sites)})
    v = v.to(device=device)
    made: dict[str, Variant] = {NOISE_FLOOR: lambda: plain(setting.model)}
    for name, way in WAYS.items():
        if name == "Add, positions" and setting.x.is_floating_point():
            continue  # no sequence
        hooks = {site: _hook(way.formula(v[site], _numbers(setting.d, seed=99).to(device))) for site in setting.sites}
        options = {"vectors": v, "c": C} | way.options(v)
        made[name + BY_HAND] = partial(hooked, setting.model, hooks)
        made[name] = partial(_steered, setting.model, options)
    for name, (gate, fires) in EARLIER.items():
        w = SteeringVector({f"{site}:in": _numbers(_width(setting, site), seed=7) for site in setting.sites})
        w = w.to(device=device)
        bank = VectorBank({site: v.select(site) for site in setting.sites})
        gates = {site: gate(w.select(f"{site}:in")) for site in setting.sites}
        read = {site: (fires(w[f"{site}:in"]), C * v[site]) for site in setting.sites}
        made[name + BY_HAND] = partial(_gated_earlier, setting.model, read)
        made[name] = partial(_steered, setting.model, {"vectors": bank, "c": C, "gate": gates})
    return made


def check_equal(setting: Setting, made: dict[str, Variant]) -> None:
    """Each way gives the output of its formula, and not that of the unsteered model."""
    with torch.inference_mode():
        unsteered = setting.run(setting.model)
        for name in NAMES:
            if name in made:
                with made[name]() as model:
                    ours = setting.run(model)
                with made[name + BY_HAND]() as model:
                    by_hand = setting.run(model)
                if not torch.allclose(ours, by_hand, rtol=1e-3, atol=1e-4):
                    raise AssertionError(f"{setting.name}: {name} gives another output than its formula")
                alone = len(setting.x) == 1  # a row that a gate may leave out
                if not alone and torch.allclose(ours, unsteered, rtol=1e-4, atol=1e-5):
                    raise AssertionError(f"{setting.name}: {name} changes nothing, so there is nothing to time")


def _steered(model: nn.Module, options: dict[str, Any]) -> AbstractContextManager[nn.Module]:
    return steered(Steerer(model, **options))


@contextmanager
def _gated_earlier(model: nn.Module, sites: dict[str, tuple[Fires, Tensor]]) -> Iterator[nn.Module]:
    """A hook before each module that decides on its input, and one behind it that adds."""
    decided: dict[str, Tensor] = {}

    def read(module: nn.Module, args: Any, *, site: str) -> None:
        decided[site] = sites[site][0](args[0])

    def add(module: nn.Module, args: Any, output: Tensor, *, site: str) -> Tensor:
        fires = decided[site]
        return output + fires.view(*fires.shape, *[1] * (output.ndim - fires.ndim)) * sites[site][1]

    with ExitStack() as handles:
        for site in sites:
            handles.callback(model.get_submodule(site).register_forward_pre_hook(partial(read, site=site)).remove)
        handles.enter_context(hooked(model, {site: partial(add, site=site) for site in sites}))
        yield model


def _width(setting: Setting, site: str) -> int:
    """The features of the input of a Linear or of a GPT-2's Conv1D."""
    module = setting.model.get_submodule(site)
    return int(module.in_features if isinstance(module, nn.Linear) else module.get_parameter("weight").shape[0])


def _step_fires(w: Tensor) -> Fires:
    u = _unit(w)
    return lambda h: ((h if h.ndim == 2 else h.mean(dim=1)) @ u > 0.0).to(h.dtype)


def _cosine_fires(w: Tensor) -> Fires:
    u = _unit(w)
    return lambda h: (h @ u > 0.05 * h.norm(dim=-1)).to(h.dtype)


def _unit(v: Tensor) -> Tensor:
    u: Tensor = v / v.norm()
    return u


def _relative(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    delta = C * _unit(v)
    return lambda h: h + h.norm(dim=-1, keepdim=True) * delta


def _keep_norm(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    def formula(h: Tensor) -> Tensor:
        edited = h + C * v
        kept: Tensor = edited * (h.norm(dim=-1, keepdim=True) / edited.norm(dim=-1, keepdim=True))
        return kept

    return formula


def _ablate(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    u = _unit(v)
    return lambda h: h - C * (h @ u)[..., None] * u


def _one_sided(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    u = _unit(v)
    return lambda h: h - C * (h @ u)[..., None].clamp(min=0) * u


def _clamp(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    u = _unit(v)
    return lambda h: h + C * (TARGET - h @ u)[..., None] * u


def _rotate(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    u = _unit(v)

    def formula(h: Tensor) -> Tensor:
        along = (h @ u)[..., None]
        rest = h - along * u
        across = rest.norm(dim=-1, keepdim=True)
        angle = (torch.atan2(across, along) - C * ANGLE).clamp(0, torch.pi)
        turned: Tensor = h.norm(dim=-1, keepdim=True) * (angle.cos() * u + angle.sin() * rest / across)
        return turned

    return formula


def _chain(v: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
    first = _ablate(v, w)
    return lambda h: first(h) + C * v


def _affine(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    weight, bias = _map(v)
    return lambda h: torch.lerp(h, linear(h, weight, bias), C)


def _low_rank(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    reads, adds, offsets = _parts(v)
    return lambda h: h + C * linear(linear(h, reads, offsets), adds.T)


def _step(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    u, delta = _unit(v), C * v

    def formula(h: Tensor) -> Tensor:
        rows = h if h.ndim == 2 else h.mean(dim=1)
        fires = (rows @ u > 0.0).to(h.dtype)
        return h + fires.view(-1, *[1] * (h.ndim - 1)) * delta

    return formula


def _soft(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    u, delta = _unit(v), C * v
    return lambda h: h + torch.sigmoid(h @ u / 0.5)[..., None] * delta


def _cosine(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    u, delta = _unit(v), C * v
    return lambda h: h + (h @ u > 0.05 * h.norm(dim=-1)).to(h.dtype)[..., None] * delta


def _after_two(v: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    delta = C * v

    def formula(h: Tensor) -> Tensor:
        mask = torch.arange(h.shape[1], device=h.device) >= 2
        return h + mask[None, :, None] * delta

    return formula


def _map(v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.eye(len(v), device=v.device) + torch.outer(v, v.flip(0)) / len(v), v / 8


def _parts(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.stack([v.roll(shift) for shift in range(4)])
    return rows / len(v), rows.flip(0), torch.ones(4, device=v.device) / 8


def _each(gate: Callable[[SteeringVector], Any]) -> Callable[[SteeringVector], dict[str, Any]]:
    """A concept per site, each gated where it steers."""

    def options(v: SteeringVector) -> dict[str, Any]:
        bank = VectorBank({site: v.select(site) for site in v})
        return {"vectors": bank, "gate": {site: gate(v.select(site)) for site in v}}

    return options


def _edit(kind: Callable[..., Any], parts: Callable[[Tensor], Any]) -> Callable[[SteeringVector], dict[str, Any]]:
    return lambda v: {"vectors": kind({site: parts(v[site]) for site in v})}


WAYS = {
    "Add, relative": Way(lambda v: {"intervention": Add(relative=True)}, _relative),
    "KeepNorm(Add)": Way(lambda v: {"intervention": KeepNorm(Add())}, _keep_norm),
    "Ablate": Way(lambda v: {"intervention": Ablate()}, _ablate),
    "Ablate, one_sided": Way(lambda v: {"intervention": Ablate(one_sided=True)}, _one_sided),
    "Clamp": Way(lambda v: {"intervention": Clamp(TARGET)}, _clamp),
    "Rotate": Way(lambda v: {"intervention": Rotate(ANGLE)}, _rotate),
    "Chain of Ablate and Add": Way(lambda v: {"intervention": Chain(Ablate(), Add())}, _chain),
    "Affine": Way(_edit(Affine, _map), _affine),
    "LowRank, rank 4": Way(_edit(LowRank, _parts), _low_rank),
    "Add, gated by a step": Way(_each(lambda v: ProjectionAbove(v, 0.0)), _step),
    "Add, gated per token by a cosine": Way(_each(lambda v: CosineAbove(v, 0.05, per="token")), _cosine),
    "Add, gated softly per token": Way(_each(lambda v: Soft(ProjectionAbove(v, 0.0, per="token"), width=0.5)), _soft),
    "Add, positions": Way(lambda v: {"positions": slice(2, None)}, _after_two),
}
EARLIER: dict[str, tuple[Callable[[SteeringVector], Gate], Callable[[Tensor], Fires]]] = {
    # gates that read at the input of the module that is steered: the gate of a vector, and its formula
    "Add, gated by a step that reads earlier": (lambda w: ProjectionAbove(w, 0.0), _step_fires),
    "Add, gated per token by a cosine that reads earlier": (
        lambda w: CosineAbove(w, 0.05, per="token"),
        _cosine_fires,
    ),
}
NAMES = (*WAYS, *EARLIER)


def _numbers(d: int, *, seed: int) -> Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(seed)) / 4


def _hook(formula: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda module, args, output: formula(output)
