"""The models that are timed, where they are steered, and the ways to run each of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from actsteer import Steerer, SteeringVector, VectorBank

CONCEPTS = 16
NOISE_FLOOR, NO_OP, BY_HAND, INLINE = "unhooked again", "no-op hook", "hand-written hook", "added in the model's code"
ONE, MANY = "Steerer, 1 concept", f"Steerer, {CONCEPTS} concepts"
TAP, BUFFER, FOLD = "Steerer, tap", "Steerer, buffer", "Steerer, fold"

Variant = Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class Setting:
    """A model with an input, and the sites that are steered."""

    name: str
    model: nn.Module
    x: Tensor
    sites: tuple[str, ...]
    d: int

    def to(self, device: str) -> Self:
        """The model (itself) and its input on a device."""
        return dataclasses.replace(self, model=self.model.to(device), x=self.x.to(device))

    def run(self, model: nn.Module) -> Tensor:
        """The output on the setting's input, as a tensor."""
        output: Any = model(self.x)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits


def settings(*, quick: bool) -> list[Setting]:
    """The MNIST classifier on one image and on many, and a small GPT-2; with `quick`, smaller ones of each kind."""
    torch.manual_seed(0)
    width = 8 if quick else 100
    blocks = [
        [nn.Linear(784 if i == 0 else width, width, bias=False), nn.LayerNorm(width), nn.ReLU()] for i in range(4)
    ]
    mlp = nn.Sequential(*[module for block in blocks for module in block], nn.Linear(width, 10)).eval()
    linears = ("0", "3", "6", "9")
    layers, d, length, batch = (2, 16, 8, 2) if quick else (6, 512, 64, 4)
    config = GPT2Config(
        n_layer=layers, n_embd=d, n_head=8, n_positions=length, vocab_size=1000, bos_token_id=0, eos_token_id=0
    )
    config.use_cache = False
    gpt2: nn.Module = GPT2LMHeadModel(config)
    gpt2.eval()
    projections = tuple(f"transformer.h.{layer}.mlp.c_proj" for layer in range(layers))
    tokens = torch.randint(0, 1000, (batch, length))
    return [
        *(
            Setting(f"MLP 784-{width}x4-10, batch {rows}", mlp, torch.randn(rows, 784), linears, width)
            for rows in (1, 32 if quick else 1024)
        ),
        Setting(f"GPT-2 {layers}x{d}, length {length}, batch {batch}", gpt2, tokens, projections, d),
    ]


def variants(setting: Setting) -> dict[str, Variant]:
    """Name -> a block that gives the model to run; all but the first two add the same shifts."""
    bank, strengths = _bank(setting)
    v = bank.combine(strengths)
    model = setting.model
    return {
        NOISE_FLOOR: lambda: plain(model),
        NO_OP: lambda: hooked(model, dict.fromkeys(v, _nothing)),
        BY_HAND: lambda: hooked(model, {site: _adding(v[site]) for site in v}),
        ONE: lambda: steered(Steerer(model, v / 2, c=2.0)),
        MANY: lambda: steered(Steerer(model, bank, c=strengths)),
        TAP: lambda: steered(Steerer(model, v / 2, c=2.0, backend="tap")),
        BUFFER: lambda: steered(Steerer(model, v / 2, c=2.0, backend="buffer")),
        FOLD: lambda: steered(Steerer(model, v / 2, c=2.0, backend="fold")),
    }


def compiled(setting: Setting, **options: Any) -> Setting:
    """The same setting, compiled; beside this the variants of `compiled_variants` are timed."""
    model: nn.Module = torch.compile(twin(setting.model), **options)  # type: ignore[assignment]
    return dataclasses.replace(setting, name=f"{setting.name}, compiled", model=model)


def compiled_variants(setting: Setting, eager: nn.Module, **options: Any) -> dict[str, Variant]:
    """Name -> a block, as for `variants`; each model is compiled by itself and shares the weights of the eager one."""
    bank, strengths = _bank(setting)
    v = bank.combine(strengths)
    again, inline, tapped, buffered, folded = (twin(eager) for _ in range(5))  # compiled code ignores hooks
    for site in v:
        parent, _, name = site.rpartition(".")
        setattr(inline.get_submodule(parent), name, nn.Sequential(inline.get_submodule(site), _Plus(v[site])))
    buffer = Steerer(buffered, v / 2, c=2.0, backend="buffer").install()
    run: dict[int, Any] = {
        id(model): torch.compile(model, **options) for model in (again, inline, tapped, buffered, folded)
    }
    with torch.inference_mode():
        for model in run.values():
            setting.run(model)  # compiled before anything is attached, but for the buffer
    return {
        NOISE_FLOOR: lambda: plain(run[id(again)]),
        INLINE: lambda: plain(run[id(inline)]),
        ONE: lambda: steered(Steerer(tapped, v / 2, c=2.0), run[id(tapped)]),
        MANY: lambda: steered(Steerer(tapped, bank, c=strengths), run[id(tapped)]),
        BUFFER: lambda: steered(buffer, run[id(buffered)]),
        FOLD: lambda: steered(Steerer(folded, v / 2, c=2.0, backend="fold"), run[id(folded)]),
    }


def check_equal(setting: Setting, ways: dict[str, Variant]) -> None:
    """Every variant that steers gives the output of one that is written by hand, and that is not the unsteered one."""
    outputs: dict[str, Tensor] = {}
    for name, way in ways.items():
        with way() as model, torch.inference_mode():
            outputs[name] = setting.run(model).clone()  # a CUDA graph writes the next output where the last one is
    by_hand = outputs[BY_HAND if BY_HAND in outputs else INLINE]
    for name, output in outputs.items():
        same_as = outputs[NOISE_FLOOR] if name in (NOISE_FLOOR, NO_OP) else by_hand
        if not torch.allclose(output, same_as, rtol=1e-3, atol=1e-4):
            raise AssertionError(f"{setting.name}: {name} gives another output, so its time would mean nothing")
    if torch.allclose(by_hand, outputs[NOISE_FLOOR], rtol=1e-2):
        raise AssertionError("the steering changes nothing, so there is nothing to time")


def _bank(setting: Setting) -> tuple[VectorBank, dict[str, float]]:
    generator = torch.Generator().manual_seed(1)
    strengths = {str(k): (k + 1) / 8 for k in range(CONCEPTS)}
    vectors = {
        concept: SteeringVector({site: torch.randn(setting.d, generator=generator) / 8 for site in setting.sites})
        for concept in strengths
    }
    vectors = {concept: v.to(device=setting.x.device) for concept, v in vectors.items()}
    return VectorBank(vectors), strengths


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    yield model


@contextmanager
def steered(steerer: Steerer, model: nn.Module | None = None) -> Iterator[nn.Module]:
    with steerer:
        yield steerer.model if model is None else model


@contextmanager
def hooked(model: nn.Module, hooks: dict[str, Callable[..., Any]]) -> Iterator[nn.Module]:
    with ExitStack() as handles:
        for site, hook in hooks.items():
            handles.callback(model.get_submodule(site).register_forward_hook(hook).remove)
        yield model


class _Plus(nn.Module):
    """Adds a constant."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, x: Tensor) -> Tensor:
        """x + delta."""
        return x + self.delta


def _nothing(module: nn.Module, args: Any, output: Tensor) -> None:
    return None


def _adding(delta: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + delta

    return hook
