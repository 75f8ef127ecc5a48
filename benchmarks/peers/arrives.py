"""Row d, yes or no: does the edit arrive? One function a column, each on nothing but a peer's `steer`.

All are told by numbers: how far the output is from the one that plain hooks give on a fresh model, as a share of what
the steering changes. A function gives (yes or no, the numbers).
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import by_hand, language
from benchmarks.peers.left_behind import Interrupt, differences, state_of
from benchmarks.peers.peer import Cell, Peer, tried

Steer = Callable[..., Any]
Answer = tuple[bool, str]
Check = Callable[[Steer], Answer]

CLOSE = 1e-3
"""Outputs are the same where they differ by no more than this share of what the steering changes."""
SITES = ("model.layers.3", "model.layers.6")
IDS = torch.tensor([[5, 17, 90, 33, 64, 7, 21]])
POINTS = 200
"""Interrupts per peer, spread evenly over all places where one can come."""


class Boom(Exception):  # noqa: N818 - raised by the checks themselves
    """What goes wrong in the block."""


def row(peer: Peer, *, repeats: int = 1, quick: bool = False) -> dict[str, Cell]:
    """One cell per check, by its name."""
    fewer: dict[str, Check] = {"interrupt": partial(after_an_interrupt, points=20)} if quick else {}
    return {name: tried(partial(_cell, check, peer)) for name, check in (CHECKS | fewer).items()}


def _cell(check: Check, peer: Peer) -> Cell:
    with torch.no_grad(), warnings.catch_warnings(record=True) as warned:
        arrives, evidence = check(peer.steer)
    warned = [] if arrives else warned[:1]
    return Cell("yes" if arrives else "no", "; ".join((evidence, *(f"it warns: {each.message}" for each in warned))))


# --- the checks ------------------------------------------------------------------------------------------------------
def after_compile(steer: Steer) -> Answer:
    """The model is compiled and has run before it is steered, then steered, then with other vectors, then plain.

    Dynamo's guards decide, so that nothing compiles what it has found.
    """
    model, reference = _used(steer), language.tiny()
    torch.compiler.reset()
    model.compile(backend="eager")
    for _ in range(2):
        _logits(model)
        model(input_ids=IDS)  # a call of another form is compiled anew, and some peers make it
    parts = []
    for name, directions in (("steered", _directions(1)), ("other vectors", _directions(2))):
        with steer(model, directions, 2.0) as run:
            _logits(run)
            parts.append((name, _off(_logits(run), reference, directions, 2.0)))
    parts.append(("left", _off(_logits(model), reference, _directions(1), 2.0, wanted=_logits(reference))))
    torch.compiler.reset()
    return _all_close(parts)


def with_left_pads(steer: Steer) -> Answer:
    """Three texts of 3, 5 and 7 tokens, padded on the left: each is as it is alone, steered by plain hooks."""
    model, reference, directions = _used(steer), language.tiny(), _directions(1)
    texts = [IDS[0, :length] for length in (3, 5, 7)]
    longest = max(map(len, texts))
    mask = torch.stack([(torch.arange(longest) >= longest - len(text)).long() for text in texts])
    ids = torch.zeros_like(mask).masked_scatter(mask.bool(), torch.cat(texts))
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as `generate` gives them
    with steer(model, directions, 2.0) as run:
        got = _logits(run, ids=ids, attention_mask=mask, position_ids=positions)
    return _all_close(
        (f"{len(text)} tokens", _off(rows[-len(text) :][None], reference, directions, 2.0, ids=text[None]))
        for text, rows in zip(texts, got, strict=True)
    )


def on_a_conv_map(steer: Steer) -> Answer:
    """A map of 8 channels, 8 by 8: the direction (8,) is added along the channels, and not along the width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, v = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh()).eval(), torch.randn(2, 3, 8, 8), torch.randn(8)
    before = model[0](x)
    changed = (before + v[:, None, None]).tanh() - before.tanh()

    def off(direction: Tensor, wanted: Tensor) -> float:
        with steer(model, {"0": direction}, 1.0) as run:
            return _furthest(run(x) - wanted.tanh()) / _furthest(changed)

    channels, width = off(v, before + v[:, None, None]), off(v, before + v)
    said = f"(8,): {_share(channels)} from the sum along the channels, {_share(width)} from that along the width"
    if channels <= CLOSE:
        return True, said
    said += "; given as (8, 1, 1): "
    try:
        shaped = off(v[:, None, None], before + v[:, None, None])
        return False, said + f"{_share(shaped)} from the sum along the channels"
    except Exception as error:
        return False, said + type(error).__name__


