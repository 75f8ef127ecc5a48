"""How fast rows become a covariance: `python -m benchmarks.covariance [--out FILE] [--d 4096] [--rows N] [--peer]`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from actsteer import ConceptErasure, Moments, Statistics
from benchmarks.memory import peak
from benchmarks.overhead import described, shown
from benchmarks.timing import Ratio, set_threads


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file too.")] = None,
    d: Annotated[int, typer.Option(min=2, help="Features.")] = 4096,
    rows: Annotated[int, typer.Option(min=2, help="Rows, in float32.")] = 4096,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the processor.")] = 2,
    peer: Annotated[bool, typer.Option("--peer", help="Beside concept-erasure instead, d = 768.")] = False,
) -> None:
    """Time Moments.update against one float64 product XᵀX of the same rows, and compare with two passes over them."""
    console = Console(width=120)
    if peer:
        for dtype in (torch.float32, torch.float64):
            beside_peer(console, repeats, threads, dtype=dtype)
        return
    x = data(rows, d)
    with set_threads(threads):
        exact = x.double()
        rates: dict[str, list[float]] = {"blocks of 512": [], "one batch": []}
        for _ in range(repeats):
            product = seconds(partial(torch.mm, exact.T, exact))
            rates["blocks of 512"].append(product / seconds(partial(streamed, x, 512)))
            rates["one batch"].append(product / seconds(partial(streamed, x, rows)))
        error = relative_error(streamed(x, 512).scatter, exact)
    whole = d * d * 8 / 1e6
    memory = peak(work, rows, d, threads=threads) / whole
    for name, found in rates.items():
        console.print(f"{name}: rate / rate of the float64 product beside it: {shown(Ratio.of(found))}")
    console.print(f"largest error of the covariance, relative to the largest variance: {error:.1e}")
    console.print(f"peak memory, reading the covariance included: {memory:.2f} d x d matrices of float64")
    if out is not None:
        command = f"python -m benchmarks.covariance --d {d} --rows {rows} --repeats {repeats} --threads {threads}"
        ratios = {name: vars(Ratio.of(found)) for name, found in rates.items()}
        results = {"rates": ratios, "relative error": error, "matrices": memory}
        out.write_text(json.dumps(described(command) | results, indent=2) + "\n")


def data(rows: int, d: int) -> Tensor:
    """Rows with a mean, and features that vary together."""
    generator = torch.Generator().manual_seed(0)
    rows_alone: Tensor = torch.randn(rows, d, generator=generator).cumsum(dim=1) / d**0.5
    return rows_alone + torch.randn(d, generator=generator)


def streamed(x: Tensor, size: int) -> Moments:
    """The moments of these rows, batch by batch."""
    moments = Moments.empty(x.shape[1], covariance=True)
    for batch in x.split(size):
        moments.update(batch)
    return moments


def relative_error(scatter: Tensor, exact: Tensor) -> float:
    """The largest entry of the difference from two passes in float64."""
    centred = exact - exact.mean(dim=0)
    truth = centred.T @ centred
    return float((scatter - truth).abs().max() / truth.diagonal().max())


def beside_peer(
    console: Console, repeats: int, threads: int, *, dtype: torch.dtype, rows: int = 20_000, d: int = 768
) -> None:
    """The statistics of two classes, as an eraser needs them, and the edited rows, beside those of concept-erasure.

    Needs `pip install --no-deps concept-erasure==0.2.4`; both sum in float64, in turns.
    """
    from concept_erasure import LeaceFitter  # type: ignore[import-not-found]

    labels = torch.arange(rows) % 2
    x = (data(rows, d) + labels[:, None] * torch.linspace(0, 1, d)).to(dtype)
    codes = torch.nn.functional.one_hot(labels, 2)

    def theirs(size: int) -> Any:
        fitter = LeaceFitter(d, 2, dtype=torch.float64, shrinkage=False, constrain_cov_trace=False, svd_tol=1e-9)
        for batch, code in zip(x.split(size), codes.split(size), strict=True):
            fitter.update(batch, code)
        return fitter

    def ours(size: int) -> list[Moments]:
        classes = [Moments.empty(d, covariance=True) for _ in range(2)]
        for batch, label in zip(x.split(size), labels.split(size), strict=True):
            for own, moments in enumerate(classes):
                moments.update(batch[label == own])
        return classes

    clock = time.thread_time if threads == 1 else time.perf_counter  # other processes do not count in the first
    with set_threads(threads):
        for size in (64, 256, 1024):
            runs = ([seconds(partial(way, size), clock) for way in (ours, theirs)] for _ in range(repeats))
            ratios = [own / beside for own, beside in runs]
            console.print(f"{dtype}, batches of {size}: time / time of concept-erasure: {shown(Ratio.of(ratios))}")
        negative, positive = (Statistics({"0": moments}) for moments in ours(256))
        edit, exact = ConceptErasure()(positive=positive, negative=negative).at("0"), x.double()
        found = edit(exact, edit.offsets, torch.ones(()))
        expected = theirs(256).eraser(exact)
    console.print(f"{dtype}: largest difference of the edited rows: {float((found - expected).abs().max()):.1e}")


def seconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def work(rows: int, d: int) -> Any:
    """What the memory is measured of."""
    x = data(min(rows, 1024), d)
    streamed(x[:, :8], 512)
    return lambda: streamed(x, 512).covariance


if __name__ == "__main__":
    typer.run(main)
