"""Greedy decoding by a GPT-2 of ten blocks: positions, and a gate per token, beside the same by hand in raw hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel

from actsteer import ProjectionAbove, Steerer, SteeringVector
from benchmarks.models import NOISE_FLOOR, ONE, Setting, Variant, hooked, plain, steered
from benchmarks.timing import Timing, compare, set_threads

GENERATED, GATED = 'Steerer, positions="generated"', "Steerer, one gate per token"
BY_HAND = ", by hand"
BLOCKS = 10


@dataclass(frozen=True)
class Decoding(Setting):
    """A model that continues a prompt greedily."""

    new_tokens: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module) -> Tensor:
        """The tokens of the prompt and of what follows."""
        generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
        mask = torch.ones_like(self.x)
        return generate(self.x, attention_mask=mask, max_new_tokens=self.new_tokens, do_sample=False, **self.options)


def setting(*, quick: bool, device: str = "cpu", compiler: str | None = None) -> Decoding:
    """The model and its prompt; with a compiler, decoding with a static cache, compiled."""
    torch.manual_seed(0)
    d, length, new_tokens = (16, 4, 4) if quick else (256, 16, 32)
    sizes: dict[str, Any] = {"n_layer": BLOCKS, "n_embd": d, "n_head": 8, "n_positions": 64, "vocab_size": 1000}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None, pad_token_id=0))
    options = {} if compiler is None else static_cache(compiler, device=device)
    name = f"greedy decoding, {BLOCKS} blocks" + ("" if compiler is None else ", static cache, compiled")
    sites = tuple(f"transformer.h.{block}" for block in range(BLOCKS))
    x = torch.randint(0, 1000, (1, length))
    return Decoding(name, model.eval(), x, sites, d, new_tokens, options).to(device)


def static_cache(compiler: str, *, device: str = "cpu") -> dict[str, Any]:
    """What `generate` is told to decode with a static cache, compiled, on a processor too."""
    config: Any = CompileConfig(backend=compiler)
    if device == "cpu":
        config.mode, config._compile_all_devices = None, True
    return {"cache_implementation": "static", "compile_config": config}


def ways(own: Decoding) -> dict[str, Variant]:
    """Name -> a block that gives the model to run: each way beside the one that is written by hand."""
    v, gate = _vector(own), _gate(own)
    return {
        NOISE_FLOOR: lambda: plain(own.model),
        GENERATED + BY_HAND: lambda: hooked(own.model, {site: _after_the_prompt(v[site]) for site in v}),
        GENERATED: lambda: steered(Steerer(own.model, v, positions="generated")),
        GATED + BY_HAND: lambda: _gated_by_hand(own, v),
        GATED: lambda: steered(Steerer(own.model, v, gate=gate)),
    }


def compiled_ways(own: Decoding) -> dict[str, Variant]:
    """The same without the hooks, which compiled code ignores; and plain steering."""
    v = _vector(own)
    made = {name: way for name, way in ways(own).items() if not name.endswith(BY_HAND)}
    return made | {ONE: lambda: steered(Steerer(own.model, v))}


def check_equal(own: Decoding, made: dict[str, Variant]) -> None:
    """Each way writes the tokens that its formula writes, and not those of the unsteered model."""
    unsteered = _tokens(own, made[NOISE_FLOOR])
    for name in (GENERATED, GATED):
        ours = _tokens(own, made[name])
        if name + BY_HAND in made and not torch.equal(ours, _tokens(own, made[name + BY_HAND])):
            raise AssertionError(f"{own.name}: {name} writes other tokens than its formula")
        if torch.equal(ours, unsteered):
            raise AssertionError(f"{own.name}: {name} changes nothing, so there is nothing to time")


def timed(*, quick: bool, device: str, rounds: int, seconds: float) -> Timing:
    """Eager decoding."""
    own = setting(quick=quick, device=device)
    made = ways(own)
    check_equal(own, made)
    return compare(own, made, threads=1, rounds=rounds, seconds=seconds)


def timed_compiled(*, quick: bool, device: str, rounds: int, seconds: float, compiler: str) -> tuple[Timing, int]:
    """Compiled decoding with a static cache; and how often code was compiled after each way had run once."""
    own = setting(quick=quick, device=device, compiler=compiler)
    made = compiled_ways(own)
    with set_threads(1), torch._dynamo.config.patch(recompile_limit=64):
        check_equal(own, made)
        _tokens(own, made[ONE])
        before = counters["stats"]["unique_graphs"]
        found = compare(own, made, threads=1, rounds=rounds, seconds=seconds)
        recompiles = counters["stats"]["unique_graphs"] - before
    torch.compiler.reset()
    return found, recompiles


def _tokens(own: Decoding, way: Variant) -> Tensor:
    with way() as model, torch.inference_mode():
        return own.run(model)


def _vector(own: Decoding) -> SteeringVector:
    generator = torch.Generator().manual_seed(1)
    v = SteeringVector({site: torch.randn(own.d, generator=generator) / 4 for site in own.sites})
    return v.to(device=own.x.device)


def _gate(own: Decoding) -> ProjectionAbove:
    return ProjectionAbove(_vector(own).select(own.sites[0]), 0.0, per="token")


def _after_the_prompt(delta: Tensor) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return output + delta if output.shape[1] == 1 else None

    return hook


@contextmanager
def _gated_by_hand(own: Decoding, v: SteeringVector) -> Iterator[nn.Module]:
    first, *others = own.sites
    u, fires = _gate(own).direction, torch.empty(0)

    def decide_and_add(module: nn.Module, args: Any, output: Tensor, *, delta: Tensor) -> Tensor:
        nonlocal fires
        fires = (output @ u > 0.0).to(output.dtype)[..., None]
        return output + fires * delta

    def add(module: nn.Module, args: Any, output: Tensor, *, delta: Tensor) -> Tensor:
        return output + fires * delta

    hooks: dict[str, Callable[..., Any]] = {site: partial(add, delta=v[site]) for site in others}
    hooks[first] = partial(decide_and_add, delta=v[first])
    with hooked(own.model, hooks) as model:
        yield model
