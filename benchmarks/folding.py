"""What a fold takes, and how that grows: `python -m benchmarks.folding [--out FILE.json] [--repeats N] [--quick]`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from actsteer import Ablate, SteeringVector, fold, residual_writers
from benchmarks.extraction import blocks_of, language_model
from benchmarks.latency import Row, seconds, table, width
from benchmarks.overhead import described
from benchmarks.timing import Ratio, no_collection, set_threads

TOKENS = 16  # on which a fold is proved, and which a forward pass has
Sites = tuple[str, ...]


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file too.")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the processor.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model: a check that it works.")] = False,
) -> None:
    """Time `fold` of Ablate at what writes to the residual stream, beside a forward pass, on 30 blocks with d = 576."""
    with set_threads(threads):
        model = language_model(quick=quick, tied=True)
        rows = timed(model, cases(model), rounds=repeats)
    Console(width=150).print(table(rows, title=f"fold of Ablate, {blocks_of(model)} blocks, d = {width(model)}"))
    if out is not None:
        command = f"python -m benchmarks.folding --repeats {repeats} --threads {threads}" + " --quick" * quick
        document = described(command) | {"rows": [asdict(row) for row in rows]}
        out.write_text(json.dumps(document, indent=2) + "\n")


def cases(model: nn.Module) -> dict[int, Sites]:
    """The number of sites -> so many of the outputs of attention and MLP: all of them, half and a quarter."""
    every = residual_writers(model, slice(None))
    return {count: every[:count] for count in (len(every) // 4, len(every) // 2, len(every))}


def timed(model: nn.Module, sites: Mapping[int, Sites], *, rounds: int) -> list[Row]:
    """A fold at these sites, and one at the whole stream, each over a forward pass beside it; and how it grows."""
    tokens = torch.arange(TOKENS)[None]
    forward = partial(model, tokens)
    ways = {f"{count} sites": partial(folded, model, own, tokens) for count, own in sites.items()}
    ways["the whole stream"] = partial(folded, model, residual_writers(model), tokens)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad(), no_collection():
        for turn in range(rounds + 1):
            for name in sorted(ways, reverse=bool(turn % 2)):
                beside, own = seconds(forward, 3) / 3, seconds(ways[name])
                if turn:  # the first warms up
                    taken[name].append(own)
                    ratios[name].append(own / beside)
    found = [Row(name, Ratio.of(own), "x", "a forward pass") for name, own in ratios.items()]
    few, _, many = (f"{count} sites" for count in sites)
    growth = [more / less for more, less in zip(taken[many], taken[few], strict=True)]
    return [*found, Row(f"{many}, of {few}", Ratio.of(growth), "x", few)]


def folded(model: nn.Module, sites: Sites, tokens: torch.Tensor) -> nn.Module:
    """A copy with one direction ablated at all these sites."""
    direction = torch.randn(width(model), generator=torch.Generator().manual_seed(0))
    v = SteeringVector(dict.fromkeys(sites, direction))
    return fold(model, v, 1.0, intervention=Ablate(), untie=True, verify_on=tokens)


if __name__ == "__main__":
    typer.run(main)
