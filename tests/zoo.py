"""Small seeded models in evaluation mode and float64, and how each of them lays out its activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns: unlike numbers, they tell 0.0 from -0.0, and nan equals itself."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.itemsize])


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The model with the same numbers every time, whoever asks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double().eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers in float64, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- models ----------------------------------------------------------------------------------------------------------
def mlp() -> nn.Module:
    """784-100x4-10 scaled down to 12-6x4-3; the ReLUs are "2", "5", "8" and "11", the head is "12"."""

    def build() -> nn.Module:
        blocks = [[nn.Linear(12 if i == 0 else 6, 6, bias=False), nn.LayerNorm(6), nn.ReLU()] for i in range(4)]
        return nn.Sequential(*[module for block in blocks for module in block], nn.Linear(6, 3))

    return seeded(build)


def exact() -> nn.Sequential:
    """4-4-4-4 with small integers as weights: on eighths, everything that it computes is exact."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    return model


def identity(*, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A model that is nothing but sites: "0" and "1" give out what came in."""
    return nn.Sequential(nn.Identity(), nn.Identity()).to(dtype)


def cnn() -> nn.Module:
    """(B, 3, 4, 4) -> (B, 3); channels, height and width are all 4, so that a wrong axis fits as well as the right."""

    def build() -> nn.Module:
        norm = nn.BatchNorm2d(4)
        nn.init.normal_(norm.running_mean)
        convolutions = [nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(3, stride=1, padding=1)]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 3))

    return seeded(build)


class Recurrent(nn.Module):
    """A recurrent cell "rnn" and a head "head" at every position."""

    def __init__(self, kind: type[nn.RNNBase], *, batch_first: bool) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=batch_first)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def data_parallel(module: nn.Module) -> nn.Module:
    """nn.DataParallel on the CPU, whatever devices there are."""
    wrapper = nn.DataParallel(module).cpu()
    wrapper.device_ids = []
    return wrapper


def recurrent(kind: type[nn.RNNBase], *, batch_first: bool) -> nn.Module:
    """A classifier of every position, by an LSTM or a GRU."""
    return seeded(lambda: Recurrent(kind, batch_first=batch_first))


def encoder(*, batch_first: bool) -> nn.Module:
    """Two transformer layers "layers.0" and "layers.1", d = 4."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for parameter in model.parameters():  # the layers are made as copies of one
            nn.init.normal_(parameter, std=0.5)
        return model

    return seeded(build)


def gpt2(*, vocabulary: int = 17) -> nn.Module:
    """A GPT-2 with random weights: blocks "transformer.h.0" and "transformer.h.1", d = 8."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": vocabulary}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=None, pad_token_id=0, initializer_range=0.5)
    return seeded(lambda: GPT2LMHeadModel(config))


def lens() -> nn.Module:
    """A TransformerLens model: hook points "hook_embed" and "hook_mid", d = 4, and the root's "hook_out"."""
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class Toy(HookedRootModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.middle, self.unembed = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.hook_embed, self.hook_mid, self.hook_out = HookPoint(), HookPoint(), HookPoint()
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.hook_embed(self.embed(x))
            return self.hook_out(self.unembed(self.hook_mid(hidden + self.middle(hidden).relu())))

    return seeded(Toy)


# --- layouts ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """A model, an input of three or four rows, and one site with the layout of its activation, known by hand."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    site: str
    d: int
    features: int = -1
    rows: int = 0

    def inputs(self) -> Tensor:
        return normal(*self.shape)

    def spread(self, direction: Tensor, rank: int) -> Tensor:
        """The direction along the axis of the features, to be added to an activation of this rank."""
        shape = [1] * rank
        shape[self.features] = self.d
        return direction.reshape(shape)


def _cases() -> dict[str, Case]:
    cases = {
        "mlp": Case(mlp, (4, 12), "5", 6),
        "mlp on sequences": Case(mlp, (3, 3, 12), "5", 6),
        "linear in a cnn": Case(cnn, (4, 3, 4, 4), "5", 3),
    }
    for site, name in enumerate(["conv", "norm", "relu", "pool"]):
        cases[name] = Case(cnn, (4, 3, 4, 4), str(site), 4, features=1)
    for batch_first in (True, False):
        rows, order = (0, "rows first") if batch_first else (1, "sequence first")
        for kind in (nn.LSTM, nn.GRU):
            build = _bound(recurrent, kind, batch_first=batch_first)
            cases[f"{kind.__name__} {order}"] = Case(build, (3, 3, 3), "rnn", 4, rows=rows)
        for site in ("layers.0", "layers.0.linear2", "layers.1.self_attn"):
            cases[f"{site} {order}"] = Case(_bound(encoder, batch_first=batch_first), (3, 3, 4), site, 4, rows=rows)
    return cases


def _bound(function: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: function(*args, **kwargs)


CASES = _cases()


def llama(*, kind: str = "Llama", **changes: Any) -> nn.Module:
    """A tiny causal language model of a Hugging Face family that is made as Llama is, in float32."""
    import transformers

    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 64}
    config = getattr(transformers, f"{kind}Config")(**(sizes | heads | special | changes))
    return seeded(lambda: getattr(transformers, f"{kind}ForCausalLM")(config)).eval()
