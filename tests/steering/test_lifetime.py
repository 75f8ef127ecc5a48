"""Steerers come and go in any order, and leave the model bit for bit as it was."""

import copy
from collections.abc import Mapping

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from actsteer import (
    AttachedError,
    ProjectionAbove,
    ShapeError,
    SiteNotFoundError,
    Steerer,
    SteeringNotApplied,
    SteeringVector,
    VectorBank,
)
from tests.oracles import state
from tests.strategies import eighths
from tests.zoo import bits, exact, mlp, normal

X = torch.tensor([[1.0, -0.5, 0.25, 2.0], [0.0, -0.0, -1.0, 0.5]], dtype=torch.float64)
V = SteeringVector({"1": torch.tensor([1.0, -2.0, 0.5, 4.0]), "3": torch.ones(4)})
EVERYTHING = SteeringVector({"2": torch.ones(6), "5": torch.ones(6)})


# --- any order ---------------------------------------------------------------------------------------------------
class Mirror:
    """h -> h + c (v - h): unlike adding, it does not commute, so the order matters."""

    def __call__(self, activation, direction, c):
        return activation + c * (direction - activation)


class Lifetime(RuleBasedStateMachine):
    """Up to four Steerers on one model, which is at every step what a run by hand says."""

    def __init__(self):
        super().__init__()
        self.model = exact()
        self.before = state(self.model)
        self.output = self.model(X)
        self.attached, self.idle = [], []

    def by_hand(self):
        x = X
        for name, module in self.model.named_children():
            x = module.forward(x)
            for steerer in self.attached:
                for concept, vector in steerer.bank.items():
                    if name in vector and name in steerer.sites:
                        c = steerer.c.get(concept, 0.0) if isinstance(steerer.c, Mapping) else steerer.c
                        c = c[:, None] if isinstance(c, torch.Tensor) else c
                        x = x + c * (vector[name] - x if steerer.mirrors else vector[name])
        return x

    some = st.integers(0, 3)
    numbers = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 2.0])
    rows = st.lists(numbers, min_size=2, max_size=2).map(lambda c: torch.tensor(c, dtype=torch.float64))
    strengths = numbers | rows | st.dictionaries(st.sampled_from(["a", "b"]), numbers)
    vectors = st.dictionaries(st.sampled_from(["0", "1", "3", "4"]), eighths(4), min_size=1).map(SteeringVector)

    @precondition(lambda self: len(self.attached) + len(self.idle) < 4)
    @rule(a=vectors, b=vectors, c=strengths, mirrors=st.booleans(), last_only=st.booleans())
    def enter(self, a, b, c, mirrors, last_only):
        if mirrors:  # an intervention sees a zero direction where its vector has no site
            b = SteeringVector({site: torch.ones(4) for site in a})
        chosen = [max([*a.sites, *b.sites])] if last_only else None
        bank, intervention = VectorBank({"a": a, "b": b}), Mirror() if mirrors else None
        steerer = Steerer(self.model, bank, c=c, intervention=intervention, sites=chosen)
        steerer.mirrors = mirrors
        self.attached.append(steerer.__enter__())

    @precondition(lambda self: self.idle)
    @rule(index=some)
    def enter_again(self, index):
        self.attached.append(self.idle.pop(index % len(self.idle)).__enter__())

    @precondition(lambda self: self.attached)
    @rule(index=some)
    def enter_twice(self, index):
        with pytest.raises(AttachedError, match="attached already"):
            self.attached[index % len(self.attached)].attach()

    @precondition(lambda self: self.attached)
    @rule(index=some, error=st.sampled_from([None, ValueError(), KeyboardInterrupt()]))
    def leave(self, index, error):
        steerer = self.attached.pop(index % len(self.attached))
        assert not steerer.__exit__(type(error) if error else None, error, None)
        self.idle.append(steerer)

    @precondition(lambda self: self.attached)
    @rule(index=some, c=strengths)
    def change(self, index, c):
        self.attached[index % len(self.attached)].c = c

    @rule()
    def fail_in_a_forward(self):
        with pytest.raises(RuntimeError, match="shape"):
            self.model(X[:, :3])

    @rule()
    def fail_to_enter(self):
        with pytest.raises(SiteNotFoundError):
            Steerer(self.model, SteeringVector({"0": torch.ones(4), "9": torch.ones(4)}))

    @invariant()
    def the_output_is_the_one_by_hand(self):
        assert torch.equal(self.model(X), self.by_hand())

    @invariant()
    def a_steerer_knows_whether_it_is_attached(self):
        assert all(steerer.attached for steerer in self.attached)
        assert not any(steerer.attached for steerer in self.idle)

    def teardown(self):
        for steerer in self.attached:
            steerer.detach()
        assert torch.equal(bits(self.model(X)), bits(self.output))
        assert state(self.model) == self.before


