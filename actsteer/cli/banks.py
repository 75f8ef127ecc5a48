"""Banks: the vectors that a command is given."""

from __future__ import annotations

import glob
from pathlib import Path

import typer
from torch import nn

from actsteer.vectors.bank import VectorBank


def check(path: str) -> None:
    """Before any work: whether there is such a file.

    Raises:
        typer.BadParameter: there is none.
    """
    if not glob.has_magic(path) and not Path(path).is_file():
        raise typer.BadParameter(f"{path}: there is no such file", param_hint="bank")


def read(path: str, model: nn.Module | None, concepts: list[str] | None, *, layer_offset: int = 0) -> VectorBank:
    """The vectors of a file, or some of them, with the model's names for the sites."""
    bank = VectorBank.load(path, model, layer_offset=layer_offset)
    return bank.select(*concepts) if concepts else bank
