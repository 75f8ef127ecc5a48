"""Examples: files of inputs, texts or tensors, as batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from actsteer.cli.models import Loaded
from actsteer.collecting.batches import Batches
from actsteer.collecting.texts import input_device, text_batches


def read(path: Path) -> list[Any] | Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
    """`.txt`: a text a line; `.jsonl`: a string or a conversation a line; `.safetensors`, `.pt`: the model's inputs.

    Raises:
        typer.BadParameter: no such file, or not what its suffix says.
    """
    try:
        if path.suffix in (".txt", ".jsonl"):
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            texts = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
            if not texts or not all(isinstance(text, str | list) for text in texts):
                raise ValueError("expected one or more texts, or conversations, a line each")
            return texts
        if path.suffix == ".safetensors":
            named = load_file(path)
            return next(iter(named.values())) if len(named) == 1 else named
        if path.suffix in (".pt", ".pth"):
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
            if not _is_input(found):
                raise ValueError("expected a tensor, a tuple of them, or a mapping name -> tensor")
            return tuple(found) if isinstance(found, list) else found
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError, EOFError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="FILE") from None
    except Exception as error:  # torch.load, of what it will not unpickle
        raise typer.BadParameter(
            f"{path}: only tensors are read ({str(error).splitlines()[0]})", param_hint="FILE"
        ) from None
    raise typer.BadParameter(
        f"{path}: expected texts, .txt or .jsonl, or tensors, .safetensors or .pt", param_hint="FILE"
    )


def batches(path: Path, loaded: Loaded, *, batch_size: int, chat: bool = False) -> tuple[Batches, bool]:
    """A file's inputs as batches on the model's device, and whether they are texts."""
    found = read(path)
    device = input_device(loaded.model)
    if isinstance(found, list):
        return text_batches(loaded.tokenizer(), found, batch_size=batch_size, chat=chat, device=device), True
    if isinstance(found, Tensor):
        return found.to(device), False
    if isinstance(found, dict):
        return [{name: tensor.to(device) for name, tensor in found.items()}], False
    return [tuple(tensor.to(device) for tensor in found)], False


def one_batch(path: Path, loaded: Loaded, *, chat: bool = False) -> Any:
    """The same as one batch."""
    found, _ = batches(path, loaded, batch_size=2**31, chat=chat)
    return found if isinstance(found, Tensor) else next(iter(found))


def _is_input(found: Any) -> bool:
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, tuple | list) else [found]
    return bool(len(parts)) and all(isinstance(part, Tensor) for part in parts)