TestLifetime = Lifetime.TestCase
TestLifetime.settings = settings(deadline=None, max_examples=40, stateful_step_count=20)


# --- attach and detach -------------------------------------------------------------------------------------------
def test_attaching_twice_is_refused_and_changes_nothing():
    model = exact()
    with Steerer(model, V) as steerer:
        during = state(model)
        with pytest.raises(AttachedError, match=r"Steerer\(Sequential.* is attached already; detach it"), steerer:
            pass
        assert state(model) == during
        assert steerer.attached
        model(X)
    assert not steerer.attached


def test_detaching_is_idempotent_and_a_steerer_can_be_used_again():
    model = exact()
    steerer, plain = Steerer(model, V), model(X)
    steerer.detach()
    outputs = []
    for _ in range(3):
        assert steerer.attach() is steerer
        outputs.append(model(X))
        steerer.detach()
        steerer.detach()
        assert torch.equal(model(X), plain)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert not torch.equal(outputs[0], plain)


# --- the model is left as it was ---------------------------------------------------------------------------------
def leave_normally(model, steerer):
    with steerer:
        model(normal(2, 12))


def leave_without_a_forward(model, steerer):
    with steerer:
        pass


def fail_inside(steerer, error):
    with steerer:
        steerer.model(normal(2, 12))
        raise error


def leave_by_an_error_in_the_block(model, steerer):
    with pytest.raises(ZeroDivisionError):
        fail_inside(steerer, ZeroDivisionError())


def leave_by_an_interrupt(model, steerer):
    with pytest.raises(KeyboardInterrupt):
        fail_inside(steerer, KeyboardInterrupt())


def leave_by_an_error_in_a_forward(model, steerer):
    with pytest.raises(RuntimeError, match="shape"), steerer:
        model(normal(2, 11))


def leave_by_an_error_in_an_edit(model, steerer):
    steerer.c = torch.ones(7)
    with pytest.raises((ValueError, RuntimeError), match="7"), steerer:
        model(normal(2, 12))


def leave_a_generator_early(model, steerer):
    def stream():
        with steerer:
            while True:
                yield model(normal(2, 12))

    outputs = stream()
    next(outputs)
    outputs.close()


def leave_by_not_being_applied(model, steerer):
    steerer.attach()
    model.forward = lambda x: x  # the root runs, its members do not
    model(normal(2, 12))
    del model.forward
    with pytest.raises(SteeringNotApplied):
        steerer.detach()


ENDINGS = [
    leave_normally,
    leave_without_a_forward,
    leave_by_an_error_in_the_block,
    leave_by_an_interrupt,
    leave_by_an_error_in_a_forward,
    leave_by_an_error_in_an_edit,
    leave_a_generator_early,
    leave_by_not_being_applied,
]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("leave", ENDINGS)
def test_however_the_block_ends_the_model_is_what_it_was(leave, gated):
    model, x = mlp(), normal(3, 12)
    model.register_buffer("signs", torch.tensor([-0.0, 0.0]))
    model[2].register_forward_hook(lambda module, args, output: output * 2)  # the user's own hook stays
    gate = ProjectionAbove(SteeringVector({"2": normal(6)}), 0.0) if gated else None
    before, output, numbers = state(model), model(x), {k: bits(t) for k, t in model.state_dict().items()}
    leave(model, Steerer(model, EVERYTHING, gate=gate))
    assert state(model) == before
    assert torch.equal(bits(model(x)), bits(output))
    assert all(torch.equal(bits(tensor), numbers[key]) for key, tensor in model.state_dict().items())


