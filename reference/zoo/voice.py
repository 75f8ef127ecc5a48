"""Voice: a speaker encoder, an LSTM, hears one voice as another.

A vector for every voice, at the LSTM's last step; from one voice to another it is the difference of two. The truth:
other sentences in the other voice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from actsteer import Centroids, VectorBank, collect
from reference.controls import beside
from reference.stored import packaged
from reference.zoo.doses import doses, draw_doses
from reference.zoo.finding import Finding, Row
from reference.zoo.speech import ESPEAK, MELS, said, voices
from reference.zoo.topics import ASK, FIT, FOUND, sentences

INSTALL = "pip install --no-deps resemblyzer==0.1.4"
SITE, STRENGTHS = "lstm:out.0", (0.5, 1.0, 1.5, 2.0)


class Encoder(nn.Module):
    """Mel frames (n, 160, 40) to embeddings of norm 1, (n, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(MELS, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, frames: Tensor) -> Tensor:
        states, _ = self.lstm(frames)
        return F.normalize(self.linear(states[:, -1]).relu(), dim=1)


def load() -> Encoder:
    """The pretrained encoder, of the package's file.

    Raises:
        ModelMissingError: the package is not installed.
    """
    state = torch.load(packaged(INSTALL, "resemblyzer", "pretrained.pt"), map_location="cpu", weights_only=True)
    model = Encoder()
    model.load_state_dict({name: own for name, own in state["model_state"].items() if "similarity" not in name})
    return model.eval().requires_grad_(False)


def run(*, texts: int = 5, seed: int = 0) -> Finding:
    """Steer every voice to every other one."""
    model, names = load(), voices()
    fitted, known, asked = (_said(part, names, texts) for part in (FIT, FOUND, ASK))
    enrolled = F.normalize(model(known.flatten(0, 1)).unflatten(0, known.shape[:2]).mean(dim=1), dim=1)
    labels = [name for name in names for _ in range(texts)]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    bank, shuffled = (_bank(model, fitted.flatten(0, 1), own) for own in (labels, [labels[place] for place in order]))
    pairs = [(own, goal) for own in range(len(names)) for goal in range(len(names)) if goal != own]
    owns, goals = torch.tensor(pairs).repeat_interleave(texts, dim=0).unbind(dim=1)
    frames = torch.cat([asked[own] for own, _ in pairs])

    def each_row(c: float) -> dict[str, Tensor]:
        return {name: c * ((goals == place).float() - (owns == place).float()) for place, name in enumerate(names)}

    rows = doses(
        model,
        {"voice": bank, **beside(bank, shuffled)},
        c=STRENGTHS,
        each_row=each_row,
        positions="last",
        evaluate=lambda steered: _scores(steered, frames, enrolled, goals, owns),
    )
    real = torch.arange(len(names)).repeat_interleave(texts)
    truth = _scores(model, asked.flatten(0, 1), enrolled, real, real)
    rows.append({"steering": "the voice itself", "c": None, **truth | {"cosine to its own": None}})
    kind = "espeak-ng" if names == ESPEAK else "hummed"
    title = f"{len(names)} {kind} voices, each steered to each; {1 / len(names):.2f} are nearest by chance"
    return Finding(title, rows, partial(_draw, rows))


def _said(part: slice, names: Sequence[str], count: int) -> Tensor:
    """(voices, count, 160, 40): the first sentences of a part, in every voice."""
    texts = [text for topic in zip(*sentences(part).values(), strict=True) for text in topic][:count]
    return torch.stack([torch.stack([said(name, text) for text in texts]) for name in names])


def _bank(model: nn.Module, frames: Tensor, labels: list[str]) -> VectorBank:
    return Centroids()(collect(model, frames, by=labels, sites=SITE, positions="last", progress=False))


@torch.inference_mode()
def _scores(model: nn.Module, frames: Tensor, enrolled: Tensor, goals: Tensor, owns: Tensor) -> dict[str, float]:
    cosines, rows = model(frames) @ enrolled.T, torch.arange(len(frames))
    return {
        "nearest to the voice": float((cosines.argmax(dim=1) == goals).double().mean()),
        "cosine to it": float(cosines[rows, goals].mean()),
        "cosine to its own": float(cosines[rows, owns].mean()),
    }


def _draw(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_doses(left, rows, "nearest to the voice", label="share nearest to the voice steered to")
    draw_doses(right, rows, "cosine to it", label="cosine to the voice steered to")
    left.set_ylim(-0.03, 1.03)
    left.legend()
    return figure
