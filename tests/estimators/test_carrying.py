"""align and transport: against numpy and scipy, over several sites and axes; and what is refused."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.linalg import orthogonal_procrustes
from torch import nn

from actsteer import (
    ShapeError,
    SiteMap,
    SiteNotFoundError,
    StatisticsError,
    Steerer,
    SteeringVector,
    align,
    collect,
    collect_pairs,
    fit,
)
from tests.oracles import state
from tests.strategies import eighths

G = torch.Generator().manual_seed(0)
X = torch.randn(60, 4, generator=G, dtype=torch.float64)
WEIGHT = torch.randint(-4, 5, (2, 3), generator=G).double() / 4


def network(sizes, seed):
    """Linear layers "0", "1" and so on, each seen by the next."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(sizes))).double().eval()


A, B = network((4, 5, 6), seed=0), network((4, 5, 3), seed=1)
PAIRS = {"0": "0", "1": "1"}


def aligned(a=A, b=B, x=X, pairs=PAIRS, **options):
    stats_a = collect(a, x, sites=list(pairs), covariance=True, progress=False)
    stats_b = collect(b, x, sites=list(pairs.values()), progress=False)
    paired = collect_pairs(a, b, x, sites=pairs, batch_size=13, progress=False)
    return align(stats_a, stats_b, paired, **options)


def seen(model, depth, x=X):
    with torch.no_grad():
        return model[: depth + 1](x).numpy()


def centred(rows):
    return rows - rows.mean(axis=0)


# --- the formulas ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ridge", [0.01, 0.3, 10.0])
def test_ridge_is_the_least_squares_solution_with_extra_rows_at_every_site(ridge):
    found = aligned(ridge=ridge)
    assert found.sites == ("0", "1")
    for depth in (0, 1):
        a, b = (centred(seen(model, depth)) for model in (A, B))
        root = np.sqrt(ridge * (a**2).sum() / a.shape[1]) * np.eye(a.shape[1])
        expected = np.linalg.lstsq(np.r_[a, root], np.r_[b, np.zeros((a.shape[1], b.shape[1]))], rcond=None)[0]
        target, weight = found[str(depth)]
        assert target == str(depth)
        assert_allclose(weight.numpy(), expected, rtol=1e-7, atol=1e-9)


def test_procrustes_is_scipys():
    _, weight = aligned(method="procrustes")["0"]
    expected, _ = orthogonal_procrustes(*(centred(seen(model, 0)) for model in (A, B)))
    # of 5 features that vary in 4 ways the last is free: the map is one where the rows lie
    rows = centred(seen(A, 0))
    assert_allclose(rows @ weight.numpy(), rows @ expected, atol=1e-7)
    assert_allclose(weight.numpy() @ weight.numpy().T, np.eye(5), atol=1e-9)


@pytest.mark.parametrize("sizes", [(4, 3), (3, 4)], ids=["to fewer", "to more"])
def test_procrustes_between_two_sizes_is_an_isometry_of_the_smaller(sizes):
    one, other = (network((4, size), seed) for seed, size in enumerate(sizes))
    _, weight = aligned(one, other, pairs={"0": "0"}, method="procrustes")["0"]
    product = weight.T @ weight if sizes[0] > sizes[1] else weight @ weight.T
    torch.testing.assert_close(product, torch.eye(3, dtype=torch.float64))
    a, b = (centred(seen(model, 0)) for model in (one, other))
    # nothing of its kind maps more of the one on the other: the trace is the sum of the singular values
    assert_allclose(np.trace(weight.numpy().T @ a.T @ b), np.linalg.svd(a.T @ b)[1].sum(), rtol=1e-9)


def test_neither_a_shift_of_the_activations_nor_the_order_of_the_rows_changes_the_map():
    shifted = network((4, 5, 3), seed=1)
    with torch.no_grad():
        shifted[1].bias.add_(100)
    for other in (aligned(b=shifted), aligned(x=X.flip(0))):
        for site in PAIRS:
            assert_allclose(other[site][1].numpy(), aligned()[site][1].numpy(), rtol=1e-7, atol=1e-9)


