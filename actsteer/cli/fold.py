"""fold: a steering written into a model's weights, in files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors.torch import save_model

from actsteer.cli import banks, models, options, screen
from actsteer.cli.examples import one_batch
from actsteer.cli.options import (
    BankPath,
    Chat,
    Concepts,
    Device,
    DtypeName,
    ModelName,
    OutPath,
    StrengthTexts,
    TrustRemoteCode,
)
from actsteer.files.replacing import filling, replacing
from actsteer.folding import fold as folding


def fold(
    model: ModelName,
    bank: BankPath,
    verify_on: Annotated[
        Path, typer.Option(help="On which it is proved: texts, .txt or .jsonl, or inputs.", **options.READ)
    ],
    output: OutPath,
    c: StrengthTexts = None,
    concept: Concepts = None,
    chat: Chat = False,
    untie: Annotated[bool, typer.Option("--untie", help="Give a head tied to the embedding its own weights.")] = False,
    device: Device = None,
    dtype: DtypeName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a steering into the weights, prove it, and save the model: it then runs anywhere, without actsteer.

    A Hugging Face model becomes a directory that from_pretrained loads, its tokenizer included; any other model a
    .safetensors file of its weights.
    """
    banks.check(bank)
    strength = options.one_strength(c) if c else banks.strengths(bank, c)[0]
    _check_new(output)
    loaded = models.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    host: Any = loaded.model
    is_pretrained = hasattr(host, "save_pretrained")
    if is_pretrained == (output.suffix.lower() == ".safetensors"):
        wanted = "a name for a directory" if is_pretrained else "a name with .safetensors for the weights"
        raise typer.BadParameter(f"{output}: expected {wanted}", param_hint="output")
    if untie and not is_pretrained:
        raise typer.BadParameter(
            "weights alone do not say that the head has its own; fold in Python, and load them into a model whose head "
            "is not tied",
            param_hint="--untie",
        )
    companions = loaded.companions()
    steering = banks.read(bank, loaded.model, concept)
    batch = one_batch(verify_on, loaded, chat=chat)
    before = set(host.state_dict())
    folding.fold(loaded.model, steering, strength, verify_on=batch, untie=untie, inplace=True)
    if is_pretrained:
        with filling(output) as temporary:
            for part in (host, *companions):
                part.save_pretrained(temporary)
    else:
        with replacing(output) as temporary_file:
            save_model(host, str(temporary_file))
    created = sorted(set(host.state_dict()) - before)
    screen.say(f"proved on {verify_on}, written to {output}")
    if created:
        names = f"{', '.join(created[:3])}{', ...' * (len(created) > 3)}"
        where = "its config asks for them" if is_pretrained else "make the model with them before loading, bias=True"
        screen.say(f"it has {len(created)} new bias{'es' * (len(created) != 1)} ({names}); {where}")


def _check_new(path: Path) -> None:
    """Before any work: nothing that is there is written over."""
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path}: there is no folder {path.parent}; make it first", param_hint="output")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise typer.BadParameter(f"{path}: it is there already; choose a new name", param_hint="output")
