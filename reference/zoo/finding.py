"""What a script finds: a table with its controls, and a picture; written as JSON and PNG."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reference.page import save
from reference.printed import versions

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A row for each way of steering, for none, and for the controls, with the same columns in each."""

    title: str
    rows: Sequence[Row]
    figure: Callable[[], Figure]


def write(finding: Finding, name: str, out: Path, *, seconds: Mapping[str, float]) -> None:
    """`<name>.json`, and `<name>.png` and `<name>-dark.png` for either page."""
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "title": finding.title,
        "rows": finding.rows,
        "seconds": seconds,
        "versions": versions("actsteer", "torch"),
    }
    (out / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    save(finding.figure, out, name, finding.title)
