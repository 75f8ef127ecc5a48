"""Resume: sums on disk, so that a pass over the data goes on where it was stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from os import PathLike
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, final

import torch
from torch import Tensor, nn

from actsteer.collecting import moments_file
from actsteer.errors import BatchError, FileFormatError, StatisticsError
from actsteer.files import sealed


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
        sealed.checked(path, writing=True)
        self._path, self._every, self._job = path, every, dict(job)
        self._digest = hashlib.sha256()  # of all batches so far
        self._expected = ""
        self.classes: moments_file.Classes = {}
        self.axes: dict[str, int] = {}
        self.done = 0
        if Path(path).exists():
            self._resume()

    def _resume(self) -> None:
        self.classes, document = moments_file.read(self._path, "checkpoint")
        found: list[Any] = [document.get(key) for key in ("job", "axes", "done", "batches")]
        job, axes, done, batches = found
        if (
            not (isinstance(job, dict) and isinstance(axes, dict) and isinstance(batches, str))
            or not all(type(number) is int for number in (done, *axes.values()))
            or done < 0
        ):
            raise FileFormatError(f"{self._path}: not what a pass has left there; give another path, or delete it")
        if job != self._job:
            changed = [k for k in {**self._job, **job} if job.get(k) != self._job.get(k)]
            raise StatisticsError(
                f"{self._path}: a checkpoint of another pass; {changed} differ; give another path, or delete it"
            )
        if strange := {site for own in self.classes.values() for site in own}.difference(job["sites"]):
            raise FileFormatError(f"{self._path}: it has sums of {sorted(strange)}, which are no sites of its pass")
        self.axes, self.done, self._expected = axes, done, batches

    def unseen(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, with what belongs to them, that are not in the sums yet; afterwards the file is written.

        Raises:
            BatchError: the batches before them are not those that were seen.
        """
        count = written = 0
        seen = self.done
        for batch in batches:
            count += 1
            _add(self._digest, batch)
            if count > seen:
                yield batch
                self.done = count
                if count % self._every == 0:
                    self._write()
                    written = count
            elif count == seen and self._digest.hexdigest() != self._expected:
                raise BatchError(
                    f"{self._path}: the first {count} batches are not those that were seen then; feed the same in the "
                    "same order, or delete the checkpoint"
                )
        if count < seen:
            raise BatchError(
                f"{self._path}: {seen} batches were seen then, there are {count} now; feed the same, or delete it"
            )
        if seen < count != written:
            self._write()

    def _write(self) -> None:
        document = {"job": self._job, "axes": self.axes, "done": self.done, "batches": self._digest.hexdigest()}
        moments_file.write(self._path, "checkpoint", self.classes, document)


def weights(model: nn.Module) -> str:
    """A digest of every parameter and buffer that lies in this process."""
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        local: Any = getattr(tensor, "_local_tensor", tensor)
        if not local.is_meta:
            _add(digest, [name, local])
    return digest.hexdigest()


def digest_of(batches: Iterable[Any]) -> str:
    """A digest of everything that batches hold."""
    digest = hashlib.sha256()
    for batch in batches:
        _add(digest, batch)
    return digest.hexdigest()


def code_of(function: Any) -> str:
    """A digest of what a function does: its code, constants and defaults, and what it closes over."""
    if isinstance(function, partial):
        given = digest_of([function.args, function.keywords])
        return f"{code_of(function.func)} {given}"
    function = function if isinstance(function, FunctionType) else vars(type(function)).get("__call__")
    code = getattr(function, "__code__", None)
    if code is None:
        return ""
    digest = hashlib.sha256(_described(code).encode())
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    _add(digest, [cells, list(function.__defaults__ or ()), function.__kwdefaults__ or {}])
    return digest.hexdigest()


def _described(code: CodeType) -> str:
    constants = [_described(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return repr((code.co_code, code.co_names, code.co_varnames, constants))


def _add(digest: Any, value: Any) -> None:
    """Take in what a batch holds."""
    if isinstance(value, Tensor) and value.is_nested:
        _add(digest, list(value.unbind()))
    elif hasattr(value, "__array__") and not isinstance(value, Tensor):
        _add(digest, [str(value.dtype), value.tolist()])
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(repr(key).encode())
            _add(digest, value[key])
    elif isinstance(value, tuple | list):
        digest.update(f"[{len(value)}]".encode())
        for member in value:
            _add(digest, member)
    elif isinstance(value, bool | int | float | str | None):
        digest.update(repr(value).encode())
