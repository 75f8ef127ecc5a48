"""Passes in other threads, inside one another, and in coroutines: each has its own tokens, rows and decisions.

The kind of fault: a pass in another thread, or inside this one, makes a padded pass steer its pads.
"""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from actsteer import ProjectionAbove, Steerer, SteeringVector
from tests.kinds.by_hand import Text, every_backend, ids, moved, right_or_refused, steerer

TOKENS, MASK = ids(2, 3), torch.tensor([[1, 1, 0], [0, 1, 1]])
WAIT = 20.0


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


class Between:
    """A hook at "a" that lets something else happen once, in the middle of a pass."""

    def __init__(self, model, meanwhile):
        self.meanwhile = meanwhile
        model.a.register_forward_hook(self)

    def __call__(self, *_):
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(WAIT)


def here(function):
    return function()


OTHERS = {
    "no pads": lambda m: m(ids(2, 3)),
    "other pads": lambda m: m(TOKENS, attention_mask=1 - MASK),
    "other rows": lambda m: m(ids(5, 3)),
    "another length": lambda m: m(ids(2, 7), attention_mask=torch.ones(2, 7).long()),
    "one token": lambda m: m(ids(1, 1)),
}
PLACES = {
    "all": (None, [[1, 1, 0], [0, 1, 1]]),
    "last": ("last", [[0, 1, 0], [0, 0, 1]]),
    "first": (0, [[1, 0, 0], [0, 1, 0]]),
    "from the end": (-2, [[1, 0, 0], [0, 1, 0]]),
    "slice": (slice(1, None), [[0, 1, 0], [0, 0, 1]]),
    "callable": (lambda inputs: inputs["attention_mask"].bool() & (inputs["input_ids"] % 2 == 0), None),
}


@every_backend
def test_a_pass_without_pads_while_a_padded_one_is_on_its_way_in_another_thread(backend):
    """The padded pass waits in its thread; the other one runs whole in the meantime."""
    model, tokens, mask = Text(), ids(1, 2), torch.tensor([[1, 0]])
    arrived, go, threads, out = threading.Event(), threading.Event(), [], []

    def wait(*_):
        if threading.current_thread() in threads:
            arrived.set()
            go.wait(WAIT)

    model.a.register_forward_hook(wait)

    def padded():
        with torch.no_grad():
            out.append(moved(model(tokens, attention_mask=mask), model.e(tokens)))

    with steerer(model, backend=backend):
        threads.append(threading.Thread(target=padded))
        threads[0].start()
        arrived.wait(WAIT)
        model(tokens)
        go.set()
        threads[0].join(WAIT)
    assert out == [[[1, 0]]]


@every_backend
@pytest.mark.parametrize("where", [in_thread, here], ids=["in a thread", "inside the pass"])
@pytest.mark.parametrize(("positions", "want"), PLACES.values(), ids=PLACES)
def test_a_pass_in_the_middle_of_another_changes_nothing_in_it(backend, where, positions, want):
    model, plain = Text(), Text()(TOKENS)
    want = want or (MASK * (TOKENS % 2 == 0)).tolist()
    if callable(positions):
        real = positions
        positions = lambda inputs: (  # noqa: E731
            real(inputs) if inputs.get("attention_mask") is not None else inputs["input_ids"] > 0
        )
    with steerer(model, backend=backend, positions=positions):

        def run(other):
            with torch.no_grad():
                right_or_refused(lambda: other(model) is None, False)  # where a row is too short for -2, it is refused

        between = Between(model, None)
        for other in OTHERS.values():
            between.meanwhile = partial(where, partial(run, other))
            assert moved(model(TOKENS, attention_mask=MASK), plain) == want
            assert moved(model(TOKENS, attention_mask=MASK), plain) == want


