"""The report: a table, a reading and a figure for each experiment, whose numbers are those of the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reference.language import charts
from reference.language.reading import CAPTIONS, GLOSSARY, TITLES, readings
from reference.page import Drawn, save, write_page

Results = dict[str, dict[str, Any]]
Row = list[str]


def sections(results: Results) -> list[dict[str, Any]]:
    """One table per experiment: title, columns, rows of cells, and a line on each name in it."""
    return [
        {
            "experiment": name,
            "title": TITLES[name],
            **dict(zip(("columns", "rows"), TABLES[name](document), strict=True)),
            "lines": {own: " ".join(line.split()) for own, line in GLOSSARY[name].items()},
        }
        for name, document in results.items()
    ]


def draw(results: Results, out: Path) -> dict[str, list[Drawn]]:
    """Every figure."""
    plots: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
        "sentiment": charts.sentiment,
        "topic": charts.topic,
        "refusal": charts.refusal,
        "low_rank": charts.low_rank,
        "prompt": charts.prompt,
    }
    return {
        name: [save(partial(plots[name], document), out, name, CAPTIONS[name])] if name in plots else []
        for name, document in results.items()
    }


def write_report(results: Results, out: Path) -> Path:
    """Write the figures, and `report.html` with the figures in it."""
    first = next(iter(results.values()))
    return write_page(
        Path(__file__).parent,
        out,
        draw(results, out),
        sections=sections(results),
        readings=readings(results),
        first=first,
    )


def _sentiment(document: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    plain = document["unsteered"]
    at = {f"c = {row['c']:g}": row for row in document["curve"]}
    rows = {"unsteered": plain, **at}
    if "c" in document["calibrated"]:
        rows["calibrated"] = document["calibrated"]
    for kind, moods in document["controls"].items():
        rows[f"worst {kind}"] = max(moods, key=lambda row: abs(row["log_odds"] - plain["log_odds"]))
    rows |= {f"“{name}”": own for name, own in document["prompts"].items()}
    return ["steering", "log-odds", "moved by", "happy endings", "of which preferred", "perplexity", "ratio"], [
        [
            name,
            f"{row['log_odds']:.2f}",
            f"{row['log_odds'] - plain['log_odds']:+.2f}",
            f"{row['endings']:.2f}",
            f"{row['happy']:.2f}",
            f"{row['perplexity']:.1f}",
            f"{row['perplexity'] / plain['perplexity']:.2f}",
        ]
        for name, row in rows.items()
    ]


def _topic(document: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    columns = ["gate", "precision", "recall", "fires wrongly", "cooking moved by", "other moved by", "other left alone"]
    rows = [
        [
            name,
            f"{gate['precision']:.2f}",
            f"{gate['recall']:.2f}",
            f"{gate['fires wrongly']} of {gate['texts'][1]}",
            f"{gate['shift']['cooking']['gated']:+.2f}",
            f"{gate['shift']['other']['gated']:+.2f}",
            f"{gate['shift']['other']['left alone']:.2f}",
        ]
        for name, gate in document["gates"].items()
    ]
    shift = next(iter(document["gates"].values()))["shift"]
    ungated = [f"{shift[kind]['ungated']:+.2f}" for kind in ("cooking", "other")]
    return columns, [*rows, ["none", "", "", "", *ungated, "0.00"]]


def _refusal(document: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    rows = {name: document[name] for name in ("unsteered", "ablated", "added")}
    rows |= {f"random {number + 1}": own for number, own in enumerate(document["random"])}
    keys = ("impossible", "possible", "sorry impossible", "sorry possible", "perplexity")
    columns = ["steering", "log p, impossible", "possible", "says sorry, impossible", "possible", "perplexity"]
    return columns, [[name, *(f"{row[key]:.2f}" for key in keys)] for name, row in rows.items()]


def _low_rank(document: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    return ["steering", "log-odds, cooking", "other", "right", "perplexity"], [
        [
            name,
            *(f"{sum(document[name][kind]) / len(document[name][kind]):+.2f}" for kind in ("cooking", "other")),
            f"{document[name]['right']:.2f}",
            f"{document[name]['perplexity']:.1f}",
        ]
        for name in ("unsteered", "vector", "low_rank")
    ]


def _prompt(document: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    return ["edit", "KL, held-out questions", "fitted ones"], [
        [name, f"{own['asked']:.3f}", f"{own['taught']:.3f}"] for name, own in document["kl"].items()
    ]


def _generations(document: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    names = list(document["answers"])
    answers = zip(*document["answers"].values(), strict=True)
    return ["question", *names], [
        [question, *own] for question, own in zip(document["questions"], answers, strict=True)
    ]


TABLES: dict[str, Callable[[Mapping[str, Any]], tuple[Row, list[Row]]]] = {
    "sentiment": _sentiment,
    "topic": _topic,
    "refusal": _refusal,
    "low_rank": _low_rank,
    "prompt": _prompt,
    "generations": _generations,
}
