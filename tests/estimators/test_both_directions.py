"""optimize in both directions: what a loss is told, and that -c does the contrary of c."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import mse_loss

from actsteer import (
    BatchError,
    LossError,
    LowRank,
    ShapeError,
    SiteNotFoundError,
    StatisticsError,
    Steerer,
    SteeringVector,
    Validation,
    optimize,
    preference,
    preference_shift,
    record,
)
from tests.oracles import state
from tests.strategies import eighths
from tests.tuning.trained import points
from tests.tuning.trained import trained as digits
from tests.zoo import identity

X = torch.linspace(-2, 2, 24).reshape(12, 2)


def train(model, batches=X, *, seed=0, **options):
    options = {"sites": "0", "steps": 12, "lr": 0.05, "progress": False} | options
    return optimize(model, batches, generator=torch.Generator().manual_seed(seed), **options)


# --- what a loss is told -----------------------------------------------------------------------------------------
def told(c, steps=12, seed=0, **options):
    """The strengths of the steps, as the loss was told, and what was trained."""
    seen = []

    def loss(output, *, c):
        seen.append(c)
        return (output - c).square().mean()

    return seen, train(identity(), loss=loss, c=c, steps=steps, seed=seed, **options)


@pytest.mark.parametrize("c", [[-1.0, 1.0], (-2.0, -1.0, 0.5, 3.0)])
def test_every_strength_is_taken_once_in_every_round(c):
    seen, _ = told(c)
    rounds = [sorted(seen[start : start + len(c)]) for start in range(0, len(seen), len(c))]
    assert rounds == [sorted(c)] * (12 // len(c))


def test_the_order_is_drawn_and_the_generator_decides_it():
    one, same, other = (told([-2.0, -1.0, 1.0, 2.0], steps=40, seed=seed) for seed in (0, 0, 1))
    assert one[0] == same[0] != other[0] and one[1].equal(same[1])
    assert one[0][:4] != one[0][4:8] or one[0][4:8] != one[0][8:12]


def test_a_strength_is_that_of_a_steerer():
    """At c = 2 half of the vector does what is wanted, and the loss is told that it is 2."""
    wide = train(identity(), loss=lambda o, target, *, c: (o - target - c).square().mean(), c=2, steps=400, lr=0.1)
    torch.testing.assert_close(wide["0"], torch.ones(2), atol=0.01, rtol=0)
    assert wide.metadata["strengths"] == "2"


@pytest.mark.parametrize("kind", [None, LowRank(rank=2)], ids=["vector", "edit"])
def test_what_is_odd_in_c_is_found_from_both_sides_and_what_is_even_is_not(kind):
    """x + c g + |c| k: an edit that is linear in c can make the first part alone."""
    g, k = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])

    def loss(output, target, *, c):
        return (output - target - c * g - abs(c) * k).square().mean()

    found = train(identity(), loss=loss, c=[-1, 1], train=kind, steps=600, lr=0.05)
    vector = found if kind is None else found.constant
    assert (vector["0"] - g).norm() < 0.15 * k.norm()
    one_way = train(identity(), loss=loss, c=1.0, steps=600, lr=0.05)
    torch.testing.assert_close(one_way["0"], g + k, atol=0.1, rtol=0)


def test_one_strength_draws_nothing_so_that_it_is_what_it_was_without():
    loss = {"loss": lambda output: (output - 1).square().mean(), "batch_size": 5, "steps": 7}
    assert train(identity(), c=1, **loss).equal(train(identity(), **loss))
    assert train(identity(), c=[1.0], **loss).equal(train(identity(), **loss))


@pytest.mark.parametrize("kind", [None, LowRank(rank=1)], ids=["vector", "edit"])
def test_plain_is_what_the_unsteered_model_gives_on_the_batch_without_gradients(kind):
    model, seen = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout()), []

    def loss(output, target, *, plain):
        seen.append((plain, target))
        assert not plain.requires_grad and output.requires_grad
        return (output - 1).square().mean()

    train(model, loss=loss, c=[1, 2], train=kind, batch_size=5)
    model.eval()
    assert len(seen) == 12 and all(torch.equal(plain, model(batch)) for plain, batch in seen)


def test_a_loss_is_told_nothing_that_has_a_default_or_that_it_does_not_ask_for():
    def loss(output, c=None, plain=None):
        assert c is plain is None
        return output.square().mean()

    with pytest.warns(UserWarning, match="the loss has no parameter c, so that c and -c are trained to do the same"):
        train(identity(), loss=loss, c=[-1, 1])
    train(identity(), loss=partial(lambda output, target, c: (output - target - c).square().mean(), c=3.0))


def test_validation_looks_at_every_strength():
    seen = []

    def loss(output, *, c):
        seen.append(c)
        return (output - c).square().mean()

    train(identity(), loss=loss, c=[-1, 2], steps=1, validation=Validation(X, patience=1))
    assert seen[:2] == [-1, 2] and seen[3:] == [-1, 2]


@pytest.mark.parametrize("c", [0.0, [], [1.0, 0], float("nan"), [float("inf")]], ids=str)
def test_a_strength_that_steers_nothing_is_refused(c):
    with pytest.raises(ValueError, match="c: expected a"):
        train(identity(), loss=lambda output: output.mean(), c=c)


# --- losses of activations ---------------------------------------------------------------------------------------
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def test_a_vector_makes_the_activations_of_later_sites_those_that_were_recorded():
    """The truth is a steering: the activations that it makes are imitated, and with them the vector is found."""
    model, truth = network(), SteeringVector({"1": torch.tensor([0.5, -0.25, 0.75, 0.0])})
    with Steerer(model, truth):
        wanted = record(model, X, sites=["2", "3"], keep_shape=True, progress=False)
    seen = []

    def loss(activations, target):
        seen.append(set(activations) == set(target) == {"2", "3"})
        return sum(mse_loss(activations[site], target[site]) for site in target)

    found = train(model, targets=wanted, loss=loss, reads=["2", "3"], sites="1", steps=600, lr=0.05, batch_size=5)
    assert all(seen)
    torch.testing.assert_close(found["1"], truth["1"], atol=0.02, rtol=0)


def test_what_is_asked_for_by_name_is_no_target_wherever_it_stands():
    def loss(output, c, plain):
        torch.testing.assert_close(output - plain, (output - plain)[:1].expand_as(output))  # c · v in every row
        return (output * c).mean()

    train(identity(), loss=loss, c=[-1, 1], steps=2)


def test_plain_and_target_are_of_the_same_rows_and_sites():
    model = network()
    recorded = record(model, X, sites="3", keep_shape=True, progress=False)

    def loss(activations, target, *, plain):
        torch.testing.assert_close(plain["3"], target["3"])
        return activations["3"].square().mean()

    train(
        model,
        targets=recorded,
        loss=loss,
        reads="3",
        sites="1",
        batch_size=5,
        train=SteeringVector({"1": torch.ones(4)}),
    )


def test_a_sequence_is_read_in_its_own_shape_and_an_image_with_its_channels_last():
    shapes = []

    def loss(activations):
        shapes.extend(own.shape for own in activations.values())
        return activations["1"].square().mean()

    train(network(), torch.zeros(3, 5, 2), loss=loss, reads="1", steps=1)
    train(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.ones(3, 1, 4, 5), loss=loss, reads="1", steps=1)
    assert [tuple(shape) for shape in shapes] == [(3, 5, 4), (3, 4, 5, 2)]


def test_the_model_is_left_as_it_was():
    model = network().train()
    before = state(model)
    train(model, loss=lambda activations, *, c, plain: activations["3"].sum(), reads="3", c=[-1, 1])
    assert state(model) == before
    with pytest.raises(ZeroDivisionError):
        train(model, loss=lambda activations: 1 / 0, reads="3")
    assert state(model) == before


class Skips(nn.Sequential):
    def forward(self, x):
        return self[0](x)


def test_what_cannot_be_read_is_refused():
    loss = {"loss": lambda activations: activations["1"].sum()}
    with pytest.raises(SiteNotFoundError):
        train(network(), reads="7", **loss)
    with pytest.raises(StatisticsError, match="site '1', which the loss reads, never ran"):
        train(Skips(nn.Linear(2, 2), nn.Linear(2, 2)), reads="1", **loss)
    nested = torch.nested.nested_tensor([torch.zeros(2, 2), torch.zeros(3, 2)], layout=torch.jagged)
    with pytest.raises(ShapeError, match="nested or packed"):
        train(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [nested], reads="1", **loss)


@pytest.mark.parametrize("targets", [{"0": X[1:]}, {"0": X, "1": X[1:]}], ids=["one", "the second"])
def test_each_tensor_of_a_mapping_has_a_target_for_each_row(targets):
    with pytest.raises(BatchError, match="expected one for each of the 12 rows, got 11"):
        train(identity(), targets=targets, loss=lambda output, target: output.sum())


# --- losses of pairs ---------------------------------------------------------------------------------------------
def likelihoods(logits, labels):
    """Σ log p and the number of tokens of each row, by loops in float64."""
    found = []
    for row, own in zip(logits.double().numpy(), labels.tolist(), strict=True):
        steps = list(zip(row[:-1], own[1:], strict=True)) if isinstance(own, list) else [(row, own)]
        counted = [(step, label) for step, label in steps if label != -100]
        found.append((sum(step[label] - np.log(np.exp(step).sum()) for step, label in counted), max(1, len(counted))))
    return np.array(found)


def oracle(output, target, c, plain, beta):
    half = len(output) // 2
    sides = [[likelihoods(own[:half], target[0]), likelihoods(own[half:], target[1])] for own in (output, plain)]
    (first, second), (likely, unlikely) = sides if c > 0 else [side[::-1] for side in sides]
    if beta is None:
        weight = np.maximum(1, unlikely[:, 0] - likely[:, 0])
        margin = weight * first[:, 0] / first[:, 1] - second[:, 0] / second[:, 1]
    else:
        margin = beta * ((first[:, 0] - likely[:, 0]) - (second[:, 0] - unlikely[:, 0]))
    return np.log1p(np.exp(-margin)).mean()


LOSSES = {
    "preference": (preference, None),
    "shift": (preference_shift, 0.1),
    "steep": (partial(preference_shift, beta=2.0), 2.0),
}
every_loss = pytest.mark.parametrize(("loss", "beta"), LOSSES.values(), ids=LOSSES)


def token_labels():
    return st.lists(st.lists(st.sampled_from([-100, 0, 1, 2]), min_size=4, max_size=4), min_size=2, max_size=2).map(
        torch.tensor
    )


@every_loss
@given(st.data())
def test_the_loss_of_texts_is_the_formula(loss, beta, data):
    output, plain = (data.draw(eighths(4, 4, 3)) for _ in range(2))
    target, c = (data.draw(token_labels()), data.draw(token_labels())), data.draw(st.sampled_from([-2.0, 0.5]))
    found = loss(output, target, c=c, plain=plain)
    np.testing.assert_allclose(float(found), oracle(output, target, c, plain, beta), rtol=1e-9)


@every_loss
@given(eighths(6, 3), eighths(6, 3), st.sampled_from([-1.0, 3.0]))
def test_the_loss_of_classes_is_the_formula(loss, beta, output, plain, c):
    target = torch.tensor([0, 1, 2]), torch.tensor([2, 2, 0])
    found = loss(output, target, c=c, plain=plain)
    np.testing.assert_allclose(float(found), oracle(output, target, c, plain, beta), rtol=1e-9)


@every_loss
@given(eighths(6, 3), eighths(6, 3))
def test_with_the_answers_exchanged_minus_c_is_c(loss, beta, output, plain):
    """The law of both directions, of the loss itself."""
    target, order = (torch.tensor([0, 1, 2]), torch.tensor([2, 2, 0])), [3, 4, 5, 0, 1, 2]
    one = loss(output, target, c=1.0, plain=plain)
    assert torch.equal(one, loss(output[order], target[::-1], c=-1.0, plain=plain[order]))


def test_where_nothing_is_shifted_the_loss_is_that_of_a_coin():
    output, target = torch.randn(4, 3), (torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert float(preference_shift(output, target, c=1.0, plain=output)) == pytest.approx(np.log(2))


@every_loss
@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), "labels of the chosen and of the rejected"),
        (torch.zeros(3, 3), (torch.tensor([0]), torch.tensor([0, 1])), "as many for the rejected ones"),
        (torch.zeros(4, 3), (torch.tensor([0]), torch.tensor([0])), r"got shapes \[\(1,\), \(1,\)\] for logits"),
        (torch.zeros(4, 5, 3), (torch.zeros(2, 4).long(), torch.zeros(2, 5).long()), "labels for the chosen rows"),
        ("text", (torch.tensor([0]), torch.tensor([0])), "expected an output with logits, got str"),
    ],
)
def test_labels_that_do_not_fit_are_refused(loss, beta, output, target, message):
    with pytest.raises(LossError, match=message):
        loss(output, target, c=1.0, plain=output)


def test_a_beta_that_would_train_the_contrary_is_refused():
    output, target = torch.zeros(4, 3), (torch.tensor([0, 1]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="beta: expected a number above 0, got -1"):
        preference_shift(output, target, c=1.0, plain=output, beta=-1)


def test_pairs_cannot_be_given_in_one_tensor_whose_rows_are_shuffled():
    with pytest.raises(BatchError, match="expected a tensor for batches in one tensor"):
        train(identity(), X, targets=(torch.zeros(6).long(), torch.ones(6).long()), loss=preference)


# --- both directions, on a network that was trained ----------------------------------------------------------------
def between(count, seed):
    """Points halfway between the third cloud and another one, and which."""
    clouds = range(3, 12)
    rows = [(points(2, count, seed=seed + k) + points(k, count, seed=seed + 50 + k)) / 2 for k in clouds]
    return torch.cat(rows), torch.arange(3, 12).repeat_interleave(count)


def effects(model, vector, strengths):
    """How far the log-odds of the third cloud against the other move."""
    x, y = between(40, 300)

    def odds():
        logits = model(x)
        return float((logits[:, 2] - logits.gather(1, y[:, None])[:, 0]).mean())

    found = []
    for c in strengths:
        with torch.no_grad(), Steerer(model, vector, c=c):
            found.append(odds())
    return [own - odds() for own in found]


def toward_two(model, *, loss, c, seed):
    x, y = between(40, 100)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(60)
    batches = [x[rows].repeat(2, 1) for rows in order]
    targets = [(torch.full((len(rows),), 2), y[rows]) for rows in order]
    options = {"sites": ["1", "3"], "max_norm": 3.0, "steps": 60, "targets": targets}
    return train(model, batches, loss=loss, c=c, seed=seed, **options)


@pytest.mark.parametrize("loss", [preference, preference_shift])
@pytest.mark.parametrize("seed", range(5))
def test_plus_c_moves_up_and_minus_c_down(loss, seed):
    """By 18 and -21, or 21 and -23, in the logarithm of the odds; a vector of a random direction moves them by less."""
    model = digits()
    up, half, down = effects(model, v := toward_two(model, loss=loss, c=[-1, 1], seed=seed), [1, 0.5, -1])
    assert up > 10 and down < -10 and 0 < half < up
    generator = torch.Generator().manual_seed(seed)
    noise = SteeringVector({site: torch.randn(64, generator=generator) for site in v}).unit() * 3
    assert max(map(abs, effects(model, noise, [1, -1]))) < 5


@pytest.mark.parametrize("seed", range(5))
def test_a_vector_trained_in_both_directions_is_more_symmetric_than_one_trained_in_either(seed):
    """By the smaller effect as a share of the larger."""
    model = digits()

    def symmetry(c):
        up, down = effects(model, toward_two(model, loss=preference_shift, c=c, seed=seed), [1, -1])
        return min(up, -down) / max(up, -down)

    both, *alone = (symmetry(c) for c in ([-1, 1], 1.0, -1.0))
    print(f"seed {seed}: trained both ways {both:.2f}, at c = 1 {alone[0]:.2f}, at c = -1 {alone[1]:.2f}")
    assert both > max(alone) + 0.05
