"""What the exam gives: small networks, trained on the spot, and their data. Nothing here uses actsteer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sides(seed: int = 0, n: int = 64) -> tuple[Tensor, Tensor]:
    """Points on the left and points on the right, (n, 2) each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator) - 2, torch.randn(n, 2, generator=generator) + 2


def two_sides(seed: int = 0) -> nn.Module:
    """A network that calls points left, 0, or right, 1."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    return _trained(model, torch.cat(sides(seed)), torch.arange(128) // 64, lr=0.05)


def rows(seed: int = 0, n: int = 200) -> tuple[Tensor, Tensor]:
    """Rows of twelve kinds, (12 n, 36), and the kind of each, 0 to 11."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(12 * n) // n
    clean = torch.eye(12)[kinds].repeat_interleave(3, dim=1) * 2
    return clean + torch.randn(12 * n, 36, generator=generator), kinds


def twelve_kinds(seed: int = 0, never_saw: int | None = None) -> nn.Module:
    """A network that tells the twelve kinds apart, 12 outputs; one kind it may never have seen."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12))
    x, kinds = rows(seed)
    seen = kinds != never_saw if never_saw is not None else kinds >= 0
    return _trained(model, x[seen], kinds[seen], lr=0.01)


class Stage(nn.Module):
    """Two convolutions, each with a ReLU, and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()
        self.conv2, self.act2 = nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The map with what the convolutions make of it."""
        return x + self.act2(self.conv2(self.act1(self.conv1(x))))


class Pictures(nn.Module):
    """Pictures (n, 3, 8, 8) to five numbers each; the maps have 8 channels, and are 8 pixels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.stages = nn.ModuleList([Stage(8), Stage(8)])
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8 * 8, 5))

    def forward(self, pictures: Tensor) -> Tensor:
        """Five numbers for each picture."""
        x = self.stem(pictures)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def pictures(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network for pictures, with random weights, and six pictures."""
    torch.manual_seed(seed)
    return Pictures().eval().requires_grad_(False), torch.rand(6, 3, 8, 8)


def language(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A tiny Llama with random weights, three prompts padded on the left, and a direction behind block 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3, **sizes
    )
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    ids, mask = torch.randint(2, 60, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    for row, pads in enumerate((3, 0, 1)):
        ids[row, :pads] = mask[row, :pads] = 0
    return model, {"input_ids": ids, "attention_mask": mask}, 4 * torch.randn(32, dtype=torch.float64)


def _trained(model: nn.Module, x: Tensor, labels: Tensor, *, lr: float) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)
