"""Options: what several commands take, each with one name and one meaning."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import typer

from actsteer.tokens.positions import Positions, from_text

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16", "float64"]
"""In which dtype a Hugging Face model is loaded; "auto" is the one that it was saved in."""

ModelName = Annotated[
    str,
    typer.Option("--model", "-m", help="A Hugging Face directory or name, or module:factory.", show_default=False),
]
MaybeModelName = Annotated[
    str | None, typer.Option("--model", "-m", help="The model that has names for blocks that a file numbers.")
]
BankPath = Annotated[
    str, typer.Option("--bank", "-b", help="A file of vectors or of a steering, or a pattern.", show_default=False)
]
Concepts = Annotated[list[str] | None, typer.Option("--concept", help="Only this concept; may be repeated.")]
StrengthTexts = Annotated[
    list[str] | None,
    typer.Option("-c", help="The strength: 2 for all concepts, or nine=2; may be repeated. Or that of the file."),
]
RowPositions = Annotated[
    str | None,
    typer.Option("--positions", help="all, last, an index, or start:stop; of texts the last token, else all."),
]
READ: Any = {"exists": True, "dir_okay": False, "readable": True, "show_default": False}
"""What every file that is read as examples must be."""
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Texts, or rows, at a time.")]
Chat = Annotated[bool, typer.Option("--chat", help="Apply the tokenizer's chat template.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to run; an accelerator if there is one.")]
DtypeName = Annotated[
    Dtype,  # whose names, as they stand, are wider than what is said of every option
    typer.Option(
        "--dtype", metavar="<dtype>", help=f"In which dtype to load a Hugging Face model: {', '.join(get_args(Dtype))}."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with a Hugging Face model.")
]
OutPath = Annotated[Path, typer.Option("--output", "-o", help="Where to write.", show_default=False)]


def check_output(path: Path, *suffixes: str, inputs: Sequence[str | Path] = ()) -> None:
    """Before any work: whether something can be written there, and is not what is read.

    Raises:
        typer.BadParameter: another suffix, no such folder, or one of the inputs.
    """
    if path.suffix.lower() not in suffixes:
        raise typer.BadParameter(f"{path}: expected a name with {' or '.join(suffixes)}", param_hint="output")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path}: there is no folder {path.parent}; make it first", param_hint="output")
    patterns = [name for name in map(str, inputs) if not Path(name).exists()]
    read = {*map(str, inputs), *(name for pattern in patterns for name in glob.glob(pattern))}  # noqa: PTH207
    if any(Path(name).resolve() == path.resolve() for name in read):
        raise typer.BadParameter(f"{path}: it is read, and would be lost; choose another name", param_hint="output")


def strengths(texts: list[str]) -> list[float | dict[str, float]]:
    """What "-c 2 -c 4" means: two strengths; "-c nine=2 -c eight=-1": one, of two concepts.

    >>> strengths(["2", "nine=2", "eight=-1"])
    [2.0, {'nine': 2.0, 'eight': -1.0}]
    """
    found: list[float | dict[str, float]] = []
    named: dict[str, float] = {}
    for text in texts:
        concept, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise typer.BadParameter(f"{text!r}: expected a number, or concept=number", param_hint="-c") from None
        if not equals:
            found.append(value)
            continue
        if concept in named:
            raise typer.BadParameter(f"{text!r}: {concept!r} has a strength already", param_hint="-c")
        if not named:
            found.append(named)
        named[concept] = value
    return found


def one_strength(texts: list[str]) -> float | dict[str, float]:
    """The same where only one can be meant."""
    found = strengths(texts)
    if len(found) != 1:
        raise typer.BadParameter(f"{texts}: expected one strength, or one for each concept", param_hint="-c")
    return found[0]


def shard(text: str) -> tuple[int, int]:
    """ "2/8": part 2 of the parts 0 to 7.

    >>> shard("2/8")
    (2, 8)
    """
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise typer.BadParameter(f"{text!r}: expected i/n, from 0/n to n-1/n", param_hint="--shard")
    return int(number), int(of)


def size(text: str) -> tuple[int, ...]:
    """ "28x28": height and width; "1x28x28": the channel before them.

    >>> size("28x28")
    (28, 28)
    """
    parts = text.split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"{text!r}: expected height x width, as in 28x28, or 1x28x28", param_hint="--image")
    return tuple(map(int, parts))


def positions(text: str) -> Positions:
    """What `from_text` makes of it."""
    try:
        return from_text(text)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("positions: "), param_hint="--positions") from None
