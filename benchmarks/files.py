"""How fast a large bank opens: `python -m benchmarks.files [--out FILE.json] [--concepts N] [--d N] [--repeats N]`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file

from actsteer import SteeringVector, VectorBank
from benchmarks.covariance import seconds
from benchmarks.overhead import described, shown
from benchmarks.timing import Ratio


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file too.")] = None,
    concepts: Annotated[int, typer.Option(min=2, help="Vectors in the bank, of one site each.")] = 10_000,
    d: Annotated[int, typer.Option(min=1, help="Features.")] = 2048,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds.")] = 9,
) -> None:
    """Time opening a bank, and reading one of its vectors, beside a plain read of all tensors with safetensors."""
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.safetensors"
        write(path, concepts, d)
        size = path.stat().st_size / 1e6
        timed = {"all tensors, by safetensors alone": lambda: load_file(path), **ways(path)}
        taken: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(repeats):
            for name, way in timed.items():
                taken[name].append(seconds(way))
    console.print(f"a bank of {concepts} concepts, d = {d}: {size:.0f} MB")
    for name, found in taken.items():
        console.print(f"{name}: {shown(Ratio.of([1000 * own for own in found]))} ms")
    if out is not None:
        command = f"python -m benchmarks.files --concepts {concepts} --d {d} --repeats {repeats}"
        results: dict[str, Any] = {name: vars(Ratio.of(found)) for name, found in taken.items()}
        out.write_text(json.dumps(described(command) | {"MB": size, "seconds": results}, indent=2) + "\n")


def write(path: Path, concepts: int, d: int) -> None:
    """A bank of random vectors at one site."""
    rows = torch.randn(concepts, d, generator=torch.Generator().manual_seed(0))
    VectorBank({f"concept {i}": SteeringVector({"layers.0": row}) for i, row in enumerate(rows)}).save(path)


def ways(path: Path) -> dict[str, Callable[[], object]]:
    """What is timed."""

    def one() -> SteeringVector:
        bank = VectorBank.load(path)
        return bank[bank.concepts[-1]]

    return {
        "opened": lambda: VectorBank.load(path),
        "opened, one vector read and verified": one,
        "opened, all vectors read and verified": lambda: VectorBank.load(path).items(),
    }


if __name__ == "__main__":
    typer.run(main)
