"""The charts of the reference: blue is the unsteered model, orange the steered one, grey what means nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reference.style import CONTROL, STEERED, UNSTEERED, ink

KINDS = {"cooking": "C2", "other": "C3"}
MARKERS = {"random": "x", "shuffled": "+", "stretched": "1"}
MEASURES = {
    "log_odds": "log-odds of good words (nats)",
    "endings": "log-odds of happy endings (nats)",
    "perplexity": "perplexity of neutral text",
}


def sentiment(document: Mapping[str, Any]) -> Figure:
    """A panel for each measure, against c, with the controls at c = 1 and the prompts as lines."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        rows = sorted([{"c": 0, **document["unsteered"]}, *document["curve"]], key=lambda row: row["c"])
        axes.plot([row["c"] for row in rows], [row[measure] for row in rows], "o-", color=STEERED, label="steered")
        for shift, (kind, moods) in zip((-0.15, 0, 0.15), document["controls"].items(), strict=True):
            points = [(row["c"] + shift, row[measure]) for row in moods]  # beside each other
            axes.plot(*zip(*points, strict=True), MARKERS[kind], color=CONTROL, label=f"{kind} directions")
        if measure != "perplexity":  # which a text in front changes by itself
            for style, (name, own) in zip(("--", ":", "-."), document["prompts"].items(), strict=True):
                axes.axhline(own[measure], linestyle=style, color=ink(), linewidth=1, label=f"“{name}”")
        axes.plot([0], [document["unsteered"][measure]], "o", color=UNSTEERED, markersize=8, label="unsteered")
        axes.set_title(title)
        axes.set_xlabel("strength c")
        axes.grid(axis="y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def topic(document: Mapping[str, Any]) -> Figure:
    """The scores of held-out prompts, less the threshold; a dot for each."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(document["gates"]), sharey=True)
    for axes, (name, gate) in zip(panels, document["gates"].items(), strict=True):
        _dots(axes, {kind: (gate["scores"][kind], color) for kind, color in KINDS.items()})
        axes.axvline(0, color=ink(), linestyle="--", linewidth=1)
        axes.set_title(f"{name}: precision {gate['precision']:.2f}, recall {gate['recall']:.2f}")
        axes.set_xlabel("score less the threshold: it fires on the right")
        axes.locator_params(axis="x", nbins=6)
    return figure


def refusal(document: Mapping[str, Any]) -> Figure:
    """How likely the apology is after requests of both kinds, by what is done to the model."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    shown = {"unsteered": UNSTEERED, "ablated": STEERED, "added": STEERED}
    for axes, kind in zip(panels, ("impossible", "possible"), strict=True):
        axes.barh(list(shown), [document[name][kind] for name in shown], color=list(shown.values()))
        random = [own[kind] for own in document["random"]]
        axes.plot(random, ["random ablated"] * len(random), "x", color=CONTROL)
        axes.set_title(f"{kind} requests")
        axes.set_xlabel("log p(“I'm sorry”), nats")
    panels[0].invert_yaxis()
    return figure


def low_rank(document: Mapping[str, Any]) -> Figure:
    """The log-odds of held-out prompts, a dot for each, by what steers."""
    names = {"unsteered": "unsteered", "vector": "a trained vector", "low_rank": f"an edit of rank {document['rank']}"}
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), sharex=True, sharey=True)
    for axes, (key, title) in zip(panels, names.items(), strict=True):
        _dots(axes, {kind: (document[key][kind], color) for kind, color in KINDS.items()})
        axes.axvline(0, color=ink(), linestyle="--", linewidth=1)
        axes.set_title(f"{title}: {document[key]['right']:.0%} right")
        axes.set_xlabel("log-odds of good words (nats)")
    return figure


def prompt(document: Mapping[str, Any]) -> Figure:
    """How far the answers without the prompt are from those with it, by what steers."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    kl = document["kl"]
    colors = [UNSTEERED, CONTROL, *[STEERED] * (len(kl) - 2)]
    names = [f"{name}: {own['asked']:.3f}" for name, own in kl.items()]
    axes.barh(names, [own["asked"] for own in kl.values()], color=colors)
    axes.plot([own["taught"] for own in kl.values()], names, "|", color=ink(), markersize=16, label="when fitted")
    axes.set_xlabel("KL(prompted ‖ not prompted) on held-out questions, nats for a token")
    axes.invert_yaxis()
    figure.legend(loc="outside upper right")
    return figure


def _dots(axes: Axes, rows: Mapping[str, tuple[list[float], str]]) -> None:
    """A row of dots for each, none of which hides another."""
    for place, (values, color) in enumerate(rows.values()):
        heights = [place + 0.5 * (index / len(values) - 0.5) for index in range(len(values))]
        axes.plot(values, heights, "o", color=color, alpha=0.7, markersize=5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
