"""The look of the figures: a colour means one thing in all of them, on a light page and on a dark one.

A colour is named by its place in the page's cycle ("C0"), so the same drawing takes the shades of the page it is for.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

UNSTEERED, STEERED, TRUTH, CONTROL = "C0", "C1", "C2", "C4"
"""Control is of directions that mean nothing; truth of what steering is to come near to."""
SCORES = {"acquired": "C2", "retained": "C3", "overall": "C4"}
"""Acquired is of the new digits, retained of the old ones: what shows new and old digits themselves has these too."""


def _look(*, page: str, ink: str, faint: str, colors: list[str], signs: tuple[str, str]) -> Any:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, ink),
        "figure.facecolor": page,
        "axes.facecolor": page,
        "axes.prop_cycle": cycler(color=[*colors, *signs]),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "grid.color": faint,
        "legend.frameon": False,
    }


LOOKS = {
    "light": _look(
        page="#ffffff",
        ink="#24292f",
        faint="#d0d7de",
        colors=["#1f77b4", "#ff7f0e", "#009e73", "#b5529b", "#8a8f98"],
        signs=("#b2182b", "#01665e"),
    ),
    "dark": _look(
        page="#0d1117",
        ink="#e6edf3",
        faint="#3d444d",
        colors=["#58a6e8", "#ff9a3d", "#2fd0a0", "#e08cc8", "#9aa2ad"],
        signs=("#f0616d", "#35b0a5"),
    ),
}


def look(page: str) -> AbstractContextManager[None]:
    """What is drawn and saved inside has the look of this page."""
    return matplotlib.rc_context(LOOKS[page])


def ink() -> str:
    """The colour of the text, for lines and bars of error that belong to no colour's meaning."""
    color: str = matplotlib.rcParams["text.color"]
    return color


def shades() -> LinearSegmentedColormap:
    """From the page to the ink: an image of strokes, on either page."""
    return LinearSegmentedColormap.from_list("shades", [matplotlib.rcParams["figure.facecolor"], ink()])


def signs() -> LinearSegmentedColormap:
    """From one hue through the page to another: zero is not seen."""
    return LinearSegmentedColormap.from_list("signs", ["C5", matplotlib.rcParams["figure.facecolor"], "C6"])


def inline(figure: Figure) -> str:
    """The figure as SVG for a page of HTML: what is drawn in black takes the colour of the text around it."""
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor").replace("<svg", '<svg fill="currentColor"', 1)
