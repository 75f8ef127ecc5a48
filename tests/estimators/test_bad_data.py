"""What the estimators say to data that they cannot use: an error that names it, never a number."""

import pytest
import torch
from torch import nn

from actsteer import (
    ActsteerError,
    Centroids,
    ConceptErasure,
    LayerMean,
    LogisticDirection,
    LowRank,
    MeanDifference,
    Moments,
    NullSpace,
    PrincipalDirection,
    RidgeDirection,
    ShapeError,
    SiteNotFoundError,
    SparseFeature,
    Statistics,
    StatisticsError,
    Steerer,
    SteeringVector,
    WhitenedMeanDifference,
    collect,
)

IDENTITY = nn.Sequential(nn.Identity())
D = 3
VECTOR = SteeringVector({"0": torch.ones(D)})
OF_SUMS = {
    "mean": MeanDifference(),
    "layer": LayerMean(),
    "whitened": WhitenedMeanDifference(),
    "ridge": RidgeDirection(),
    "principal": PrincipalDirection(),
    "sparse": SparseFeature(torch.eye(D)),
    "erasure": ConceptErasure(),
    "null space": NullSpace(VECTOR),
}
of_sums = pytest.mark.parametrize("estimator", OF_SUMS.values(), ids=OF_SUMS)


def rows(count=9, d=D, seed=0):
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed))


def statistics(data):
    return Statistics({"0": Moments.of(data, covariance=True)})


# --- sums ------------------------------------------------------------------------------------------------------------
@of_sums
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_sums_that_are_not_finite_are_refused(estimator, value, side):
    sides = {"positive": rows(), "negative": rows(seed=1)}
    sides[side][4, 1] = value
    with pytest.raises(ActsteerError):
        estimator(**{name: statistics(data) for name, data in sides.items()})


@of_sums
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_side_without_rows_is_refused(estimator, side):
    sides = {"positive": rows(), "negative": rows(seed=1)}
    sides[side] = rows(0)
    with pytest.raises(StatisticsError, match="no rows"):
        estimator(**{name: statistics(data) for name, data in sides.items()})


@of_sums
def test_sums_of_other_sites_are_refused(estimator):
    with pytest.raises(SiteNotFoundError, match="'0'"):
        estimator(positive=Statistics({"1": statistics(rows())["0"]}), negative=statistics(rows()))


def test_rows_that_do_not_vary_cannot_be_erased_and_are_not_a_crash():
    with pytest.raises(StatisticsError, match="site '0'"):
        ConceptErasure()(positive=statistics(torch.ones(4, D)), negative=statistics(torch.ones(5, D)))


def test_one_class_alone_cannot_be_erased():
    alone = collect(IDENTITY, rows(), by=["a"] * 9, sites="0", covariance=True, progress=False)
    with pytest.raises(StatisticsError, match="two classes"):
        ConceptErasure().classes(alone)


def test_labels_that_read_alike_are_not_mixed_up():
    mixed = collect(IDENTITY, torch.arange(6.0)[:, None], by=[1, "1", 1, "1", 2, 2], sites="0", progress=False)
    with pytest.raises(StatisticsError, match="'1'"):
        Centroids()(mixed)


def test_equal_means_choose_no_feature():
    same = statistics(rows())
    with pytest.raises(StatisticsError, match="mean"):
        SparseFeature(torch.eye(D))(positive=same, negative=same)


def test_a_decoder_without_features_has_none_to_choose():
    with pytest.raises(ShapeError, match="feature"):
        SparseFeature(torch.zeros(0, D))(positive=statistics(rows()), negative=statistics(rows(seed=1)))


def test_a_vector_of_another_size_has_no_null_space_here():
    flat = rows() * torch.tensor([1.0, 1.0, 0.0])
    narrow = NullSpace(SteeringVector({"0": torch.ones(2)}))
    with pytest.raises(ShapeError, match=r"site '0'.*3 features.*2"):
        narrow(positive=statistics(rows()), negative=statistics(flat))


# --- rows ------------------------------------------------------------------------------------------------------------

FORMS = {"recorded": lambda data, site="0": {site: data}, "streamed": lambda data, site="0": [{site: data}]}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@every_form
def test_a_regression_needs_rows_on_both_sides(form):
    with pytest.raises(StatisticsError, match="both sides"):
        LogisticDirection()(positive=form(rows()), negative=form(rows(0)))


@every_form
def test_a_regression_needs_one_size_on_both_sides(form):
    with pytest.raises(ShapeError, match="site '0'"):
        LogisticDirection()(positive=form(rows()), negative=form(rows(d=2)))


@every_form
def test_a_regression_needs_the_same_sites_on_both_sides(form):
    with pytest.raises(SiteNotFoundError, match="'1'"):
        LogisticDirection()(positive=form(rows()), negative=form(rows(), site="1"))


@every_form
def test_a_regression_needs_rows_of_features(form):
    with pytest.raises(ShapeError, match=r"\(n, d\)"):
        LogisticDirection()(positive=form(rows()[0]), negative=form(rows()[1]))


@pytest.mark.parametrize("nothing", [{}, [], [{}]], ids=["mapping", "stream", "blocks"])
def test_a_regression_at_no_site_is_refused(nothing):
    with pytest.raises((SiteNotFoundError, StatisticsError)):
        LogisticDirection()(positive=nothing, negative=nothing)


@every_form
def test_a_regression_that_does_not_converge_is_an_error(form):
    with pytest.raises(StatisticsError, match="no convergence in 1 steps"):
        LogisticDirection(steps=1)(positive=form(rows(50) + 1), negative=form(rows(50, seed=1)))


def test_a_regression_says_that_it_needs_rows_when_it_is_given_sums():
    with pytest.raises((TypeError, StatisticsError), match="record"):
        LogisticDirection()(positive=statistics(rows()), negative=statistics(rows(seed=1)))


# --- edits -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "parts", [([[1.0]], [[1.0]], [1.0]), (torch.ones(1, D), torch.ones(1, D)), ()], ids=["lists", "two", "none"]
)
def test_an_edit_is_three_tensors(parts):
    with pytest.raises((ShapeError, TypeError), match="site '0'"):
        LowRank({"0": parts})


def test_what_a_site_s_edit_gives_away_does_not_change_the_edit():
    edit = LowRank({"0": (torch.ones(1, D), torch.ones(1, D), torch.ones(1))})
    for part in (edit.at("0").reads, edit.at("0").adds, edit.at("0").offsets):
        part.zero_()
    assert all(torch.equal(part, torch.ones_like(part)) for part in edit["0"])
    with Steerer(IDENTITY, edit):
        assert torch.equal(IDENTITY(torch.zeros(1, D)), torch.ones(1, D))
