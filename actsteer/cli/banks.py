"""Banks: the files of vectors, or of a whole steering, that a command is given, and what may be written over."""

from __future__ import annotations

import glob
from pathlib import Path

import typer
from torch import nn

from actsteer.cli import factory, options
from actsteer.files import gguf, sealed
from actsteer.files.formats import Format
from actsteer.steering.steering import Steering


def check(path: str) -> None:
    """Before any work: whether there is such a file.

    Raises:
        typer.BadParameter: there is none.
    """
    if Path(path).is_dir():
        raise typer.BadParameter(f"{path}: it is a folder; name a file in it", param_hint="bank")
    if not glob.has_magic(path) and not Path(path).is_file():
        raise typer.BadParameter(f"{path}: there is no such file", param_hint="bank")


def check_own(path: Path, *kinds: str) -> None:
    """Before any work: nothing is written over but what actsteer has written, of one of these kinds ("statistics").

    A control vector, `.gguf`, is a "bank", and so is a whole steering.

    Raises:
        typer.BadParameter: there is another file.
    """
    found = ("bank" if gguf.is_ours(path) else None) if path.suffix.lower() == ".gguf" else sealed.kind_of(path)
    if path.exists() and ("bank" if found == "steering" else found) not in kinds:
        raise typer.BadParameter(
            f"{path}: it is there already, and no {' or '.join(kinds)} of actsteer's; choose another name",
            param_hint="output",
        )


def check_concepts(path: Path, steering: Steering, *, form: Format | None) -> None:
    """Nothing is written over a bank but one of the same concepts.

    Raises:
        typer.BadParameter: there is another one.
    """
    if path.exists() and set(there := Steering.load(path, format=form).concepts) != set(steering.concepts):
        raise typer.BadParameter(
            f"{path}: it is there already, with {', '.join(there)}; choose another name, or delete it",
            param_hint="output",
        )


def read(
    path: str, model: nn.Module | None, concepts: list[str] | None, *, layer_offset: int = 0, form: Format | None = None
) -> Steering:
    """What a file says, or what it says of some of the concepts, with the model's names for the sites."""
    steering = Steering.load(path, model, layer_offset=layer_offset, format=form)
    return steering.select(*concepts) if concepts else steering


def strengths(path: str, texts: list[str] | None) -> list[float | dict[str, float] | None]:
    """Before any work: the strengths that are given, see `options.strengths`; or None, for that of the file.

    Raises:
        typer.BadParameter: neither says one, for a file of vectors alone has none.
    """
    if texts:
        return list(options.strengths(texts))
    if sealed.kind_of(path) != "steering":
        raise typer.BadParameter("the file holds vectors alone, and no strength; give one", param_hint="-c")
    return [None]


def format_of(name: str) -> Format:
    """The format that is a Python module, of the current folder or installed.

    Raises:
        typer.BadParameter: there is no such module, or it is no format.
    """
    try:
        found: Format = factory.imported(name)
    except Exception as error:
        raise typer.BadParameter(f"{name}: {type(error).__name__}: {error}", param_hint="--format") from error
    if missing := [part for part in ("SUFFIX", "read", "write") if not hasattr(found, part)]:
        raise typer.BadParameter(f"{name}: a format needs {', '.join(missing)}; see Format", param_hint="--format")
    return found
