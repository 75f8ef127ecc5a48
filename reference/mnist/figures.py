"""The figures: two PNG files of each, for a light and for a dark page, and a caption that says what to see in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reference.mnist import charts, insides
from reference.mnist.suite import Results, Task
from reference.page import Drawn, save

CAPTIONS = {
    "methods": """What each method reaches on the test images, the best overall on top: mean over seeds, with bars of
    one standard deviation (n - 1). A method is worth something only if all three are high; overall alone has to be read
    against the dashed line, which is not steering at all.""",
    "strength": """Accuracy on held-out images at each strength c that was measured: mean over seeds, with a band of one
    standard deviation (n - 1). Where acquired rises while retained falls, the direction does not add a digit: it trades
    the old ones for it.""",
    "readout": """What the readout makes of the mean difference, W v at the last layer: mean over seeds, with bars of
    one standard deviation (n - 1). It is why that difference never yields a 9: the largest logits go to old digits that
    share strokes with it, and that of 9 has only ever learned to be low.""",
    "cosines": """How far the concepts interfere: the cosines between the vectors of a bank (first seed). Zero would
    mean that adding one does not move along the other.""",
    "radar": """Mean activation at the four ReLU layers on held-out images of the new digits (first seed), before and
    after steering: on the left as it was published, one axis per layer, on the right the same numbers as bars.""",
    "example": """The first held-out image of a new digit that this steering turns from wrong to right (first seed), and
    the logits of all ten digits before and after.""",
    "histograms": """Activations per layer on held-out images of the new digits (first seed), before and after
    steering; shares of all units on a logarithmic axis.""",
    "sigma": """Test accuracy against the noise on the training images, for every method of experiment 2: mean over
    seeds, with bars of one standard deviation (n - 1). If noise helped, the lines would rise beyond their bars.""",
}


def draw(results: Results, done: Mapping[Task, dict[str, Any]], out: Path) -> dict[str, list[Drawn]]:
    """Every figure of every experiment."""
    figures: dict[str, list[Drawn]] = {}
    for experiment, document in results.items():
        runs = [] if experiment == "noise" else [done[Task(experiment, seed)] for seed in document["seeds"]]
        plots = _of_one(document, runs) if runs else {"sigma": partial(charts.noise, document)}
        figures[experiment] = [save(plot, out, f"{experiment}_{kind}", CAPTIONS[kind]) for kind, plot in plots.items()]
    return figures


def _of_one(document: Mapping[str, Any], runs: list[dict[str, Any]]) -> dict[str, Callable[[], Figure]]:
    first, portrait = runs[0], runs[0]["portrait"]
    plots: dict[str, Callable[[], Figure]] = {
        "example": partial(insides.example, portrait["example"]),
        "methods": partial(charts.methods, document),
    }
    if "curves" in first:
        plots["strength"] = partial(charts.curves, [run["curves"] for run in runs])
    if "logits of v" in portrait:
        new = list(document["unsteered"]["acquired_by_digit"])
        plots["readout"] = partial(insides.readout, [run["portrait"]["logits of v"] for run in runs], new=new)
    if "cosines" in first:
        plots["cosines"] = partial(insides.cosines, first["cosines"])
    plots["radar"] = partial(insides.radar, portrait)
    plots["histograms"] = partial(insides.histograms, portrait["histograms"])
    return plots
