"""Models: what a MODEL on the command line means."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from actsteer.cli import screen
from actsteer.cli.options import Dtype
from actsteer.errors import FileFormatError, UnsupportedModelError


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and what makes its tokenizer when texts are read."""

    model: nn.Module
    tokenizer: Callable[[], Any]


def load(
    name: str,
    *,
    device: str | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    empty: bool = False,
) -> Loaded:
    """A Hugging Face directory or name, or `module:factory`, a model or what makes one without arguments.

    Args:
        empty: of a Hugging Face model only the names and shapes, without its weights.

    Raises:
        typer.BadParameter: there is no such model.
    """
    if ":" in name and not Path(name).exists():
        model = _made(name)
        return Loaded((model if device is None else model.to(device)).eval(), lambda: _no_tokenizer(name))
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise typer.BadParameter(f"{name}: there is no such directory", param_hint="MODEL")
    try:
        import transformers
    except ImportError:
        raise typer.BadParameter(
            f"{name}: Hugging Face models need transformers; pip install 'actsteer[cli]'"
        ) from None
    if not screen.err.is_terminal:
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        kind = _class_of(config, trust_remote_code)
        if empty:
            with torch.device("meta"):
                model = (
                    kind.from_config(config, trust_remote_code=trust_remote_code) if _is_auto(kind) else kind(config)
                )
        else:
            model = kind.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code, weights_only=True)
            model = model.to(device or _accelerator())
    except (OSError, ValueError, KeyError) as error:
        raise typer.BadParameter(f"{name}: {str(error).strip() or type(error).__name__}", param_hint="MODEL") from None
    return Loaded(
        model.eval(), lambda: transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    )


def folded(name: str, loaded: Loaded, *, device: str | None, dtype: Dtype, trust_remote_code: bool) -> nn.Module:
    """A model of its own, or a `.safetensors` file of the weights of one like `loaded`."""
    if Path(name).suffix != ".safetensors":
        return load(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code).model
    model = copy.deepcopy(loaded.model)
    try:
        load_model(model, name)
    except (RuntimeError, SafetensorError) as error:
        raise FileFormatError(f"{name}: not the weights of this {type(model).__name__} ({error})") from None
    return model


def _made(name: str) -> nn.Module:
    """What `module:factory` names, the current folder's modules included."""
    home, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it
    try:
        found: Any = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{home}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it needs is not
        raise typer.BadParameter(
            f"{name}: no folder, and no module {home!r} here or installed; expected a Hugging Face directory or name, "
            "or module:factory",
            param_hint="MODEL",
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise typer.BadParameter(f"{name}: {home!r} has no {attribute!r}", param_hint="MODEL")
        found = getattr(found, part)
    model = found() if not isinstance(found, nn.Module) and callable(found) else found
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(f"{name}: expected a torch.nn.Module, got {type(model).__name__}", param_hint="MODEL")
    return model


def _class_of(config: Any, trust_remote_code: bool) -> Any:
    """The class that the weights were saved from, so that a vector fits the model that Python code loads."""
    import transformers

    if trust_remote_code and getattr(config, "auto_map", None):
        return getattr(transformers, next((k for k in config.auto_map if k.startswith("AutoModel")), "AutoModel"))
    kind = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def _is_auto(kind: Any) -> bool:
    return not issubclass(kind, nn.Module)


def _accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _no_tokenizer(name: str) -> Any:
    raise UnsupportedModelError(
        f"{name}: texts need a Hugging Face model with a tokenizer; of another model give tensors, .safetensors or .pt"
    )
