"""Readers: what a gate decides at its site, kept for the rest of the forward pass or of the generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, final, runtime_checkable

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor, nn

from actsteer.errors import GateError
from actsteer.sites.axes import Layout
from actsteer.sites.lens import Frame, Lens, View
from actsteer.sites.place import Place
from actsteer.steering.gates.gate import AnyGate, Combination, Gate, check_weights, decide, prepared_gate, wide
from actsteer.tokens.current import Current
from actsteer.tokens.passes import Pass, Passes
from actsteer.tokens.real import real_at


@runtime_checkable
class Reader(Protocol):
    """A gate, and what it has decided."""

    @property
    def gate(self) -> AnyGate:
        """The gate."""
        ...

    def weights_for(self, site: str) -> Tensor:
        """The decision, per row (B,) or per token (B, S); GateError if it has not been made yet in this pass."""
        ...


@final
class GateReader:
    """What a gate decides of the activation at its site, in the pass that runs.

    A decision per sequence is one on its prompt. It is made in the pass that computes the prompt, and holds until the
    generation ends; a decision per token is made in every pass, for its tokens.

    Args:
        key: tells the gate from others of the same Steerer.
    """

    def __init__(self, gate: Gate, place: Place, layout: Layout, passes: Passes, *, key: int) -> None:
        self.gate = gate
        self.lens = Lens(place, layout)
        self._alone: Current[tuple[object, Tensor]] = Current()  # decided while a part of the model runs by itself
        self._block = object()  # tells what was decided in this block from what was decided in earlier ones
        self._kept: tuple[tuple[Any, ...], Callable[[Tensor, Pass | None], Tensor]] | None = None
        self._passes, self._key = passes, key
        self._per_token, self._is_output = gate.per == "token", place.side == "out"
        self.is_inline = False  # whether whoever edits where it reads calls it, and nobody else asks

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        """Decide; `last` is the output, or the keyword arguments."""
        kept = None if torch.compiler.is_compiling() else self._kept
        h: Any = last if self._is_output else args[0] if len(args) == 1 and not last else None
        plain = kept is not None and h.__class__ is Tensor and not h.is_nested
        if kept is not None and plain and (h.shape, h.dtype, h.device) == kept[0]:
            kept[1](h, self._passes.now)
        elif self._held() is None:
            view = self.lens.heard(module, args, last)
            if view.raw is h and not torch.compiler.is_compiling() and view.open().is_bare:
                bound = self.bind(view)
                self._kept = (view.part.shape, view.part.dtype, view.part.device), bound
                bound(view.part, self._passes.now)
            else:
                self._decide(view)

    def bind(self, view: View) -> Callable[[Tensor, Pass | None], Tensor]:
        """The decision on plain activations such as this one, or on this one, as a function of it."""
        frame, shape = view.frame, view.frame.shape
        if not view.is_bare:
            return lambda h, now: self._decide(view) if (held := self._held()) is None else held
        ready, in_rows = None, len(shape) == 2
        if frame.is_last and frame.row_axis == 0 and (in_rows or (len(shape) == 3 and self._per_token)):
            ready = prepared_gate(self.gate, view.part.flatten(0, -2))

        def bound(h: Tensor, now: Pass | None) -> Tensor:
            if ready is not None and in_rows and (now is None or now.tokens is None):  # they stand for themselves
                return ready(h) if self.is_inline else self._keep([ready(h)])
            if ready is not None and not in_rows:
                frame.check_rows(None if now is None else now.rows)
                return self._keep([ready(h.flatten(0, 1)).view(shape[:2])])
            held = self._held()
            return self._keep([self._read(h.movedim(frame.axis, -1), frame, nested=False)]) if held is None else held

        return bound

    def _held(self) -> Tensor | None:
        """What was decided for the whole of a sequence in an earlier pass."""
        return None if self._per_token else self._passes.decided(self._key, before=True)

    def _decide(self, view: View) -> Tensor:
        if view.packed is not None:
            raise GateError(f"gate at site {self.gate.site!r}: a packed sequence has no rows; gate at an earlier site")
        return self._keep([self._read(rows, frame, nested=view.raw.is_nested) for rows, frame in view.rows()])

    def _keep(self, parts: list[Tensor]) -> Tensor:
        if len({part.shape[1:] for part in parts}) > 1:  # per token, of rows of several lengths
            longest = max(part.shape[1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts]
        weights = parts[0] if len(parts) == 1 else torch.cat(parts)
        alone = self._passes.now is None and self._passes.root.now is None
        self._alone.set((self._block, weights) if alone else None)
        self._passes.decide(self._key, weights, holds=not self._per_token)
        return weights

    def begin(self) -> None:
        """A block begins, or has ended."""
        self._block = object()
        self._alone.set(None)

    @property
    def place(self) -> Place:
        """Where it reads."""
        return self.lens.place

    def weights_for(self, site: str) -> Tensor:
        """The decision; GateError if the gate's site has not run yet in this forward pass."""
        weights = self._passes.decided(self._key)
        if weights is None and (alone := self._alone.get()) is not None and alone[0] is self._block:
            weights = alone[1]
        if weights is None:
            raise GateError(
                f"site {site!r} runs before site {self.gate.site!r}, where its gate reads; fit the gate at the steered "
                "site or at an earlier one, and in the same part of the model if that is checkpointed"
            )
        return weights

    def _read(self, activation: Float[Tensor, "*shape d"], frame: Frame, *, nested: bool) -> Tensor:
        by_row = frame.rows_first(activation)
        if by_row is None:
            raise GateError(
                f"gate at site {self.gate.site!r}: the activation has shape {frame.shape} and no axis of rows; give "
                "the model a batch"
            )
        now = self._passes.now
        if not nested and now is not None:
            frame.check_rows(now.rows)
        if self._per_token:
            return self._per_token_of(by_row)
        if now is None and by_row.ndim == 3:
            self._passes.check_runs()
        read = None if now is None or nested else self._prompt(now, frame)
        if self.gate.per == "last" and by_row.ndim > 2:
            return decide(self.gate, self._last(by_row, read))
        if read is not None and by_row.ndim >= 3 and (spread := _by_row(read, frame)) is not None:
            rows = wide(by_row)
            axes = tuple(range(1, by_row.ndim - 1))
            total, others = torch.where(spread, rows, 0).sum(dim=axes), rows[0, ..., 0].numel() // read.shape[1]
            return decide(self.gate, total / (spread.sum(dim=axes) * others).clamp(min=1))
        return decide(self.gate, by_row if by_row.ndim == 2 else reduce(wide(by_row), "rows ... d -> rows d", "mean"))

    def _last(self, by_row: Float[Tensor, "rows positions d"], read: Tensor | None) -> Float[Tensor, "rows d"]:
        """The last token of every prompt."""
        if by_row.ndim != 3:
            raise GateError(
                f"gate at site {self.gate.site!r}: per='last' reads an activation (rows, positions, d), got shape "
                f"{tuple(by_row.shape)}; choose another site, or per='sequence'"
            )
        if read is None:
            return by_row[:, -1]
        places = torch.arange(read.shape[1], device=by_row.device)
        where = (read.to(by_row.device) * places).amax(dim=1).expand(len(by_row))
        return by_row[torch.arange(len(by_row), device=by_row.device), where]

    def _per_token_of(self, by_row: Float[Tensor, "rows *positions d"]) -> Tensor:
        if by_row.ndim == 2:
            now = self._passes.now
            tokens = None if now is None else now.tokens
            weights = decide(self.gate, by_row)
            if tokens is not None and len(by_row) == tokens.rows * tokens.length:
                return weights.reshape(tokens.rows, tokens.length)
            return weights
        if by_row.ndim != 3:
            raise GateError(
                f"gate at site {self.gate.site!r}: per='token' reads an activation (rows, positions, d), got shape "
                f"{tuple(by_row.shape)}; choose another site, or per='sequence'"
            )
        flat = decide(self.gate, rearrange(by_row, "b s d -> (b s) d"))
        return rearrange(flat, "(b s) -> b s", b=by_row.shape[0])

    def _prompt(self, now: Pass, frame: Frame) -> Tensor | None:
        """Which of the tokens are those of the prompt, and no pads; None where all are."""
        tokens = now.tokens
        if tokens is None:
            return None
        if not tokens.has_whole_prompt:
            raise GateError(
                f"gate at site {self.gate.site!r}: it decides once for a sequence, from its prompt, and this pass does "
                "not compute the whole prompt: a part of it lies in a cache; use model.generate without prefill "
                "chunks, or a gate with per='token'"
            )
        assert tokens.prompt is not None
        real_at(frame, now)  # where pads cannot be told, it is refused
        if tokens.prompt == tokens.length:
            return now.real
        inside = tokens.in_prompt[None].expand(tokens.rows, tokens.length)
        return inside if now.real is None else inside & now.real


