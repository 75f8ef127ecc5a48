"""convert: from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actsteer.cli import banks, models, options, screen
from actsteer.cli.options import Concepts, MaybeModelName, TrustRemoteCode


def convert(
    source: Annotated[str, typer.Argument(metavar="A", help="Any file of vectors, or a pattern.")],
    target: Annotated[Path, typer.Argument(metavar="B", help="A .safetensors file, or a .gguf of one vector.")],
    concept: Concepts = None,
    model: MaybeModelName = None,
    source_offset: Annotated[
        int, typer.Option(help="What A's numbers are above those of the blocks, which count from 0.")
    ] = 0,
    target_offset: Annotated[int, typer.Option(help="The same for B, a .gguf.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Read vectors in one format and write them in another; several files into one bank, too.

    Reads .safetensors (actsteer's own, and steering-lite's), .gguf (llama.cpp, repeng, EasySteer), .svec, and .pt files
    of tensors alone. Where a file numbers a model's blocks and does not say of which model, name it with --model.
    """
    if target_offset and target.suffix.lower() != ".gguf":
        raise typer.BadParameter("only a .gguf numbers the blocks", param_hint="--target-offset")
    options.check_output(target, ".safetensors", ".gguf", inputs=[source])
    banks.check(source)
    named = models.names(model, trust_remote_code=trust_remote_code)
    bank = banks.read(source, named, concept, layer_offset=source_offset)
    bank.save(target, layer_offset=target_offset)
    screen.say(f"{len(bank)} concept{'s' * (len(bank) != 1)} written to {target}: {', '.join(bank.concepts)}")
