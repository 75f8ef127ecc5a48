"""Eight threads that attach and leave at once: nothing is raised, nothing stays behind, each sees what it may see.

The kind of fault: weights differ for ever, for two threads read and write what is shared without a lock.
"""

import contextlib
import copy
import sys
import threading

import pytest
import torch
from torch import nn

from actsteer import AttachedError, GateError, ProjectionAbove, Steerer, SteeringVector
from tests.kinds.by_hand import BACKENDS, Text, moved

V = SteeringVector({"2": torch.linspace(-1, 1, 8)})
X = torch.linspace(-1, 1, 18).view(3, 6).sin()
pytestmark = pytest.mark.filterwarnings("ignore:.*equal.*:UserWarning", "ignore:.*attached.*:UserWarning")


def small():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)).eval().requires_grad_(False)
    for n, parameter in enumerate(model.parameters()):
        parameter.copy_((torch.arange(parameter.numel()).view_as(parameter) * 5 % 11 - 5 + n) / 8)
    return model


def left(model):
    """What a steering may leave behind."""
    return [(type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.fixture(autouse=True, params=[1e-6, 0.005], ids=["switching all the time", "switching seldom"])
def switching(request):
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param)
    yield
    sys.setswitchinterval(before)


def together(body, threads=8):
    """The body in eight threads that begin at once; what they raised."""
    barrier, errors = threading.Barrier(threads, timeout=30), []

    def run(n):
        try:
            barrier.wait()
            with torch.no_grad():
                body(n)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
    assert not any(thread.is_alive() for thread in running), "they wait for one another"
    assert errors == []


def cycles(body, *, times):
    """Eight threads, each so many times; the model is what it was."""
    model = small()
    before, plain, weights = left(model), model(X), copy.deepcopy(model.state_dict())

    def run(n):
        for _ in range(times):
            body(model, n)

    together(run)
    assert torch.equal(model(X), plain) and left(model) == before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def attach_and_leave(**options):
    def body(model, n):
        with Steerer(model, V, strict=False, **options):
            model(X)

    return body


def own_steering(**options):
    """In a scope of one's own, each thread sees its own strength, and none other."""
    plain, v = small()(X), V["2"]

    def body(model, n):
        with Steerer(model, V, c=float(n), scope="context", **options):
            torch.testing.assert_close(model(X), plain + n * v)
        assert torch.equal(model(X), plain)

    return body


def gated():
    """A pass of another thread that is past the gate already when the edit comes is refused, and not guessed."""
    gate = ProjectionAbove(SteeringVector({"0": torch.ones(8)}), 0.0)

    def body(model, n):
        with contextlib.suppress(GateError), Steerer(model, V, gate=gate, strict=False):
            model(X)
        with Steerer(model, V, gate=gate, scope="context"), contextlib.suppress(GateError):
            model(X)  # in which the edits of others are too

    return body


BODIES = {
    **{backend: attach_and_leave(backend=backend) for backend in (*BACKENDS, "fold")},
    **{f"own, {backend}": own_steering(backend=backend) for backend in ("auto", "tap", "hook")},
    "gated": gated(),
    "rows": attach_and_leave(c=torch.tensor([0.0, 1.0, 2.0])),
    "by hand": lambda model, n: Steerer(model, V, strict=False).attach().detach(),
}
every_body = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)


@every_body
def test_attaching_and_leaving(body):
    cycles(body, times=8)


@pytest.mark.slow
@every_body
def test_attaching_and_leaving_many_times(body):
    cycles(body, times=400)


def one_steerer(times, **options):
    """One Steerer that all of them attach and detach: attached already, or not, and never half."""
    model = small()
    before, plain, weights = left(model), model(X), copy.deepcopy(model.state_dict())
    steerer = Steerer(model, V, strict=False, **options)

    def run(n):
        for _ in range(times):
            try:
                steerer.attach()
            except AttachedError:
                continue
            model(X)
            steerer.detach()

    together(run)
    steerer.detach()
    assert torch.equal(model(X), plain) and left(model) == before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


@pytest.mark.parametrize("backend", [*BACKENDS, "fold"])
def test_one_steerer_of_all(backend):
    one_steerer(8, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*BACKENDS, "fold"])
def test_one_steerer_of_all_many_times(backend):
    one_steerer(400, backend=backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "fold"])
def test_a_strength_that_is_set_from_all_sides_is_one_of_them(backend):
    model = small()
    plain, v = model(X), V["2"]
    with Steerer(model, V, backend=backend) as steerer:

        def run(n):
            for _ in range(5):
                steerer.c = float(n)
                got = model(X) - plain
                assert any(torch.allclose(got, k * v, atol=1e-5) for k in range(8))

        steerer.c = 0.0
        together(run)
        torch.testing.assert_close(model(X), plain + steerer.c * v)
    assert torch.equal(model(X), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_passes_with_their_own_pads_while_others_come_and_go(backend):
    """Half of the threads attach and leave an edit of size zero; the other half reads what is steered."""
    model = Text().requires_grad_(False)
    tokens, masks = torch.tensor([[1, 2, 3]]), [torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 1]])]
    plain = model(tokens)
    nothing = SteeringVector({"b": torch.zeros(2)})

    def run(n):
        for _ in range(8):
            if n % 2:
                with Steerer(model, nothing, strict=False):
                    pass
            else:
                mask = masks[n // 2 % 2]
                assert moved(model(tokens, attention_mask=mask), plain) == mask.tolist()

    with Steerer(model, SteeringVector({"b": torch.ones(2)}), backend=backend):
        together(run)
    assert torch.equal(model(tokens), plain)


@pytest.mark.parametrize("backend", [*BACKENDS, "fold"])
def test_two_models_that_share_a_module(backend):
    """A tied layer, steered through two models by turns."""
    shared = small()
    models = [nn.Sequential(shared[0], shared[1], shared[2]) for _ in range(2)]
    before, plain = left(shared), shared(X)

    def run(n):
        for _ in range(5):
            with Steerer(models[n % 2], V, strict=False, backend=backend):
                models[n % 2](X)

    together(run)
    assert torch.equal(shared(X), plain) and left(shared) == before
