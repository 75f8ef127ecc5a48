"""`python -m reference.zoo [NAME]`: steer networks of other kinds, print the tables, write JSON and pictures."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from time import monotonic, process_time
from typing import Annotated, Literal, get_args

import typer
from rich.table import Table

from reference.printed import console, table
from reference.stored import ModelMissingError
from reference.zoo.finding import Finding, write

Network = Literal["pitch", "voice", "vision", "sentences", "diffusion", "maze", "lens"]
NETWORKS: tuple[str, ...] = get_args(Network)


def main(
    network: Annotated[Network | None, typer.Argument(help="Which network; all unless given.")] = None,
    out: Annotated[Path, typer.Option(help="Where JSON and pictures go.")] = Path("zoo-results"),
) -> None:
    """Steer networks of seven kinds towards what is known to be true, beside directions that mean nothing."""
    missing = 0
    for name in (network,) if network else NETWORKS:
        began, used = monotonic(), process_time()
        try:
            finding = import_module(f"reference.zoo.{name}").run()
        except ModelMissingError as error:
            console.print(f"[red]{name}[/red]: {error}", soft_wrap=True)
            missing += 1
            continue
        seconds = {"wall": monotonic() - began, "processor": process_time() - used}
        write(finding, name, out, seconds=seconds)
        console.print(_table(finding))
        spent = f"{seconds['wall']:.0f} s, {seconds['processor']:.0f} s of processor time"
        console.print(f"{spent}; {out / name}.json, .png and -dark.png", soft_wrap=True)
    if missing and (network or missing == len(NETWORKS)):
        raise typer.Exit(code=2)


def _table(finding: Finding) -> Table:
    rows = [[_cell(value) for value in row.values()] for row in finding.rows]
    return table(finding.title, list(finding.rows[0]), rows)


def _cell(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.0e}" if 0 < abs(value) < 0.005 else f"{value:.2f}"


if __name__ == "__main__":
    typer.run(main)
