"""The data: the bundled sample, or the whole of MNIST through torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from jaxtyping import Float, Int
from torch import Tensor

from reference.mnist.sample import SAMPLE

Source = Literal["bundled", "full"]
MEAN, STD = 0.1307, 0.3081
HELD_OUT_EVERY = {"bundled": 6, "full": 12}


@dataclass(frozen=True)
class Split:
    """Normalised images, flattened, and their digits."""

    x: Float[Tensor, "n 784"]
    y: Int[Tensor, " n"]

    def of(self, *digits: int) -> Split:
        """The rows that show one of these digits."""
        chosen = torch.isin(self.y, torch.tensor(digits))
        return Split(self.x[chosen], self.y[chosen])


@dataclass(frozen=True)
class Mnist:
    """`train` is for weights and vectors, `held_out` for choosing strengths and gates, `test` for the report alone."""

    train: Split
    held_out: Split
    test: Split


class DataMissingError(FileNotFoundError):
    """The data are neither here nor to be had."""


@lru_cache(maxsize=1)
def load(source: Source, data_root: Path | None = None) -> Mnist:
    """The bundled sample, or the whole set from `data_root` (downloaded there if it is not yet).

    Raises:
        DataMissingError: no sample beside this file; no data in `data_root`, and no download.
    """
    arrays = _bundled() if source == "bundled" else _full(data_root)
    whole, test = (_split(arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test"))
    held_out = torch.arange(len(whole.y)) % HELD_OUT_EVERY[source] == 0
    return Mnist(Split(whole.x[~held_out], whole.y[~held_out]), Split(whole.x[held_out], whole.y[held_out]), test)


def _bundled() -> dict[str, Tensor]:
    if not SAMPLE.exists():
        raise DataMissingError(f"{SAMPLE} is missing; make it with `python -m reference.mnist.sample --data-root DIR`")
    with np.load(SAMPLE) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def _full(data_root: Path | None) -> dict[str, Tensor]:
    if data_root is None:
        raise DataMissingError("--data full needs --data-root DIR: where the data are, or where to download them")
    arrays: dict[str, Tensor] = {}
    for part in ("train", "test"):
        try:
            found = torchvision.datasets.MNIST(str(data_root), train=part == "train", download=True)
        except (RuntimeError, OSError) as error:
            raise DataMissingError(
                f"no MNIST in {data_root}, and no download ({error}); copy it there, or use --data bundled"
            ) from error
        arrays |= {f"{part}_images": found.data, f"{part}_labels": found.targets}
    return arrays


def _split(images: Tensor, labels: Tensor) -> Split:
    return Split(((images.float() / 255 - MEAN) / STD).flatten(1), labels.long())