@every_backend
@pytest.mark.parametrize("where", [in_thread, here], ids=["in a thread", "inside the pass"])
def test_an_inner_pass_has_its_own_pads(backend, where):
    model, plain, found = Text(), Text()(TOKENS), []
    with steerer(model, backend=backend):

        def meanwhile():
            with torch.no_grad():
                found.append(moved(model(TOKENS, attention_mask=1 - MASK), plain))

        Between(model, lambda: where(meanwhile))
        assert moved(model(TOKENS), plain) == [[1, 1, 1], [1, 1, 1]]
        assert found == [(1 - MASK).tolist()]


@every_backend
@pytest.mark.parametrize("where", [in_thread, here], ids=["in a thread", "inside the pass"])
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_a_gate_decides_in_each_pass_for_itself(backend, where, per):
    """The gate reads at "e", the edit is at "b", and the other pass comes between."""
    model, tokens = Text(), torch.tensor([[1, 1, 1], [8, 8, 8]])
    score = model.e(tokens)[..., 0] - 0.1
    gate = ProjectionAbove(SteeringVector({"e": torch.tensor([1.0, 0.0])}), 0.1, per=per)
    fires = (score > 0).int()
    assert fires.tolist() == [[0, 0, 0], [1, 1, 1]]
    with steerer(model, backend=backend, gate=gate):

        def meanwhile():
            with torch.no_grad():
                other = tokens.flip(0)
                assert moved(model(other), Text().e(other)) == fires.flip(0).tolist()

        Between(model, lambda: where(meanwhile))
        got = model(tokens)
        assert moved(got, Text()(tokens)) == fires.tolist()


@every_backend
def test_a_pass_that_raises_leaves_its_pads_to_none(backend):
    model, plain = Text(), Text()(TOKENS)

    def stop():
        raise RuntimeError("stop")

    with steerer(model, backend=backend):
        Between(model, stop)
        with pytest.raises(RuntimeError, match="stop"):
            model(TOKENS, attention_mask=MASK)
        assert moved(model(TOKENS), plain) == [[1, 1, 1], [1, 1, 1]]
        assert moved(model.b(plain), plain) == [[1, 1, 1], [1, 1, 1]]  # called by itself, outside of any pass


@every_backend
def test_an_inner_pass_that_raises_leaves_the_outer_one_its_pads(backend):
    model, plain = Text(), Text()(TOKENS)

    def fails():
        with pytest.raises(IndexError):
            model(torch.full((1, 2), 99), attention_mask=torch.ones(1, 2))

    with steerer(model, backend=backend):
        Between(model, fails)
        assert moved(model(TOKENS, attention_mask=MASK), plain) == MASK.tolist()


@every_backend
def test_two_models_inside_one_another_have_each_its_own_pads(backend):
    inner, outer, plain = Text(), Text(), Text()(TOKENS)
    found = []
    Between(outer, lambda: found.append(moved(inner(TOKENS, attention_mask=1 - MASK), plain)))
    with steerer(inner, backend=backend), steerer(outer, backend=backend):
        assert moved(outer(TOKENS, attention_mask=MASK), plain) == MASK.tolist()
    assert found == [(1 - MASK).tolist()]


@every_backend
def test_threads_at_once_have_each_its_own_pads_and_strengths(backend):
    """Eight threads meet in the middle of their passes, again and again."""
    model, barrier = Text(), threading.Barrier(8, timeout=WAIT)

    def meet(*_):
        barrier.wait()

    model.a.register_forward_hook(meet)
    masks = [torch.tensor([[int(bit) for bit in f"{n:03b}"], [1, 1, 1]]) for n in range(8)]
    plain = Text()(TOKENS)

    def run(mask):
        with torch.no_grad():
            return [moved(model(TOKENS, attention_mask=mask), plain) for _ in range(5)]

    with steerer(model, backend=backend), ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, masks)) == [[mask.tolist()] * 5 for mask in masks]


# --- one thread, or one coroutine, alone -----------------------------------------------------------------------------
SCOPED = pytest.mark.parametrize("backend", ["auto", "tap", "hook"])


