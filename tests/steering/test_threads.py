"""Threads and tasks: a model is steered in all of them, or with scope="context" in the attaching one alone."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from actsteer import ProjectionAbove, Steerer, SteeringVector
from tests.oracles import state
from tests.zoo import exact, normal

X = normal(4, 4)
DIRECTION = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
V = SteeringVector({"1": DIRECTION})
INPUT = SteeringVector({"2:in": DIRECTION})
WAIT = 20.0  # seconds after which a test that hangs fails


def in_thread(function, *args):
    """What the function gives, or raises, in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(WAIT)


def mirror(h, v, c):
    """h -> h + c (v - h)."""
    return h + c * (v - h)


GATE = ProjectionAbove(SteeringVector({"0": DIRECTION}), 0.0)
OPTIONS = {
    "plain": {},
    "rows": {"c": torch.tensor([0.0, 1.0, -0.5, 2.0])},
    "gated": {"gate": GATE},
    "custom": {"intervention": mirror},
    "by hook": {"backend": "hook"},
}
each = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.mark.case(44)
@each
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
def test_by_default_every_thread_is_steered(options, backend):
    model = exact()
    with Steerer(model, V, **({"backend": backend} | options)):
        here, there = model(X), in_thread(model, X)
    assert torch.equal(here, there)
    assert not torch.equal(here, model(X))


@pytest.mark.case(44)
@each
@pytest.mark.parametrize("v", [V, INPUT], ids=["output", "input"])
def test_scope_context_steers_the_attaching_thread_alone(options, v):
    model, plain = exact(), exact()(X)
    with Steerer(model, v, **options):
        expected = model(X)
    with Steerer(model, v, scope="context", **options):
        for _ in range(2):
            assert torch.equal(in_thread(model, X), plain)
            assert torch.equal(model(X), expected)
    assert state(model) == state(exact())


class Meeting(nn.Module):
    """Gives out what came in, when all the others have come as well."""

    def __init__(self, parties):
        super().__init__()
        self.barrier = threading.Barrier(parties, timeout=WAIT)

    def forward(self, x):
        self.barrier.wait()
        return x


def meeting(parties):
    """exact() with meetings between its parts: "0" and "3" and "6" are its linear modules."""
    a, b, c, d, e = exact()
    return nn.Sequential(a, Meeting(parties), b, Meeting(parties), c, d, e)


@pytest.mark.case(44)
@pytest.mark.parametrize("site", ["2", "4:in"])
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_threads_at_the_same_place_at_the_same_time_have_each_their_own_steering(site, backend, gated):
    strengths = [None, 0.5, -1.0, torch.tensor([0.0, 1.0, 2.0, -3.0])]
    inputs = [X, -X, 2 * X, X.flip(0)]
    model, alone = meeting(len(strengths)), meeting(1)
    site = site if not site.startswith("4") else "4:in"
    gate = GATE if gated else None
    v = SteeringVector({site: DIRECTION})

    def run(chosen, c, x):
        if c is None:
            return [chosen(x) for _ in range(3)]
        with Steerer(chosen, v, c=c, gate=gate, scope="context", backend=backend):
            return [chosen(x) for _ in range(3)]

    expected = [run(alone, c, x)[0] for c, x in zip(strengths, inputs, strict=True)]
    with ThreadPoolExecutor(len(strengths)) as pool:
        got = list(pool.map(run, [model] * len(strengths), strengths, inputs))
    for outputs, wanted in zip(got, expected, strict=True):
        assert all(torch.equal(output, wanted) for output in outputs)
    assert all(not m._forward_hooks and not m._forward_pre_hooks and "forward" not in vars(m) for m in model.modules())


@pytest.mark.case(44)
def test_in_every_thread_a_gate_decides_for_its_own_rows():
    model, alone = meeting(2), meeting(1)
    inputs = (X, -X)
    v = SteeringVector({"2": DIRECTION})
    with Steerer(alone, v, gate=GATE):
        expected = [alone(x) for x in inputs]
    with Steerer(model, v, gate=GATE), ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            got = list(pool.map(model, inputs))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class Turns(nn.Module):
    """An identity whose `training` flag, when read, lets something else happen first, as a switch of threads would."""

    def __init__(self):
        self.meanwhile = None
        super().__init__()

    @property
    def training(self):
        meanwhile, self.__dict__["meanwhile"] = self.__dict__.get("meanwhile"), None
        if meanwhile is not None:
            meanwhile()
        return False

    @training.setter
    def training(self, value):
        pass

    def forward(self, x):
        return x


@pytest.mark.case(44)
def test_a_forward_of_another_dtype_in_another_thread_does_not_change_this_one():
    model = nn.Sequential(Turns())
    v = SteeringVector({"0": torch.tensor([0.1, 0.3])})
    x = torch.ones(2, 2)
    with Steerer(model, v):
        expected = model(x)
        model(x)
        model[0].meanwhile = lambda: in_thread(model, x.bfloat16())
        got = model(x)
        assert got.dtype is torch.float32
        assert torch.equal(got, expected)


