"""look: one page that shows what a steering does to prompts, or to other inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from actsteer.cli import banks, examples, models, options, screen
from actsteer.cli.options import BankPath, Chat, Concepts, Device, DtypeName, ModelName, OutPath, TrustRemoteCode
from actsteer.looking.look import look as shown


def look(
    model: ModelName,
    bank: BankPath,
    prompts: Annotated[
        Path, typer.Option("--prompts", help="Texts, .txt or .jsonl, or inputs, .pt or .safetensors.", **options.READ)
    ],
    output: OutPath,
    c: Annotated[list[str] | None, typer.Option("-c", help="The strength; that of the file, or 1.")] = None,
    concept: Concepts = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="How many tokens a text goes on for at most.")] = 32,
    positions: Annotated[
        str | None,
        typer.Option(help="all, prompt, generated, last, an index, or start:stop. Or those of the file."),
    ] = None,
    image_shape: Annotated[
        str | None, typer.Option(help="28x28 or 3x32x32, of inputs that are images and come flat.")
    ] = None,
    chat: Chat = False,
    device: Device = None,
    dtype: DtypeName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write one HTML file that shows what a steering does: each token or row, at each site, plain and steered.

    It needs no server and no network. Texts go on in both runs, side by side.
    """
    banks.check(bank)
    options.check_output(output, ".html", inputs=[bank, prompts])
    strength = options.one_strength(c) if c else None
    where = None if positions is None else options.positions(positions)
    shape = None if image_shape is None else _shape(image_shape)
    loaded = models.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    steering = banks.read(bank, loaded.model, concept)
    batches, are_texts = examples.batches(prompts, loaded, batch_size=1, chat=chat)
    inputs: Any = batches if are_texts or isinstance(batches, Tensor) else list(batches)
    page = shown(
        loaded.model,
        steering,
        inputs=inputs,
        tokenizer=loaded.tokenizer() if are_texts else None,
        c=strength,
        positions=where,
        max_new_tokens=max_new_tokens,
        image_shape=shape,
    )
    page.save(output)
    screen.say(f"{output}: {output.stat().st_size:,} bytes")


def _shape(text: str) -> list[int]:
    """ "28x28": 28 and 28."""
    sides = text.lower().split("x")
    if len(sides) not in (2, 3) or not all(side.isdecimal() and int(side) for side in sides):
        raise typer.BadParameter(f"{text!r}: expected HxW or CxHxW", param_hint="--image-shape")
    return [int(side) for side in sides]
