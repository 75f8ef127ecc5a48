"""Screen: where tables and texts are printed; without a terminal, plain and wide."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
for console in (out, err):
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160


def say(text: str) -> None:
    """One line, as it stands, however long."""
    out.print(Text(text), soft_wrap=True)


def complain(kind: str, text: str) -> None:
    """One line on stderr: "error: ..." or "warning: ..."."""
    err.print(Text.assemble((f"{kind}: ", "bold red" if kind == "error" else "bold yellow"), text), soft_wrap=True)


def table(
    *columns: str, rows: Iterable[Iterable[object]], numbers: Iterable[str] = (), title: str | None = None
) -> None:
    """A table without lines, one row a line, the columns that are `numbers` set to the right."""
    right = set(numbers)
    made = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold", header_style="bold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    out.print(made)
