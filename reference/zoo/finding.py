"""What a script finds: a table with its controls, and a picture; written as JSON and PNG."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reference.style import look

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A row for each way of steering, for none, and for the controls, with the same columns in each."""

    title: str
    rows: Sequence[Row]
    figure: Callable[[], Figure]


def write(finding: Finding, name: str, out: Path, *, seconds: float) -> None:
    """`<name>.json` and `<name>.png`."""
    out.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), **{own: version(own) for own in ("actsteer", "torch")}}
    document = {"title": finding.title, "rows": finding.rows, "seconds": round(seconds, 1), "versions": versions}
    (out / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    with look("light"):
        finding.figure().savefig(out / f"{name}.png", dpi=110)
