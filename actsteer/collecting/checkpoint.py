"""Checkpoint: sums on disk, so that a pass over the data resumes where it was stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from actsteer.collecting import storage
from actsteer.errors import BatchError, StatisticsError


@final
class Checkpoint:
    """What has been seen of the batches so far.

    Args:
        path: the file, a `.safetensors`; read if it is there.
        every: write it after so many batches, and at the end.
        job: what is collected, and how; a file of another job is refused.
    """

    def __init__(self, path: str | PathLike[str], every: int, job: Mapping[str, Any]) -> None:
        if every < 1:
            raise ValueError(f"every: expected 1 batch or more, got {every}")
        self._path, self._every, self._job = path, every, dict(job)
        self._last = ""
        self.classes: storage.Classes = {}
        self.axes: dict[str, int] = {}
        self.done = 0
        if Path(path).exists():
            self._resume()

    def _resume(self) -> None:
        self.classes, document = storage.read(self._path, "checkpoint")
        if document["job"] != self._job:
            changed = [k for k in self._job if document["job"].get(k) != self._job[k]]
            raise StatisticsError(
                f"{self._path}: a checkpoint of another pass; {changed} differ; give another path, or delete it"
            )
        self.axes, self.done, self._last = document["axes"], document["done"], document["last"]

    def unseen(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches that are not in the sums yet; afterwards the file is written.

        Raises:
            BatchError: the batches before them are not those that were seen.
        """
        count = 0
        for batch in batches:
            count += 1
            if count > self.done:
                yield batch
                self.done = count
                if count % self._every == 0:
                    self.write(batch)
                    continue
                self._unwritten = batch
            elif count == self.done and _digest(batch) != self._last:
                raise BatchError(
                    f"{self._path}: batch {count} is not the one that was seen then; feed the same batches in the same "
                    "order, or delete the checkpoint"
                )
        if count < self.done:
            raise BatchError(
                f"{self._path}: {self.done} batches were seen then, and there are {count} now; feed the same"
            )
        if count and count % self._every and self._unwritten is not None:
            self.write(self._unwritten)

    _unwritten: Any = None

    def write(self, last: Any) -> None:
        """Write the sums so far; atomic."""
        self._last = _digest(last)
        document = {"job": self._job, "axes": self.axes, "done": self.done, "last": self._last}
        storage.write(self._path, "checkpoint", self.classes, document)


def weights(model: nn.Module) -> str:
    """A digest of a sample of every parameter's numbers."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        local: Any = getattr(parameter, "_local_tensor", parameter)
        if not local.is_meta:
            flat = local.detach().flatten()
            sample = torch.cat([flat[:64], flat[-64:]]).cpu().contiguous()
            digest.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(batch: Any) -> str:
    """A digest of what a batch holds."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        elif isinstance(value, Mapping):
            for key in value:
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, tuple | list):
            digest.update(f"[{len(value)}]".encode())
            for member in value:
                add(member)
        elif isinstance(value, bool | int | float | str | None):
            digest.update(repr(value).encode())

    add(batch)
    return digest.hexdigest()
