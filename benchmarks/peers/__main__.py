"""`python -m benchmarks.peers [--rows a,b] [--peers actsteer] [--repeats N] [--quick] [--here] [--out FILE.json]`."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.overhead import described
from benchmarks.peers.environments import environment_of, python_of
from benchmarks.peers.peer import PEERS
from benchmarks.peers.run import ROWS

ROOT = Path(__file__).parents[2]


def main(
    rows: Annotated[str, typer.Option(help="Their letters, with commas.")] = ",".join(ROWS),
    peers: Annotated[str, typer.Option(help="Their names, with commas.")] = ",".join(PEERS),
    repeats: Annotated[int, typer.Option(min=2, help="Rounds; a slow model gets a fifth of them.")] = 50,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models: a check that it works.")] = False,
    here: Annotated[bool, typer.Option("--here", help="This interpreter runs them all; no environments.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file too.")] = None,
) -> None:
    """Run every peer's rows, each in a process of the peer's environment, and print a table for each row."""
    console = Console(width=150)
    found: dict[str, Any] = {}
    for row in rows.split(","):
        found[row] = {}
        for peer in peers.split(","):
            console.print(f"row {row}, {peer} ...", style="dim")
            python = Path(sys.executable) if here else python_of(environment_of(peer))
            found[row][peer] = in_process(python, peer, row, repeats=repeats, quick=quick)
        console.print(table(row, found[row]))
        console.print(*notes(found[row]), sep="\n", markup=False)
    if out is not None:
        command = (
            f"python -m benchmarks.peers --rows {rows} --repeats {repeats}" + " --quick" * quick + " --here" * here
        )
        date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        out.write_text(json.dumps(described(command) | {"date": date, "rows": found}, indent=2) + "\n")


def in_process(python: Path, peer: str, row: str, *, repeats: int, quick: bool) -> dict[str, Any]:
    """What `benchmarks.peers.run` writes; a process that ends otherwise has one cell, which says how."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cells.json"
        command = [str(python), "-m", "benchmarks.peers.run", peer, row, str(out), "--repeats", str(repeats)]
        ended = subprocess.run(command + ["--quick"] * quick, cwd=ROOT, capture_output=True, text=True, check=False)
        if ended.returncode == 0:
            made: dict[str, Any] = json.loads(out.read_text())
            return made
    last = ended.stderr.strip().splitlines()[-1:] or ["no message"]
    return {"versions": {}, "cells": {"": {"says": "fails", "evidence": last[0], "numbers": {}}}}


def table(row: str, found: dict[str, Any]) -> Table:
    """One line per peer, one column per cell."""
    columns = list(dict.fromkeys(column for each in found.values() for column in each["cells"]))
    made = Table(title=f"row ({row})")
    for column in ("", *columns, "versions"):
        made.add_column(column)
    for peer, each in found.items():
        cells = (each["cells"].get(column, {"says": ""})["says"] for column in columns)
        versions = ", ".join(f"{name} {number}" for name, number in each["versions"].items())
        made.add_row(*map(escape, (peer, *cells, versions)))
    return made


def notes(found: dict[str, Any]) -> list[str]:
    """The evidence of each cell, one line each."""
    return [
        f"{peer}, {column}: {cell['evidence']}"
        for peer, each in found.items()
        for column, cell in each["cells"].items()
        if cell["evidence"]
    ]


if __name__ == "__main__":
    typer.run(main)
