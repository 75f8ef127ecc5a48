"""The models that are timed, where they are steered, and the seven ways to run each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from actsteer import Steerer, SteeringVector, VectorBank

CONCEPTS = 16
NOISE_FLOOR, BY_HAND = "unhooked again", "hand-written hook"
ONE, MANY = "Steerer, 1 concept", f"Steerer, {CONCEPTS} concepts"

Fold = Callable[[nn.Module, SteeringVector], None]
Variant = Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class Setting:
    """A model with an input, the sites that are steered, and how to write a vector into its biases."""

    name: str
    model: nn.Module
    x: Tensor
    sites: tuple[str, ...]
    d: int
    fold: Fold

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
    relus = ("2", "5", "8", "11")
    layers, d, length, batch = (2, 16, 8, 2) if quick else (6, 512, 64, 4)
    config = GPT2Config(
        n_layer=layers, n_embd=d, n_head=8, n_positions=length, vocab_size=1000, bos_token_id=0, eos_token_id=0
    )
    config.use_cache = False
    gpt2: nn.Module = GPT2LMHeadModel(config)
    gpt2.eval()
    outputs = tuple(f"transformer.h.{layer}.mlp" for layer in range(layers))
    tokens = torch.randint(0, 1000, (batch, length))
    return [
        *(
            Setting(f"MLP 784-{width}x4-10, batch {rows}", mlp, torch.randn(rows, 784), relus, width, _fold_after_relus)
            for rows in (1, 32 if quick else 1024)
        ),
        Setting(f"GPT-2 {layers}x{d}, length {length}, batch {batch}", gpt2, tokens, outputs, d, _fold_into_gpt2),
    ]


def variants(setting: Setting) -> dict[str, Variant]:
    """Name -> a block that gives the model to run; all but the first three add the same shifts."""
    generator = torch.Generator().manual_seed(1)
    strengths = {str(k): (k + 1) / 8 for k in range(CONCEPTS)}
    bank = VectorBank(
        {
            concept: SteeringVector({site: torch.randn(setting.d, generator=generator) / 8 for site in setting.sites})
            for concept in strengths
        }
    )
    v = bank.combine(strengths)
    folded = copy.deepcopy(setting.model, {id(p): p for p in setting.model.parameters()})  # the weights are shared
    setting.fold(folded, v)
    model = setting.model
    return {
        NOISE_FLOOR: lambda: _plain(model),
        "no-op hook": lambda: _hooked(model, dict.fromkeys(v, _nothing)),
        BY_HAND: lambda: _hooked(model, {site: _adding(v[site]) for site in v}),
        ONE: lambda: _steered(Steerer(model, v / 2, c=2.0)),
        MANY: lambda: _steered(Steerer(model, bank, c=strengths)),
        "folded into a bias": lambda: _plain(folded),
    }


def check_equal(setting: Setting, ways: dict[str, Variant]) -> None:
    """Every variant that steers gives the output of the hand-written hook, and that is another one than unsteered."""
    outputs: dict[str, Tensor] = {}
    for name, way in ways.items():
        with way() as model, torch.inference_mode():
            outputs[name] = setting.run(model)
    unsteered = list(outputs)[:2]
    for name, output in outputs.items():
        same_as = outputs[NOISE_FLOOR if name in unsteered else BY_HAND]
        if not torch.allclose(output, same_as, rtol=1e-3, atol=1e-4):
            raise AssertionError(f"{setting.name}: {name} gives another output, so its time would mean nothing")
    if torch.allclose(outputs[BY_HAND], outputs[NOISE_FLOOR], rtol=1e-2):
        raise AssertionError("the steering changes nothing, so there is nothing to time")


@contextmanager
def _plain(model: nn.Module) -> Iterator[nn.Module]:
    yield model


@contextmanager
def _steered(steerer: Steerer) -> Iterator[nn.Module]:
    with steerer:
        yield steerer.model


@contextmanager
def _hooked(model: nn.Module, hooks: dict[str, Callable[..., Any]]) -> Iterator[nn.Module]:
    with ExitStack() as handles:
        for site, hook in hooks.items():
            handles.callback(model.get_submodule(site).register_forward_hook(hook).remove)
        yield model


def _nothing(module: nn.Module, args: Any, output: Tensor) -> None:
    return None


def _adding(delta: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + delta

    return hook


def _fold_after_relus(model: nn.Module, v: SteeringVector) -> None:
    """Each shift goes into the bias of the linear map that follows, as W v."""
    for site in v:
        following = model.get_submodule(str(int(site) + 1))
        assert isinstance(following, nn.Linear)
        bias = following.weight.new_zeros(following.out_features) if following.bias is None else following.bias
        following.bias = nn.Parameter(bias.detach() + following.weight.detach() @ v[site])


def _fold_into_gpt2(model: nn.Module, v: SteeringVector) -> None:
    """Each shift goes into the bias of the projection that the block's MLP ends with."""
    for site in v:
        projection = model.get_submodule(f"{site}.c_proj")
        assert isinstance(projection.bias, Tensor)
        projection.bias = nn.Parameter(projection.bias.detach() + v[site])