@SCOPED
def test_two_tasks_of_one_thread_have_each_its_own_steering(backend):
    """asyncio switches where a task awaits: inside a block, between two passes."""
    model, plain = Text(), Text()(TOKENS)

    async def task(c):
        found = []
        with steerer(model, c=c, scope="context", backend=backend):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append((model(TOKENS) - plain).mean().item())
        await asyncio.sleep(0)
        found.append((model(TOKENS) - plain).mean().item())
        return found

    async def unsteered():
        found = []
        for _ in range(5):
            await asyncio.sleep(0)
            found.append((model(TOKENS) - plain).mean().item())
        return found

    async def main():
        return await asyncio.gather(task(1.0), task(2.0), unsteered())

    first, second, none = asyncio.run(main())
    assert first == pytest.approx([1, 1, 1, 0]) and second == pytest.approx([2, 2, 2, 0]) and none == [0.0] * 5
    assert torch.equal(model(TOKENS), plain)


@SCOPED
def test_a_thread_that_runs_in_the_task_s_context_is_steered_and_another_is_not(backend):
    model, plain = Text(), Text()(TOKENS)

    def run():
        with torch.no_grad():
            return moved(model(TOKENS), plain)

    async def task():
        with steerer(model, scope="context", backend=backend):
            there = await asyncio.to_thread(run)  # which copies the context
            with ThreadPoolExecutor(1) as pool:
                elsewhere = pool.submit(run).result(WAIT)
            return there, elsewhere, run()

    assert asyncio.run(task()) == ([[1] * 3] * 2, [[0] * 3] * 2, [[1] * 3] * 2)


@SCOPED
def test_a_context_that_was_copied_before_is_another_one(backend):
    model, plain = Text(), Text()(TOKENS)
    before = contextvars.copy_context()
    with steerer(model, scope="context", backend=backend):
        assert moved(before.run(model, TOKENS), plain) == [[0] * 3] * 2
        assert moved(model(TOKENS), plain) == [[1] * 3] * 2
    assert moved(model(TOKENS), plain) == [[0] * 3] * 2


@SCOPED
def test_a_task_has_its_own_pads_and_gates(backend):
    model, plain = Text(), Text()(TOKENS)

    async def task(mask, positions):
        found = []
        with steerer(model, scope="context", backend=backend, positions=positions):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(moved(model(TOKENS, attention_mask=mask), plain))
        return found

    async def main():
        return await asyncio.gather(task(MASK, None), task(1 - MASK, None), task(MASK, "last"))

    got = asyncio.run(main())
    assert got == [[MASK.tolist()] * 3, [(1 - MASK).tolist()] * 3, [[[0, 1, 0], [0, 0, 1]]] * 3]


@SCOPED
def test_a_generator_that_holds_a_block_open_steers_the_context_that_runs_it(backend):
    """A generator has no context of its own (PEP 567): between its steps the caller is steered."""
    model, plain = Text(), Text()(TOKENS)

    def steps():
        with steerer(model, scope="context", backend=backend):
            yield moved(model(TOKENS), plain)
            yield moved(model(TOKENS), plain)

    running = steps()
    assert next(running) == next(running) == [[1] * 3] * 2
    assert in_thread(lambda: moved(model(TOKENS), plain)) == [[0] * 3] * 2
    running.close()
    assert moved(model(TOKENS), plain) == [[0] * 3] * 2


@SCOPED
def test_process_and_context_add_up(backend):
    model, plain = Text(), Text()(TOKENS)
    with steerer(model, c=4.0), steerer(model, c=1.0, scope="context", backend=backend):
        assert (model(TOKENS) - plain).mean().item() == pytest.approx(5)
        assert in_thread(lambda: (model(TOKENS) - plain).mean().item()) == pytest.approx(4)


def test_the_buffer_and_the_fold_are_of_the_process():
    for backend in ("buffer", "fold"):
        model = nn.Sequential(nn.Linear(2, 2))
        plain = model(torch.ones(1, 2))
        try:
            steering = Steerer(model, SteeringVector({"0": torch.ones(2)}), scope="context", backend=backend)
        except (ValueError, TypeError):
            continue
        with steering:
            assert torch.equal(in_thread(lambda m=model: m(torch.ones(1, 2))), plain)
