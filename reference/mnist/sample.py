"""Make the bundled sample of MNIST: `python -m reference.mnist.sample --data-root DIR` (add --check to compare only).

The sample is 10,000 training and 2,000 test images, each class as frequent as in the whole set, taken at even
distances through each class, so that no random number is involved and anyone gets the same images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torchvision
import typer
from numpy.typing import NDArray

SAMPLE = Path(__file__).parent / "data" / "mnist_sample.npz"
SIZES = {"train": 10_000, "test": 2_000}


def main(
    data_root: Annotated[Path, typer.Option(help="Where torchvision finds, or puts, the whole of MNIST.")],
    check: Annotated[bool, typer.Option(help="Compare with the bundled file instead of writing it.")] = False,
) -> None:
    """Write the bundled sample, or check that it is what this script makes."""
    arrays: dict[str, NDArray[np.uint8]] = {}
    for part, size in SIZES.items():
        whole = torchvision.datasets.MNIST(str(data_root), train=part == "train", download=not data_root.exists())
        labels = whole.targets.numpy().astype(np.uint8)
        chosen = stratified(labels, size)
        arrays[f"{part}_images"] = whole.data.numpy()[chosen]
        arrays[f"{part}_labels"] = labels[chosen]
    if check:
        with np.load(SAMPLE) as bundled:
            same = all(np.array_equal(bundled[name], array) for name, array in arrays.items())
        typer.echo("the bundled sample is reproduced" if same else "the bundled sample differs")
        raise typer.Exit(code=0 if same else 1)
    SAMPLE.parent.mkdir(exist_ok=True)
    np.savez_compressed(SAMPLE, allow_pickle=False, **arrays)
    typer.echo(f"{SAMPLE}: {SAMPLE.stat().st_size:,} bytes")


def stratified(labels: NDArray[np.uint8], size: int) -> NDArray[np.intp]:
    """Indices of `size` rows, in order, each class with its share of them (largest remainders) and evenly spread."""
    classes, counts = np.unique(labels, return_counts=True)
    shares = counts * size / len(labels)
    take = np.floor(shares).astype(int)
    take[np.argsort(take - shares, kind="stable")[: size - take.sum()]] += 1
    picked = [
        np.flatnonzero(labels == digit)[np.arange(k) * count // k]
        for digit, count, k in zip(classes, counts, take, strict=True)
    ]
    return np.sort(np.concatenate(picked))


if __name__ == "__main__":
    typer.run(main)
