"""Directions against scikit-learn: regressions on the side, and principal components."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from actsteer import (
    LogisticDirection,
    Moments,
    PrincipalDirection,
    RidgeDirection,
    ShapeError,
    SiteNotFoundError,
    Statistics,
    StatisticsError,
    fit,
)

IDENTITY = nn.Sequential(nn.Identity())
SIZES = [(60, 40, 7), (5, 50, 3), (100, 3, 2), (4, 4, 6)]
ESTIMATORS = {
    "ridge": RidgeDirection(alpha=2.5),
    "logistic": LogisticDirection(C=0.7),
    "streamed": LogisticDirection(C=0.7, streamed=True),
    "principal": PrincipalDirection(),
}


@pytest.fixture(autouse=True, scope="module")
def _vectors_in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sides(n, m, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator)
    positive = torch.randn(n, d, generator=generator) @ mixing + torch.randn(d, generator=generator)
    return positive, torch.randn(m, d, generator=generator) @ mixing


def direction(estimator, positive, negative, **options):
    options = {"batch_size": 16, "progress": False} | options
    return fit(IDENTITY, positive=positive, negative=negative, sites="0", estimator=estimator, **options)["0"].numpy()


def stacked(positive, negative):
    return torch.cat([positive, negative]).numpy(), np.r_[np.ones(len(positive)), -np.ones(len(negative))]


# --- the formulas ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alpha", [0.1, 2.5, 100.0])
def test_ridge_is_scikit_learns(size, alpha):
    positive, negative = sides(*size)
    expected = Ridge(alpha=alpha).fit(*stacked(positive, negative)).coef_
    assert_allclose(direction(RidgeDirection(alpha=alpha), positive, negative), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("streamed", [False, True])
def test_logistic_is_scikit_learns(size, streamed):
    positive, negative = sides(*size)
    model = LogisticRegression(C=0.7, tol=1e-12, max_iter=100_000).fit(*stacked(positive, negative))
    seen = direction(LogisticDirection(C=0.7, streamed=streamed), positive, negative)
    assert_allclose(seen, model.coef_[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_principal_is_scikit_learns_and_points_to_the_positive_side(size):
    positive, negative = sides(*size)
    expected = PCA(1).fit(stacked(positive, negative)[0]).components_[0]
    seen = direction(PrincipalDirection(), positive, negative)
    assert_allclose(seen * np.sign(seen @ expected), expected, rtol=1e-7, atol=1e-9)
    assert seen @ (positive.mean(0) - negative.mean(0)).numpy() > 0


def test_principal_of_pairs_is_that_of_their_differences_both_ways():
    positive, negative = sides(40, 40, 7)
    differences = (positive - negative).numpy()
    expected = np.linalg.svd(np.r_[differences, -differences])[2][0]
    seen = direction(PrincipalDirection(paired=True), positive, negative)
    assert_allclose(seen * np.sign(seen @ expected), expected, rtol=1e-7, atol=1e-9)
    assert seen @ differences.mean(0) > 0


# --- the laws --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_swapping_the_sides_turns_the_direction_round(estimator):
    positive, negative = sides(30, 20, 4)
    seen = direction(estimator, positive, negative)
    assert_allclose(direction(estimator, negative, positive), -seen, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_shift_of_both_sides_changes_nothing(estimator):
    positive, negative = sides(30, 20, 4)
    shift = torch.tensor([3.0, -1.0, 0.5, 10.0])
    seen = direction(estimator, positive, negative)
    assert_allclose(direction(estimator, positive + shift, negative + shift), seen, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_order_of_the_rows_and_the_batches_does_not_matter(estimator):
    positive, negative = sides(30, 20, 4)
    seen = direction(estimator, positive.flip(0), negative.flip(0), batch_size=7)
    assert_allclose(seen, direction(estimator, positive, negative), rtol=1e-5, atol=1e-7)


def test_the_principal_direction_does_not_depend_on_the_scale_and_is_a_unit_vector():
    positive, negative = sides(30, 20, 4)
    seen = direction(PrincipalDirection(), positive, negative)
    assert_allclose(np.linalg.norm(seen), 1.0)
    assert_allclose(direction(PrincipalDirection(), 8 * positive, 8 * negative), seen, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", [RidgeDirection(alpha=2.0), LogisticDirection(C=0.5)], ids=["ridge", "logistic"])
def test_a_rotation_of_the_features_rotates_the_direction(estimator):
    positive, negative = sides(30, 20, 4)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    seen = direction(estimator, positive, negative)
    assert_allclose(direction(estimator, positive @ turn, negative @ turn), seen @ turn.numpy(), rtol=1e-4, atol=1e-6)


# --- what cannot be ---------------------------------------------------------------------------------------------------
def statistics(rows, *, covariance=True):
    return Statistics({"0": Moments.of(rows, covariance=covariance)})


@pytest.mark.parametrize("estimator", [RidgeDirection(), PrincipalDirection()], ids=["ridge", "principal"])
def test_without_covariances_there_is_no_direction(estimator):
    positive, negative = (statistics(rows, covariance=False) for rows in sides(5, 5, 3))
    with pytest.raises(StatisticsError, match="covariance"):
        estimator(positive=positive, negative=negative)


def test_rows_that_do_not_vary_have_no_principal_direction():
    alike = statistics(torch.ones(5, 3))
    with pytest.raises(StatisticsError, match="do not vary"):
        PrincipalDirection()(positive=alike, negative=alike)


@pytest.mark.parametrize("bad", [{"C": 0.0}, {"C": -1.0}, {"steps": 0}, {"tolerance": 0.0}])
def test_options_of_the_logistic_direction_are_checked(bad):
    with pytest.raises(ValueError, match="expected"):
        LogisticDirection(**bad)


def test_a_negative_ridge_is_refused():
    with pytest.raises(ValueError, match="alpha"):
        RidgeDirection(alpha=-0.1)


def test_recorded_sides_have_to_be_alike():
    with pytest.raises(SiteNotFoundError, match="'1'"):
        LogisticDirection()(positive={"0": torch.ones(2, 2)}, negative={"1": torch.ones(2, 2)})
    with pytest.raises(ShapeError):
        LogisticDirection()(positive={"0": torch.ones(2, 2)}, negative={"0": torch.ones(2, 3)})
    with pytest.raises(TypeError, match="one of each"):
        LogisticDirection()(positive={"0": torch.ones(2, 2)}, negative=[{"0": torch.ones(2, 2)}])


def test_a_generator_cannot_be_gone_over_again():
    def stream():
        yield {"0": torch.randn(5, 2, generator=torch.Generator().manual_seed(0))}

    with pytest.raises(StatisticsError, match="list"):
        LogisticDirection(streamed=True)(positive=stream(), negative=stream())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(streamed, value):
    positive, negative = sides(5, 5, 3)
    positive[2, 1] = value
    with pytest.raises(StatisticsError, match="finite"):
        direction(LogisticDirection(streamed=streamed), positive, negative)
