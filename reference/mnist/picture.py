"""The picture of the project: `python -m reference.mnist.picture` draws what steering does, from a real run.

A network that has learned 0-8 is shown a 9. At its last hidden layer a trained vector is added, the same for every
image; its answers are read before and after. Where other layers were edited too, φ(x) + c·v at one of them would not be
the whole story, so here there is one site.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from matplotlib.transforms import blended_transform_factory

from actsteer import record
from reference.mnist.data import Mnist, load
from reference.mnist.insides import change
from reference.mnist.model import SITES, train_classifier
from reference.mnist.portrait import first_turned
from reference.mnist.scores import Scores
from reference.mnist.study import BUDGETS, Budget, Edit, Study, steered
from reference.style import LOOKS, STEERED, UNSTEERED, ink, look, shades

NEW, SITE, C = 9, SITES[-1], 1.0
WORDS = "a network trained on\n0–8 alone and frozen;\nthe same v is added\nfor every image"
SVG: Any = {"svg.hashsalt": "actsteer", "font.size": 10}  # the salt: the same names in the file whenever it is drawn


@dataclass(frozen=True)
class Scene:
    """One image on its way through the network, and what the same vector does to all test images."""

    digit: int
    image: list[list[float]]
    activation: list[float]
    added: list[float]
    steered: list[float]
    answers: dict[str, list[float]]
    scores: Scores


def main(
    out: Annotated[Path, typer.Option(help="Where the two SVG files go.")] = Path("docs/images"),
    seed: Annotated[int, typer.Option(help="Of the network and of the vector.")] = 0,
) -> None:
    """Draw what steering does to a network, for a light and for a dark page."""
    scene = play(load("bundled"), seed=seed, budget=BUDGETS["bundled"])
    out.mkdir(parents=True, exist_ok=True)
    for page in LOOKS:
        path = out / f"steering-{page}.svg"
        with look(page), matplotlib.rc_context(SVG):
            draw(scene).savefig(path, transparent=True, metadata={"Date": None, "Title": "What steering does"})
        typer.echo(f"{path}: {path.stat().st_size:,} bytes")


def play(data: Mnist, *, seed: int, budget: Budget) -> Scene:
    """Train the network on 0-8 and a vector on all digits, and follow the first held-out 9 that it turns right."""
    model = train_classifier(data.train.of(*range(NEW)), seed=seed, epochs=budget.epochs)
    study = Study(model, data, (NEW,), seed, budget)
    vector = study.trained(data.train, sites=[SITE])
    edit = Edit(vector, C)
    own = data.held_out.of(NEW)
    with torch.inference_mode():
        before = model(own.x)
        with steered(model, [edit]):
            after = model(own.x)
    chosen = first_turned(own.y, before=before, after=after)
    x = own.x[chosen : chosen + 1]
    activation = record(model, x, sites=SITE, progress=False)[SITE][0]
    with steered(model, [edit]):
        moved = record(model, x, sites=SITE, progress=False)[SITE][0]
    return Scene(
        digit=int(own.y[chosen]),
        image=x.reshape(28, 28).tolist(),
        activation=activation.tolist(),
        added=(C * vector[SITE]).tolist(),
        steered=moved.tolist(),
        answers={
            name: logits[chosen].softmax(dim=0).tolist() for name, logits in (("unsteered", before), ("steered", after))
        },
        scores=study.report(edit),
    )


def draw(scene: Scene) -> Figure:
    """Left to right: the data, the activation with c·v added under it as in a sum, the answers before and after."""
    strips = {"activation": scene.activation, "added": scene.added, "steered": scene.steered}
    figure = Figure(figsize=(9, 4.3))  # no solved layout: its last bits differ, and with them the ids in the file
    panels = figure.subplot_mosaic(
        [["image", ".", "activation", ".", "before"],
         ["image", ".", "added", ".", "change"],
         ["words", ".", "steered", ".", "after"]],
        width_ratios=[1.7, 0.35, 4.2, 0.3, 2.4],
        height_ratios=[_height(values) for values in strips.values()],  # so that the strips have one scale
        gridspec_kw={"left": 0.01, "right": 0.99, "top": 0.94, "bottom": 0.06, "hspace": 0.42, "wspace": 0.05},
    )  # fmt: skip
    for name in ("image", "words", "change"):
        panels[name].set_axis_off()
    panels["image"].imshow(scene.image, cmap=shades(), interpolation="none")
    panels["image"].set_anchor("N")
    panels["image"].set_title(f"data: a {scene.digit}", fontweight="bold")
    panels["words"].text(0.5, 0.5, WORDS, ha="center", va="center", linespacing=1.5)
    _strip(panels["activation"], scene.activation, UNSTEERED, "", "activation φ(x): the 100 units of layer 4")
    _strip(panels["added"], scene.added, ink(), "+", f"c · v, a trained direction; c = {C:g}")
    _strip(panels["steered"], scene.steered, STEERED, "=", "steered: φ(x) + c · v")
    read = change(scene.answers)
    panels["change"].text(0.5, 0.7, read, ha="center", va="center", fontsize=20, fontweight="bold")
    gained, kept = scene.scores["acquired"], scene.scores["retained"]
    fine = f"all test images: {gained:.0%} of the {scene.digit}s\nacquired, {kept:.0%} of 0–8 retained"
    panels["change"].text(0.5, 0.27, fine, ha="center", va="center", fontsize="small")
    _answers(panels["before"], scene.answers["unsteered"], UNSTEERED, f"answer before: {read[0]}")
    _answers(panels["after"], scene.answers["steered"], STEERED, f"answer after: {read[-1]}")
    for start, end, color in (
        ("image", "activation", UNSTEERED),
        ("activation", "before", UNSTEERED),
        ("steered", "after", STEERED),
    ):
        _arrow(figure, panels[start], panels[end], color)
    return figure


def _height(values: list[float]) -> float:
    return max(0.0, *values) - min(0.0, *values)


def _strip(axes: Axes, values: list[float], color: str, sign: str, title: str) -> None:
    axes.bar(range(len(values)), values, 0.8, color=color)
    axes.axhline(0, color=ink(), linewidth=0.5)
    axes.set_ylim(min(0.0, *values), max(0.0, *values))
    axes.set_title(title, color=color, loc="left", fontweight="bold")
    axes.set_ylabel(sign, rotation=0, fontsize=20, ha="right", va="center")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.margins(x=0.01)


def _answers(axes: Axes, answers: list[float], color: str, title: str) -> None:
    best = max(answers)
    axes.bar_label(axes.bar(range(10), answers, color=color), [f"{p:.0%}" if p == best else "" for p in answers])
    axes.set_title(title, color=color, fontweight="bold")
    axes.set_xticks(range(10))
    axes.set_ylim(0, 1.1)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)


def _arrow(figure: Figure, start: Axes, end: Axes, color: str) -> None:
    level = blended_transform_factory(start.transAxes, end.transAxes)
    figure.add_artist(
        ConnectionPatch((1.02, 0.5), (-0.02, 0.5), level, end.transAxes, arrowstyle="-|>", color=color, linewidth=1.5)
    )


if __name__ == "__main__":
    typer.run(main)
