"""The estimators with a formula: against independent truth, and the laws that all of them share."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import Tensor, nn

from actsteer import (
    Estimator,
    LayerMean,
    MeanDifference,
    Moments,
    ShapeError,
    SiteNotFoundError,
    Statistics,
    StatisticsError,
    WhitenedMeanDifference,
    collect,
    fit,
)
from tests.oracles import discriminant, ledoit_wolf_of_classes, moments, pooled_covariance, posterior
from tests.strategies import eighths

ESTIMATORS = [MeanDifference(), LayerMean(), WhitenedMeanDifference(), WhitenedMeanDifference(shrinkage=0.25)]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=["mean", "layer", "oas", "shrunk"])
D = 3


def statistics(rows: Tensor, **metadata: str) -> Statistics:
    return Statistics({"2": Moments.of(rows, covariance=True)}, metadata=metadata)


def direction(estimator: Estimator, positive: Tensor, negative: Tensor) -> np.ndarray:
    return estimator(positive=statistics(positive), negative=statistics(negative))["2"].double().numpy()


@st.composite
def sides(draw):
    """Rows of a positive and a negative side, whose within-class covariance has full rank."""
    spread = torch.cat([torch.eye(D), -torch.eye(D)]).double()
    counts = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    return tuple(torch.cat([spread, draw(eighths(count, D))]) + draw(eighths(D)) for count in counts)


@pytest.fixture(autouse=True, scope="module")
def _vectors_in_float64():
    """An estimate comes in torch's default dtype; float64 lets the laws be checked tightly."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- the formulas ------------------------------------------------------------------------------------------------
@given(sides())
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_mean_difference_is_the_difference_of_the_means(data):
    positive, negative = data
    expected = moments(positive)[0] - moments(negative)[0]
    assert_allclose(direction(MeanDifference(), positive, negative), expected, atol=1e-12)


@given(sides())
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_layer_mean_is_one_number_the_mean_over_all_features(data):
    positive, negative = data
    found = direction(LayerMean(), positive, negative)
    assert len(set(found.tolist())) == 1
    assert_allclose(found[0], positive.numpy().mean() - negative.numpy().mean(), atol=1e-12)


@given(sides(), st.sampled_from([0.0, 0.125, 0.5, 1.0]))
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_whitened_mean_difference_is_scikit_learn_s_discriminant(data, shrinkage):
    found = direction(WhitenedMeanDifference(shrinkage=shrinkage), *data)
    expected = discriminant(*data, shrinkage)
    assert_allclose(found, expected, atol=1e-9 * max(1.0, np.abs(expected).max()))


@given(sides(), st.sampled_from([0.125, 0.5]), eighths(4, D))
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_with_its_offset_it_gives_scikit_learn_s_probability_of_the_positive_side(data, shrinkage, rows):
    v = WhitenedMeanDifference(shrinkage=shrinkage)(positive=statistics(data[0]), negative=statistics(data[1]))
    expected = posterior(*data, shrinkage, rows)
    found = torch.sigmoid(rows @ v["2"] + float(v.metadata["offset 2"]))
    assert_allclose(found.numpy(), expected, atol=1e-9)


@given(sides())
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_the_default_shrinkage_is_that_of_ledoit_and_wolf(data):
    positive, negative = data
    rho = ledoit_wolf_of_classes(positive, negative)
    expected = direction(WhitenedMeanDifference(shrinkage=rho), positive, negative)
    assert_allclose(direction(WhitenedMeanDifference(), positive, negative), expected, atol=1e-9)


def test_full_shrinkage_is_the_scaled_mean_difference():
    positive, negative = torch.randn(9, D), torch.randn(7, D)
    scale = np.trace(pooled_covariance(positive, negative)) / D
    expected = direction(MeanDifference(), positive, negative) / scale
    assert_allclose(direction(WhitenedMeanDifference(shrinkage=1.0), positive, negative), expected)


