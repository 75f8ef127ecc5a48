"""A report: one self-contained HTML file of tables, readings and figures, for a light and for a dark page."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from reference.style import LOOKS, look


@dataclass(frozen=True)
class Drawn:
    """One figure on disk, by the page that it is for ("light", "dark")."""

    caption: str
    paths: Mapping[str, Path]


def save(plot: Callable[[], Figure], out: Path, name: str, caption: str) -> Drawn:
    """Two PNG files of a figure."""
    paths = {page: out / f"{name}{'' if page == 'light' else f'-{page}'}.png" for page in LOOKS}
    for page, path in paths.items():
        with look(page):
            plot().savefig(path, dpi=110)
    return Drawn(" ".join(caption.split()), paths)


def write_page(folder: Path, out: Path, figures: Mapping[str, Sequence[Drawn]], **values: Any) -> Path:
    """Write `report.html`, by the template of that name in a folder, with the figures of each experiment in it."""
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    embedded = {
        name: [(figure.caption, {page: _base64(path) for page, path in figure.paths.items()}) for figure in drawn]
        for name, drawn in figures.items()
    }
    path = out / "report.html"
    path.write_text(environment.get_template("report.html.j2").render(figures=embedded, looks=LOOKS, **values))
    return path


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
