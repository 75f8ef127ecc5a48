"""One model seen from inside, unsteered and steered: its layers, one example, what its readout and vectors do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import MaxNLocator

from reference.mnist.scores import spread
from reference.style import SCORES, STEERED, UNSTEERED, ink, shades, signs

COLORS = {"unsteered": UNSTEERED, "steered": STEERED}


def radar(portrait: Mapping[str, Any]) -> Figure:
    """The published picture, and beside it the same numbers as bars, which can be read."""
    means, method = portrait["layer means"], portrait["method"]
    layers = [f"layer {index + 1}" for index in range(len(means["unsteered"]))]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplot_mosaic(
        [["radar", "bars"]], per_subplot_kw={"radar": {"projection": "polar"}}, width_ratios=[1, 1.3]
    )
    web, bars = panels["radar"], panels["bars"]
    assert isinstance(web, PolarAxes)
    angles = [2 * math.pi * index / len(layers) for index in range(len(layers) + 1)]
    for offset, (name, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
        # a circle has no place for what is below its centre: such a mean is drawn there, and the bars show it
        lengths = [max(0.0, value) for value in means[name]]
        label = f"steered by {method}" if name == "steered" else "model A, unsteered"
        web.plot(angles, [*lengths, lengths[0]], color=color, marker="o", markersize=4)
        web.fill(angles, [*lengths, lengths[0]], color=color, alpha=0.15)
        places = [index + offset for index in range(len(layers))]
        drawn = bars.bar(places, means[name], 0.38, color=color, label=label)
        bars.bar_label(drawn, [_signed(mean) for mean in means[name]], padding=2)
    ticks = MaxNLocator(4).tick_values(0, max(max(values) for values in means.values()))
    web.set_ylim(0, ticks[-1])
    web.set_yticks(ticks[1:-1])
    web.set_rlabel_position(45)
    web.set_xticks(angles[:-1], layers)
    web.tick_params(axis="x", pad=10)
    below = any(value < 0 for values in means.values() for value in values)
    web.set_title(f"mean activation: centre 0, rim {ticks[-1]:g}" + ("\n(below 0: at the centre)" if below else ""))
    bars.axhline(0, color=ink(), linewidth=0.8)
    bars.set_xticks(range(len(layers)), layers)
    bars.set_ylabel("mean activation")
    bars.margins(y=0.1)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def example(example: Mapping[str, Any]) -> Figure:
    """An image, and what the network answers to it before and after."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    picture, axes = figure.subplots(1, 2, width_ratios=[1, 2.6])
    picture.imshow(example["image"], cmap=shades())
    picture.set_title(f"a {example['digit']}, read as {change(example['logits'])}", fontsize="large")
    picture.set_axis_off()
    for offset, (name, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
        axes.bar([digit + offset for digit in range(10)], example["logits"][name], 0.38, label=name, color=color)
    axes.axhline(0, color=ink(), linewidth=0.8)
    axes.set_xticks(range(10))
    axes.set_xlabel("digit")
    axes.set_ylabel("logit")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def change(answers: Mapping[str, Sequence[float]]) -> str:
    """What is read before and after: the digits of the largest of ten numbers."""
    before, after = (max(range(10), key=answers[name].__getitem__) for name in ("unsteered", "steered"))
    return f"{before} → {after}"


def readout(runs: Sequence[Sequence[float]], *, new: Sequence[str]) -> Figure:
    """What the readout makes of a direction, in the colours of what is acquired and what is retained."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    logits = [spread(values) for values in zip(*runs, strict=True)]
    for label, color, is_new in (
        ("digits it was trained on", SCORES["retained"], False),
        ("new digit", SCORES["acquired"], True),
    ):
        digits = [digit for digit in range(10) if (str(digit) in new) is is_new]
        axes.bar(
            digits,
            [logits[digit]["mean"] for digit in digits],
            yerr=[logits[digit]["std"] for digit in digits],
            color=color,
            label=label,
            error_kw={"ecolor": ink(), "capsize": 2, "elinewidth": 1},
        )
    axes.axhline(0, color=ink(), linewidth=0.8)
    axes.set_xticks(range(10))
    axes.set_xlabel("digit")
    axes.set_ylabel("W v")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def cosines(cosines: Mapping[str, Any]) -> Figure:
    """The cosine between any two vectors of each bank."""
    concepts = cosines["concepts"]
    matrices = {name: matrix for name, matrix in cosines.items() if name != "concepts"}
    figure = Figure(figsize=(3 * len(matrices), 2.9), layout="constrained")
    panels = list(figure.subplots(1, len(matrices), squeeze=False).flat)
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        image = axes.imshow(matrix, vmin=-1, vmax=1, cmap=signs())
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                axes.text(column, row, _signed(value), ha="center", va="center", color=_on(image.to_rgba(value)))
        axes.set_xticks(range(len(concepts)), concepts)
        axes.set_yticks(range(len(concepts)), concepts)
        axes.set_title(name)
    figure.colorbar(image, ax=panels, label="cosine")
    return figure


def histograms(histograms: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """The activations of each layer, as shares of all its units on all images."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = list(figure.subplots(1, len(histograms), sharey=True, squeeze=False).flat)
    for index, (axes, found) in enumerate(zip(panels, histograms.values(), strict=True)):
        for name, color in COLORS.items():
            axes.stairs(found[name], found["edges"], color=color, fill=True, alpha=0.25)
            axes.stairs(found[name], found["edges"], color=color, linewidth=1.3, label=name)
        axes.set_yscale("log")
        axes.set_title(f"layer {index + 1}")
        axes.set_xlabel("activation")
    panels[0].set_ylabel("share of units")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _on(color: Any) -> str:
    red, green, blue = color[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"
