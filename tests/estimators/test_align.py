"""Maps from one model's activations to another's, and vectors carried over them."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.linear_model import Ridge
from torch import nn

from actsteer import (
    BatchError,
    ShapeError,
    SiteMap,
    SiteNotFoundError,
    SteeringVector,
    align,
    collect,
    collect_pairs,
    fit,
)


def linear(size, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, size)).double()


A, B = linear(4, seed=0), linear(3, seed=1)
X = torch.randn(80, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def aligned(one, other, x=X, **options):
    stats = [collect(model, x, sites="0", covariance=True, progress=False) for model in (one, other)]
    return align(*stats, collect_pairs(one, other, x, sites={"0": "0"}, batch_size=16, progress=False), **options)


def seen(model, x=X):
    with torch.no_grad():
        return model(x).numpy()


def test_the_cross_moments_are_the_covariance_of_both():
    found = collect_pairs(A, B, X, sites={"0": "0"}, batch_size=7, progress=False)["0", "0"]
    a, b = (seen(model) - seen(model).mean(0) for model in (A, B))
    assert found.count == 80
    assert_allclose(found.covariance.numpy(), a.T @ b / 79, rtol=1e-10, atol=1e-12)


def test_ridge_is_the_regression_of_one_on_the_other():
    target, weight = aligned(A, B, ridge=0.5)["0"]
    a, b = seen(A), seen(B)
    mean_variance = np.trace(np.cov(a.T)) / a.shape[1]
    expected = Ridge(alpha=0.5 * mean_variance * 79).fit(a, b).coef_.T
    assert target == "0"
    assert_allclose(weight.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_procrustes_finds_a_rotation():
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    turned = linear(4, seed=2)
    with torch.no_grad():
        turned[0].weight.copy_(turn.T @ A[0].weight)
        turned[0].bias.copy_(A[0].bias @ turn + 3)
    _, weight = aligned(A, turned, method="procrustes")["0"]
    assert_allclose(weight.numpy(), turn.numpy(), rtol=1e-5, atol=1e-6)


def test_the_identity_is_for_two_models_of_one_origin():
    _, weight = aligned(A, A, method="identity")["0"]
    assert torch.equal(weight.double(), torch.eye(4, dtype=torch.float64))
    with pytest.raises(ShapeError, match="equal sizes"):
        aligned(A, B, method="identity")


def test_a_difference_of_means_is_carried_over_an_affine_relation_exactly():
    class After(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = A[0], nn.Linear(4, 6).double()

        def forward(self, x):
            return self.second(self.first(x))

    later = nn.Sequential(After())
    across = aligned(A, later, ridge=0.0)
    options = {"positive": X + 1, "negative": X - 1, "sites": "0", "progress": False}
    carried, own = fit(A, **options).transport(across), fit(later, **options)
    assert carried.allclose(own, rtol=1e-4, atol=1e-5)
    assert carried.metadata["model"] == own.metadata["model"]


def test_the_transposed_map_carries_probes_back():
    across = SiteMap({"0": ("1", torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 4.0]]))})
    probe = SteeringVector({"1": torch.tensor([1.0, 1.0, 0.5])})
    x = torch.tensor([3.0, -1.0])
    carried = SteeringVector({"0": x}).transport(across)
    assert carried["1"] @ probe["1"] == x @ probe.transport(across.T)["0"]


def test_transport_is_linear_and_keeps_the_concept():
    across = SiteMap({"0": ("1", torch.tensor([[1.0, 2.0], [0.0, 0.5]]))})
    v, w = (SteeringVector({"0": torch.tensor(t)}, concept="c") for t in ([1.0, 2.0], [-0.5, 4.0]))
    assert (v + 2 * w).transport(across).equal(v.transport(across) + 2 * w.transport(across))
    assert v.transport(across).concept == "c"


def test_what_does_not_fit_is_refused():
    across = SiteMap({"0": ("1", torch.eye(2))})
    with pytest.raises(SiteNotFoundError, match="no map from site '3'"):
        SteeringVector({"3": torch.ones(2)}).transport(across)
    with pytest.raises(ShapeError, match="takes 2 features, the vector has 3"):
        SteeringVector({"0": torch.ones(3)}).transport(across)
    with pytest.raises(ShapeError, match="two sites lead to one"):
        SiteMap({"0": ("1", torch.eye(2)), "2": ("1", torch.eye(2))})
    with pytest.raises(ValueError, match="method"):
        aligned(A, B, method="lasso")
    stats = collect(A, X, sites="0", progress=False)
    with pytest.raises(SiteNotFoundError, match="collect_pairs"):
        align(stats, stats, {})


def test_models_that_see_different_numbers_of_rows_have_no_pairs():
    class Halves(nn.Module):
        def forward(self, x):
            return x[: len(x) // 2]

    with pytest.raises(BatchError):
        collect_pairs(A, nn.Sequential(Halves()), X, sites={"0": "0"}, progress=False)
