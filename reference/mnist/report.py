"""The report: tables and figures in one self-contained HTML file, each with an honest reading, for either page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reference.mnist.glossary import COLUMNS, lines
from reference.mnist.reading import readings
from reference.mnist.suite import Results
from reference.page import Drawn, write_page

TITLES = {
    "cross": "1. Cross-model steering: another model teaches the digit 9",
    "self": "2. Self steering: a model trained on 0-8 recognises 9",
    "multi": "3. Multi-vector steering: a model trained on 0-7 recognises 8 and 9",
    "noise": "4. Noise injection: experiment 2 on models trained on noisy images",
}


def sections(results: Results) -> list[dict[str, Any]]:
    """One table per experiment: title, columns, rows of cells, and a line on each name in it."""
    tables = {
        name: _noise_table(document) if name == "noise" else _table(document) for name, document in results.items()
    }
    return [
        {
            "experiment": name,
            "title": _title(results[name]),
            **table,
            "lines": lines(name, [row[0].partition(":")[0] for row in table["rows"]]),
        }
        for name, table in tables.items()
    ]


def write_report(results: Results, figures: Mapping[str, Sequence[Drawn]], out: Path) -> Path:
    """Write `report.html`, with the figures of each experiment in it."""
    first = next(iter(results.values()))
    return write_page(
        Path(__file__).parent,
        out,
        figures,
        sections=sections(results),
        readings=readings(results),
        first=first,
        columns=COLUMNS,
    )


def _title(document: Mapping[str, Any]) -> str:
    seeds = len(document["seeds"])
    return f"{TITLES[document['experiment']]} ({document['data']} data, {seeds} seed{'s' if seeds > 1 else ''})"


def _table(document: Mapping[str, Any]) -> dict[str, Any]:
    digits = list(document["unsteered"]["acquired_by_digit"])
    ceiling = {"ceiling": document["ceiling"]} if "ceiling" in document else {}
    columns = ["method", "overall", "retained", "acquired", *([f"of {d}" for d in digits] if len(digits) > 1 else [])]
    rows = [
        [name, *(cell(scores[key]) for key in ("overall", "retained", "acquired"))]
        + ([cell(scores["acquired_by_digit"][digit]) for digit in digits] if len(digits) > 1 else [])
        for name, scores in {"unsteered": document["unsteered"], **document["methods"], **ceiling}.items()
    ]
    return {"columns": columns, "rows": rows}


def _noise_table(document: Mapping[str, Any]) -> dict[str, Any]:
    sigmas = document["sigma"]
    methods = ["unsteered", *next(iter(sigmas.values()))["methods"]]
    rows = [
        [f"{method}: {key}"]
        + [cell((at["unsteered"] if method == "unsteered" else at["methods"][method])[key]) for at in sigmas.values()]
        for method in methods
        for key in ("overall", "retained", "acquired")
    ]
    return {"columns": ["method", *(f"sigma {sigma}" for sigma in sigmas)], "rows": rows}


def cell(score: Mapping[str, Any]) -> str:
    """Mean ± standard deviation (n - 1) over the seeds."""
    return f"{score['mean']:.3f} ± {score['std']:.3f}"
