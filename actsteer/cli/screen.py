"""Screen: where tables and texts are printed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE, _UNENDING = 160, 10_000
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}

out = Console(highlight=False)
_tables = Console(highlight=False, width=_UNENDING)
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


def head(text: str) -> None:
    """A line above what it names."""
    out.print(plain(text), soft_wrap=True, style="bold")


def write(text: str) -> None:
    """A part of a text, whose lines stay lines, at once."""
    out.print(plain(text, keep="\n"), soft_wrap=True, end="")


def complain(kind: str, text: str) -> None:
    """ "error: ..." or "warning: ..." on stderr."""
    style = "bold red" if kind == "error" else "bold yellow"
    err.print(Text.assemble((f"{kind}: ", style), plain(text, keep="\n")), soft_wrap=True)


def table(*columns: str, rows: Iterable[Iterable[object]], numbers: Iterable[str] = ()) -> None:
    """A table without lines, the columns that are `numbers` set to the right; nothing of it is cut.

    In a terminal what is too wide for its column goes on below it. Elsewhere a row is a line, however wide, for what
    reads it line by line.
    """
    right, folds = set(numbers), out.is_terminal
    made = Table(box=None, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        made.add_column(column, justify=justify, no_wrap=not folds, overflow="fold", header_style="bold")
    for row in rows:
        made.add_row(*(plain(cell) for cell in row))
    if folds:
        out.print(made)
    else:
        _tables.print(made, crop=False, soft_wrap=True)
