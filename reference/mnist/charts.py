"""Charts of the scores over seeds: by method, by strength, by training noise. Error bars and bands are one `spread`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from math import ceil, floor, log10
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.scale import SymmetricalLogTransform

from reference.mnist.scores import spread
from reference.style import SCORES, UNSTEERED, ink


def methods(document: Mapping[str, Any]) -> Figure:
    """Horizontal bars, the best method on top, between what not steering and training on all digits reach."""
    ordered = sorted(document["methods"].items(), key=lambda item: float(item[1]["overall"]["mean"]))
    figure = Figure(figsize=(9, 1.2 + 0.62 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    bars = [
        axes.barh(
            [place + offset for place in range(len(ordered))],
            [scores[key]["mean"] for _, scores in ordered],
            0.25,
            xerr=[scores[key]["std"] for _, scores in ordered],
            color=color,
            label=key,
            error_kw={"ecolor": ink(), "capsize": 2, "elinewidth": 1},
        )
        for offset, (key, color) in zip((0.27, 0, -0.27), SCORES.items(), strict=True)
    ]
    marks = [("unsteered", document["unsteered"], UNSTEERED, "--")]
    if "ceiling" in document:
        marks.append(("trained on all ten digits", document["ceiling"], ink(), ":"))
    means = [scores["overall"]["mean"] for _, scores, _, _ in marks]
    lines = [
        axes.axvline(mean, color=color, linestyle=style, linewidth=1.5, label=f"{name}, overall: {mean:.3f}")
        for mean, (name, _, color, style) in zip(means, marks, strict=True)
    ]
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    axes.set_xlabel("accuracy")
    axes.set_xlim(*holding([scores[key] for _, scores in ordered for key in SCORES]))
    axes.set_ylim(-0.5, len(ordered) - 0.5)
    columns = zip_longest(bars, lines)  # as a legend is filled: the bars are its first row, the lines its second
    figure.legend(handles=[h for pair in columns for h in pair if h], loc="outside upper center", ncols=3)
    return figure


def curves(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel for each direction: the three scores at every strength that was measured."""
    figure = Figure(figsize=(9, 0.6 + 2.3 * len(runs[0])), layout="constrained")
    panels = figure.subplots(len(runs[0]), sharey=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, runs[0], strict=True):
        strengths = [row["c"] for row in runs[0][name]]
        for key, color in SCORES.items():
            scores = [spread([run[name][index][key] for run in runs]) for index in range(len(strengths))]
            low, high = ([s["mean"] + sign * s["std"] for s in scores] for sign in (-1, 1))
            axes.plot(strengths, [s["mean"] for s in scores], color=color, marker="o", markersize=2.5, lw=1, label=key)
            axes.fill_between(strengths, low, high, color=color, alpha=0.2, linewidth=0)
        _strength_axis(axes, strengths)
        axes.set_title(name)
        axes.set_ylabel("held-out accuracy")
    panels[-1].set_xlabel("strength c (logarithmic outside the shaded range, linear in it)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def noise(document: Mapping[str, Any]) -> Figure:
    """One panel for each method, so that the colours are those of the scores here too."""
    sigmas = document["sigma"]
    places = [float(sigma) for sigma in sigmas]
    clean = next(iter(sigmas.values()))["methods"]
    ordered = sorted(clean, key=lambda method: -float(clean[method]["overall"]["mean"]))
    rows = ceil(len(ordered) / 4)
    figure = Figure(figsize=(11, 0.7 + 2.3 * rows), layout="constrained")
    panels = list(figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False).flat)
    for axes, method in zip(panels, ordered, strict=False):
        for key, color in SCORES.items():
            scores = [at["methods"][method][key] for at in sigmas.values()]
            axes.errorbar(
                places,
                [s["mean"] for s in scores],
                [s["std"] for s in scores],
                color=color,
                label=key,
                capsize=3,
                fmt="o-",
            )
        unsteered = [at["unsteered"]["overall"]["mean"] for at in sigmas.values()]
        axes.plot(places, unsteered, color=UNSTEERED, linestyle="--", label="unsteered, overall")
        axes.set_title(method)
        axes.set_xticks(places, list(sigmas))
        axes.grid(axis="y")
    for axes in panels[len(ordered) :]:
        axes.set_axis_off()
    figure.supxlabel("sigma of the noise on the training images", fontsize="medium")
    figure.supylabel("test accuracy", fontsize="medium")
    first = figure.axes[0]
    first.set_ylim(*holding([at["methods"][m][key] for at in sigmas.values() for m in ordered for key in SCORES]))
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def holding(scores: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Limits of an axis that hold 0, 1 and every bar with its error; retained can exceed 1."""
    low = min(0.0, *(s["mean"] - s["std"] for s in scores))
    high = max(1.0, *(s["mean"] + s["std"] for s in scores))
    room = 0.02 * (high - low)
    return low - room if low < 0 else low, high + room


def linear_up_to(strengths: Sequence[float]) -> float:
    """Where a symlog axis turns from linear to logarithmic, chosen so that the two nearest strengths lie apart."""

    def nearest(threshold: float) -> float:
        places = SymmetricalLogTransform(10, threshold, 1).transform(np.array(sorted(strengths)))
        return float(np.diff(places).min() / np.ptp(places))

    return max((abs(c) for c in strengths if c), key=nearest)


def decades(strengths: Sequence[float], threshold: float) -> list[float]:
    """Zero, the outermost strengths, and the powers of ten between them that are not too near zero for a label."""
    smallest = max(min(abs(c) for c in strengths if c), threshold / 5)
    largest = max(abs(c) for c in strengths)
    powers = [10.0**k for k in range(ceil(log10(smallest)), floor(log10(largest)) + 1)]
    low, high = min(strengths), max(strengths)
    inner = {0.0, *powers, *(-power for power in powers)}
    return sorted({low, high} | {tick for tick in inner if low <= tick <= high})


def _strength_axis(axes: Axes, strengths: Sequence[float]) -> None:
    threshold = linear_up_to(strengths)
    axes.set_xscale("symlog", linthresh=threshold)
    axes.axvspan(max(min(strengths), -threshold), min(max(strengths), threshold), color=ink(), alpha=0.05, linewidth=0)
    ticks = decades(strengths, threshold)
    axes.set_xticks(ticks, [f"{tick:.3g}".replace("-", "−") for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.01)