@pytest.mark.parametrize("d", [1, 2])
def test_isotropic_data_of_few_features_is_shrunk_all_the_way(d):
    spread = torch.cat([torch.eye(d), -torch.eye(d)])
    expected = direction(WhitenedMeanDifference(shrinkage=1.0), spread + 1, spread)
    assert_allclose(direction(WhitenedMeanDifference(), spread + 1, spread), expected)


# --- the laws ----------------------------------------------------------------------------------------------------
@every_estimator
@given(data=sides())
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_swapping_the_sides_flips_the_sign(estimator, data):
    positive, negative = data
    assert_allclose(direction(estimator, positive, negative), -direction(estimator, negative, positive), atol=1e-9)


@every_estimator
@given(data=sides(), shift=eighths(D))
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_a_shift_of_both_sides_changes_nothing(estimator, data, shift):
    positive, negative = data
    shifted = direction(estimator, positive + shift, negative + shift)
    assert_allclose(shifted, direction(estimator, positive, negative), atol=1e-9)


@every_estimator
@given(data=sides(), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_the_order_of_the_rows_does_not_matter(estimator, data, seed):
    positive, negative = data
    order = torch.randperm(len(positive), generator=torch.Generator().manual_seed(seed))
    assert_allclose(
        direction(estimator, positive[order], negative), direction(estimator, positive, negative), atol=1e-9
    )


@every_estimator
@given(data=sides())
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_the_same_data_on_both_sides_gives_zero(estimator, data):
    assert_allclose(direction(estimator, data[0], data[0]), 0, atol=1e-12)


@given(sides(), st.sampled_from([-2.0, 0.5, 4.0]))
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_scaling_the_activations_scales_a_mean_and_divides_a_whitened_one(data, scale):
    positive, negative = data
    for estimator, power in ((MeanDifference(), 1), (LayerMean(), 1), (WhitenedMeanDifference(), -1)):
        scaled = direction(estimator, scale * positive, scale * negative)
        assert_allclose(scaled, scale**power * direction(estimator, positive, negative), atol=1e-9)


@every_estimator
def test_every_site_is_estimated_by_itself(estimator):
    sides = [torch.randn(9, D), torch.randn(9, D)], [torch.randn(9, 2), torch.randn(9, 2)]
    positive, negative = (
        Statistics({name: Moments.of(rows[side], covariance=True) for name, rows in zip("ab", sides, strict=True)})
        for side in (0, 1)
    )
    v = estimator(positive=positive, negative=negative)
    assert v.sites == ("a", "b")
    for name, rows in zip("ab", sides, strict=True):
        assert_allclose(v[name], direction(estimator, *rows))


# --- what comes out ----------------------------------------------------------------------------------------------
@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_vector_has_torch_s_default_dtype_and_says_where_it_comes_from(estimator, dtype):
    torch.set_default_dtype(dtype)
    positive = statistics(torch.randn(9, D), model="m", side="positive")
    v = estimator(positive=positive, negative=statistics(torch.randn(7, D), model="m", side="negative"))
    torch.set_default_dtype(torch.float64)
    assert v["2"].dtype is dtype
    said = {key: text for key, text in v.metadata.items() if not key.startswith("offset")}
    assert said == {
        "model": "m",
        "estimator": type(estimator).__name__,
        "positive count": "9",
        "negative count": "7",
    }


@every_estimator
def test_an_estimator_keeps_nothing(estimator):
    first = torch.randn(9, D), torch.randn(9, D)
    before = vars(estimator).copy(), direction(estimator, *first)
    direction(estimator, torch.randn(9, 2), torch.randn(9, 2))
    assert vars(estimator) == before[0]
    assert_allclose(direction(estimator, *first), before[1], rtol=0)


@every_estimator
def test_it_is_an_estimator(estimator):
    assert isinstance(estimator, Estimator)
    assert estimator.reads == ("covariance" if isinstance(estimator, WhitenedMeanDifference) else "means")


# --- fit ---------------------------------------------------------------------------------------------------------
MODEL = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).double()
POSITIVE, NEGATIVE = torch.randn(20, 2).double() + 1, torch.randn(15, 2).double()


