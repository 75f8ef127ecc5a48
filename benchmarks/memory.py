"""Peak memory of a piece of work, in a process of its own: what it holds above what was there before it began."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def peak(work: Callable[..., Any], *arguments: Any, threads: int = 1) -> float:
    """Megabytes by which the resident memory grew at most during `work(*arguments)()`.

    `work` sets up, loads what is allocated once and for all, and returns what is measured; it has a process of its own.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, work, arguments, threads))
    process.start()
    sender.close()
    try:
        found: float = receiver.recv()
    finally:
        process.join()
    return found


def _measure(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    run = work(*arguments)
    before = _resident()
    run()
    sender.send(max(0.0, _highest() - before))


def _resident() -> float:
    """Megabytes now; the highest so far is forgotten where the system lets us."""
    if not STATUS.exists():
        return _highest()
    RESET.write_text("5")
    return _field("VmRSS")


def _highest() -> float:
    if STATUS.exists():
        return _field("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def _field(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1e3
