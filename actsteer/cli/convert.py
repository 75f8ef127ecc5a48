"""convert: from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actsteer.cli import banks, models, options, screen
from actsteer.cli.options import Concepts, MaybeModelName, TrustRemoteCode


def convert(
    source: Annotated[
        str, typer.Argument(metavar="A", help="A file of vectors or of a steering, or a pattern of several, in quotes.")
    ],
    target: Annotated[Path, typer.Argument(metavar="B", help="A .safetensors file, or a .gguf of one vector.")],
    concept: Concepts = None,
    model: MaybeModelName = None,
    source_offset: Annotated[
        int, typer.Option(help="What A's numbers are above those of the blocks, which count from 0.")
    ] = 0,
    target_offset: Annotated[int, typer.Option(help="The same for B, a .gguf.")] = 0,
    form: Annotated[
        str | None,
        typer.Option("--format", help="A Python module of your own, with SUFFIX, read and write, for A or B."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Read vectors in one format and write them in another; several files into one bank, too.

    Reads .safetensors (actsteer's own, and steering-lite's), .gguf (llama.cpp, repeng, EasySteer), .svec, and .pt files
    of tensors alone (CAA, RepE). Where a file numbers a model's blocks and does not say of which model, name it with
    --model. A steering that is more than its vectors stays so, as .safetensors. Nothing is written over but a file of
    actsteer's with the same concepts.
    """
    mine = None if form is None else banks.format_of(form)
    reads, writes = (
        mine if mine is not None and str(name).lower().endswith(mine.SUFFIX) else None for name in (source, target)
    )
    if mine is not None and reads is writes is None:
        raise typer.BadParameter(f"{form}: its files end in {mine.SUFFIX}", param_hint="--format")
    if target_offset and target.suffix.lower() != ".gguf" and writes is None:
        raise typer.BadParameter("only a .gguf numbers the blocks", param_hint="--target-offset")
    suffixes = (".safetensors", ".gguf") if writes is None else (target.suffix.lower(),)
    options.check_output(target, *suffixes, inputs=[source])
    banks.check_own(target, "bank")
    banks.check(source)
    named = models.names(model, trust_remote_code=trust_remote_code)
    steering = banks.read(source, named, concept, layer_offset=source_offset, form=reads)
    banks.check_concepts(target, steering, form=writes)
    if steering.is_plain:
        steering.vectors.save(target, layer_offset=target_offset, format=writes)
    elif writes is not None:
        raise typer.BadParameter(f"{form}: a format holds vectors alone, and {source} more", param_hint="--format")
    else:
        steering.save(target)
    concepts = steering.concepts
    screen.say(f"{len(concepts)} concept{'s' * (len(concepts) != 1)} written to {target}: {', '.join(concepts)}")