@every_estimator
def test_fit_is_collect_twice_and_estimate(estimator):
    sites = ["0", "2"]
    positive, negative = (
        collect(MODEL, x, sites=sites, covariance=estimator.reads == "covariance") for x in (POSITIVE, NEGATIVE)
    )
    fitted = fit(MODEL, positive=POSITIVE, negative=NEGATIVE, sites=sites, estimator=estimator)
    expected = estimator(positive=positive, negative=negative)
    assert fitted.equal(expected)
    assert fitted.metadata == expected.metadata


def test_fit_takes_the_mean_difference_unless_told_otherwise():
    fitted = fit(MODEL, positive=POSITIVE, negative=NEGATIVE, sites="2")
    assert fitted.equal(fit(MODEL, positive=POSITIVE, negative=NEGATIVE, sites="2", estimator=MeanDifference()))
    assert fitted.metadata["estimator"] == "MeanDifference"


def test_fit_names_the_concept_and_splits_as_told():
    fitted = fit(MODEL, positive=POSITIVE, negative=NEGATIVE, sites="0", concept="nine", batch_size=4)
    assert fitted.concept == "nine"
    assert fitted.allclose(fit(MODEL, positive=POSITIVE, negative=NEGATIVE, sites="0"), atol=1e-12)


# --- errors ------------------------------------------------------------------------------------------------------
@every_estimator
def test_the_sides_cover_the_same_sites_and_sizes(estimator):
    here, there = statistics(torch.randn(9, D)), Statistics({"5": statistics(torch.randn(9, D))["2"]})
    with pytest.raises(SiteNotFoundError, match=r"positive has the sites \('2',\), negative \('5',\); collect both at"):
        estimator(positive=here, negative=there)
    with pytest.raises(ShapeError, match="site '2': positive has 3 features, negative 2; were they collected at sites"):
        estimator(positive=here, negative=statistics(torch.randn(9, 2)))


@every_estimator
def test_statistics_without_sites_are_refused(estimator):
    with pytest.raises((SiteNotFoundError, StatisticsError)):
        estimator(positive=Statistics({}), negative=Statistics({}))


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, float("nan")])
def test_shrinkage_is_a_share(shrinkage):
    with pytest.raises(ValueError, match=rf"shrinkage: expected a number in \[0, 1\] or None, got {shrinkage}"):
        WhitenedMeanDifference(shrinkage=shrinkage)


def test_whitening_needs_a_covariance():
    plain = Statistics({"2": Moments.of(torch.randn(9, D))})
    with pytest.raises(StatisticsError, match="no covariance was collected; collect with covariance=True"):
        WhitenedMeanDifference()(positive=plain, negative=plain)


def test_whitening_needs_more_than_one_row_on_each_side():
    with pytest.raises(StatisticsError, match="one row on either side says nothing about the covariance; collect more"):
        direction(WhitenedMeanDifference(), torch.ones(1, D), torch.zeros(1, D))


def test_a_constant_feature_is_singular_without_shrinkage_and_fine_with_it():
    positive, negative = torch.randn(9, D), torch.randn(9, D)
    positive[:, 1] = negative[:, 1] = 0
    match = "the covariance of 3 features from 18 rows is singular; shrink more, or collect more rows"
    with pytest.raises(StatisticsError, match=match):
        direction(WhitenedMeanDifference(shrinkage=0.0), positive, negative)
    assert direction(WhitenedMeanDifference(), positive, negative)[1] == 0


@pytest.mark.parametrize("seed", range(5))
def test_dependent_features_are_singular_without_shrinkage(seed):
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (torch.randn(40, 10, generator=generator) for _ in range(2))
    for rows in (positive, negative):
        rows[:, 0] = rows[:, 1] + rows[:, 2]
    with pytest.raises(StatisticsError, match="is singular; shrink more"):
        direction(WhitenedMeanDifference(shrinkage=0.0), positive, negative)


def test_data_that_never_varies_is_singular_whatever_the_shrinkage():
    for shrinkage in (None, 0.0, 1.0):
        with pytest.raises(StatisticsError, match="is singular"):
            direction(WhitenedMeanDifference(shrinkage=shrinkage), torch.ones(3, D), torch.zeros(3, D))
