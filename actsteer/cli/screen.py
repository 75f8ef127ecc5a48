"""Screen: where tables and texts are printed; a line of a table stays a line, however narrow the terminal is."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE, _UNENDING = 160, 10_000
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}

out = Console(highlight=False)
_tables = Console(highlight=False, width=_UNENDING)  # what is too wide goes on in the next line, and is not cut
err = Console(stderr=True, highlight=False)
for console in (out, err):
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE


def plain(text: object, *, keep: str = "") -> Text:
    """Text as it stands: no markup, and what would control the terminal in letters, but for what is to be kept."""
    return Text(str(text).translate({code: own for code, own in _CONTROLS.items() if chr(code) not in keep}))


def say(text: str) -> None:
    """One line, however long."""
    out.print(plain(text), soft_wrap=True)


def complain(kind: str, text: str) -> None:
    """ "error: ..." or "warning: ..." on stderr."""
    style = "bold red" if kind == "error" else "bold yellow"
    err.print(Text.assemble((f"{kind}: ", style), plain(text, keep="\n")), soft_wrap=True)


def table(*columns: str, rows: Iterable[Iterable[object]], numbers: Iterable[str] = ()) -> None:
    """A table without lines, the columns that are `numbers` set to the right."""
    right = set(numbers)
    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=True, header_style="bold")
    for row in rows:
        made.add_row(*(plain(cell) for cell in row))
    _tables.print(made, crop=False, soft_wrap=True)
