"""The figures: PNG files, and a caption for each that says what to see in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import MaxNLocator

from reference.mnist.model import SITES
from reference.mnist.suite import Results, Task

BLUE, ORANGE, GREY = "tab:blue", "tab:orange", "0.6"
SCORES = ("acquired", "retained", "overall")
Captioned = list[tuple[str, Path]]


def draw(results: Results, done: Mapping[Task, dict[str, Any]], out: Path) -> dict[str, Captioned]:
    """Every figure of every experiment: experiment -> (caption, path)."""
    figures: dict[str, Captioned] = {}
    for experiment, document in results.items():
        if experiment == "noise":
            figures[experiment] = [_save(_noise(document), out, "noise_sigma", CAPTIONS["sigma"])]
            continue
        runs = [done[Task(experiment, seed)] for seed in document["seeds"]]
        drawn = {f"{experiment}_methods": _methods(document)}
        if "curves" in runs[0]:
            drawn[f"{experiment}_strength"] = _curves([run["curves"] for run in runs])
        portrait = runs[0]["portrait"]
        if "logits of v" in portrait:
            drawn[f"{experiment}_readout"] = _readout([run["portrait"]["logits of v"] for run in runs])
        if "cosines" in runs[0]:
            drawn[f"{experiment}_cosines"] = _cosines(runs[0]["cosines"])
        drawn[f"{experiment}_radar"] = _radar(portrait["layer means"])
        drawn[f"{experiment}_example"] = _example(portrait["example"])
        drawn[f"{experiment}_histograms"] = _histograms(portrait["histograms"])
        figures[experiment] = [
            _save(figure, out, name, CAPTIONS[name.removeprefix(f"{experiment}_")]) for name, figure in drawn.items()
        ]
    return figures


CAPTIONS = {
    "methods": """What each method reaches on the test images: mean over seeds, bars of one standard deviation. The
    dashed line is the overall accuracy of not steering at all; a method is worth something only if all three are
    high.""",
    "strength": """Accuracy on held-out images against the strength c, mean over seeds with a band of one standard
    deviation; the axis is logarithmic away from zero. Where acquired rises while retained falls, the direction does
    not add a digit: it trades the old ones for it.""",
    "readout": """What the readout makes of the mean difference, W v at the last layer, mean over seeds: why it never
    yields a 9. The largest logits go to old digits that share strokes with it; that of 9 has only ever learned to be
    low.""",
    "cosines": """How far the concepts interfere: the cosines between the vectors of a bank (first seed). Zero would
    mean that adding one does not move along the other.""",
    "radar": """Mean activation at the four ReLU layers on held-out images of the new digits (first seed), one axis
    per layer: model A in blue, steered by the last method of the table in orange.""",
    "example": """One held-out image that steering turns from wrong to right (first seed), and the logits of all ten
    digits before and after.""",
    "histograms": """Activations per layer on held-out images of the new digits (first seed), before and after
    steering; shares of all units on a logarithmic axis.""",
    "sigma": """Test accuracy against the noise on the training images, mean over seeds with one standard deviation,
    for every method of experiment 2. If noise helped, the lines would rise beyond their bars.""",
}


def _save(figure: Figure, out: Path, name: str, caption: str) -> tuple[str, Path]:
    path = out / f"{name}.png"
    figure.savefig(path, dpi=110, facecolor="white")
    return " ".join(caption.split()), path


def _axes(rows: int, columns: int, *, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def _methods(document: Mapping[str, Any]) -> Figure:
    methods = document["methods"]
    figure, (axes,) = _axes(1, 1, size=(9, 4.2))
    for offset, (key, color) in enumerate(zip(SCORES, (ORANGE, BLUE, GREY), strict=True)):
        places = [index + (offset - 1) * 0.27 for index in range(len(methods))]
        scores = [scores[key] for scores in methods.values()]
        axes.bar(
            places,
            [s["mean"] for s in scores],
            0.25,
            yerr=[s["std"] for s in scores],
            label=key,
            color=color,
            capsize=2,
        )
    axes.axhline(
        document["unsteered"]["overall"]["mean"], color="black", linestyle="--", linewidth=1, label="unsteered, overall"
    )
    axes.set_xticks(range(len(methods)), [name.replace("_", "\n") for name in methods])
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.05)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _curves(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure, panels = _axes(1, len(runs[0]), size=(4 * len(runs[0]), 3.6), sharey=True)
    for axes, name in zip(panels, runs[0], strict=True):
        strengths = [row["c"] for row in runs[0][name]]
        for key, color in zip(SCORES, (ORANGE, BLUE, GREY), strict=True):
            values = [[run[name][index][key] for run in runs] for index in range(len(strengths))]
            mean, std = [fmean(v) for v in values], [pstdev(v) for v in values]
            axes.plot(strengths, mean, color=color, label=key)
            low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
            axes.fill_between(strengths, low, high, color=color, alpha=0.2, linewidth=0)
        if max(strengths) > 10:
            axes.set_xscale("symlog", linthresh=0.25)
            axes.set_xticks([-100, -10, -1, 0, 1, 10, 100], ["−100", "−10", "−1", "0", "1", "10", "100"])
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel("strength c")
    panels[0].set_ylabel("held-out accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def _readout(runs: Sequence[Sequence[float]]) -> Figure:
    figure, (axes,) = _axes(1, 1, size=(6, 3.2))
    means, stds = [fmean(logits) for logits in zip(*runs, strict=True)], [pstdev(v) for v in zip(*runs, strict=True)]
    axes.bar(range(10), means, yerr=stds, capsize=2, color=[ORANGE if digit == 9 else BLUE for digit in range(10)])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(10))
    axes.set_xlabel("digit")
    axes.set_ylabel("W v")
    return figure


def _cosines(cosines: Mapping[str, Any]) -> Figure:
    concepts = cosines["concepts"]
    matrices = {name: matrix for name, matrix in cosines.items() if name != "concepts"}
    figure, panels = _axes(1, len(matrices), size=(3.4 * len(matrices), 3.4))
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    color="white" if abs(value) > 0.6 else "black",
                )
        axes.set_xticks(range(len(concepts)), concepts)
        axes.set_yticks(range(len(concepts)), concepts)
        axes.set_title(name.replace("_", " "))
    figure.colorbar(image, ax=panels, label="cosine", shrink=0.8)
    return figure


def _radar(means: Mapping[str, Sequence[float]]) -> Figure:
    figure, (axes,) = _axes(1, 1, size=(5, 4.6), subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * index / len(SITES) for index in range(len(SITES))]
    for (name, values), color in zip(means.items(), (BLUE, ORANGE), strict=True):
        axes.plot(
            [*angles, angles[0]], [*values, values[0]], color=color, label="model A" if name == "unsteered" else name
        )
        axes.fill([*angles, angles[0]], [*values, values[0]], color=color, alpha=0.15)
    axes.set_xticks(angles, [f"layer {index + 1}" for index in range(len(SITES))])
    axes.tick_params(axis="x", pad=10)
    assert isinstance(axes, PolarAxes)
    axes.set_rlabel_position(45)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_ylim(bottom=min(0.0, *(v for values in means.values() for v in values)))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _example(example: Mapping[str, Any]) -> Figure:
    figure, (picture, axes) = _axes(1, 2, size=(9, 3.2), width_ratios=[1, 3])
    picture.imshow(example["image"], cmap="gray_r")
    picture.set_title(f"a {example['digit']}")
    picture.set_axis_off()
    for offset, (name, color) in zip((-0.2, 0.2), (("unsteered", BLUE), ("steered", ORANGE)), strict=True):
        axes.bar([digit + offset for digit in range(10)], example["logits"][name], 0.38, label=name, color=color)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(10))
    axes.set_xlabel("digit")
    axes.set_ylabel("logit")
    axes.legend(frameon=False)
    return figure


def _histograms(histograms: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    figure, panels = _axes(1, len(histograms), size=(12, 3.2), sharey=True)
    for index, (axes, found) in enumerate(zip(panels, histograms.values(), strict=True)):
        for name, color in (("unsteered", BLUE), ("steered", ORANGE)):
            axes.stairs(found[name], found["edges"], color=color, fill=True, alpha=0.45, label=name)
        axes.set_yscale("log")
        axes.set_title(f"layer {index + 1}")
        axes.set_xlabel("activation")
    panels[0].set_ylabel("share of units")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _noise(document: Mapping[str, Any]) -> Figure:
    sigmas = document["sigma"]
    figure, panels = _axes(1, 3, size=(12, 4))
    methods = list(next(iter(sigmas.values()))["methods"])
    for axes, key in zip(panels, SCORES, strict=True):
        for index, method in enumerate(methods):
            scores = [at["methods"][method][key] for at in sigmas.values()]
            places = [float(sigma) + (index - len(methods) / 2) * 0.006 for sigma in sigmas]
            means, stds = [s["mean"] for s in scores], [s["std"] for s in scores]
            axes.errorbar(places, means, stds, marker="o", capsize=2, label=method.replace("_", " "))
        axes.set_title(key)
        axes.set_xlabel("sigma of the training noise")
        axes.set_xticks([float(sigma) for sigma in sigmas])
    panels[0].set_ylabel("test accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    return figure
