"""Moments: as exact as two passes over the rows, however these are split, and values that never alias."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from actsteer import Moments, ShapeError, StatisticsError
from actsteer.collecting.moments import BLOCK
from actsteer.collecting.symmetric import PANEL
from tests.strategies import eighths
from tests.zoo import normal

X = torch.tensor([[0.0, 2.0], [4.0, 2.0], [2.0, -1.0]])
EPS = 2.0**-52


def exact(rows):
    """Mean, scatter and fourth sum in fractions, without any rounding."""
    values = [[Fraction(value) for value in row] for row in rows.tolist()]
    mean = [sum(column) / len(values) for column in zip(*values, strict=True)]
    centred = [[value - m for value, m in zip(row, mean, strict=True)] for row in values]
    columns = list(zip(*centred, strict=True))
    scatter = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in columns] for one in columns]
    return mean, scatter, sum(sum(value * value for value in row) ** 2 for row in centred)


def fourth(rows):
    array = rows.double().numpy()
    return ((array - array.mean(axis=0)) ** 2).sum(axis=1) @ ((array - array.mean(axis=0)) ** 2).sum(axis=1)


def furthest(found, true, scale=None):
    """The largest error, as a share of the largest number, or of `scale`."""
    found, true = np.ravel(found).tolist(), np.ravel(np.array(true, dtype=object)).tolist()
    distance = max(abs(Fraction(one) - other) for one, other in zip(found, true, strict=True))
    return float(distance / (max(map(abs, true)) if scale is None else Fraction(scale)))


def streamed(rows, size):
    moments = Moments.empty(rows.shape[1], covariance=True)
    for part in rows.split(size):
        moments.update(part)
    return moments


def merged(rows, size):
    parts = [Moments.of(part, covariance=True) for part in rows.split(size)]
    while len(parts) > 1:  # a tree
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [pair[0].merge(pair[1]) if len(pair) > 1 else pair[0] for pair in pairs]
    return parts[0]


def agree(one, other, *, atol=1e-9):
    assert one.count == other.count
    assert_allclose(one.mean, other.mean, atol=atol)
    assert_allclose(one.scatter, other.scatter, atol=atol)
    assert_allclose(one.fourth, other.fourth, rtol=1e-11, atol=atol)


# --- numbers ---------------------------------------------------------------------------------------------------------
def far_away():
    return 1e6 + 1e-3 * normal(400, 3)


def outlier(where):
    rows = normal(400, 3)
    rows[where] = 1e9
    return rows


def drifting():
    return (1e8 * normal(400, 3)).sort(dim=0).values


@pytest.mark.parametrize("how", [streamed, merged])
@pytest.mark.parametrize("size", [1, 7, 400])
@pytest.mark.parametrize(
    "rows",
    [far_away(), outlier(200), outlier(0), drifting()],
    ids=["far away", "outlier", "outlier first", "drifting"],
)
def test_the_error_is_no_larger_than_that_of_two_passes_or_a_few_roundings(how, size, rows):
    mean, scatter, sum_of_fourths = exact(rows)
    array = rows.numpy()
    centred = array - array.mean(axis=0)
    found, few, largest = how(rows, size), 30 * EPS, float(rows.abs().max())
    assert furthest(found.mean, mean, largest) <= 2 * furthest(array.mean(axis=0), mean, largest) + few
    assert furthest(found.scatter, scatter) <= 2 * furthest(centred.T @ centred, scatter) + few
    assert furthest(found.fourth, sum_of_fourths) <= 2 * furthest(fourth(rows), sum_of_fourths) + few


def test_single_precision_rows_are_summed_in_double():
    rows = (1e3 + normal(2 * BLOCK + 5, 2)).float()
    found = Moments.of(rows, covariance=True)
    assert_allclose(found.mean, rows.double().numpy().mean(axis=0), rtol=1e-14)
    assert_allclose(found.covariance, np.cov(rows.double().numpy().T), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_do_not_overflow(dtype):
    rows = torch.full((300, 2), 6e4, dtype=dtype)
    rows[::2] *= -1
    found = Moments.of(rows, covariance=True)
    assert found.mean.tolist() == [0, 0]
    assert float(found.scatter[0, 1]) == 300 * float(rows[0, 0]) ** 2


@given(eighths(9, 3), st.lists(st.integers(1, 8), unique=True).map(sorted), st.booleans())
def test_the_fourth_sum_is_right_after_any_split_and_any_order_of_merges(rows, cuts, backwards):
    parts = [Moments.of(part, covariance=True) for part in torch.tensor_split(rows, cuts)]
    whole = Moments.empty(3, covariance=True)
    for part in reversed(parts) if backwards else parts:
        whole = whole.merge(part)
    mean, scatter, sum_of_fourths = exact(rows)
    assert_allclose(whole.mean, np.array(mean, dtype=float), atol=1e-12)
    assert_allclose(whole.scatter, np.array(scatter, dtype=float), atol=1e-10)
    assert_allclose(whole.fourth, float(sum_of_fourths), rtol=1e-12, atol=1e-9)


@given(eighths(6, 3), st.integers(1, 5), eighths(3))
def test_updating_after_a_merge_is_like_one_pass(rows, cut, far):
    rows = rows + 1024 * far
    parts = Moments.of(rows[:1], covariance=True).merge(Moments.of(rows[1:cut], covariance=True))
    agree(parts.update(rows[max(cut, 1) :]), Moments.of(rows, covariance=True), atol=1e-6)
    assert_allclose(parts.fourth, fourth(rows), rtol=1e-9, atol=1e-6)


@given(eighths(4, 2), eighths(3, 2), eighths(5, 2))
def test_merging_commutes_and_associates(a, b, c):
    one, two, three = (Moments.of(rows, covariance=True) for rows in (a, b, c))
    agree(one.merge(two), two.merge(one))
    agree(one.merge(two).merge(three), one.merge(two.merge(three)))
    agree(one.merge(two).merge(three), Moments.of(torch.cat([a, b, c]), covariance=True))


@given(eighths(4, 2))
def test_the_moments_of_no_rows_change_nothing_bit_for_bit(rows):
    own, empty = Moments.of(rows, covariance=True), Moments.empty(2, covariance=True)
    for same in (own.merge(empty), empty.merge(own), own.copy().update(rows[:0]), empty.copy().merge(own)):
        assert torch.equal(same.mean, own.mean) and torch.equal(same.scatter, own.scatter)
        assert torch.equal(same.fourth, own.fourth) and same.count == 4
    assert empty.merge(empty).count == 0


@given(eighths(5, 3))
def test_the_negated_moments_are_those_of_the_negated_rows(rows):
    agree(-Moments.of(rows, covariance=True), Moments.of(-rows, covariance=True))
    agree((-Moments.of(rows[:2], covariance=True)).update(-rows[2:]), Moments.of(-rows, covariance=True))


@pytest.mark.parametrize("d", [PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 76])
def test_many_features_are_as_right_as_few(d):
    rows = normal(20, d).round(decimals=0)
    array = rows.numpy()
    for found in (streamed(rows, 6), merged(rows, 6), Moments.of(rows, covariance=True)):
        assert torch.equal(found.scatter, found.scatter.T)
        assert_allclose(found.scatter, 19 * np.cov(array.T), atol=1e-9)
        assert_allclose(found.fourth, fourth(rows), rtol=1e-12)


def test_more_rows_than_a_block_are_as_right_as_few():
    rows = normal(3 * BLOCK + 1, 2)
    found = Moments.of(rows, covariance=True)
    assert_allclose(found.scatter, (len(rows) - 1) * np.cov(rows.numpy().T), rtol=1e-12, atol=1e-9)
    assert_allclose(found.fourth, fourth(rows), rtol=1e-12)
    agree(found, merged(rows, 1000), atol=1e-8)


@pytest.mark.parametrize(
    "rows", [X.T.contiguous().T, X.repeat(1, 3)[:, 1:5:3], X[:1].expand(3, 2), X[None].expand(2, 3, 2)[0]]
)
def test_the_layout_in_memory_does_not_matter(rows):
    agree(Moments.of(rows, covariance=True), Moments.of(rows.clone().contiguous(), covariance=True), atol=0)


# --- values ----------------------------------------------------------------------------------------------------------
def numbers(moments):
    return moments.count, moments.mean.tolist(), moments.scatter.tolist(), moments.fourth.item()


COPIES = {
    "copy": Moments.copy,
    "merged with nothing": lambda m: m.merge(Moments.empty(2, covariance=True)),
    "nothing merged with it": lambda m: Moments.empty(2, covariance=True).merge(m),
    "negated twice": lambda m: (-m).__neg__(),
    "pickled": lambda m: pickle.loads(pickle.dumps(m)),
    "deep copy": copy.deepcopy,
    "copy of a copy": lambda m: m.copy().copy(),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_updating_a_copy_changes_nothing_else_and_the_reverse(copied):
    own = Moments.of(X, covariance=True)
    other, third = copied(own), copied(own)
    before = numbers(own)
    assert numbers(other) == numbers(third) == before
    other.update(torch.full((2, 2), 9.0))
    assert numbers(own) == numbers(third) == before
    own.update(torch.full((1, 2), -9.0))
    assert numbers(third) == before
    assert other.count == 5 and own.count == 4
    agree(other, Moments.of(torch.cat([X, torch.full((2, 2), 9.0)]), covariance=True))


def test_a_merged_value_is_its_own():
    one, two = Moments.of(X, covariance=True), Moments.of(2 * X, covariance=True)
    whole, before = one.merge(two), (numbers(one), numbers(two))
    whole.update(X)
    assert (numbers(one), numbers(two)) == before
    kept = numbers(whole)
    one.update(X)
    two.update(X)
    assert numbers(whole) == kept


def test_the_rows_are_neither_kept_nor_changed():
    rows = X.double()
    found = Moments.of(rows[:1], covariance=True).update(rows)
    assert torch.equal(rows, X.double())
    before = numbers(found)
    rows.fill_(7)
    assert numbers(found) == before


def test_what_grew_in_inference_mode_works_in_autograd():
    with torch.inference_mode():
        found = (
            Moments.empty(2, covariance=True).update(X * 1).merge(Moments.of(X + 0, covariance=True)).copy().update(X)
        )
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (weight @ found.scatter @ weight + found.mean @ weight + found.fourth * weight.sum()).backward()
    assert bool(weight.grad.isfinite().all())


def test_rows_with_gradients_are_detached():
    assert not Moments.of(X.clone().requires_grad_(), covariance=True).scatter.requires_grad


# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [torch.zeros(3), torch.zeros(3, 3), torch.zeros(1, 3, 2)])
def test_other_rows_are_refused_and_change_nothing(rows):
    own = Moments.of(X, covariance=True)
    with pytest.raises(ShapeError, match=r"expected rows of shape \(n, 2\)"):
        own.update(rows)
    agree(own, Moments.of(X, covariance=True), atol=0)


def test_moments_of_other_features_do_not_merge():
    with pytest.raises(ShapeError, match="2 features against 3"):
        Moments.of(X).merge(Moments.empty(3))


def test_without_the_scatter_there_is_no_fourth_sum_and_from_a_scatter_alone_it_is_unknown():
    with pytest.raises(StatisticsError, match="no covariance was collected"):
        _ = Moments.of(X).fourth
    made = Moments(3, torch.zeros(2), torch.eye(2))
    assert made.merge(Moments.of(X, covariance=True)).update(X).fourth.isnan()
    assert bool(made.scatter.isfinite().all())


# --- variances alone -------------------------------------------------------------------------------------------------
@given(eighths(9, 3), st.lists(st.integers(1, 8), unique=True).map(sorted), st.booleans())
def test_the_variances_are_the_diagonal_of_the_covariance_after_any_split(rows, cuts, grown):
    whole = Moments.empty(3, covariance="diagonal")
    for part in torch.tensor_split(rows, cuts):
        whole = whole.update(part) if grown else whole.merge(Moments.of(part, covariance="diagonal"))
    assert_allclose(whole.variance, Moments.of(rows, covariance=True).covariance.diagonal(), atol=1e-12)
    assert_allclose(whole.variance, Moments.of(rows, covariance=True).variance, atol=1e-12)
    assert torch.equal((-whole).variance, whole.variance)


@pytest.mark.parametrize(
    "rows", [far_away(), outlier(200), outlier(0), drifting()], ids=["far", "outlier", "first", "drifting"]
)
def test_the_variances_are_as_exact_as_the_covariances(rows):
    _, scatter, _ = exact(rows)
    for size in (1, 7, 400):
        moments = Moments.empty(3, covariance="diagonal")
        for part in rows.split(size):
            moments.update(part)
        found = moments.variance * 399
        array = rows.numpy() - rows.numpy().mean(axis=0)
        true = [scatter[i][i] for i in range(3)]
        assert furthest(found, true) <= 2 * furthest((array**2).sum(axis=0), true) + 30 * EPS


def test_variances_take_no_memory_for_a_covariance_and_say_so():
    found = Moments.of(torch.zeros(2, 2000), covariance="diagonal")
    assert (found.kept, found.has_covariance, repr(found)) == (
        "diagonal",
        False,
        "Moments(count=2, d=2000, covariance='diagonal')",
    )
    assert sum(tensor.numel() for tensor in (found._origin, found._total, found._squares)) == 3 * 2000
    for name in ("covariance", "scatter", "fourth"):
        with pytest.raises(StatisticsError, match="covariance='diagonal'; collect with covariance=True"):
            getattr(found, name)
    with pytest.raises(StatisticsError, match="the variance of a single row is not defined"):
        _ = Moments.of(X[:1], covariance="diagonal").variance
    with pytest.raises(StatisticsError, match="no covariance was collected"):
        _ = Moments.of(X).variance


def test_a_copy_with_variances_is_a_value():
    own = Moments.of(X, covariance="diagonal")
    twin, before = own.copy(), own.variance
    own.update(9 * X)
    own.variance.zero_()
    assert torch.equal(twin.variance, before) and not torch.equal(own.variance, before)


def test_moments_can_be_made_from_the_diagonal_of_a_scatter():
    made = Moments(3, torch.zeros(2), torch.tensor([2.0, 4.0]))
    assert made.variance.tolist() == [1, 2]
    with pytest.raises(ShapeError, match="or its diagonal"):
        Moments(3, torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("wrong", ["full", 1, None])
def test_another_word_for_what_is_kept_is_refused(wrong):
    with pytest.raises(ValueError, match="expected False, True or 'diagonal'"):
        Moments.of(X, covariance=wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_moments_know_the_dtype_of_their_rows(dtype):
    own = Moments.of(X.to(dtype), covariance=True)
    assert own.dtype is (-own).dtype is own.copy().dtype is own.merge(Moments.empty(2)).dtype is dtype
    assert own.merge(Moments.of(X.double(), covariance=True)).dtype is torch.float64
    assert Moments.empty(2).dtype is None


@given(eighths(9, 3), st.lists(st.integers(1, 8), unique=True).map(sorted))
def test_means_alone_are_those_of_the_covariances(rows, cuts):
    grown, whole = Moments.empty(3), Moments.of(rows, covariance=True)
    for part in torch.tensor_split(rows, cuts):
        grown.update(part)
    assert grown.count == whole.count
    assert_allclose(grown.mean, whole.mean, atol=1e-14)
