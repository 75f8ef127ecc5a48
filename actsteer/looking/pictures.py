"""Pictures: inputs that are images, and the map of a calibration, drawn by matplotlib for either colour scheme."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from actsteer.looking.numbers import shortened
from actsteer.tuning.calibration import Calibration

_LARGEST = 128  # pixels on a side
_INK, _PLUS, _MINUS, _COST = "#010203", "#040506", "#070809", "#0a0b0c"  # stand for the page's own colours
_COLORS = {_INK: "currentColor", _PLUS: "rgb(var(--plus))", _MINUS: "rgb(var(--minus))", _COST: "rgb(var(--gate))"}
_DROPPED = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<(metadata|style)\b.*?</\1>|<!--.*?-->|\sxmlns(?::\w+)?=\"[^\"<]*\"", re.S
)  # which no text in it can begin, for that has no "<"
_SIZES: dict[Any, Any] = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "actsteer", "text.parse_math": False}


def image(pixels: Tensor) -> str:
    """An image (1 or 3, H, W) as the address of a PNG that is all in it; from its least number to its largest."""
    from matplotlib.image import imsave

    shape = pixels.shape[-2:]
    if max(shape) > _LARGEST:
        height, width = (max(1, round(side * _LARGEST / max(shape))) for side in shape)
        pixels = torch.nn.functional.adaptive_avg_pool2d(pixels, (height, width))
    finite = pixels.double().nan_to_num()
    low, high = finite.min(), finite.max()
    shown = ((finite - low) / (high - low).clamp(min=1e-30)).movedim(0, -1).numpy()
    drawn = io.BytesIO()
    unsigned: dict[str, Any] = {"Software": None}
    grey: dict[str, Any] = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0} if len(pixels) == 1 else {}
    imsave(drawn, shown[..., 0] if grey else shown, format="png", metadata=unsigned, **grey)
    return "data:image/png;base64," + base64.b64encode(drawn.getvalue()).decode()


def calibration_maps(calibration: Calibration) -> list[dict[str, str]]:
    """What every point gains over not steering, and its cost, its sites against its dose: each a title and an SVG."""
    rows = calibration.table
    every = list(dict.fromkeys(site for row in rows for site in row["sites"]))
    prefix, names = shortened(every) if every else ("", [])
    short = dict(zip(every, names, strict=True))
    labels = [", ".join(short[site] for site in row["sites"]) for row in rows]
    where = f", at sites of {prefix}" if prefix else ""
    gained = [None if row["effect"] is None else row["effect"] - calibration.unsteered for row in rows]
    said = {f"Effect, less {calibration.unsteered:.3g} unsteered{where}": gained}
    said |= {f"Cost, {next(iter(calibration.budget))}{where}": [row["cost"] for row in rows]}
    chosen = calibration.chosen
    return [
        {"title": title, "svg": _map(rows, labels, values, name=name, chosen=chosen)}
        for name, (title, values) in zip(("effect", "cost"), said.items(), strict=True)
    ]


def _map(
    rows: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    values: Sequence[float | None],
    *,
    name: str,
    chosen: Mapping[str, Any] | None,
) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(labels))
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0) or 1.0
    with rc_context(_SIZES), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser's font has it
        figure = Figure(figsize=(5, 0.9 + 0.3 * len(names)))
        axes = figure.subplots()
        for row, label, value in zip(rows, labels, values, strict=True):
            place = names.index(label)
            if value is not None:
                color = _COST if name == "cost" else _PLUS if value >= 0 else _MINUS
                depth = 0.08 + 0.87 * min(1.0, abs(value) / largest)
                axes.scatter(row["dose"], place, s=130, color=color, alpha=depth, linewidths=0)
            if not row["feasible"]:
                axes.scatter(row["dose"], place, s=26, color=_INK, marker="x", linewidths=1)
            if row is chosen:
                axes.scatter(row["dose"], place, s=230, facecolors="none", edgecolors=_INK, linewidths=1.4)
        axes.set_yticks(range(len(names)), [_short(own) for own in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        doses = [abs(row["dose"]) for row in rows]
        axes.set_xscale("symlog", linthresh=min(doses), linscale=0.3)  # they double
        axes.set_xticks(sorted({round(own, 3) for own in _ticks(row["dose"] for row in rows)}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel("dose")
        axes.margins(x=0.1)
        axes.grid(axis="x", color=_INK, alpha=0.12, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=_INK)
        axes.xaxis.label.set_color(_INK)
        axes.spines[:].set_visible(False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    return _inline(drawn.getvalue(), prefix=name)


def _ticks(doses: Iterable[float]) -> list[float]:
    """Every second one of those that stand at several places, the coarse ones, from the largest down."""
    counts = Counter(doses)
    coarse = sorted((own for own in counts if counts[own] == max(counts.values())), key=abs, reverse=True)
    return coarse[::2]


def _short(name: str) -> str:
    return name if len(name) <= 26 else "…" + name[-25:]


def _inline(svg: str, *, prefix: str) -> str:
    """An SVG as a part of a page: in its colours and its font, with ids of its own, and no address in it."""
    svg = _DROPPED.sub("", svg).replace("xlink:href", "href")
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"(url\(|href=\")#", rf"\1#{prefix}-", svg)
    svg = re.sub(r"(<svg[^>]*?) (?:width|height)=\"[^\"]*\"", r"\1", svg)
    svg = re.sub(r"(<svg[^>]*?) (?:width|height)=\"[^\"]*\"", r"\1", svg)
    for stand_in, color in _COLORS.items():
        svg = svg.replace(stand_in, color)
    return re.sub(r"font(-family)?: [^;\"<]*;?", lambda found: _font(found.group(0)), svg).strip()


def _font(declared: str) -> str:
    """The size alone, in the page's own font."""
    size = re.search(r"([\d.]+px)", declared)
    return f"font-size: {size.group(1)};" if size else ""
