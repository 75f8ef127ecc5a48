"""repeng: a `ControlModel` around the model, with the control vectors set as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from repeng import ControlModel
from torch import Tensor, nn

from benchmarks.peers.peer import Cannot


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[Any]:
    """At the outputs of blocks alone, which it wraps; afterwards the model is unwrapped."""
    blocks = {int(last): c * v for site, v in directions.items() for last in [site.rpartition(".")[2]]}
    try:
        control: Any = ControlModel(model, list(blocks))
    except ValueError as error:
        raise Cannot(f"it wraps the blocks of transformers' models alone: {error} (control.py)") from error
    control.set_raw_control(blocks)
    try:
        yield control
    finally:
        control.unwrap()
