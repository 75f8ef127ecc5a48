"""Models in bfloat16 and float16: what is fitted and trained there is what float32 gives, to the dtype's rounding."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from actsteer import (
    ConceptErasure,
    LogisticDirection,
    LowRank,
    MeanDifference,
    PrincipalDirection,
    RidgeDirection,
    SiteMap,
    Steerer,
    SteeringVector,
    discover,
    fit,
    optimize,
)

HALVES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
X = torch.randn(32, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
TARGETS = torch.arange(32) % 3


def network(dtype):
    """Weights of eight bits, so that they are the same in every dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    return model.bfloat16().to(dtype)


def generator():
    return torch.Generator().manual_seed(0)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).min())


def trained(dtype, **options):
    options = {"sites": "1", "loss": cross_entropy, "targets": TARGETS, "steps": 60, "lr": 0.05} | options
    return optimize(network(dtype), X.to(dtype), generator=generator(), progress=False, **options)


def loss_under(dtype, steering):
    model = network(dtype)
    with torch.no_grad(), Steerer(model, steering):
        return float(cross_entropy(model(X.to(dtype)).float(), TARGETS))


@every_half
def test_training_finds_the_vector_of_float32(dtype):
    found, expected = trained(dtype), trained(torch.float32)
    assert found["1"].dtype is dtype
    assert cosine(found["1"], expected["1"]) > 0.999
    assert loss_under(dtype, found) < loss_under(torch.float32, expected) + 8 * EPS[dtype]


@every_half
def test_a_low_rank_edit_is_trained_as_in_float32(dtype):
    found, expected = (trained(kind, train=LowRank(rank=2)) for kind in (dtype, torch.float32))
    assert isinstance(found, LowRank)
    reads, adds, offsets = (part.float() for part in found["1"])
    assert all(part.isfinite().all() for part in (reads, adds, offsets))
    torch.testing.assert_close(adds @ adds.T, torch.eye(2), rtol=0, atol=8 * EPS[dtype])
    assert loss_under(dtype, found) < loss_under(torch.float32, expected) + 16 * EPS[dtype]


@every_half
def test_a_feature_that_the_loss_does_not_see_stays_at_zero(dtype):
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 1, bias=False)).to(dtype)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0, 2.0**-10]]))
    options = {"sites": "0", "loss": lambda output: (output - 1).square().mean(), "steps": 5, "progress": False}
    found = optimize(model, torch.zeros(4, 3, dtype=dtype), **options)["0"]
    assert found[1] == 0 and found[0] > 0 and found[2] > 0


@every_half
def test_a_small_step_is_not_lost_on_a_large_start(dtype):
    """Steps of half a rounding error add up: float32 inside, the activation's dtype at the end."""
    start = SteeringVector({"0": torch.full((2,), 16.0, dtype=dtype)})
    model, step = nn.Sequential(nn.Identity()), 16 * EPS[dtype] / 4
    options = {"sites": "0", "train": start, "loss": lambda output: output.float().sum(), "progress": False}
    found = optimize(model, torch.zeros(4, 2, dtype=dtype), steps=200, lr=step, **options)["0"]
    torch.testing.assert_close(found.double(), torch.full((2,), 16 - 100 * step).double(), rtol=8 * EPS[dtype], atol=0)


@every_half
def test_a_norm_budget_is_kept(dtype):
    found = trained(dtype, max_norm=0.5, lr=0.5)["1"]
    assert 0.45 < found.double().norm() <= 0.5 + EPS[dtype]


@every_half
@pytest.mark.parametrize("norm", [0.25, 1.0, 4.0])
def test_discover_finds_what_it_finds_in_float32(dtype, norm):
    options = {"site": "1", "target": "2", "norm": norm, "count": 2, "steps": 200, "progress": False}
    found, expected = (discover(network(d), X.to(d), generator=generator(), **options) for d in (dtype, torch.float32))
    for concept in expected.concepts:
        assert abs(cosine(found[concept]["1"], expected[concept]["1"])) > 0.99
    unit = found.gram().float() / norm**2
    torch.testing.assert_close(unit, torch.eye(2), rtol=0, atol=16 * EPS[dtype])


@every_half
@pytest.mark.parametrize(
    "estimator",
    [MeanDifference(), RidgeDirection(), PrincipalDirection(), LogisticDirection(), LogisticDirection(streamed=True)],
    ids=["mean", "ridge", "principal", "logistic", "streamed"],
)
def test_what_is_fitted_is_what_float32_fits_to_the_same_numbers(estimator, dtype):
    """Activations of the same numbers: sums are taken in float64 whatever the model's dtype."""
    model = nn.Sequential(nn.Identity())
    positive, negative = (torch.randn(64, 4, generator=torch.Generator().manual_seed(k)).to(dtype) for k in (1, 2))
    options = {"sites": "0", "estimator": estimator, "progress": False}
    found = fit(model, positive=positive + 1, negative=negative, **options)
    expected = fit(model, positive=(positive + 1).float(), negative=negative.float(), **options)
    assert found.allclose(expected, rtol=1e-6, atol=1e-7)


@every_half
def test_an_erasure_leaves_no_more_of_the_classes_than_rounding(dtype):
    model, side = nn.Sequential(nn.Identity()), torch.arange(400) < 200
    rows = torch.randn(400, 8, generator=generator()) + side[:, None] * torch.tensor([2.0] + 7 * [0.0]) + 4
    rows = rows.to(dtype)
    options = {"sites": "0", "estimator": ConceptErasure(), "progress": False}
    edit = fit(model, positive=rows[side], negative=rows[~side], **options)
    with Steerer(model, edit):
        erased = model(rows)
    gap = (erased[side].double().mean(0) - erased[~side].double().mean(0)).abs().max()
    assert erased.dtype is dtype and gap < 8 * EPS[dtype]


@every_half
def test_a_vector_is_carried_in_the_dtype_of_the_map(dtype):
    """Products of the map are not rounded one by one."""
    d = 256
    weight = torch.randn(d, d, generator=generator(), dtype=torch.float64)
    direction = torch.randn(d, generator=generator()).to(dtype)
    carried = SteeringVector({"0": direction}).transport(SiteMap({"0": ("1", weight)}))["1"]
    assert carried.dtype is dtype
    assert torch.equal(carried, (direction.double() @ weight).to(dtype))
