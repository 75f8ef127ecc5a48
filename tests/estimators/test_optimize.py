"""optimize: the loss falls, the model stays, and a seed decides everything."""

import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from tqdm import tqdm

from actsteer import (
    ActsteerError,
    BatchError,
    LowRank,
    ProjectionAbove,
    ShapeError,
    SiteNotFoundError,
    StatisticsError,
    Steerer,
    SteeringVector,
    optimize,
)
from tests.oracles import Lazy, state
from tests.zoo import data_parallel

X = torch.linspace(-2, 2, 24).reshape(12, 2)
Y = torch.arange(12) % 3


def to_one(output):
    """A convex loss: the outputs shall be 1."""
    return (output - 1).square().mean()


@pytest.fixture
def model():
    """Something of everything that training could disturb."""
    torch.manual_seed(0)
    parts = nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 3)
    built = nn.Sequential(*parts).train()
    built[0].weight.requires_grad_(False)
    built[1].eval()
    return built


def train(model, batches=X, *, sites="2", loss=to_one, steps=5, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return optimize(model, batches, sites=sites, loss=loss, steps=steps, generator=generator, progress=False, **options)


def test_the_bar_shows_the_loss_of_now_however_slow_the_steps_are(model, monkeypatch):
    """At a second a step, as of a large model, it would be that of ten steps ago."""
    clock, shown = iter(range(1000)), []
    module = sys.modules["actsteer.estimators.optimize"]
    monkeypatch.setattr(module, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(tqdm, "set_postfix", lambda self, *_, loss, **__: shown.append(float(loss)))
    seen = []

    def loss(output):
        seen.append((output - 1).square().mean())
        return seen[-1]

    optimize(model, X, sites="2", loss=loss, steps=12, lr=0.1, batch_size=12, progress=True)
    assert shown == [float(f"{float(value.detach()):.4g}") for value in seen[-len(shown) :]]
    assert len(shown) >= 10
    shown.clear()
    optimize(model, X, sites="2", loss=loss, steps=3, progress=False)
    assert not shown


def loss_under(model, v, loss=to_one):
    model.eval()
    with torch.no_grad():
        plain = loss(model(X))
        with Steerer(model, v):
            return float(loss(model(X))), float(plain)


# --- it trains ---------------------------------------------------------------------------------------------------
def test_the_optimum_of_a_quadratic_is_found():
    goal = torch.tensor([3.0, -2.0])
    v = train(
        nn.Sequential(nn.Identity()),
        torch.zeros(4, 2),
        sites="0",
        steps=500,
        lr=0.05,
        loss=lambda o: (o - goal).square().sum(),
    )
    assert torch.allclose(v["0"], goal, atol=1e-2)


@pytest.mark.parametrize("sites", ["2", "4", ["0", "2"], "*"])
def test_the_loss_falls(model, sites):
    steered, plain = loss_under(model, train(model, sites=sites, steps=60))
    assert steered < 0.9 * plain


def test_one_step_of_adam_has_the_size_of_the_learning_rate():
    v = train(nn.Sequential(nn.Identity()), torch.zeros(4, 2), sites="0", steps=1, lr=0.5)
    assert torch.allclose(v["0"], torch.tensor([0.5, 0.5]))


def test_the_vector_says_where_it_comes_from(model):
    v = train(model, sites=["2", "0"], concept="nine")
    assert v.sites == ("0", "2")
    assert v.metadata["model"].startswith("Sequential:")
    assert {key: v.metadata[key] for key in ("concept", "estimator", "steps")} == {
        "concept": "nine",
        "estimator": "optimize",
        "steps": "5",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_vector_has_the_activation_s_dtype(model, dtype):
    assert train(model.to(dtype), X.to(dtype))["2"].dtype is dtype


def test_images_are_steered_along_their_channels():
    v = train(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.ones(3, 1, 4, 4), sites="1")
    assert v["1"].shape == (2,)


# --- the loss and its target -------------------------------------------------------------------------------------
def test_a_loss_of_two_arguments_compares_with_the_target(model):
    v = train(model, targets=Y, loss=functional.cross_entropy, steps=60, batch_size=4)
    steered, plain = loss_under(model, v, lambda output: functional.cross_entropy(output, Y))
    assert steered < plain


def test_a_module_is_a_loss(model):
    by_module = train(model, targets=Y, loss=nn.CrossEntropyLoss())
    assert by_module.equal(train(model, targets=Y, loss=functional.cross_entropy))


def test_without_targets_a_loss_of_two_arguments_compares_with_the_batch():
    seen = []

    def loss(output, target):
        seen.append(target)
        return (output - target - 1).square().mean()

    v = train(nn.Sequential(nn.Identity()), X, sites="0", loss=loss, steps=300, batch_size=5)
    assert torch.allclose(v["0"], torch.ones(2), atol=0.05)
    assert {row for batch in seen[:3] for row in map(tuple, batch.tolist())} == set(map(tuple, X.tolist()))


def test_rows_and_targets_are_shuffled_together(model):
    pairs = set()

    def loss(output, target):
        pairs.update(map(tuple, target.tolist()))
        return to_one(output)

    train(model, X, targets=torch.cat([X, 2 * X], dim=1), loss=loss, batch_size=5, steps=6)
    assert pairs == set(map(tuple, torch.cat([X, 2 * X], dim=1).tolist()))


def test_a_loss_with_defaults_takes_the_output_alone(model):
    assert train(model, loss=lambda output, goal=1.0: (output - goal).square().mean()).equal(train(model))


def test_a_builtin_is_a_loss(model):
    assert train(model, loss=torch.mean).equal(train(model, loss=lambda output: output.mean()))


def test_batches_and_targets_of_an_iterable_are_repeated_in_order(model):
    seen = []

    def loss(output, target):
        seen.append(target)
        return to_one(output)

    train(model, [X[:4], X[4:]], targets=["a", "b"], loss=loss, steps=5)
    assert seen == ["a", "b", "a", "b", "a"]


@pytest.mark.parametrize("batch", [(X,), {"input": X}], ids=["tuple", "dict"])
def test_every_form_of_a_batch_trains_alike(model, batch):
    assert train(model, [batch]).equal(train(model, [X]))


# --- start and gate ----------------------------------------------------------------------------------------------
def test_training_continues_from_a_start(model):
    first = train(model, steps=60)
    assert loss_under(model, train(model, train=first, steps=1, lr=1e-9))[0] == pytest.approx(
        loss_under(model, first)[0], rel=1e-5
    )


def test_a_start_at_some_of_the_sites_leaves_the_others_at_zero(model):
    start = SteeringVector({"2": torch.full((4,), 0.5)})
    v = train(model, sites=["0", "2"], train=start, steps=1, lr=1e-9)
    assert v.sites == ("0", "2")
    assert torch.allclose(v["2"], start["2"], atol=1e-6)
    assert torch.allclose(v["0"], torch.zeros(4), atol=1e-6)


@pytest.mark.parametrize("kind", [None, LowRank(rank=1)], ids=["vector", "edit"])
def test_positions_decide_which_tokens_the_training_moves(kind):
    model, rows = nn.Sequential(nn.Identity()), torch.zeros(4, 3, 2)
    goal = torch.tensor([[9.0, 9.0], [1.0, 2.0], [9.0, 9.0]]).expand(4, 3, 2)
    options = {"targets": goal, "loss": functional.mse_loss, "lr": 0.05, "steps": 400, "progress": False}
    found = optimize(
        model, rows, sites="0", positions=1, train=kind, generator=torch.Generator().manual_seed(0), **options
    )
    with Steerer(model, found, positions=1):
        torch.testing.assert_close(model(rows)[:, 1], goal[:, 1], rtol=0, atol=0.05)
        assert not model(rows)[:, [0, 2]].any()


def test_a_gate_decides_which_rows_the_training_sees():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    rows = torch.tensor([[5.0, 0.0], [-5.0, 0.0]])
    goal = torch.tensor([[5.0, 1.0], [-5.0, 9.0]])
    gate = ProjectionAbove(SteeringVector({"0": torch.tensor([1.0, 0.0])}), threshold=0.0)
    v = train(model, rows, sites="1", gate=gate, steps=300, targets=goal, loss=functional.mse_loss)
    assert torch.allclose(v["1"], torch.tensor([0.0, 1.0]), atol=0.05)


# --- the seed ----------------------------------------------------------------------------------------------------
def test_a_generator_makes_it_reproducible_and_another_seed_differs(model):
    same = [train(model, seed=3, batch_size=2) for _ in range(2)]
    assert same[0].equal(same[1])
    assert not same[0].equal(train(model, seed=4, batch_size=2))


def test_a_generator_leaves_the_global_seed_alone(model):
    before = torch.get_rng_state()
    train(model)
    assert torch.equal(torch.get_rng_state(), before)


# --- the model ---------------------------------------------------------------------------------------------------
def test_the_model_is_left_as_it_was_found(model):
    before = state(model)
    train(model, sites="*")
    assert state(model) == before


def test_while_it_trains_the_model_is_frozen_and_evaluates(model):
    seen = set()

    def look(*_):
        seen.add((any(p.requires_grad for p in model.parameters()), any(m.training for m in model.modules())))

    train(model, loss=lambda output: look() or to_one(output))
    assert seen == {(False, False)}


@pytest.mark.parametrize("loss", [lambda output: output.mean().detach(), lambda _: 1 / 0], ids=["detached", "raises"])
def test_the_model_is_left_as_it_was_found_after_an_error(model, loss):
    before = state(model)
    with pytest.raises((ValueError, ZeroDivisionError)):
        train(model, loss=loss)
    assert state(model) == before


def test_no_grad_of_the_caller_does_not_matter(model):
    expected = train(model)
    with torch.no_grad():
        assert train(model).equal(expected)
        assert not torch.is_grad_enabled()


def test_inference_mode_of_the_caller_does_not_matter(model):
    expected = train(model)
    with torch.inference_mode():
        assert train(model).equal(expected)


def test_a_model_that_makes_a_table_at_its_first_call_can_be_trained_on():
    assert train(nn.Sequential(nn.Identity(), Lazy()), sites="0")["0"].shape == (2,)


def test_inside_a_steerer_it_trains_on_top_of_that_steering():
    model = nn.Sequential(nn.Identity())
    with Steerer(model, SteeringVector({"0": torch.tensor([1.0, 0.0])}), c=3):
        v = train(model, torch.zeros(4, 2), sites="0", steps=500)
        with Steerer(model, v):
            assert torch.allclose(model(torch.zeros(1, 2)), torch.ones(1, 2), atol=1e-2)
    assert torch.allclose(v["0"], torch.tensor([-2.0, 1.0]), atol=1e-2)


# --- errors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda output: output.sum(dim=1), r"got shape \(12,\), requires_grad=True"),
        (lambda output: output.sum().detach(), r"got shape \(\), requires_grad=False"),
        (lambda _: torch.tensor(1.0), r"got shape \(\), requires_grad=False"),
    ],
)
def test_a_loss_is_zero_dimensional_and_differentiable(model, loss, got):
    with pytest.raises(ValueError, match=f"loss: expected a 0-dim tensor that depends on the output, {got}"):
        train(model, loss=loss)


@pytest.mark.parametrize("loss", [lambda output: float(output.detach().sum()), lambda _: None], ids=["float", "None"])
def test_a_loss_is_a_tensor(model, loss):
    with pytest.raises(ValueError, match="loss: expected a 0-dim tensor that depends on the output, got"):
        train(model, loss=loss)


def test_a_loss_that_diverges_is_named(model):
    with pytest.raises(ShapeError, match="site '2': the direction is not finite; did a loss diverge"):
        train(model, loss=lambda output: output.sum() * float("nan"))


@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": 0.0}, {"lr": -1.0}])
def test_steps_and_learning_rate_are_positive(model, options):
    with pytest.raises(ValueError, match="expected steps >= 1 and lr > 0, got steps="):
        train(model, **options)


@pytest.mark.parametrize("batches", [[], X[:0], iter([])], ids=["list", "tensor", "iterator"])
def test_no_batches_are_an_error(model, batches):
    with pytest.raises(BatchError, match="there are none; is the generator used up, or the tensor empty"):
        train(model, batches)


@pytest.mark.parametrize("targets", [None, ["a", "b"]])
def test_a_generator_lasts_for_one_epoch(model, targets):
    with pytest.raises(BatchError, match="there are none; is the generator used up"):
        train(model, (X for _ in range(2)), targets=targets, loss=lambda output, *_: to_one(output), steps=3)


def test_targets_are_of_the_batches_kind(model):
    for batches, targets in ((X, [Y]), ([X], Y)):
        with pytest.raises(
            BatchError, match="targets: expected a tensor for batches in one tensor, and an iterable for"
        ):
            train(model, batches, targets=targets, loss=functional.cross_entropy)


def test_there_is_one_target_for_each_row(model):
    with pytest.raises(BatchError, match="targets: expected one for each of the 12 rows, got 11"):
        train(model, targets=Y[:11], loss=functional.cross_entropy)


@pytest.mark.parametrize("targets", [["a"], ["a", "b", "c"]], ids=["fewer", "more"])
def test_there_is_one_target_for_each_batch(model, targets):
    with pytest.raises(BatchError, match="targets"):
        train(model, [X, X], targets=targets, loss=lambda output, target: to_one(output))


def test_a_wrong_site_and_a_wrong_start_are_named(model):
    with pytest.raises(SiteNotFoundError, match="Sequential has no site '9'"):
        train(model, sites="9")
    with pytest.raises(ShapeError, match="site '2': 4 features against 3; were they fitted on one model"):
        train(model, train=SteeringVector({"2": torch.ones(3)}))


def test_a_site_that_never_runs_is_named(model):
    model.forward = lambda x: model[4](model[0](x))
    with pytest.raises(StatisticsError, match=r"these sites never ran: '2' \(") as caught:
        train(model)
    assert isinstance(caught.value, ActsteerError)


# --- whatever people have --------------------------------------------------------------------------------------------
SHIFT = torch.tensor([1.0, -2.0, 0.5])


class Opaque(nn.Module):
    """Its class tells nothing of its axes; it is called by name and gives a dict."""

    def forward(self, *, hidden):
        return {"loss": hidden.mean(), "hidden": hidden}


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Opaque()

    def forward(self, x):
        return self.part(hidden=x)["hidden"]


@pytest.mark.parametrize("site", ["part", "part:in", "part:in.hidden", "part:out.hidden", ":in"])
@pytest.mark.parametrize("axis", [1, 2, -1, {"site": -2}])
@pytest.mark.case(20, 23)
def test_a_direction_is_trained_along_a_given_axis_on_every_side_and_part(site, axis):
    if isinstance(axis, dict):
        axis = {site: axis["site"]}
    model, x = Calls(), torch.zeros(2, 3, 3)
    at = axis if isinstance(axis, int) else axis[site]
    spread = [1, 1, 1]
    spread[at] = 3
    goal = SHIFT.reshape(spread)

    def loss(output):
        return (output - goal).square().mean()

    v = train(model, x, sites=site, axis=axis, loss=loss, steps=300, lr=0.1)
    torch.testing.assert_close(v[site], SHIFT, atol=0.02, rtol=0)
    with Steerer(model, v):  # the vector remembers the axis
        torch.testing.assert_close(model(x), goal.expand(2, 3, 3), atol=0.02, rtol=0)


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_given_axis_of_a_convolution_is_trained_and_remembered(axis):
    model = nn.Sequential(nn.Conv1d(3, 3, 1)).requires_grad_(False)
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    spread = [1, 1, 1]
    spread[axis] = 3
    goal = SHIFT.reshape(spread)
    x = torch.zeros(2, 3, 3)
    v = train(model, x, sites="0", axis=axis, loss=lambda out: (out - goal).square().mean(), steps=300, lr=0.1)
    with Steerer(model, v):
        torch.testing.assert_close(model(x), goal.expand(2, 3, 3), atol=0.02, rtol=0)


@pytest.fixture
def compiler():
    """Counts what is compiled; the process has compiled nothing before or after."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.case(1, 9)
def test_a_compiled_model_trains_as_the_eager_one_and_stays_compiled(model, compiler):
    model.eval()
    expected = train(model, sites=["2", "4:in"])
    run = torch.compile(model, backend=compiler)
    with torch.no_grad():
        plain = run(X)
        for _ in range(2):
            assert train(run, sites=["2", "4:in"]).equal(expected)
            assert torch.equal(run(X), plain)
    assert compiler.frame_count == 1


def test_a_wrapped_model_trains_as_the_bare_one(model):
    assert train(data_parallel(model)).equal(train(model))
    assert train(checkpoint_wrapper(model), sites="2").equal(train(model))


@pytest.mark.case(1)
def test_inside_a_steerer_on_compiled_code_it_trains_on_top_of_that_steering(model, compiler):
    run = torch.compile(model.eval(), backend=compiler)
    run(X)
    v = SteeringVector({"2": torch.ones(4)})
    with Steerer(run, v):
        on_top = train(run)
    torch._dynamo.reset()
    with Steerer(model, v):
        assert train(model).equal(on_top)
    assert not train(model).equal(on_top)
