"""Interleaved timing: each run is divided by a run of the unhooked model right beside it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.models import Setting, Variant

SLOW = 5  # a model of which one forward pass fills a run gets 1 / SLOW of the rounds


@dataclass(frozen=True)
class Ratio:
    """Time over the time of the unhooked run beside it: the median of the rounds, and the quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, ratios: list[float]) -> Ratio:
        """The median and quartiles of one ratio per round."""
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, lower, upper)

    def inverse(self) -> Ratio:
        """The ratio of speeds."""
        return Ratio(1 / self.median, 1 / self.upper, 1 / self.lower)


@dataclass(frozen=True)
class Timing:
    """One setting with one number of threads: what a forward pass takes unhooked, and every variant's ratio to it."""

    setting: str
    threads: int
    unhooked_microseconds: float
    forwards_per_run: int
    rounds: int
    ratios: dict[str, Ratio]


def compare(setting: Setting, ways: dict[str, Variant], *, threads: int, rounds: int, seconds: float) -> Timing:
    """Time every variant in every round, in rotating order, each beside an unhooked run, before or after it by turns.

    A run is as many forward passes as take `seconds`; a model of which one pass takes longer gets fewer rounds.
    """
    with set_threads(threads), torch.inference_mode(), no_collection():
        own_time = threads == 1 and not setting.x.is_cuda  # in which other processes do not count
        clock = time.thread_time if own_time else time.perf_counter
        forwards = _forwards_in(setting, seconds)
        rounds = rounds if forwards > 1 else max(2, rounds // SLOW)
        unhooked: list[float] = []
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        names = list(ways)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                before = _run(setting, setting.model, forwards, clock) if turn % 2 else 0.0
                with ways[name]() as model:
                    setting.run(model)  # the first forward pass after attaching is not the usual one
                    taken = _run(setting, model, forwards, clock)
                beside = before or _run(setting, setting.model, forwards, clock)
                unhooked.append(beside / forwards)
                ratios[name].append(taken / beside)
    microseconds = statistics.median(unhooked) * 1e6
    return Timing(
        setting.name, threads, microseconds, forwards, rounds, {name: Ratio.of(r) for name, r in ratios.items()}
    )


def _run(setting: Setting, model: nn.Module, forwards: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(forwards):
        setting.run(model)
    if setting.x.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def _forwards_in(setting: Setting, seconds: float) -> int:
    forwards = 1
    setting.run(setting.model)
    while _run(setting, setting.model, forwards, time.perf_counter) < seconds:
        forwards *= 2
    return forwards


@contextmanager
def set_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