def after_an_exception(steer: Steer) -> Answer:
    """Raised in the block, and in the forward pass behind the sites: outputs, weights, hooks, modules are as before."""
    model = _used(steer)
    before, plain = state_of(model), _logits(model)
    said = []
    for name, raising in (("in the block", _nothing), ("in the forward pass", _raise)):
        with suppress(Exception), steer(model, _directions(1), 2.0) as run:
            _logits(run)
            handle = model.get_submodule("model.norm").register_forward_pre_hook(raising)
            try:
                _logits(run)
            finally:
                handle.remove()
            raise Boom
        said += [f"{name}: {difference}" for difference in _differences(before, plain, model)]
    return not said, "; ".join(said) or "outputs, weights, hooks and modules are bit for bit what they were"


def beside_another(steer: Steer) -> Answer:
    """Two at once sum; when the first is taken off the second stays, and the other way round; then nothing is left."""
    first, second = _directions(1), _directions(2)
    both = {site: first[site] + second[site] for site in SITES}
    reference, parts = language.tiny(), []
    for name, gone in (("without the first", 0), ("without the second", 1)):
        model = _used(steer)
        before, plain = state_of(model), _logits(model)
        blocks = [steer(model, first, 2.0), steer(model, second, 2.0)]
        runs = [block.__enter__() for block in blocks]
        parts.append(("both", _off(_logits(runs[1]), reference, both, 2.0)))
        blocks[gone].__exit__(None, None, None)
        parts.append((name, _off(_logits(runs[1 - gone]), reference, (second, first)[gone], 2.0)))
        blocks[1 - gone].__exit__(None, None, None)
        if found := _differences(before, plain, model):
            return False, f"{_all_close(parts)[1]}; left behind: {'; '.join(found)}"
    return _all_close(parts[:2] + parts[3:])


def in_a_replica(steer: Steer) -> Answer:
    """A deepcopy made in the block, and a replica as DataParallel makes it, get weights half as large.

    Both are plain or steered, with these weights; the copy is plain once the block is left, for nothing takes it off.
    """
    model, directions = _used(steer), _directions(1)
    halves = _halved(language.tiny())
    known = {}
    for whose, reference in (("its weights", halves), ("the original's weights", language.tiny())):
        known[f"plain, {whose}"] = _logits(reference)
        with by_hand.steer(reference, directions, 2.0):
            known[f"steered, {whose}"] = _logits(reference)
    with steer(model, directions, 2.0) as run:
        _logits(run)
        copied = _halved(copy.deepcopy(model))
        inside = _which(copied, known)
        replica = _which(_replica(model), known)
    outside = _which(copied, known)
    own = ("plain, its weights", "steered, its weights")
    said = f"copy: {inside}; after the block: {outside}; replica: {replica}"
    return inside in own and replica in own and outside == own[0], said


