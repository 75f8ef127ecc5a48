"""What training obeys: closed-form optima, budgets, retention, early stopping, starts; of vectors and of edits."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from actsteer import (
    Ablate,
    Add,
    LossError,
    LowRank,
    ProjectionAbove,
    Retain,
    ShapeError,
    SiteNotFoundError,
    StatisticsError,
    Steerer,
    SteeringVector,
    Validation,
    discover,
    optimize,
)
from tests.oracles import state

G = torch.Generator().manual_seed(0)
X, OTHER = torch.randn(32, 5, generator=G), torch.randn(24, 5, generator=G) + 1
TARGETS = torch.arange(32) % 3
both = pytest.mark.parametrize("train", [None, LowRank(rank=2)], ids=["vector", "edit"])


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(5, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)]
        return nn.Sequential(*layers).eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(model=None, batches=X, **options):
    options = {"sites": "1", "steps": 60, "lr": 0.05, "loss": cross_entropy, "targets": TARGETS} | options
    return optimize(model or network(), batches, generator=generator(), progress=False, **options)


def tensors(found):
    return [t for s in found.sites for t in (found[s] if isinstance(found, LowRank) else (found[s],))]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@torch.no_grad()
def loss_under(model, steering, x=X, targets=TARGETS, **options):
    with Steerer(model, steering, **options):
        return float(cross_entropy(model(x), targets))


# --- optima that are known -------------------------------------------------------------------------------------------
def test_with_a_penalty_the_optimum_is_that_of_ridge_regression():
    """mean ‖x + v - t‖² + l2 ‖v‖² is least at v = mean(t - x) / (1 + d · l2), the mean being over rows and features."""
    goal = torch.tensor([1.0, -2.0, 0.5])
    x = torch.randn(20, 3, generator=generator())
    for l2 in (0.0, 0.25, 1.0):
        options = {"sites": "0", "steps": 600, "lr": 0.05, "l2": l2, "progress": False}
        found = optimize(nn.Sequential(nn.Identity()), x, loss=lambda out: (out - goal).square().mean(), **options)
        torch.testing.assert_close(found["0"], (goal - x.mean(0)) / (1 + 3 * l2), rtol=1e-3, atol=1e-3)


def test_with_a_budget_the_optimum_is_the_projection_on_the_ball():
    goal = torch.tensor([3.0, 4.0])
    options = {"sites": "0", "steps": 600, "lr": 0.05, "max_norm": 2.0, "progress": False}
    loss = nn.MSELoss()
    zeros = torch.zeros(4, 2)
    found = optimize(nn.Sequential(nn.Identity()), zeros, loss=loss, targets=goal.expand(4, 2), **options)
    torch.testing.assert_close(found["0"], torch.tensor([1.2, 1.6]), rtol=1e-2, atol=1e-2)


def test_an_edit_of_full_rank_finds_any_affine_map():
    x = torch.randn(64, 3, generator=generator())
    wanted, shift = torch.randn(3, 3, generator=generator(1)) / 2, torch.tensor([0.5, -0.5, 1.0])
    options = {
        "sites": "0",
        "train": LowRank(rank=3),
        "steps": 800,
        "lr": 0.05,
        "progress": False,
        "loss": nn.functional.mse_loss,
    }
    model = nn.Sequential(nn.Identity())
    edit = optimize(model, x, targets=x @ wanted.T + shift, generator=generator(), **options)
    reads, adds, offsets = edit["0"]
    torch.testing.assert_close(torch.eye(3) + adds.T @ reads, wanted, rtol=0, atol=2e-2)
    torch.testing.assert_close(adds.T @ offsets, shift, rtol=0, atol=2e-2)


# --- budgets ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [0.0, 0.1, 0.3, 0.7, 1.1])
@pytest.mark.parametrize("options", [{}, {"train": SteeringVector({"1": torch.full((6,), 9.0)})}, {"lr": 100.0}])
def test_the_norm_is_never_above_its_budget(budget, options):
    seen = []

    def loss(output, target):
        seen.append(1)
        return cross_entropy(output, target)

    found = trained(loss=loss, steps=7, max_norm=budget, **options)
    assert found["1"].double().norm() <= budget * (1 + 1e-6) and len(seen) == 7


def test_a_budget_that_is_never_reached_changes_nothing():
    assert same(trained(max_norm=1e6), trained())


@both
def test_no_penalty_and_no_retention_change_nothing(train):
    assert same(trained(train=train, l2=0.0, retain=Retain([OTHER], weight=0.0)), trained(train=train))


# --- retention -------------------------------------------------------------------------------------------------------
@both
def test_retention_holds_the_answers_on_other_data_at_a_price_in_the_loss(train):
    model = network()
    free = trained(model, train=train)
    kept = trained(model, train=train, retain=Retain(OTHER, weight=20.0))

    @torch.no_grad()
    def moved(steering):
        plain = log_softmax(model(OTHER), dim=-1)
        with Steerer(model, steering):
            return float(kl_div(log_softmax(model(OTHER), dim=-1), plain, log_target=True, reduction="batchmean"))

    assert moved(kept) < 0.2 * moved(free)
    assert loss_under(model, free) <= loss_under(model, kept) <= loss_under(model, free, c=0.0) + 1e-3


@both
def test_inside_another_steerer_what_is_retained_are_the_steered_answers(train):
    """On top of a steering whose answers are to stay, a huge weight leaves no room."""
    model = network()
    with Steerer(model, SteeringVector({"4": torch.tensor([5.0, 0.0, -5.0])})), torch.no_grad():
        before = log_softmax(model(X), dim=-1)
    with Steerer(model, SteeringVector({"4": torch.tensor([5.0, 0.0, -5.0])})):
        kept = trained(model, train=train, retain=Retain(X, weight=1e4))
        with Steerer(model, kept), torch.no_grad():
            after = log_softmax(model(X), dim=-1)
    assert (after.exp() - before.exp()).abs().max() < 0.05


# --- early stopping --------------------------------------------------------------------------------------------------
@both
def test_a_validated_training_never_returns_what_is_worse_than_the_start(train):
    model = network()
    contrary = (TARGETS + 1) % 3
    for patience in (1, 3, 100):
        validation = Validation(X, targets=contrary, patience=patience)
        found = trained(model, train=train, lr=0.5, validation=validation)
        before, after = (loss_under(model, found, targets=contrary, c=c) for c in (0.0, 1.0))
        assert after <= before + 1e-6


@both
def test_what_is_returned_is_the_best_that_validation_saw(train):
    model, seen = network(), []

    def loss(output, target):
        value = cross_entropy(output, target)
        if not torch.is_grad_enabled():
            seen.append(float(value))
        return value

    answers = TARGETS.roll(1)
    found = trained(model, train=train, loss=loss, lr=0.3, validation=Validation(X, targets=answers, patience=100))
    assert abs(loss_under(model, found, targets=answers) - min(seen)) < 1e-6
    assert len(seen) == 21 and min(seen) < seen[-1]


# --- what it depends on ----------------------------------------------------------------------------------------------
@both
def test_it_is_reproducible_and_leaves_the_global_seed_and_the_model_alone(train):
    model = network().train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, seed = state(model), torch.random.get_rng_state()
    options = {"train": train, "batch_size": 8, "retain": OTHER, "steps": 20}
    options |= {"validation": Validation(OTHER, targets=torch.zeros(24, dtype=torch.long))}
    assert same(trained(model, **options), trained(model, **options))
    after = state(model)
    for name, own in before.items():
        for (key, flag, grad, numbers), (k, f, g, n) in zip(
            own.pop("parameters"), after[name].pop("parameters"), strict=True
        ):
            assert (key, flag, numbers) == (k, f, n)
            assert (grad is None and g is None) or torch.equal(grad, g)
    assert before == after and torch.equal(torch.random.get_rng_state(), seed)


@both
def test_a_gate_in_training_leaves_out_the_rows_that_it_will_leave_out(train):
    model = network()
    gate = ProjectionAbove(SteeringVector({"0": torch.ones(6)}), threshold=0.0)
    with torch.no_grad():
        fires = model[0](X).sum(1) > 0
    assert 4 < fires.sum() < 28
    found = trained(model, train=train, gate=gate, steps=30)
    scrambled = torch.where(fires, TARGETS, (TARGETS + 1) % 3)  # what the other rows ask for has no gradient
    other = trained(model, train=train, gate=gate, steps=30, targets=scrambled)
    for a, b in zip(tensors(found), tensors(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- what cannot be --------------------------------------------------------------------------------------------------
@both
@pytest.mark.parametrize("of", ["a parameter of the loss", "the input"])
def test_a_loss_that_depends_on_other_things_alone_is_refused(train, of):
    other = torch.ones(4, 5, requires_grad=True)
    batches = [X[:4]] if of == "a parameter of the loss" else [other]
    options = {"sites": "1", "steps": 2, "train": train, "progress": False}
    with pytest.raises(LossError, match="depends on"):
        optimize(network(), batches, loss=lambda _: other.square().mean(), **options)


@both
def test_a_site_that_the_loss_cannot_see_is_still_zero(train):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x):
            return self.a(x), self.b(x)

    options = {"sites": ["a", "b"], "steps": 3, "train": train, "progress": False, "generator": generator()}
    found = optimize(Fork(), X, loss=lambda out: out[0].square().mean(), **options)
    constant = found if train is None else found.constant
    assert constant["a"].any() and not constant["b"].any()


def test_what_has_another_site_is_refused():
    with pytest.raises(SiteNotFoundError, match="'0'"):
        trained(train=SteeringVector({"0": torch.ones(6)}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_start_in_another_dtype_gives_the_activation_s(dtype):
    assert trained(steps=1, train=SteeringVector({"1": torch.ones(6, dtype=dtype)}))["1"].dtype is torch.float32


@pytest.mark.parametrize("bad", [{"max_norm": -1.0}, {"l2": -1.0}])
def test_options_are_checked_before_the_model_runs(bad):
    model = network()
    model.forward = lambda x: pytest.fail("the model ran")
    with pytest.raises(ValueError, match=next(iter(bad))):
        trained(model, **bad)
    for train in (2, LowRank, Ablate()):
        with pytest.raises(TypeError, match=r"train: expected a SteeringVector, or an edit such as LowRank\(rank=4\)"):
            trained(model, train=train)
    for number in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="weight: expected a number >= 0"):
            Retain(OTHER, weight=number)
    with pytest.raises(ValueError, match="patience: expected 1 or more, got 0"):
        Validation(OTHER, patience=0)
    for rank in (0, -1):
        with pytest.raises(ValueError, match="rank: expected 1 or more"):
            LowRank(rank=rank)


def test_data_alone_are_what_their_value_is_by_default():
    """retain=data is Retain(data), and validation=data is Validation(data)."""
    options = {"loss": lambda output: output.square().mean(), "targets": None, "lr": 0.3, "steps": 20}
    by_default = trained(retain=Retain(OTHER), validation=Validation(X), **options)
    assert same(trained(retain=OTHER, validation=X, **options), by_default)


# --- edits that go on ------------------------------------------------------------------------------------------------
def random_edit(*sites, rank=2):
    drawn = generator(5)
    return LowRank({s: tuple(torch.randn(n, generator=drawn) for n in ((rank, 6), (rank, 6), (rank,))) for s in sites})


def test_an_edit_goes_on_from_where_it_is():
    """After one step of no length it is the same map, though its rows may be others."""
    start, h = random_edit("1"), torch.randn(10, 6, generator=generator(1))
    found = trained(train=start, lr=1e-9, steps=1)
    torch.testing.assert_close(*(e.at("1")(h, h[0], torch.tensor(1.0)) for e in (found, start)), rtol=1e-4, atol=1e-4)
    again = trained(train=found, lr=1e-9, steps=1)
    for one, other in zip(again["1"], found["1"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert loss_under(network(), trained(train=found, steps=60)) < loss_under(network(), found)


def test_an_edit_at_some_of_the_sites_starts_elsewhere_where_it_changes_nothing():
    start, h = random_edit("1"), torch.randn(10, 6, generator=generator(1))
    found = trained(sites=["0", "1"], train=start, lr=1e-9, steps=1)
    assert found.sites == ("0", "1") and found.rank == 2
    torch.testing.assert_close(found.at("0")(h, h[0], torch.tensor(1.0)), h, rtol=1e-5, atol=1e-5)


def test_what_is_given_is_left_as_it_is_and_names_the_result():
    start = random_edit("1").described({"concept": "kind", "other": "x"})
    before = [part.clone() for part in start["1"]]
    found = trained(train=start, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(start["1"], before, strict=True))
    assert found.concept == "kind" and "other" not in found.metadata
    assert trained(train=LowRank(rank=1, concept="kind"), steps=1).concept == "kind"
    assert trained(train=SteeringVector({}, concept="kind"), steps=1, concept="given").concept == "given"


def test_an_edit_of_another_place_or_size_is_refused():
    with pytest.raises(SiteNotFoundError, match=r"train has the sites \['0'\], which are not trained"):
        trained(train=random_edit("0"))
    with pytest.raises(ShapeError, match="site '4': the activation has 3 features, the edit 6"):
        trained(sites="4", train=random_edit("4"))


def test_an_edit_that_is_not_trained_yet_says_so():
    blank = LowRank(rank=4)
    assert blank.rank == 4 and blank.sites == () and blank.described({"concept": "x"}).rank == 4
    with pytest.raises(SiteNotFoundError, match="no sites"):
        Steerer(network(), blank)
    for bad in ({}, {"sites": {}}, {"sites": {"1": random_edit("1")["1"]}, "rank": 2}):
        with pytest.raises(ShapeError, match="expected one site or more, or rank= for an edit that is yet to be"):
            LowRank(**bad)


def test_the_rank_that_the_metadata_tells_is_the_edit_s():
    found = trained(train=LowRank(rank=99), steps=1)
    assert found.metadata["rank"] == str(found.rank) == "6"


def test_a_diverged_edit_is_refused_as_a_diverged_vector_is():
    for train in (None, LowRank(rank=1)):
        with pytest.raises(ShapeError, match="diverge"):
            trained(train=train, loss=lambda output, target: output.sum() * float("nan"), steps=2)


@pytest.mark.parametrize("target", ["0", "1"], ids=["before", "the same"])
@pytest.mark.parametrize("asks", [False, True], ids=["plain input", "input with grad"])
def test_discover_refuses_a_target_that_the_direction_cannot_change(target, asks):
    batches = [X.clone().requires_grad_(asks)]
    with pytest.raises(StatisticsError, match=f"'{target}'"):
        discover(network(), batches, site="1", target=target, norm=1.0, steps=2, progress=False)


def test_discover_refuses_a_target_that_does_not_move():
    dead = nn.Sequential(nn.Identity(), nn.Linear(5, 3), nn.ReLU())
    with torch.no_grad():
        dead[1].bias.fill_(-1e3)
    with pytest.raises(StatisticsError, match="'2'"):
        discover(dead, X, site="0", target="2", norm=1.0, steps=2, progress=False)


@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_what_discover_finds_says_which_model_it_is_from():
    found = discover(network(), X, site="1", target="4", norm=1.0, steps=2, progress=False)["0"]
    assert found.metadata["model"] == trained(steps=1).metadata["model"]
    with Steerer(network(), found, intervention=Add()):
        pass
