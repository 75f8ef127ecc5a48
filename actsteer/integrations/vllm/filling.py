"""Filling: before each pass of the engine, the strength of every token in it is written where the hooks read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ModelMismatchError
from actsteer.integrations.vllm.hooks import Buffers
from actsteer.integrations.vllm.requests import NAME, Request
from actsteer.integrations.vllm.served import Served
from actsteer.tokens.tokens import Tokens


class Part(NamedTuple):
    """The tokens of one request in a pass: those from `start` on, of a text whose prompt has `prompt` tokens."""

    key: str
    start: int
    length: int


@dataclass(slots=True, eq=False)
class Known:
    """A request that the engine has taken on.

    Args:
        sent: what the front end has said of it.
        state: what the engine keeps of it, from its first pass to its last; None: the engine says when it ends.
        request: what is to be steered; None: nothing.
        prompt: the number of the prompt's tokens.
        steady_from: the token from which on all get the same.
        steady: what they get, (1, K).
        slot: where the decision for its sequence is kept; None: none yet.
        is_decided: whether there is one.
        kept: the decision, while another request has its slot.
    """

    sent: Mapping[str, Any] | None
    state: object
    request: Request | None
    prompt: int
    steady_from: float
    steady: Tensor
    slot: int | None = None
    is_decided: bool = False
    kept: Tensor | None = None


@final
class Filler:
    """Fills the buffers that the hooks read.

    Args:
        served: the steering.
        buffers: of the hooks.
        check: is called before the first pass, as vLLM may have tried the model when it started, and before the second.
    """

    def __init__(self, served: Served, buffers: Buffers, *, check: Callable[[], None]) -> None:
        self.served, self._buffers, self._check = served, buffers, check
        self._count = 0
        self._digest = served.digest
        self._known: dict[str, Known] = {}
        self._replaced: set[str] = set()  # digests of the banks before
        self._last: list[tuple[Known, int]] | None = None  # whose tokens the last pass had, if all were steady
        self._used = 0  # up to here the buffers are not zero
        self._slots: dict[int, Known] = {}

    def replace(self, served: Served) -> None:
        """Another steering, from the next request on.

        The front end waits until no client waits for an answer; what still runs then is about to be aborted, and goes
        on unsteered.
        """
        for own in self._known.values():
            own.request, own.steady = None, torch.zeros(1, len(served.concepts))
        self._replaced = (self._replaced | {self._digest}) - {served.digest}
        self.served, self._digest, self._last = served, served.digest, None

    def add(self, key: str, extra_args: Mapping[str, Any] | None, prompt: int, *, state: object = None) -> None:
        """A request begins, or comes back with the parameters that it had.

        Args:
            state: what the engine keeps of it as long as it runs, by which another one of the same key is told.

        Raises:
            ModelMismatchError: the front end has checked it against another bank than the one that is here.
        """
        sent = None if extra_args is None else extra_args.get(NAME)
        if (known := self._known.get(key)) is not None:
            if known.state is state and known.prompt == prompt and (state is not None or known.sent == sent):
                return
            self.forget([key])
        if sent is None or sent.get("digest") in self._replaced:
            nothing = torch.zeros(1, len(self.served.concepts))
            self._known[key] = Known(sent, state, None, prompt, 0, nothing)
            return
        if sent.get("digest") != self._digest:
            raise ModelMismatchError(
                f"request {key!r} was checked against another bank than the one that this process has; replace a bank "
                "by collective_rpc('actsteer_replace_bank', args=(path,)) of the engine that takes the requests"
            )
        request = self.served.asked({NAME: {name: sent[name] for name in ("c", "positions")}})
        assert request is not None  # the front end sends none that is not steered
        start = request.steady_from(prompt)
        steady = self._rows(request, _tokens(0 if start == math.inf else int(start), 1, prompt))
        self._known[key] = Known(sent, state, request, prompt, start, steady)

    def forget(self, keys: Sequence[str]) -> None:
        """These requests have ended."""
        for key in keys:
            own = self._known.pop(key, None)
            if own is not None and own.slot is not None:
                del self._slots[own.slot]

    def keep_only(self, keys: Mapping[str, object]) -> None:
        """All other requests have ended."""
        if len(self._known) > len(keys):
            self.forget([key for key in self._known if key not in keys])

    def fill(self, parts: Sequence[Part]) -> None:
        """Write what a pass over these tokens, one request after another, is to have."""
        if self._count < 2:
            self._check()
            self._count += 1
        each = [self._known[part.key] for part in parts]
        total = sum(part.length for part in parts)
        if self.served.decides_once:
            self._choose_slots(parts, each, total)
        elif self._is_as_before(parts, each):
            return
        rows = [self._part(own, part) for own, part in zip(each, parts, strict=True) if part.length]
        self._write(self._buffers.strengths, torch.cat(rows) if rows else None, total)
        self._used = total

    def _is_as_before(self, parts: Sequence[Part], each: Sequence[Known]) -> bool:
        """Whether the buffers hold what is needed already, as they do step by step once all is steady."""
        steady = all(part.start >= own.steady_from for own, part in zip(each, parts, strict=True))
        now = [(own, part.length) for own, part in zip(each, parts, strict=True)] if steady else None
        before, self._last = self._last, now
        return now is not None and now == before

    def _part(self, own: Known, part: Part) -> Float[Tensor, "n K"]:
        if own.request is None or part.start >= own.steady_from:
            return own.steady.expand(part.length, -1)
        return self._rows(own.request, _tokens(part.start, part.length, own.prompt))

    def _rows(self, request: Request, tokens: Tokens) -> Float[Tensor, "n K"]:
        rows = torch.zeros(tokens.length, len(self.served.concepts))
        for place, concept in enumerate(self.served.concepts):
            if concept in request.c:
                rows[:, place] = request.amounts(concept, tokens)
        return rows

    def _write(self, buffer: Tensor, rows: Tensor | None, total: int) -> None:
        if rows is not None:
            if buffer.device.type == "cuda":
                rows = rows.pin_memory()  # anew each time, for the copy may run while the next one is made
            buffer[:total].copy_(rows, non_blocking=True)
        if self._used > total:
            buffer[total : self._used].zero_()

    def _choose_slots(self, parts: Sequence[Part], each: Sequence[Known], total: int) -> None:
        """Where each request's decision is kept, and which are made in this pass."""
        buffers = self._buffers
        fresh = torch.zeros(len(buffers.fresh), dtype=torch.bool)
        slots, shares = torch.zeros(total, dtype=torch.int64), torch.zeros(total, 2)
        place = 0
        for own, part in zip(each, parts, strict=True):
            here = slice(place, place + part.length)
            place += part.length
            if own.request is None or not part.length:
                continue
            if own.slot is None:
                own.slot = self._slot(own, each)
            slots[here] = own.slot
            if not own.is_decided:
                if part.start or part.length < own.prompt:
                    raise RuntimeError(
                        f"request {part.key!r}: a gate decides from its whole prompt, and the engine computes a part "
                        "of it; serve without prefix caching and chunked prefill"
                    )
                prompt = slice(here.start, here.start + own.prompt)
                shares[prompt, 0], shares[prompt.stop - 1, 1] = 1 / own.prompt, 1.0
                fresh[own.slot] = own.is_decided = True
        self._write(buffers.slots, slots, total)
        self._write(buffers.shares, shares, total)
        buffers.fresh.copy_(fresh)

    def _slot(self, own: Known, each: Sequence[Known]) -> int:
        """A free slot, or that of a request that is not in this pass, whose decision is kept meanwhile."""
        held = self._buffers.held
        free = next((slot for slot in range(1, len(held)) if slot not in self._slots), None)
        if free is None:
            running = {id(other) for other in each}
            free, other = next((slot, other) for slot, other in self._slots.items() if id(other) not in running)
            other.kept, other.slot = held[free].clone(), None
        self._slots[free] = own
        if own.kept is not None:
            held[free].copy_(own.kept)
            own.kept = None
        return free


def _tokens(start: int, count: int, prompt: int) -> Tokens:
    """Some tokens of one text."""
    return Tokens(1, count, start=start, prompt=prompt, may_go_on=True)