def test_scaling_the_other_model_s_activations_scales_the_map_of_ridge_and_not_of_procrustes():
    doubled = network((4, 5, 3), seed=1)
    with torch.no_grad():
        doubled[1].weight.mul_(2), doubled[1].bias.mul_(2)
    for method, factor in (("ridge", 2), ("procrustes", 1)):
        one, other = aligned(method=method)["1"][1], aligned(b=doubled, method=method)["1"][1]
        assert_allclose(other.numpy(), factor * one.numpy(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])
def test_the_share_of_the_ridge_does_not_depend_on_the_units(scale):
    scaled = nn.Sequential(nn.Linear(4, 4)).double()
    with torch.no_grad():
        scaled[0].weight.copy_(scale * torch.eye(4)), scaled[0].bias.zero_()
    identity = nn.Sequential(nn.Identity())
    one, other = (aligned(model, identity, pairs={"0": "0"})["0"][1] for model in (identity, scaled))
    assert_allclose(other.numpy() * scale, one.numpy(), rtol=1e-9)


# --- carrying --------------------------------------------------------------------------------------------------------
@given(eighths(2), eighths(2), st.sampled_from([-2.0, 0.5]))
def test_transport_is_linear_and_exact_on_eighths(v, w, c):
    across = SiteMap({"a": ("b", WEIGHT)})
    one, other = (SteeringVector({"a": d}).transport(across) for d in (v, w))
    assert one.sites == ("b",) and torch.equal(one["b"], v @ WEIGHT)
    assert SteeringVector({"a": v + c * w}).transport(across).equal(one + c * other)


@given(eighths(2))
def test_steering_a_linear_later_site_by_what_is_carried_is_steering_the_earlier(v):
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        model[1].weight.copy_(WEIGHT.T), model[1].bias.fill_(0.5)
        x = torch.tensor([[0.25, -1.0], [3.0, 0.0]], dtype=torch.float64)
        with Steerer(model, SteeringVector({"0": v}), c=2.0):
            expected = model(x)
        with Steerer(model, SteeringVector({"0": v}).transport(SiteMap({"0": ("1", WEIGHT)})), c=2.0):
            assert torch.equal(model(x), expected)


def test_several_sites_are_carried_each_along_its_own_map():
    across = aligned()
    vector = SteeringVector({"1": torch.ones(6).double(), "0": torch.arange(5.0).double()}, concept="k")
    carried = vector.transport(across)
    assert set(carried.sites) == {"0", "1"} and carried.concept == "k"
    for site in ("0", "1"):
        assert_allclose(carried[site].numpy(), vector[site].numpy() @ across[site][1].numpy(), atol=1e-12)


def test_sites_may_cross():
    across = SiteMap({"0": ("1", 2 * torch.eye(2)), "1": ("0", 3 * torch.eye(2))})
    carried = SteeringVector({"0": torch.tensor([1.0, 0.0]), "1": torch.tensor([0.0, 1.0])}).transport(across)
    assert carried["1"].tolist() == [2, 0] and carried["0"].tolist() == [0, 3]


