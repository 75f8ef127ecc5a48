"""GateReader: reads the activation at a gate's own site, and keeps the decision for the rest of the forward pass."""

from __future__ import annotations

from threading import local
from typing import Any, final

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from actsteer.errors import GateError
from actsteer.sites.axes import Layout
from actsteer.sites.outputs import Arguments, get, locate, members
from actsteer.sites.place import Place
from actsteer.sites.shards import full
from actsteer.steering.copies import Uncopied
from actsteer.steering.gates import Gate


@final
class GateReader(Uncopied):
    """A hook at a gate's own site."""

    def __init__(self, gate: Gate, place: Place, layout: Layout) -> None:
        self.gate = gate
        self.place = place
        self._weights: Tensor | None = None  # in compiled code, which one thread at a time may run
        self._by_thread = local()
        self._layout = layout

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        """Decide for every row, from the mean over its positions; `last` is the output, or the keyword arguments."""
        value = Arguments(args, last) if self.place.side == "in" else last
        keys = locate(self.place, value)
        if keys and isinstance(get(value, keys[:-1]), PackedSequence):
            raise GateError(f"gate at site {self.gate.site!r}: a packed sequence has no rows; gate at an earlier site")
        rows = torch.cat([self._means(module, part) for part in members(get(value, keys))])
        weights = self.gate(rows)
        if weights.shape != rows.shape[:1]:
            raise GateError(
                f"gate at site {self.gate.site!r}: expected one weight for each of {len(rows)} rows, got shape "
                f"{tuple(weights.shape)}; return a tensor of shape (rows,)"
            )
        if torch.compiler.is_compiling():
            self._weights = weights
        else:
            self._by_thread.weights = weights

    def weights_for(self, site: str) -> Tensor:
        """The decision per row; GateError if the gate's site has not run yet in this forward pass."""
        weights = self._weights
        if not torch.compiler.is_compiling():
            weights = getattr(self._by_thread, "weights", None)
        if weights is None:
            raise GateError(
                f"site {site!r} runs before site {self.gate.site!r}, where its gate reads; fit the gate at the steered "
                "site or at an earlier one, and in the same part of the model if that is checkpointed"
            )
        return weights

    def forget(self) -> None:
        """Decide anew in the next forward pass."""
        self._weights = None
        if not torch.compiler.is_compiling():
            self._by_thread.weights = None

    def _means(self, module: nn.Module, part: Tensor) -> Tensor:
        activation = full(part, module, site=self.gate.site)
        if (conversion := getattr(module, "hook_conversion", None)) is not None:
            activation = conversion.convert(activation)
        axis = self._layout.feature_axis(tuple(activation.shape), size=None, site=self.gate.site)
        row_axis = self._layout.row_axis if activation.ndim > 2 else 0
        if row_axis == axis:
            raise GateError(
                f"gate at site {self.gate.site!r}: the activation has shape {tuple(activation.shape)} and no axis of "
                "rows; give the model a batch"
            )
        return reduce(activation.movedim((row_axis, axis), (0, -1)), "rows ... d -> rows d", "mean")
