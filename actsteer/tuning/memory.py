"""Memory: what has been measured so far, in a file if there is one, so that a search goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from actsteer.errors import FileFormatError, StatisticsError
from actsteer.files import sealed
from actsteer.tuning.metrics import Figures

_EVERY = 20.0  # seconds


@final
class Memory:
    """Figures by key; what is asked for twice is measured once.

    Args:
        path: a `.safetensors`, read if it is there; None keeps nothing.
        job: what is measured, and how; a file of another job is refused.
    """

    def __init__(self, path: str | PathLike[str] | None, job: Mapping[str, Any]) -> None:
        self._path = None if path is None else sealed.checked(path, writing=True)
        self._job, self._known = dict(job), dict[str, Figures]()
        self._written = time.monotonic()
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        tensors, document = sealed.read(path, kind="calibration")
        job, keys = document.get("job"), document.get("keys")
        if not isinstance(job, dict) or not isinstance(keys, list):
            raise FileFormatError(f"{path}: not what a calibration has left there; give another path, or delete it")
        if changed := [name for name in {**self._job, **job} if job.get(name) != self._job.get(name)]:
            raise StatisticsError(
                f"{path}: a checkpoint of another calibration; {changed} differ; give another path, or delete it"
            )
        for name, row in tensors.items():
            number, _, figure = name.partition("/")
            self._known.setdefault(keys[int(number)], {})[figure] = row

    def get(self, key: str) -> Figures | None:
        """What was measured under this key, if it was."""
        return self._known.get(key)

    def keep(self, key: str, figures: Figures) -> Figures:
        """The figures, which are known from now on."""
        self._known[key] = {name: row.clone() for name, row in figures.items()}
        if self._path is not None and time.monotonic() - self._written > _EVERY:
            self.write()
        return self._known[key]

    def once(self, key: str, measure: Callable[[], Figures]) -> Figures:
        """What is known under this key, or is measured now."""
        known = self.get(key)
        return self.keep(key, measure()) if known is None else known

    def write(self) -> None:
        """Write the file, if there is to be one."""
        if self._path is None:
            return
        tensors: dict[str, Tensor] = {
            f"{number}/{name}": row for number, own in enumerate(self._known.values()) for name, row in own.items()
        }
        sealed.write(self._path, tensors, {"kind": "calibration", "job": self._job, "keys": list(self._known)})
        self._written = time.monotonic()


def number(value: float) -> Figures:
    """One number as figures."""
    return {"number": torch.tensor([value], dtype=torch.float64)}