def test_a_carried_vector_is_as_good_as_one_fitted_there():
    """Both models are linear and see all of the input, so what A knows of it is all that B does."""
    both = {"positive": X + 0.5, "negative": X, "sites": "0", "progress": False}
    one, other = network((4, 6), seed=0), network((4, 3), seed=1)
    across = aligned(one, other, pairs={"0": "0"}, ridge=1e-9)
    assert fit(one, **both).transport(across).allclose(fit(other, **both), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ridge", "procrustes", "identity"])
def test_what_is_carried_is_added_along_the_other_model_s_axis(method):
    model, x = nn.Sequential(nn.Identity()), torch.randn(20, 4, 4, generator=torch.Generator().manual_seed(0))
    stats_a = collect(model, x, sites="0", covariance=True, progress=False)
    stats_b = collect(model, x, sites="0", axis=1, progress=False)
    paired = collect_pairs(model, model, x, sites={"0": "0"}, axis_b=1, progress=False)
    vector = SteeringVector({"0": torch.tensor([1.0, 0.0, 0.0, 0.0])})
    carried = vector.transport(align(stats_a, stats_b, paired, method=method))
    with Steerer(model, carried):
        seen = model(torch.zeros(1, 4, 4))
    assert torch.equal(seen, carried["0"][None, :, None].expand(1, 4, 4))


def test_the_axis_of_the_first_model_does_not_come_along():
    model, x = nn.Sequential(nn.Identity()), torch.randn(20, 4, 4, generator=torch.Generator().manual_seed(0))
    stats_a = collect(model, x, sites="0", covariance=True, axis=1, progress=False)
    stats_b = collect(model, x, sites="0", progress=False)
    paired = collect_pairs(model, model, x, sites={"0": "0"}, axis_a=1, progress=False)
    vector = fit(model, positive=x + 1, negative=x, sites="0", axis=1, progress=False)
    carried = vector.transport(align(stats_a, stats_b, paired))
    with Steerer(model, carried):
        seen = model(torch.zeros(1, 4, 4))
    assert torch.equal(seen, carried["0"].expand(1, 4, 4))


def test_a_map_is_a_value():
    weight = WEIGHT.clone()
    across = SiteMap({"a": ("b", weight)}, metadata={"model": "m"})
    weight.zero_()
    across["a"][1].zero_()
    across.metadata["model"] = "other"
    across.T["b"][1].zero_()
    assert torch.equal(across["a"][1], WEIGHT) and across.metadata == {"model": "m"}
    assert torch.equal(across.T.T["a"][1], WEIGHT)


def test_both_models_are_left_as_they_were():
    a, b = network((4, 5, 6), seed=0).train(), network((4, 5, 3), seed=1).train()
    before = state(a), state(b)
    aligned(a, b)
    assert (state(a), state(b)) == before


# --- what cannot be --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ridge", [-1.0, -1e-9, float("nan"), float("inf")])
def test_the_ridge_is_a_share(ridge):
    with pytest.raises(ValueError, match="ridge"):
        aligned(ridge=ridge)


@pytest.mark.parametrize("x", [X[:3], X[:4]], ids=["three rows", "four rows"])
def test_activations_that_do_not_fill_their_space_need_a_ridge(x):
    with pytest.raises(StatisticsError, match=r"site '0'.*ridge|ridge.*site '0'"):
        aligned(x=x, pairs={"0": "0"}, ridge=0.0)


def test_activations_that_do_not_vary_have_no_map():
    with pytest.raises(StatisticsError, match="site '0'"):
        aligned(x=torch.ones(6, 4, dtype=torch.float64), pairs={"0": "0"})


def test_one_site_does_not_lead_to_two():
    stats = collect(A, X, sites=["0", "1"], covariance=True, progress=False)
    other = network((4, 5, 5), seed=1)
    targets = collect(other, X, sites=["0", "1"], progress=False)
    paired = {("0", to): collect_pairs(A, other, X, sites={"0": to}, progress=False)["0", to] for to in ("0", "1")}
    with pytest.raises(ShapeError, match="'0'"):
        align(stats, targets, paired)


def test_what_does_not_belong_together_is_refused():
    paired = collect_pairs(A, B, X, sites={"0": "0"}, progress=False)
    stats = collect(A, X, sites="0", progress=False), collect(B, X, sites="0", progress=False)
    with pytest.raises(StatisticsError, match="covariance"):
        align(*stats, paired)
    with pytest.raises(SiteNotFoundError, match="'7'"):
        align(*stats, {("7", "0"): paired["0", "0"]})
    deeper = collect(B, X, sites="1", progress=False)
    with pytest.raises(SiteNotFoundError, match="'0'"):
        align(stats[0], deeper, paired)
    with pytest.raises(SiteNotFoundError, match="no map from site '1'"):
        SteeringVector({"0": torch.ones(2), "1": torch.ones(2)}).transport(SiteMap({"0": ("0", torch.eye(2))}))
    for bad in (torch.ones(2), torch.ones(2, 2).long(), torch.full((2, 2), float("nan"))):
        with pytest.raises(ShapeError, match="site '0'"):
            SiteMap({"0": ("0", bad)})