def test_the_state_dict_is_the_same_inside_the_block():
    model = mlp()
    before = model.state_dict()
    with Steerer(model, EVERYTHING):
        during = model.state_dict()
    assert list(during) == list(before)
    assert all(torch.equal(bits(during[key]), bits(before[key])) for key in before)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_when_a_hook_cannot_be_registered_none_is(monkeypatch, kind, allowed):
    model, left, register = mlp(), [allowed], getattr(nn.Module, kind)

    def refuse(module, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("no more hooks")
        return register(module, *args, **kwargs)

    steerer = Steerer(model, EVERYTHING, gate=ProjectionAbove(SteeringVector({"2": normal(6)}), 0.0))
    before = state(model)
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, kind, refuse)
        if kind == "register_forward_pre_hook" and allowed:
            steerer.attach().detach()  # it needs only one
        else:
            with pytest.raises(MemoryError):
                steerer.attach()
    assert state(model) == before
    assert not steerer.attached
    leave_normally(model, steerer)


def test_a_module_that_is_gone_by_the_time_of_attaching_leaves_nothing_attached():
    model = exact()
    steerer = Steerer(model, V)
    del model[3:]
    before = state(model)
    with pytest.raises(SiteNotFoundError, match="no site '3'"):
        steerer.attach()
    assert state(model) == before


def test_hooks_that_the_user_adds_inside_the_block_survive():
    model, calls = exact(), []
    with Steerer(model, V):
        model[1].register_forward_hook(lambda *_: calls.append("hook"))
        model.register_forward_pre_hook(lambda *_: calls.append("pre-hook"))
    model(X)
    assert calls == ["pre-hook", "hook"]


def test_hooks_that_the_user_removes_inside_the_block_stay_removed():
    model, calls = exact(), []
    handle = model[1].register_forward_hook(lambda *_: calls.append("hook"))
    with Steerer(model, V):
        handle.remove()
        model(X)
    model(X)
    assert calls == []


# --- copies ------------------------------------------------------------------------------------------------------
def test_a_copy_made_before_is_not_steered():
    model = exact()
    twin = copy.deepcopy(model)
    with Steerer(model, V):
        assert torch.equal(twin(X), exact()(X))
        assert not torch.equal(model(X), twin(X))


def test_two_models_share_nothing():
    first, second = exact(), exact()
    with Steerer(first, V, c=1), Steerer(second, V, c=-1):
        both = first(X), second(X)
    for model, c, output in zip((first, second), (1, -1), both, strict=True):
        with Steerer(model, V, c=c):
            assert torch.equal(model(X), output)
    assert not torch.equal(*both)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_copy_made_inside_the_block_gives_what_the_steered_model_gives(gated):
    model = exact()
    gate = ProjectionAbove(SteeringVector({"0": torch.ones(4)}), 0.0) if gated else None
    with Steerer(model, V, gate=gate):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(X), model(X))


def test_a_model_inside_another_is_steered_within_it():
    model = nn.Sequential(exact(), nn.Identity())
    with Steerer(model[0], V):
        inside = model(X)
    with Steerer(model, SteeringVector({f"0.{site}": V[site] for site in V})):
        assert torch.equal(model(X), inside)


def test_a_wrong_size_in_a_forward_leaves_the_model_as_it_was():
    model = exact()
    before = state(model)
    with pytest.raises(ShapeError), Steerer(model, SteeringVector({"1": torch.ones(5)})):
        model(X)
    assert state(model) == before
