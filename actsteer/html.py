"""html: small tables for notebooks, of escaped text, in the colours of the page around them, light or dark."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice
from typing import final

SHOWN = 30
"""How many rows a table has at most."""
_PLUS, _MINUS = "232,113,10", "47,126,216"
_CELL = "text-align:{};padding:.15em .7em .15em 0;vertical-align:baseline;font-variant-numeric:tabular-nums"
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@final
class Markup(str):
    """What is HTML already, and is not escaped again."""

    __slots__ = ()

    def __html__(self) -> str:
        """What tells a template the same."""
        return str(self)


def text(value: object) -> Markup:
    """A value as text, escaped; HTML as it is; a float in four digits.

    >>> text("<b>"), text(0.123456), text(text("<b>"))
    ('&lt;b&gt;', '0.1235', '&lt;b&gt;')
    """
    if isinstance(value, Markup):
        return value
    return Markup(escape(_CONTROLS.sub("\ufffd", f"{value:.4g}" if isinstance(value, float) else str(value))))


def table(caption: object, columns: Sequence[str], rows: Iterable[Sequence[object]], *, total: int) -> Markup:
    """A table of the first rows, which are taken one by one, and how many more there are of `total`.

    Numbers are set to the right.
    """
    first = list(islice(rows, SHOWN))
    sides = [_side(value) for value in (first or [columns])[0]]
    head = "".join(
        f'<th scope="col" style="{_CELL.format(side)};opacity:.7">{text(name)}</th>'
        for name, side in zip(columns, sides, strict=True)
    )
    body = ["".join(f'<td style="{_CELL.format(_side(value))}">{text(value)}</td>' for value in row) for row in first]
    if total > SHOWN:
        body.append(f'<td colspan="{len(columns)}" style="{_CELL.format("left")}">and {total - SHOWN} more</td>')
    return Markup(
        '<table style="border-collapse:collapse;margin:.3em 0"><caption style="caption-side:top;text-align:left;'
        f'font-weight:bold;padding:.2em 0">{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>'
        + "".join(f"<tr>{row}</tr>" for row in body)
        + "</tbody></table>"
    )


def bar(value: float, *, of: float) -> Markup:
    """A bar as long as the value is beside the largest one."""
    return _box(f"height:.7em;width:{8 * _share(value, of):.2f}em")


def bars(values: Sequence[float], names: Sequence[str]) -> Markup:
    """A small upright bar for each value, as high as it is beside the largest; a name shows when it is pointed at."""
    largest = max(values, default=0.0)
    each = zip(values, names, strict=True)
    return Markup(
        '<span style="white-space:nowrap">'
        + "".join(
            _box(f"width:4px;height:{1.2 * _share(own, largest):.2f}em", f"{name}: {own:.4g}") for own, name in each
        )
        + "</span>"
    )


def matrix(
    caption: object,
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    columns: Sequence[str] | None = None,
) -> Markup:
    """Numbers of each two names, or of names and columns, on one hue below 0 and another above it, full at -1 and 1."""
    rows = [(name, *map(_shaded, own)) for name, own in zip(names, values, strict=True)]
    return table(caption, ["", *(names if columns is None else columns)], rows, total=len(rows))


def beside(*parts: Markup) -> Markup:
    """Tables side by side, or below one another where there is no room."""
    each = "".join(f'<div style="overflow-x:auto">{part}</div>' for part in parts)
    return Markup(f'<div style="display:flex;flex-wrap:wrap;gap:0 2.5em;align-items:flex-start">{each}</div>')


def outline(lines: Iterable[str]) -> Markup:
    """Lines that are indented by what they belong to; what stands before a colon is set apart."""
    shown = []
    for line in lines:
        key, colon, rest = line.strip().partition(": ")
        depth = (len(line) - len(line.lstrip())) / 4
        weight = "normal" if depth else "bold"
        shown.append(
            f'<div style="padding-left:{1.5 * depth:g}em;font-weight:{weight}"><span style="opacity:.7">{text(key)}'
            f"{colon.strip()}</span> {text(rest)}</div>"
        )
    return Markup(f'<div style="max-height:30em;overflow:auto;line-height:1.5">{"".join(shown)}</div>')


def _side(value: object) -> str:
    return "right" if isinstance(value, int | float) and not isinstance(value, bool) else "left"


def _shaded(value: float) -> Markup:
    hue, depth = _PLUS if value > 0 else _MINUS, 0.6 * _share(abs(value), 1.0)
    style = f"display:block;padding:0 .4em;text-align:right;background:rgba({hue},{depth:.2f})"
    return Markup(f'<span style="{style}">{value:+.2f}</span>')


def _box(style: str, title: str = "") -> Markup:
    said = f' title="{text(title)}"' if title else ""
    return Markup(
        f'<span{said} style="display:inline-block;background:currentColor;opacity:.5;margin-right:1px;{style}"></span>'
    )


def _share(value: float, of: float) -> float:
    return min(1.0, value / of) if of > 0 and math.isfinite(value) and math.isfinite(of) else 0.0
