"""Examples: files of inputs, texts or tensors, as batches."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from actsteer.cli.models import Loaded
from actsteer.collecting.batches import Batches
from actsteer.collecting.texts import TextStream, input_device, text_batches

_TENSORS = "expected a tensor, a tuple of them, or a mapping name -> tensor"


def read(path: Path) -> Any:
    """`.txt`: a text a line; `.jsonl`: a string or a conversation a line; `.safetensors`, `.pt`: the model's inputs.

    Raises:
        typer.BadParameter: not what its suffix says.
    """
    try:
        match path.suffix.lower():
            case ".txt" | ".jsonl" as suffix:
                return _texts(path, is_json=suffix == ".jsonl")
            case ".safetensors":
                return _inputs(load_file(path))
            case ".pt" | ".pth":
                try:
                    return _inputs(torch.load(path, map_location="cpu", weights_only=True))
                except Exception:
                    raise ValueError(f"{_TENSORS}, and nothing is unpickled beside them") from None
            case _:
                raise ValueError("expected texts, .txt or .jsonl, or tensors, .safetensors or .pt")
    except (OSError, ValueError, SafetensorError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="FILE") from None


def _texts(path: Path, *, is_json: bool) -> list[Any]:
    texts: list[Any] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                texts.append(_checked(json.loads(line)) if is_json else line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    if not texts:
        raise ValueError("expected one or more texts, a line each")
    return texts


def _checked(text: Any) -> Any:
    """A text, or the messages of a conversation."""
    roles = {"role", "content"}
    is_conversation = isinstance(text, list) and text and all(isinstance(m, dict) and roles <= m.keys() for m in text)
    if not isinstance(text, str) and not is_conversation:
        raise ValueError('expected a string, or messages [{"role": ..., "content": ...}, ...]')
    return text


def _inputs(found: Any) -> Any:
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, tuple | list) else [found]
    if not len(parts) or not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(_TENSORS)
    return tuple(found) if isinstance(found, list) else found


def batches(path: Path, loaded: Loaded, *, batch_size: int, chat: bool = False) -> tuple[Batches, bool]:
    """A file's inputs as batches on the model's device, and whether they are texts."""
    found = read(path)
    device = input_device(loaded.model)
    if isinstance(found, list):
        tokenizer = loaded.tokenizer()
        if not chat and any(not isinstance(text, str) for text in found):
            raise typer.BadParameter(f"{path}: it has conversations, which need --chat", param_hint="FILE")
        if chat and not getattr(tokenizer, "chat_template", None):
            raise typer.BadParameter("the model's tokenizer has no chat template", param_hint="--chat")
        texts = text_batches(tokenizer, found, batch_size=batch_size, chat=chat, device=device)
        return _with_decoder(texts, loaded), True
    if isinstance(found, Tensor):
        return found.to(device), False
    if isinstance(found, dict):
        named = {name: tensor.to(device) for name, tensor in found.items()}
        if len(named) == 1 and not named.keys() & inspect.signature(loaded.model.forward).parameters.keys():
            return next(iter(named.values())), False  # a tensor that had to have a name in its file
        return [named], False
    return [tuple(tensor.to(device) for tensor in found)], False


def dataset_batches(
    name: str, loaded: Loaded, *, split: str, column: str, config: str | None, batch_size: int, chat: bool
) -> TextStream:
    """The texts of a dataset, a directory or a name, read as they are needed.

    Raises:
        typer.BadParameter: there is none, or `datasets` is not installed.
    """
    hint = "--texts"
    if getattr(getattr(loaded.model, "config", None), "is_encoder_decoder", False):
        raise typer.BadParameter("a model with a decoder of its own takes texts from a file", param_hint=hint)
    if not Path(name).exists() and (Path(name).suffix or name.startswith((".", "/", "~"))):
        raise typer.BadParameter(f"{name}: there is no such file or directory", param_hint=hint)
    try:
        import datasets
    except ImportError:
        raise typer.BadParameter(
            f"{name}: no file, and a dataset needs pip install 'actsteer[datasets]'", param_hint=hint
        ) from None
    try:
        if (Path(name) / "dataset_info.json").exists():
            found: Any = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"{name}: no file, and no dataset was found: {error}", param_hint=hint) from None
    device, tokenizer = input_device(loaded.model), loaded.tokenizer()
    stream: TextStream = text_batches(tokenizer, found, batch_size=batch_size, chat=chat, column=column, device=device)
    return stream


def one_batch(path: Path, loaded: Loaded, *, chat: bool = False) -> Any:
    """The same as one batch."""
    found, _ = batches(path, loaded, batch_size=2**31, chat=chat)
    return found if isinstance(found, Tensor) else next(iter(found))


def _with_decoder(texts: Iterable[dict[str, Tensor]], loaded: Loaded) -> Batches:
    """The texts for the encoder, and for the decoder, if there is one, the token with which it starts."""
    config: Any = getattr(loaded.model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return texts
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    return [batch | {"decoder_input_ids": torch.full_like(batch["input_ids"][:, :1], start or 0)} for batch in texts]
