"""Diffusion: a denoiser that was told no labels makes the digit that it is steered to, at every step.

A flow from noise to digits (Lipman et al. 2023, arXiv 2210.02747) on the bundled digits, halved to 14 x 14. A vector
for every digit: its noisy images against those of the others. The truth: a classifier trained apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from actsteer import Centroids, Steerer, VectorBank, collect
from reference.controls import beside
from reference.mnist.data import Split, load
from reference.mnist.model import train_classifier
from reference.stored import cached, made_whole
from reference.style import shades
from reference.zoo.doses import doses, draw_doses
from reference.zoo.finding import Finding, Row

EDGE, WIDTH, BLOCKS, WAVES = 14, 256, 4, 32
SITES = "blocks.*"
STRENGTHS = (0.5, 1.0, 2.0, 3.0)
NOISE = (0.2, 0.95)
"""The share of noise in the images that the vectors are of."""


class Block(nn.Module):
    """A residual layer that is told how much noise there is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.time, self.back = nn.Linear(2 * WAVES, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, waves: Tensor) -> Tensor:
        added: Tensor = self.back(F.silu(self.into(self.norm(h)) + self.time(waves)))
        return h + added


class Denoiser(nn.Module):
    """From (1 - t) · image + t · noise, (n, 196), and t, (n,), to noise - image."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(EDGE * EDGE, WIDTH), nn.Linear(WIDTH, EDGE * EDGE)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, mixed: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.linspace(0, 5, WAVES).exp()
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        h = self.into(mixed)
        for block in self.blocks:
            h = block(h, waves)
        out: Tensor = self.back(self.norm(h))
        return out


def digits(split: Split) -> Split:
    """The images halved, (n, 196), in [-1, 1]."""
    low, high = split.x.min(), split.x.max()
    small = F.avg_pool2d(split.x.view(-1, 1, 28, 28), 2).flatten(1)
    return Split((small - low) / (high - low) * 2 - 1, split.y)


def doubled(x: Tensor) -> Tensor:
    """What the classifier of the MNIST reference takes, (n, 784)."""
    return F.interpolate(x.view(-1, 1, EDGE, EDGE), scale_factor=2).flatten(1)


def mixed(x: Tensor, t: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The images with that much noise, and the noise."""
    noise = torch.randn(x.shape, generator=generator)
    return (1 - t)[:, None] * x + t[:, None] * noise, noise


def train(x: Tensor, *, seed: int, steps: int) -> Denoiser:
    """Adam on the squared error, batches of 256."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (256,), generator=generator)]
        t = torch.rand(len(batch), generator=generator)
        seen, noise = mixed(batch, t, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(seen, t), noise - batch).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def trained(x: Tensor, *, seed: int, steps: int) -> Denoiser:
    """The denoiser, from the cache if it is there."""
    home = cached(f"digits-denoiser-{WIDTH}x{BLOCKS}-{steps}-{seed}.safetensors")
    model = Denoiser().eval().requires_grad_(False)
    if home.exists():
        load_model(model, home)
        return model
    model = train(x, seed=seed, steps=steps)
    made_whole(home, lambda file: save_model(model, str(file)))
    return model


@torch.inference_mode()
def drawn(model: nn.Module, count: int, *, seed: int, steps: int = 30) -> Tensor:
    """Images from noise, (count, 196); the same noise for the same seed."""
    x = torch.randn(count, EDGE * EDGE, generator=torch.Generator().manual_seed(seed))
    for step in range(steps, 0, -1):
        x = x - model(x, torch.full((count,), step / steps)) / steps
    return x


def run(*, steps: int = 3000, each: int = 50, seed: int = 0) -> Finding:
    """Train the denoiser once, and have it draw every digit from the same noise, `each` times."""
    data = load("bundled")
    seen = digits(data.train)
    model = trained(seen.x, seed=seed, steps=steps)
    judge = train_classifier(Split(doubled(seen.x), seen.y), seed=seed + 1, epochs=20)
    generator = torch.Generator().manual_seed(seed)
    t = NOISE[0] + (NOISE[1] - NOISE[0]) * torch.rand(len(seen.y), generator=generator)
    noisy = (mixed(seen.x, t, generator=generator)[0], t)

    def of(labels: Tensor) -> VectorBank:
        named = [str(label) for label in labels.tolist()]
        return Centroids()(collect(model, [noisy], by=[named], sites=SITES, progress=False))

    bank = of(seen.y)
    shuffled = of(seen.y[torch.randperm(len(seen.y), generator=generator)])
    wanted = torch.arange(10).repeat(each)
    rows = doses(
        model,
        {"digit": bank, **beside(bank, shuffled)},
        c=STRENGTHS,
        each_row=lambda c: {digit: c * (wanted == int(digit)) for digit in bank},
        evaluate=lambda steered: _scores(judge, drawn(steered, len(wanted), seed=seed), wanted),
    )
    rows.append({"steering": "real digits", "c": None, **_scores(judge, digits(data.test).x, data.test.y)})
    pictures = {}
    for c in (0.0, *STRENGTHS):
        with Steerer(model, bank, c={digit: c * (torch.arange(10) == int(digit)) for digit in bank}):
            pictures[f"c = {c:g}"] = drawn(model, 10, seed=seed)
    return Finding("a denoiser steered to a digit at every step; 0.10 by chance", rows, partial(_draw, rows, pictures))


def _scores(judge: nn.Module, images: Tensor, wanted: Tensor) -> dict[str, float]:
    chances = judge(doubled(images)).softmax(dim=1)
    share = (chances.argmax(dim=1) == wanted).double().mean()
    return {"is the digit": float(share), "classifier is sure": float(chances.amax(dim=1).mean())}


def _draw(rows: Sequence[Row], pictures: Mapping[str, Tensor]) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    draw_doses(left, rows, "is the digit", label="share that the classifier calls the digit")
    left.set_ylim(-0.03, 1.03)
    left.legend()
    strips = [images.view(10, EDGE, EDGE).permute(1, 0, 2).reshape(EDGE, -1) for images in pictures.values()]
    right.imshow(torch.cat(strips).numpy(), cmap=shades(), vmin=-1, vmax=1)
    right.set_xticks([EDGE * (place + 0.5) for place in range(10)], [f"to {digit}" for digit in range(10)])
    right.set_yticks([EDGE * (place + 0.5) for place in range(len(strips))], list(pictures))
    right.tick_params(length=0)
    right.set_title("each column from the same noise")
    return figure
