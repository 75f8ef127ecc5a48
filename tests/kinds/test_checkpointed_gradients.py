"""Checkpointed passes: their backward pass recomputes what was, or it is said that it cannot.

The kind of fault: the strength is changed, or another block entered, between the forward and the backward pass, and the
gradients are silently those of another function.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from actsteer import ActsteerError, Steerer, SteeringVector, detach_all
from tests.kinds.by_hand import Text, added, every_backend, identity

X = torch.linspace(-1, 1, 12).view(3, 4).sin().double()
V = SteeringVector({"2": torch.tensor([1.0, -2.0, 0.5, 4.0]).double()})
pytestmark = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # torch, where there is no gradient
every_kind = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


def small():
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.copy_((torch.arange(parameter.numel()).view_as(parameter) * 5 % 11 - 5 + n) / 8)
    return model


def inputs():
    return X.clone().requires_grad_()


def grads(model, x, output):
    model.zero_grad()
    output.square().sum().backward()
    return [x.grad.clone(), *[parameter.grad.clone() for parameter in model.parameters()]]


def by_hand(c=1.0):
    """Gradients without checkpoints, steered by a plain hook."""
    model, x = small(), inputs()
    with added(model, "2", c * V["2"]):
        return grads(model, x, model(x))


def agree(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def one(model, x, reentrant):
    return checkpoint(model, x, use_reentrant=reentrant)


def halves(model, x, reentrant):
    return checkpoint(model[4:], checkpoint(model[:4], x, use_reentrant=reentrant), use_reentrant=reentrant)


def segments(n):
    return lambda model, x, reentrant: checkpoint_sequential(model, n, x, use_reentrant=reentrant)


RUNS = {"one": one, "halves": halves, "sequential, 2": segments(2), "sequential, 3": segments(3), "6": segments(6)}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


# --- inside the block ------------------------------------------------------------------------------------------------
@every_backend
@every_kind
@every_run
def test_gradients_inside_the_block_are_right(backend, reentrant, run):
    model, x = small(), inputs()
    with Steerer(model, V, backend=backend):
        agree(grads(model, x, run(model, x, reentrant)), by_hand())
    assert torch.equal(model(X), small()(X))


@every_backend
@every_kind
@every_run
def test_several_passes_before_their_backward_passes(backend, reentrant, run):
    model = small()
    with Steerer(model, V, backend=backend):
        xs = [inputs() for _ in range(3)]
        outputs = [run(model, x, reentrant) for x in xs]
        for x, output in reversed(list(zip(xs, outputs, strict=True))):
            agree(grads(model, x, output), by_hand())


# --- something changes in between ------------------------------------------------------------------------------------
def strength(steerer, model):
    steerer.c = 3.0


def another_block(steerer, model):
    Steerer(model, 2 * V).attach()


def another_site(steerer, model):
    Steerer(model, SteeringVector({"0": V["2"]})).attach()


def leaves(steerer, model):
    steerer.detach()


CHANGES = {"c": strength, "a block": another_block, "a block at another site": another_site, "leaving": leaves}


@every_backend
@every_kind
@pytest.mark.parametrize("run", [one, segments(2)], ids=["one", "sequential"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_before_the_backward_pass_warns(backend, reentrant, run, change):
    model, x = small(), inputs()
    steerer = Steerer(model, V, backend=backend).attach()
    output = run(model, x, reentrant)
    with pytest.warns(UserWarning, match="checkpoint"):
        change(steerer, model)
    del output
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detach_all(model)


@every_backend
@every_kind
@pytest.mark.parametrize("change", [strength, leaves], ids=["c", "leaving"])
def test_after_the_backward_pass_nothing_is_said(backend, reentrant, change):
    model, x = small(), inputs()
    steerer = Steerer(model, V, backend=backend).attach()
    agree(grads(model, x, one(model, x, reentrant)), by_hand())
    change(steerer, model)
    steerer.detach()


@every_backend
@pytest.mark.parametrize("change", [strength, leaves], ids=["c", "leaving"])
def test_without_checkpoints_nothing_is_said_and_gradients_are_right(backend, change):
    model, x = small(), inputs()
    steerer = Steerer(model, V, backend=backend).attach()
    output = model(x)
    change(steerer, model)
    agree(grads(model, x, output), by_hand())
    steerer.detach()


@every_backend
@every_kind
def test_without_gradients_nothing_is_said(backend, reentrant):
    model = small()
    with Steerer(model, V, backend=backend) as steerer, torch.no_grad():
        one(model, X, reentrant)
        steerer.c = 2.0


@every_backend
@every_kind
def test_the_same_strength_is_no_change_of_the_gradients(backend, reentrant):
    """It may be warned about; what comes out is right."""
    model, x = small(), inputs()
    with Steerer(model, V, backend=backend) as steerer:
        output = one(model, x, reentrant)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steerer.c = 1.0
        agree(grads(model, x, output), by_hand())


# --- pads and rows in what is computed again -------------------------------------------------------------------------
class Checkpointed(Text):
    """The steered part runs inside a checkpoint."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.tail = reentrant, identity()

    def forward(self, input_ids, attention_mask=None):
        return checkpoint(self.part, self.a(self.e(input_ids)), use_reentrant=self.reentrant)

    def part(self, h):
        return self.tail(self.b(h)).tanh()


IDS, MASK = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
TOLD = {
    "pads": ({}, MASK),
    "last": ({"positions": "last"}, torch.tensor([[0, 1, 0], [0, 0, 1]])),
    "rows": ({"c": torch.tensor([1.0, 3.0])}, MASK * torch.tensor([[1], [3]])),
}


@every_backend
@every_kind
@pytest.mark.parametrize("between", ["nothing", "a pass without pads", "a longer pass"])
@pytest.mark.parametrize(("options", "amounts"), TOLD.values(), ids=TOLD)
def test_what_is_computed_again_has_the_tokens_of_its_pass(backend, reentrant, between, options, amounts):
    """The backward pass comes when the pass is over, and perhaps another one has been since: right, or refused."""
    model, plain = Checkpointed(reentrant), Checkpointed(reentrant)
    with added(plain, "b", amounts[..., None].float()):
        plain(IDS).square().sum().backward()
    want = [parameter.grad for parameter in plain.parameters()]
    with Steerer(model, SteeringVector({"b": torch.ones(2)}), backend=backend, **options):
        try:
            output = model(IDS, attention_mask=MASK)
            if between != "nothing":
                with torch.no_grad():
                    model(IDS if between == "a pass without pads" else IDS.repeat(1, 2))
            output.square().sum().backward()
        except ActsteerError:
            return
    agree([parameter.grad for parameter in model.parameters()], want)


@every_backend
@every_kind
def test_a_copy_inside_the_block_is_checkpointed_plainly(backend, reentrant):
    model, x = small(), inputs()
    with Steerer(model, V, backend=backend):
        twin = copy.deepcopy(model)
        got = grads(twin, x, one(twin, x, reentrant))
        model(X)
    other = inputs()
    agree(got, grads(small_again := small(), other, small_again(other)))
