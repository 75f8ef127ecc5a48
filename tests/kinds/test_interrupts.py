"""An interrupt (Ctrl-C in a notebook) at any line of entering, running or leaving a block.

The model is plain after it, or `detach()` makes it plain.

The kind of fault: a model that stays steered for ever, its biases changed, and `detach()` does nothing.
"""

import contextlib
import sys
import warnings

import pytest
import torch
from torch import nn

from actsteer import Ablate, ActsteerError, ProjectionAbove, Steerer, SteeringVector, detach_all
from actsteer.sites import tap
from tests.kinds.by_hand import Text

V = SteeringVector({"0": torch.linspace(-1, 1, 8), "2": torch.tensor([1.0, -2.0, 0.5])})
X = torch.linspace(-1, 1, 24).view(4, 6).sin()
STEP = 23  # of the default tier: every 23rd line; the slow tier takes every one
pytestmark = pytest.mark.filterwarnings("ignore")  # an interrupt in a finaliser is reported as a warning


def fresh():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval().requires_grad_(False)
    for n, parameter in enumerate(model.parameters()):
        parameter.copy_((torch.arange(parameter.numel()).view_as(parameter) * 5 % 11 - 5 + n) / 8)
    return model


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line, or return, of this library and of contextlib."""

    def __init__(self, n):
        self.left, self.raised = n, False

    def __call__(self, frame, event, argument):
        file = frame.f_code.co_filename
        return self.line if "/actsteer/" in file or file.endswith("contextlib.py") else None

    def line(self, frame, event, argument):
        if event in ("line", "return"):
            self.left -= 1
            if not self.left:
                self.raised = True
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.line

    def during(self, run):
        """Whether the interrupt came while this ran."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            run()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
            release(tap.lock)
        return self.raised


def release(lock):
    """A trace function raises between the end of a `with` and its `__exit__` too, where no interrupt comes."""
    with contextlib.suppress(RuntimeError):
        while True:
            lock.release()