# --- no false alarm ----------------------------------------------------------------------------------------------
@pytest.mark.case(44)
@pytest.mark.parametrize("scope", ["process", "context"])
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_a_model_that_ran_in_another_thread_alone_raises_no_alarm(scope, backend):
    model = exact()
    with Steerer(model, V, scope=scope, backend=backend):
        in_thread(model, X)


@pytest.mark.case(44)
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_with_scope_context_another_threads_other_path_counts_not():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Identity(), nn.Identity()

        def forward(self, x, left):
            return self.left(x) if left else self.right(x)

    model = Fork()
    with Steerer(model, SteeringVector({"left": DIRECTION}), scope="context"):
        model(X, left=True)
        in_thread(lambda: model(X, left=False))
    with Steerer(model, SteeringVector({"left": DIRECTION}), scope="context"):
        in_thread(lambda: model(X, left=False))


# --- attached here, left there -----------------------------------------------------------------------------------
@pytest.mark.case(44)
@pytest.mark.parametrize("scope", ["process", "context"])
def test_what_one_thread_attached_another_may_detach(scope):
    model = exact()
    steerer = in_thread(Steerer(model, V, scope=scope).attach)
    in_thread(steerer.detach)
    assert torch.equal(model(X), exact()(X))
    assert state(model) == state(exact())


@pytest.mark.case(44)
def test_a_thread_that_ended_leaves_its_steering_to_no_other_thread():
    model, plain, steerer = exact(), exact()(X), Steerer(exact(), V, scope="context")
    steerer = Steerer(model, V, scope="context")
    first = threading.Thread(target=steerer.attach)
    first.start()
    first.join(WAIT)
    for _ in range(20):  # the numbers of threads are used again
        assert torch.equal(in_thread(model, X), plain)
    steerer.detach()


@pytest.mark.case(44)
def test_a_strength_set_by_another_thread_is_taken_at_the_next_forward():
    model = exact()
    with Steerer(model, V, c=3) as steerer:
        expected = model(X)
        steerer.c = 1
        in_thread(setattr, steerer, "c", 3)
        assert torch.equal(model(X), expected)


@pytest.mark.case(44, 30)
def test_threads_that_come_and_go_leave_nothing():
    model, alone = exact(), exact()
    expected = {}
    for c in range(8):
        with Steerer(alone, V, c=c):
            expected[c] = alone(X)

    def work(c):
        right = True
        for turn in range(25):
            with Steerer(model, V if turn % 2 else INPUT, c=c, scope="context", backend="hook" if turn % 3 else "auto"):
                right = right and torch.equal(model(X), expected[c])
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert state(model) == state(exact())


@pytest.mark.case(44)
@pytest.mark.parametrize("backend", ["fold", "buffer"])
def test_backends_that_all_threads_read_are_refused(backend):
    with pytest.raises(ValueError, match=f"and the {backend} backend changes what all threads read"):
        Steerer(exact(), V, scope="context", backend=backend)


@pytest.mark.case(44)
def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope: expected one of 'process', 'context', got 'task'"):
        Steerer(exact(), V, scope="task")


# --- tasks -------------------------------------------------------------------------------------------------------
@pytest.mark.case(44)
@each
@pytest.mark.parametrize("v", [V, INPUT], ids=["output", "input"])
def test_asyncio_tasks_in_turns_have_each_their_own_steering(options, v):
    model, strengths = exact(), [None, 1.0, -2.0]
    options = {name: value for name, value in options.items() if name != "c"}
    expected = []
    for c in strengths:
        with Steerer(model, v, c=c or 0.0, **options):
            expected.append(model(X))

    async def turns(c):
        outputs = []
        for _ in range(4):
            if c is None:
                outputs.append(model(X))
                await asyncio.sleep(0)
                continue
            with Steerer(model, v, c=c, scope="context", **options):
                await asyncio.sleep(0)
                outputs.append(model(X))
                await asyncio.sleep(0)
        return outputs

    async def together():
        return await asyncio.gather(*map(turns, strengths))

    for outputs, wanted in zip(asyncio.run(together()), expected, strict=True):
        assert all(torch.equal(output, wanted) for output in outputs)
    assert state(model) == state(exact())


@pytest.mark.case(44)
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_a_task_that_is_made_inside_the_block_is_steered_until_the_block_ends():
    model, plain = exact(), exact()(X)

    async def main():
        with Steerer(model, V, scope="context"):
            expected = model(X)
            assert torch.equal(await asyncio.create_task(run()), expected)
            late = contextvars.copy_context()
        assert torch.equal(late.run(model, X), plain)
        with Steerer(model, V, scope="context"):
            assert torch.equal(late.run(model, X), plain)

    async def run():
        return model(X)

    asyncio.run(main())