def _by_row(read: Bool[Tensor, "B S"], frame: Frame) -> Tensor | None:
    """(B, S) as it lies in an activation whose rows are first and whose features are last; None if it does not fit."""
    spread = frame.by_token(read, rows=len(read))
    if spread is None or frame.row_axis is None:
        return None
    last = spread.movedim(frame.axis, -1)
    return frame.rows_first(last)


@final
class CombinedReader:
    """The decisions of several gates, combined."""

    def __init__(self, gate: Combination, readers: Sequence[Reader]) -> None:
        self.gate = gate
        self.readers = tuple(readers)

    def weights_for(self, site: str) -> Tensor:
        """The decision: per token, if one of them is."""
        weights = [reader.weights_for(site) for reader in self.readers]
        if any(own.ndim == 2 for own in weights):
            weights = list(torch.broadcast_tensors(*(own[:, None] if own.ndim == 1 else own for own in weights)))
        if len({tuple(own.shape) for own in weights}) > 1:
            raise GateError(
                f"site {site!r}: the gates of {self.gate!r} decide for {[tuple(own.shape) for own in weights]} rows; "
                "they must read sites that have the same ones"
            )
        combined: Tensor = self.gate.combine([own.to(weights[0].device) for own in weights])
        check_weights(combined, self.gate)
        return combined


def readers_in(reader: Reader) -> Iterator[GateReader]:
    """The readers on which a decision depends, in order."""
    if isinstance(reader, GateReader):
        yield reader
    elif isinstance(reader, CombinedReader):
        for inner in reader.readers:
            yield from readers_in(inner)