def state(model):
    """What a steering may leave behind."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            [list(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)],
            [p.tolist() for p in module._parameters.values() if p is not None],
        )
        for name, module in model.named_modules()
    }


def quietly(function):
    """Call it; a site that did not fire, or an edit that was half in place, may be complained about."""
    with contextlib.suppress(ActsteerError):
        function()


BACKENDS = ("auto", "tap", "hook", "buffer", "fold")
WAYS = {
    **{backend: {"backend": backend} for backend in BACKENDS},
    **{f"context, {backend}": {"backend": backend, "scope": "context"} for backend in ("auto", "tap", "hook")},
    "gated": {"gate": ProjectionAbove(SteeringVector({"0": torch.ones(8)}), 0.0), "sites": "2"},
    "gated and per row": {
        "gate": ProjectionAbove(SteeringVector({"0": torch.ones(8)}), 0.0),
        "c": torch.tensor([0.0, 1.0, 2.0, 3.0]),
    },
    "ablate": {"intervention": Ablate()},
}
PHASES = {
    "attach": (lambda s, m: None, lambda s, m: s.attach()),
    "with": (lambda s, m: None, lambda s, m: block(s, m)),
    "detach": (lambda s, m: (s.attach(), m(X)), lambda s, m: s.detach()),
    "strength": (lambda s, m: (s.attach(), m(X)), lambda s, m: setattr(s, "c", 3.0)),
    "exit": (lambda s, m: (s.__enter__(), m(X)), lambda s, m: s.__exit__(None, None, None)),
}


def block(steerer, model):
    with steerer:
        model(X)


def interrupted(make, prepare, run, *, step, begin=1):
    """Model, Steerer and what the model was, after an interrupt at every `step`-th line; ends when none comes."""
    n = begin
    while True:
        model = fresh()
        before, plain = state(model), model(X)
        steerer = make(model)
        prepare(steerer, model)
        if not Interrupt(n).during(lambda s=steerer, m=model: run(s, m)):
            quietly(steerer.detach)
            return
        yield n, model, steerer, before, plain
        n += step


def check(options, phase, *, step, begin=1):
    prepare, run = PHASES[phase]
    points = 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n, model, steerer, before, plain in interrupted(
            lambda m: Steerer(m, V, **({"c": 2.0} | options)), prepare, run, step=step, begin=begin
        ):
            points += 1
            if state(model) != before or not torch.equal(model(X), plain):
                quietly(steerer.detach)
                assert state(model) == before, f"at line {n}"
            assert torch.equal(model(X), plain), f"at line {n}"
            again = Steerer(model, V, **({"c": 2.0} | options))  # and it can be steered again
            with again:
                assert not torch.equal(model(X), plain), f"at line {n}"
            assert state(model) == before and torch.equal(model(X), plain), f"at line {n}"
    assert points


every_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
every_phase = pytest.mark.parametrize("phase", PHASES)


@every_way
@every_phase
def test_the_model_is_plain_or_detach_makes_it_plain(options, phase):
    check(options, phase, step=STEP)


@pytest.mark.slow
@every_way
@every_phase
def test_the_model_is_plain_or_detach_makes_it_plain_at_every_line(options, phase):
    check(options, phase, step=1)


class AtCalls(Interrupt):
    """Raises KeyboardInterrupt at the n-th call of a Python function, or return of one of this library's."""

    where = None

    def __call__(self, frame, event, argument):
        frame.f_trace_lines = False
        if event == "call" or (event == "return" and "/actsteer/" in frame.f_code.co_filename):
            self.left -= 1
            if not self.left:
                self.raised, self.where = True, (frame.f_code.co_name, event)
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def ends_of_blocks_that_stay_steered(options, step):
    found, n = set(), 1
    while True:
        model = fresh()
        before, plain = state(model), model(X)
        steerer, interrupt = Steerer(model, V, **({"c": 2.0} | options)), AtCalls(n)
        if not interrupt.during(lambda s=steerer, m=model: block(s, m)):
            return found
        if state(model) != before or not torch.equal(model(X), plain):
            found.add(interrupt.where)
            steerer.detach()
        n += step


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"backend": backend} for backend in BACKENDS], ids=BACKENDS)
def test_a_block_that_is_interrupted_ends_plain_but_at_two_places(options):
    """As soon as `__enter__` has returned, or before `__exit__` has begun, no code of a context manager runs."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ends_of_blocks_that_stay_steered(options, 1) == {("__enter__", "return"), ("__exit__", "call")}


def without_its_name(options, step):
    prepare, run = PHASES["with"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n, model, steerer, before, plain in interrupted(
            lambda m: Steerer(m, V, **({"c": 2.0} | options)), prepare, run, step=step, begin=step
        ):
            del steerer
            quietly(lambda m=model: detach_all(m))
            assert state(model) == before and torch.equal(model(X), plain), f"at line {n}"


@every_way
def test_detach_all_makes_it_plain_where_the_name_is_lost(options):
    without_its_name(options, STEP)


@pytest.mark.slow
@every_way
def test_detach_all_makes_it_plain_at_every_line(options):
    without_its_name(options, 1)


@every_way
def test_a_detach_that_is_interrupted_can_be_tried_again_and_again(options):
    """Each attempt is interrupted a little later than the one before."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fresh()
        before, plain = state(model), model(X)
        steerer = Steerer(model, V, **({"c": 2.0} | options)).attach()
        model(X)
        for n in range(1, 400, 7):
            try:
                if not Interrupt(n).during(steerer.detach):
                    break
            except ActsteerError:
                break
        quietly(steerer.detach)
        assert state(model) == before and torch.equal(model(X), plain)


def nested(step):
    """Two blocks; the one that was there before goes on, or is taken off, as it was."""
    inner = {"backend": "auto", "c": 3.0}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        n = 1
        while True:
            model = fresh()
            before, plain = state(model), model(X)
            outer = Steerer(model, V, c=1.0).attach()
            steered = model(X)
            second = Steerer(model, 2 * V, **inner)
            if not Interrupt(n).during(lambda s=second, m=model: block(s, m)):
                break
            quietly(second.detach)
            assert torch.equal(model(X), steered), f"at line {n}"
            outer.detach()
            assert state(model) == before and torch.equal(model(X), plain), f"at line {n}"
            n += step


def test_the_block_around_it_is_not_disturbed():
    nested(STEP)


@pytest.mark.slow
def test_the_block_around_it_is_not_disturbed_at_any_line():
    nested(1)


def passes(step):
    """Interrupts inside of passes with pads and positions: the next pass has its own."""
    tokens, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]])
    model = Text().requires_grad_(False)
    plain = model(tokens)
    with Steerer(model, SteeringVector({"b": torch.ones(2)}), positions="last") as steerer:
        n = 1
        while Interrupt(n).during(lambda: model(tokens, attention_mask=mask)):
            got = model(tokens[:, :2]) - plain[:, :2]
            assert got.abs().amax(-1).gt(0.5).int().tolist() == [[0, 1]], f"at line {n}"
            n += step
    assert n > 1 and not steerer.attached and torch.equal(model(tokens), plain)


def test_a_pass_that_is_interrupted_leaves_nothing_to_the_next():
    passes(STEP)


@pytest.mark.slow
def test_a_pass_that_is_interrupted_at_any_line_leaves_nothing_to_the_next():
    passes(1)
