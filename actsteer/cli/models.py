"""Models: what a MODEL on the command line means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import nn

from actsteer.cli import factory, screen
from actsteer.cli.options import Dtype
from actsteer.errors import FileFormatError, UnsupportedModelError


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and what gives its tokenizer, and all that is saved with it, when asked for."""

    model: nn.Module
    tokenizer: Callable[[], Any]
    companions: Callable[[], list[Any]]


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
        typer.BadParameter: there is no such model, or no such device.
        UnsupportedModelError: what should make the model fails.
    """
    where = _device(device)
    if ":" in name and not Path(name).exists():
        if dtype != "auto":
            raise typer.BadParameter(f"{name}: its factory chooses the dtype", param_hint="--dtype")
        model = factory.make(name)
        return Loaded((model if device is None else model.to(where)).eval(), lambda: _no_tokenizer(name), lambda: [])
    try:
        import transformers
    except ImportError:
        raise typer.BadParameter(
            f"{name}: Hugging Face models need transformers; pip install 'actsteer[cli]'"
        ) from None
    if not screen.err.is_terminal:
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise typer.BadParameter(f"{name}: there is no such directory", param_hint="MODEL")
    remote: Any = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **remote)
        kind = _class_of(config, trust_remote_code)
        if empty:
            with torch.device("meta"):
                model = kind.from_config(config, **remote) if _is_auto(kind) else kind(config)
        else:
            model = kind.from_pretrained(name, dtype=dtype, weights_only=True, **remote).to(where)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        known = "" if Path(name).is_dir() else "there is no such folder, and no such model was found: "
        reason = str(error).strip() or type(error).__name__
        raise typer.BadParameter(
            f"{name}: {known}{reason}\nExpected a Hugging Face directory or name, or module:factory", param_hint="MODEL"
        ) from None
    return Loaded(model.eval(), lambda: _tokenizer(name, remote), lambda: _companions(name, remote))


def names(name: str | None, *, trust_remote_code: bool) -> nn.Module | None:
    """The model that names a file's blocks, without its weights, if one was given."""
    return None if name is None else load(name, trust_remote_code=trust_remote_code, empty=True).model


def _tokenizer(name: str, remote: dict[str, bool]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **remote)
    except (OSError, ValueError, KeyError):
        _no_tokenizer(name)


def _companions(name: str, remote: dict[str, bool]) -> list[Any]:
    """What is saved with the model: its tokenizer, its image processor or feature extractor, if it has them."""
    import transformers

    found: list[Any] = []
    for kind in (transformers.AutoTokenizer, transformers.AutoImageProcessor, transformers.AutoFeatureExtractor):
        with suppress(OSError, ValueError, KeyError, ImportError):
            found.append(kind.from_pretrained(name, **remote))
    return found


def check_folded(name: str) -> None:
    """Before any work: whether there is such a file or model.

    Raises:
        typer.BadParameter: there is none.
    """
    path, is_weights = Path(name), Path(name).suffix.lower() == ".safetensors"
    is_path = is_weights or name.startswith((".", "/", "~")) or (":" not in name and "/" not in name)
    if not path.exists() and is_path:
        raise typer.BadParameter(f"{name}: there is no such file or directory", param_hint="--folded")
    if path.is_file() and not is_weights:
        raise typer.BadParameter(f"{name}: expected a directory, or weights, .safetensors", param_hint="--folded")


def folded(name: str, loaded: Loaded, *, device: str | None, dtype: Dtype, trust_remote_code: bool) -> nn.Module:
    """A model of its own, or a `.safetensors` file of the weights of one like `loaded`."""
    if Path(name).suffix.lower() != ".safetensors" or Path(name).is_dir():
        return load(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code).model
    model = copy.deepcopy(loaded.model)
    for key, tensor in load_file(name).items():
        owner, _, own = key.rpartition(".")
        if own == "bias" and key not in model.state_dict() and owner in dict(model.named_modules()):
            model.get_submodule(owner).register_parameter(own, nn.Parameter(torch.empty_like(tensor)))
    try:
        load_model(model, name)
    except (RuntimeError, SafetensorError) as error:
        raise FileFormatError(f"{name}: not the weights of this {type(model).__name__} ({error})") from None
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


def _device(name: str | None) -> torch.device:
    """The device of this name or, without one, the accelerator if there is one."""
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(f"{name}: there is no such device here ({reason})", param_hint="--device") from None
    if device.type == "meta":
        raise typer.BadParameter("meta: nothing can be computed there", param_hint="--device")
    return device


def _no_tokenizer(name: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{name} has no tokenizer, and texts need one; give tensors, .safetensors or .pt, as the model takes them"
    )
