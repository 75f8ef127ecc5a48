"""One peer in one row, in this process: `python -m benchmarks.peers.run PEER ROW OUT [--repeats N] [--quick]`."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from benchmarks.peers import arrives, extracting, timed
from benchmarks.peers.peer import Cell, Row, peer_of

ROWS: dict[str, Row] = {"a": timed.forward, "b": timed.decoding, "c": extracting.row, "d": arrives.row}


def main(
    peer: Annotated[str, typer.Argument(help="The peer's name.")],
    row: Annotated[str, typer.Argument(help="The row's letter.")],
    out: Annotated[Path, typer.Argument(help="Where to write what was found, as JSON.")],
    repeats: Annotated[int, typer.Option(min=2, help="Rounds.")] = 50,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models: a check that it works.")] = False,
) -> None:
    """Write the peer's cells in this row, and the versions."""
    cells = found(peer, row, repeats=repeats, quick=quick)
    written = {column: dataclasses.asdict(cell) for column, cell in cells.items()}
    out.write_text(json.dumps({"versions": versions(peer), "cells": written}))


def found(peer: str, row: str, *, repeats: int, quick: bool) -> dict[str, Cell]:
    """The peer's cells in this row."""
    return ROWS[row](peer_of(peer), repeats=repeats, quick=quick)


def versions(peer: str) -> dict[str, Any]:
    """Of torch, transformers and the peer, where it is a package."""
    made = {"torch": torch.__version__, "transformers": transformers.__version__}
    try:
        return made | {peer: version(peer.replace("TransformerLens", "transformer-lens"))}
    except PackageNotFoundError:
        return made


if __name__ == "__main__":
    typer.run(main)
