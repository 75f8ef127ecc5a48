"""`python -m reference.zoo [NAME]`: steer networks of other kinds, print the tables, write JSON and pictures."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from reference.language.model import ModelMissingError
from reference.zoo.finding import Finding, write

SCRIPTS = ("maze", "diffusion", "vision", "sentences", "voice", "lens", "pitch")
Name = Literal["maze", "diffusion", "vision", "sentences", "voice", "lens", "pitch", "all"]
console = Console()
if not console.is_terminal:
    console.width = 120


def main(
    name: Annotated[Name, typer.Argument(help="Which network.")] = "all",
    out: Annotated[Path, typer.Option(help="Where JSON and pictures go.")] = Path("zoo-results"),
) -> None:
    """Steer networks of seven kinds towards what is known to be true, beside directions that mean nothing."""
    missing = []
    for own in SCRIPTS if name == "all" else (name,):
        began = monotonic()
        try:
            finding = import_module(f"reference.zoo.{own}").run()
        except ModelMissingError as error:
            console.print(f"[red]{own}: {error}[/red]")
            missing.append(own)
            continue
        write(finding, own, out, seconds=monotonic() - began)
        console.print(_table(finding))
        console.print(f"{out / own}.json, {out / own}.png; {monotonic() - began:.0f} s")
    if name in missing:
        raise typer.Exit(code=2)


def _table(finding: Finding) -> Table:
    table = Table(title=finding.title)
    for index, column in enumerate(finding.rows[0]):
        table.add_column(column, justify="right" if index else "left")
    for row in finding.rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: str | float | None) -> str:
    return (
        ""
        if value is None
        else value
        if isinstance(value, str)
        else f"{value:.3g}"
        if abs(value) >= 10
        else f"{value:.2f}"
    )


if __name__ == "__main__":
    typer.run(main)
