"""Rows (a) and (b): a steered forward pass, and steered greedy decoding, beside the unhooked model."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoding import Decoding, static_cache
from benchmarks.models import NOISE_FLOOR, Setting, Variant, plain, settings, twin
from benchmarks.overhead import shown
from benchmarks.peers import language
from benchmarks.peers.peer import Cannot, Cell, Peer, peer_of, tried
from benchmarks.timing import compare, set_threads

BY_HAND, PEER = "by hand", "peer"
C = 2.0
PROMPT, NEW_TOKENS = 16, 16


def forward(peer: Peer, *, repeats: int, quick: bool) -> dict[str, Cell]:
    """(a) The MNIST classifier with its four linears steered, on one image and on many."""
    mlps = settings(quick=quick)[:2]
    return {own.name: tried(partial(_eager, own, peer, repeats=repeats, quick=quick)) for own in mlps}


def decoding(peer: Peer, *, repeats: int, quick: bool) -> dict[str, Cell]:
    """(b) SmolLM2 with ten blocks steered writes on greedily: eager, and with a static cache and compiled decoding."""
    own = _decoding(quick=quick)
    fast = dataclasses.replace(own, options=static_cache("eager" if quick else "inductor"))
    with set_threads(1):
        return {
            "eager": tried(partial(_eager, own, peer, repeats=repeats, quick=quick)),
            "compiled": tried(partial(_compiled, own, fast, peer, repeats=repeats, quick=quick)),
        }


def _decoding(*, quick: bool) -> Decoding:
    model = language.tiny() if quick else language.load()[0]
    config: Any = model.config
    first = (config.num_hidden_layers - language.STEERED) // 2
    sites = tuple(f"model.layers.{first + n}" for n in range(language.STEERED))
    x = torch.randint(2, config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    return Decoding("greedy decoding", model, x, sites, config.hidden_size, 4 if quick else NEW_TOKENS)


def _directions(own: Setting) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {site: torch.randn(own.d, generator=generator) / 8 for site in own.sites}


def _eager(own: Setting, peer: Peer, *, repeats: int, quick: bool) -> Cell:
    with ExitStack() as stack:
        models = {
            NOISE_FLOOR: own.model,
            BY_HAND: stack.enter_context(_steered(peer_of(BY_HAND), own, twin(own.model))),
            PEER: stack.enter_context(_steered(peer, own, twin(own.model))),
        }
        outputs = {name: _output(own, model) for name, model in models.items()}
        if not _same(outputs[PEER], outputs[BY_HAND]):
            raise Cannot(f"its output is another one than by hand: {_furthest(outputs[PEER], outputs[BY_HAND])}")
        if _same(outputs[BY_HAND], outputs[NOISE_FLOOR]):
            raise AssertionError("the steering changes nothing, so there is nothing to time")
        return _timed(own, models, repeats=repeats, quick=quick)


def _compiled(own: Decoding, fast: Decoding, peer: Peer, *, repeats: int, quick: bool) -> Cell:
    """Steered after it was compiled and run; where that loses the edit, again with torch told to look for hooks."""
    with _steered(peer_of(BY_HAND), own, twin(own.model)) as model:
        expected = _output(own, model)
    lost = "compiled and run before it is steered"
    for guarded in (False, True):
        torch.compiler.reset()
        unhooked, steered = twin(own.model), twin(own.model)
        fast = dataclasses.replace(fast, model=unhooked)
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not guarded):
            unsteered = _output(fast, unhooked)
            _output(fast, steered)
            with _steered(peer, own, steered) as model:
                found = _output(fast, model)
                if _same(found, expected) and _same(_output(fast, unhooked), unsteered):
                    cell = _timed(fast, {NOISE_FLOOR: unhooked, PEER: model}, repeats=repeats, quick=quick)
                    return dataclasses.replace(cell, evidence=f"{lost}: the edit arrives; {cell.evidence}")
        lost += f", it writes {_furthest(found, expected)} than by hand, eager"
        if not guarded:
            lost += "; with torch._dynamo.config.skip_nnmodule_hook_guards = False"
    raise Cannot(lost)


def _steered(peer: Peer, own: Setting, model: nn.Module) -> AbstractContextManager[Any]:
    return peer.steer(model, _directions(own), C)


def _timed(own: Setting, models: dict[str, Any], *, repeats: int, quick: bool) -> Cell:
    ways: dict[str, Variant] = {name: partial(plain, model) for name, model in models.items()}
    timing = compare(own, ways, threads=1, rounds=repeats, seconds=0.001 if quick else 0.01)
    unhooked = timing.unhooked_microseconds
    took = f"unhooked {unhooked:.1f} µs" if unhooked < 1e3 else f"unhooked {unhooked / 1e3:.1f} ms"
    beside = (f"{name} {shown(ratio)}" for name, ratio in timing.ratios.items() if name != PEER)
    return Cell(shown(timing.ratios[PEER]), "; ".join((took, *beside)), dataclasses.asdict(timing))


def _output(own: Setting, model: Any) -> Tensor:
    with torch.inference_mode():
        return own.run(model).clone()


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4) if found.is_floating_point() else found.equal(expected)


def _furthest(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"the shape {tuple(found.shape)} for {tuple(expected.shape)}"
    if found.is_floating_point():
        return f"a largest difference of {(found - expected).abs().max():.2g}"
    return f"{int((found != expected).sum())} other tokens"
