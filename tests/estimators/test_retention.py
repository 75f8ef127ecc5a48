"""optimize under conditions: what is known is kept, the norm is bounded, and training ends in time."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from actsteer import BatchError, LossError, Retain, ShapeError, Steerer, Validation, optimize
from tests.oracles import state

GENERATOR = torch.Generator().manual_seed(0)
X, OTHER = torch.randn(32, 5, generator=GENERATOR), torch.randn(64, 5, generator=GENERATOR) + 1
ONES = torch.ones(32, dtype=torch.long)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


def trained(model=None, **options):
    options = {
        "sites": "1",
        "steps": 60,
        "lr": 0.1,
        "progress": False,
        "targets": ONES,
        "loss": cross_entropy,
    } | options
    options.setdefault("generator", torch.Generator().manual_seed(0))
    return optimize(model or network(), options.pop("batches", X), **options)


def moved(model, vector, x):
    """KL from the unsteered answers to the steered ones."""
    with torch.no_grad():
        plain = log_softmax(model(x), dim=-1)
        with Steerer(model, vector):
            return float(kl_div(log_softmax(model(x), dim=-1), plain, log_target=True, reduction="batchmean"))


def test_retention_keeps_the_answers_on_other_data():
    model = network()
    free, kept = trained(), trained(retain=Retain(OTHER, weight=5.0))
    assert moved(model, kept, OTHER) < 0.5 * moved(model, free, OTHER)
    assert kept.norm() > 0


def test_a_larger_weight_keeps_more():
    model = network()
    divergences = [moved(model, trained(retain=Retain(OTHER, weight=w)), OTHER) for w in (0.1, 1.0, 10.0)]
    assert divergences == sorted(divergences, reverse=True)


@pytest.mark.parametrize("budget", [0.1, 1.0, 3.0])
def test_the_norm_at_each_site_stays_within_its_budget(budget):
    vector = trained(sites=["0", "1"], max_norm=budget)
    for site in vector:
        assert vector[site].norm() <= budget * (1 + 1e-5)
    assert max(float(vector[site].norm()) for site in vector) > 0.9 * budget or budget > 2


def test_l2_shrinks_the_vector():
    assert trained(l2=1.0).norm() < 0.5 * trained().norm()


def test_of_a_validated_training_the_best_vector_is_returned():
    model = network()
    validation, answers = OTHER, torch.zeros(64, dtype=torch.long)  # the contrary: the start is best
    vector = trained(model, validation=Validation(validation, targets=answers, patience=2))
    with torch.no_grad():
        before = float(cross_entropy(model(validation), answers))
        with Steerer(model, vector):
            after = float(cross_entropy(model(validation), answers))
    free = trained(model)
    with torch.no_grad(), Steerer(model, free):
        without = float(cross_entropy(model(validation), answers))
    assert after <= before < without - 0.1


def test_patience_ends_a_training_early():
    calls = []

    def loss(output, target):
        calls.append(1)
        return cross_entropy(output, target)

    trained(loss=loss, steps=400, validation=Validation(OTHER, targets=torch.zeros(64, dtype=torch.long), patience=1))
    early = len(calls)
    calls.clear()
    trained(loss=loss, steps=400)
    assert early < len(calls) == 400


def test_the_model_is_left_as_it_was():
    model = network().train()
    before = state(model)
    trained(model, retain=OTHER, validation=Validation(X, targets=ONES), steps=5)
    assert state(model) == before and all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_cannot_be_minimised_is_refused():
    with pytest.raises(LossError):
        trained(loss=lambda output, target: output)
    with pytest.raises(LossError):
        trained(loss=lambda output, target: torch.zeros(()))
    other = torch.ones((), requires_grad=True)
    with pytest.raises(LossError, match="depends on what is trained"):
        trained(loss=lambda output, target: other.square())
    with pytest.raises(ShapeError, match="did a loss diverge"):
        trained(loss=lambda output, target: output.sum() * float("nan"))


def test_targets_are_one_for_each_row():
    with pytest.raises(BatchError, match="32 rows, got 31"):
        trained(targets=ONES[:-1])
    with pytest.raises(BatchError):
        trained(batches=list(X.split(8)))