def after_an_interrupt(steer: Steer, *, points: int = POINTS) -> Answer:
    """Ctrl-C while it is attached, runs and is taken off: the model is bit for bit what it was.

    It comes where a function is entered or left, for there Python looks for one; in each of as many blocks at another.
    """
    model = _used(steer)
    before, plain = state_of(model), _logits(model)

    def block() -> None:
        with steer(model, _directions(1), 2.0) as run:
            _logits(run)

    block()
    total = Interrupt(0).during(block)
    where = sorted({1 + index * (total - 1) // max(1, points - 1) for index in range(min(points, total))})
    left: list[str] = []
    for point in where:
        Interrupt(point).during(block)
        if _differences(before, plain, model):
            gc.collect()  # what hangs on a generator that nobody can end any more
        if found := _differences(before, plain, model):
            left.append("; ".join(found))
            model = _used(steer)
            before, plain = state_of(model), _logits(model)
    said = f"{len(where)} of {total} places: {len(left)} leave something behind"
    return not left, said + (f", first: {left[0]}" if left else "")


def under_beams(steer: Steer) -> Answer:
    """Three beams of 8 tokens: each token's log-probability is the whole text's, by plain hooks without a cache."""
    off, unsteered = _beams_off(steer)
    said = f"log-probabilities: {_share(off)}"
    if off > CLOSE:
        said += f"; those of the unsteered model: {_share(unsteered)}"
        said += f"; with use_cache=False: {_share(_beams_off(steer, use_cache=False)[0])}"
    return off <= CLOSE, said


def _beams_off(steer: Steer, **options: Any) -> tuple[float, float]:
    """How far the steered beams are from what is expected, and the same model's unsteered ones."""
    model, reference, directions = _used(steer), language.tiny(), _directions(1)
    options |= {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": 8}
    options |= {"return_dict_in_generate": True, "output_scores": True, "attention_mask": torch.ones_like(IDS)}
    prompt = IDS.shape[1]

    def expected(sequences: Tensor) -> Tensor:
        logprobs = _logits(reference, ids=sequences).log_softmax(-1)[:, prompt - 1 : -1]
        return logprobs.gather(-1, sequences[:, prompt:, None])[..., 0]

    def scores(found: Any) -> Tensor:
        compute: Any = reference.compute_transition_scores
        made: Tensor = compute(found.sequences, found.scores, found.beam_indices)
        return made

    with steer(model, directions, 2.0) as run:
        found = run.generate(IDS, **options)
    unsteered, plain = model.generate(IDS, **options), expected(found.sequences)
    with by_hand.steer(reference, directions, 2.0):
        steered = expected(found.sequences)
    changed = _furthest(steered - plain)
    apart = _furthest(scores(unsteered) - expected(unsteered.sequences))
    return _furthest(scores(found) - steered) / changed, apart / changed


CHECKS: dict[str, Check] = {
    "torch.compile": after_compile,
    "left pads": with_left_pads,
    "conv, C = W": on_a_conv_map,
    "exception": after_an_exception,
    "beside another": beside_another,
    "replica": in_a_replica,
    "interrupt": after_an_interrupt,
    "beams": under_beams,
}


# --- what is expected ------------------------------------------------------------------------------------------------
def _directions(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.randn(16, generator=generator) / 4 for site in SITES}


def _used(steer: Steer) -> Any:
    """A fresh model that has been steered once: what a peer puts round it for good is there."""
    model = language.tiny().requires_grad_(False)
    with steer(model, _directions(0), 1.0) as run:
        _logits(run)
    return model


def _logits(run: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    output = run(ids, **options)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.detach().clone()


def _furthest(difference: Tensor) -> float:
    return difference.abs().max().item()


def _off(
    got: Tensor,
    reference: nn.Module,
    directions: dict[str, Tensor],
    c: float,
    *,
    ids: Tensor = IDS,
    wanted: Tensor | None = None,
) -> float:
    """How far this is from what plain hooks give, as a share of what they change."""
    plain = _logits(reference, ids=ids)
    with by_hand.steer(reference, directions, c):
        steered = _logits(reference, ids=ids)
    return _furthest(got - (steered if wanted is None else wanted)) / _furthest(steered - plain)


def _share(off: float) -> str:
    return f"{off:.1e}"


def _all_close(parts: Any) -> Answer:
    found = dict(parts)
    return max(found.values()) <= CLOSE, ", ".join(f"{name}: {_share(off)}" for name, off in found.items())


def _differences(before: dict[str, tuple[Any, ...]], plain: Tensor, model: nn.Module) -> list[str]:
    off = _furthest(_logits(model) - plain)
    return differences(before, model) + ([f"outputs differ by {off:.1e}"] if off else [])


def _nothing(module: nn.Module, args: Any) -> None:
    return None


def _raise(module: nn.Module, args: Any) -> None:
    raise Boom


# --- copies ----------------------------------------------------------------------------------------------------------
def _halved(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.copy_(parameter / 2)
    return model


def _replica(module: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate makes for one more device, with weights half as large."""
    replica: nn.Module = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        replica._modules[name] = _replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.detach() / 2)
    return replica


def _which(model: nn.Module, known: dict[str, Tensor]) -> str:
    """Whose output this is."""
    got, changed = _logits(model), _furthest(known["steered, its weights"] - known["plain, its weights"])
    name, off = min(((name, _furthest(got - one) / changed) for name, one in known.items()), key=lambda found: found[1])
    return name if off <= CLOSE else f"neither ({_share(off)} from {name})"
