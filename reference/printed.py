"""Printed: the console, a table, and the versions by which a number can be made again."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version

from rich.console import Console
from rich.table import Table

console = Console()
if not console.is_terminal:
    console.width = 140


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, texts: bool = False) -> Table:
    """The first column to the left, and numbers to the right; `texts` has none."""
    made = Table(title=title)
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if index and not texts else "left")
    for row in rows:
        made.add_row(*row)
    return made


def versions(*packages: str) -> dict[str, str]:
    """Of Python, and of these packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
