"""fold: a steering written into a model's weights, in files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors.torch import save_model

from actsteer.cli import models, options, screen
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
from actsteer.files.sealed import replacing
from actsteer.steering.folding import fold as folding
from actsteer.vectors.bank import VectorBank


def fold(
    model: ModelName,
    bank: BankPath,
    c: StrengthTexts,
    verify_on: Annotated[
        Path, typer.Option(help="On which it is proved: texts, .txt or .jsonl, or inputs.", show_default=False)
    ],
    output: OutPath,
    concept: Concepts = None,
    chat: Chat = False,
    device: Device = None,
    dtype: DtypeName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a steering into the weights, prove it, and save the model: it then runs anywhere, without actsteer.

    A Hugging Face model becomes a directory that from_pretrained loads, its tokenizer included; any other model a
    .safetensors file of its weights.
    """
    strength = options.one_strength(c)
    loaded = models.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    host: Any = loaded.model
    is_pretrained = hasattr(host, "save_pretrained")
    _check_output(output, is_pretrained=is_pretrained)
    vectors = VectorBank.load(bank, loaded.model)
    vectors = vectors.select(*concept) if concept else vectors
    batch = one_batch(verify_on, loaded, chat=chat)
    before = set(host.state_dict())
    folding.fold(loaded.model, vectors, strength, verify_on=batch, inplace=True)
    if is_pretrained:
        host.save_pretrained(output)
        loaded.tokenizer().save_pretrained(output)
    else:
        with replacing(output) as temporary:
            save_model(host, str(temporary))
    created = sorted(set(host.state_dict()) - before)
    screen.say(f"proved on {verify_on}, written to {output}")
    if created:
        screen.say(f"it has {len(created)} new biases, {created[0]} the first")


def _check_output(path: Path, *, is_pretrained: bool) -> None:
    """Before any work."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    if is_pretrained and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise typer.BadParameter(f"{path}: expected a new or an empty directory", param_hint="--output")
    if not is_pretrained and path.suffix != ".safetensors":
        raise typer.BadParameter(f"{path}: expected a name with .safetensors for the weights", param_hint="--output")
