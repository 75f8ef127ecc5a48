"""Factory: `module:factory`, a model or an estimator that Python can import, or make without arguments."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import typer
from torch import nn

from actsteer.errors import UnsupportedModelError

_EXPECTED = {"MODEL": "a Hugging Face directory or name, or module:factory", "--estimator": "module:Class"}
_EXPECTED |= {"--metric": "module:function"}


def make(name: str) -> nn.Module:
    """The model that `module:factory` names, or that it makes without arguments."""
    model = made(name, nn.Module, hint="MODEL")
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(f"{name}: expected a torch.nn.Module, got {type(model).__name__}", param_hint="MODEL")
    return model


def made(name: str, kind: type, *, hint: str) -> Any:
    """What `module:factory` names, the current folder's modules included, if it is of this kind, or what it makes."""
    found = attribute(name, hint=hint)
    if not callable(found) or (isinstance(found, kind) and not isinstance(found, type)):
        return found
    try:
        return found()
    except Exception as error:
        raise _failed(name, error) from error


def attribute(name: str, *, hint: str) -> Any:
    """What `module:name` is, the current folder's modules included."""
    home, _, own = name.partition(":")
    if not all(part.isidentifier() for part in (*home.split("."), *own.split("."))):
        raise typer.BadParameter(f"{name}: expected module:factory, as in nets:build", param_hint=hint)
    try:
        found = imported(home)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{home}.".startswith(f"{error.name}."):
            raise typer.BadParameter(
                f"{name}: no folder, and no module {home!r} here or installed; expected {_EXPECTED[hint]}",
                param_hint=hint,
            ) from None
        raise _failed(name, error) from error
    for part in own.split("."):
        if not hasattr(found, part):
            raise typer.BadParameter(f"{name}: {home!r} has no {own!r}", param_hint=hint)
        found = getattr(found, part)
    return found


def imported(name: str) -> Any:
    """The module of this name, in the current folder, as `python -m` has it, or installed."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _failed(name: str, error: Exception) -> UnsupportedModelError:
    """What the user's code has raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else ""
    return UnsupportedModelError(
        f"{name} raised {type(error).__name__}: {error}{where}; expected an object, or what makes one without arguments"
    )
