"""PrincipalDirection: against numpy's eigenvectors, pooled and of pairs, and its laws for all data."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import nn

from actsteer import (
    BatchError,
    Moments,
    PrincipalDirection,
    ShapeError,
    SiteNotFoundError,
    Statistics,
    StatisticsError,
    collect_differences,
    fit,
)
from tests.strategies import eighths

IDENTITY = nn.Sequential(nn.Identity())
D = 3


@pytest.fixture(autouse=True, scope="module")
def _vectors_in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def statistics(rows):
    return Statistics({"0": Moments.of(rows, covariance=True)})


def direction(positive, negative):
    return PrincipalDirection()(positive=statistics(positive), negative=statistics(negative))["0"].numpy()


def oracle(rows):
    """The eigenvalues of the scatter about the mean, and the eigenvector of the largest."""
    centred = rows.numpy() - rows.numpy().mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    return values, vectors[:, -1]


@st.composite
def sides(draw):
    """Two sides whose first component, and the sign of it, are well defined."""
    stretched = torch.tensor([[4.0, 0, 0], [-4.0, 0, 0]])
    rows = [torch.cat([stretched, draw(eighths(draw(st.integers(1, 5)), D))]) + draw(eighths(D)) for _ in range(2)]
    values, vector = oracle(torch.cat(rows))
    assume(values[-1] > 1.25 * values[-2])
    assume(abs(vector @ (rows[0].mean(0) - rows[1].mean(0)).numpy()) > 1e-3)
    return rows


# --- the formula -----------------------------------------------------------------------------------------------------
@given(sides())
def test_it_is_the_first_eigenvector_of_all_rows_and_points_to_the_positive_side(data):
    positive, negative = data
    _, expected = oracle(torch.cat(data))
    expected = expected * np.sign(expected @ (positive.mean(0) - negative.mean(0)).numpy())
    assert_allclose(direction(positive, negative), expected, atol=1e-9)


@given(sides())
def test_swapping_the_sides_flips_the_sign(data):
    positive, negative = data
    assert_allclose(direction(negative, positive), -direction(positive, negative), atol=1e-12)


@given(sides(), eighths(D), st.sampled_from([0.25, 8.0]))
def test_neither_a_shift_nor_a_scale_of_both_sides_changes_it(data, shift, scale):
    positive, negative = data
    moved = direction(scale * positive + shift, scale * negative + shift)
    assert_allclose(moved, direction(positive, negative), atol=1e-9)
    assert_allclose(np.linalg.norm(moved), 1.0)


@given(sides(), st.integers(0, 99))
def test_neither_the_order_of_the_rows_nor_the_cut_into_parts_changes_it(data, seed):
    positive, negative = data
    order = torch.randperm(len(positive), generator=torch.Generator().manual_seed(seed))
    parts = statistics(positive[order][:2]).merge(statistics(positive[order][2:]))
    seen = PrincipalDirection()(positive=parts, negative=statistics(negative))["0"].numpy()
    assert_allclose(seen, direction(positive, negative), atol=1e-9)


@given(sides(), st.permutations(range(D)))
def test_renaming_the_features_renames_the_entries(data, order):
    positive, negative = data
    assert_allclose(direction(positive[:, order], negative[:, order]), direction(*data)[order], atol=1e-9)


def test_a_mean_far_from_zero_does_not_count():
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(30, D, generator=generator) * torch.tensor([0.1, 1.0, 0.1]) + torch.tensor([0.0, 0.5, 0.0])
    negative = torch.randn(30, D, generator=generator) * torch.tensor([0.1, 1.0, 0.1])
    far = torch.tensor([2.0**24, -(2.0**24), 0.0])  # 1e7 spreads away
    assert_allclose(direction(positive + far, negative + far), direction(positive, negative), atol=1e-6)


# --- pairs -----------------------------------------------------------------------------------------------------------
def paired(positive, negative, **options):
    options = {"sites": "0", "estimator": PrincipalDirection(paired=True), "progress": False} | options
    return fit(IDENTITY, positive=positive, negative=negative, **options)["0"].numpy()


@given(eighths(6, D))
def test_of_pairs_it_is_the_first_right_singular_vector_of_the_differences(differences):
    sizes, rows = np.linalg.svd(differences.numpy())[1:]
    assume(sizes[0] > 1.1 * sizes[1] + 1e-3)
    toward = rows[0] @ differences.numpy().mean(axis=0)
    assume(abs(toward) > 1e-3)
    shared = torch.randn(6, D, generator=torch.Generator().manual_seed(0)).mul(64).round() / 8
    seen = paired(shared + differences, shared, batch_size=4)
    assert_allclose(seen, rows[0] * np.sign(toward), atol=1e-9)


@given(eighths(6, D))
def test_of_pairs_about_their_mean_it_is_the_first_component_of_the_differences(differences):
    values, vector = oracle(differences)
    assume(values[-1] > 1.1 * values[-2] + 1e-3)
    toward = vector @ differences.numpy().mean(axis=0)
    assume(abs(toward) > 1e-3)
    shared = torch.randn(6, D, generator=torch.Generator().manual_seed(0)).mul(64).round() / 8
    estimator = PrincipalDirection(paired=True, centred=True)
    seen = paired(shared + differences, shared, batch_size=4, estimator=estimator)
    assert_allclose(seen, vector * np.sign(toward), atol=1e-9)


def test_about_their_mean_pairs_that_differ_alike_have_no_direction():
    estimator, shared = PrincipalDirection(paired=True, centred=True), torch.eye(D)
    with pytest.raises(StatisticsError, match="do not vary"):
        paired(shared + 1.0, shared, estimator=estimator)
    with pytest.raises(ValueError, match="centred: it is for pairs"):
        PrincipalDirection(centred=True)


def test_what_a_pair_shares_does_not_count_and_pooled_it_does():
    shared = torch.randn(50, D, generator=torch.Generator().manual_seed(0)) * torch.tensor([100.0, 1.0, 1.0])
    positive = shared + torch.tensor([0.0, 1.0, 0.0])
    assert_allclose(paired(positive, shared), [0, 1, 0], atol=1e-9)
    assert abs(direction(positive, shared)[0]) > 0.99


def test_pairs_may_be_shuffled_together_but_not_apart():
    generator = torch.Generator().manual_seed(0)
    negative = torch.randn(20, D, generator=generator) * 5
    positive = negative + torch.tensor([0.0, 1.0, 0.0]) + torch.randn(20, D, generator=generator) / 8
    order = torch.randperm(20, generator=generator)
    assert_allclose(paired(positive[order], negative[order]), paired(positive, negative), atol=1e-9)
    assert abs(paired(positive, negative) - paired(positive[order], negative)).max() > 0.1


def test_fit_of_pairs_is_collect_differences_and_the_estimator():
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(20, D, generator=generator) + 1, torch.randn(20, D, generator=generator)
    differences = collect_differences(IDENTITY, positive, negative, sites="0", progress=False)
    by_hand = PrincipalDirection(paired=True)(positive=differences, negative=-differences)
    assert_allclose(paired(positive, negative), by_hand["0"].numpy(), rtol=0)
    assert_allclose(differences["0"].covariance, np.cov((positive - negative).T.numpy()), atol=1e-12)


@pytest.mark.parametrize("positive", [torch.ones(5, D), [torch.ones(4, D), torch.ones(1, D)], [torch.ones(5, D)]])
def test_sides_that_do_not_pair_up_are_refused(positive):
    with pytest.raises(BatchError):
        paired(positive, torch.ones(4, D))


class Tokens(nn.Module):
    """Rows of tokens, some of them pads."""

    def __init__(self):
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x, attention_mask):
        return self.site(x)


def tokens(lengths, base):
    """One batch of rows that hold base + 10 · (row + 1) at every position."""
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    x = base + 10.0 * torch.arange(1.0, len(lengths) + 1)[:, None, None].expand(-1, 5, 1)
    return [{"x": x, "attention_mask": mask}]


def test_tokens_pair_up_within_their_row():
    same = collect_differences(Tokens(), tokens([2, 4], 1.0), tokens([2, 4], 0.0), sites="site", progress=False)
    assert same["site"].mean == 1 and same["site"].count == 6
    with pytest.raises(BatchError, match="positions="):  # six on both sides, of other rows
        collect_differences(Tokens(), tokens([2, 4], 1.0), tokens([4, 2], 0.0), sites="site", progress=False)


def test_the_last_tokens_pair_up_whatever_the_lengths():
    sides = tokens([2, 4], 1.0), tokens([4, 2], 0.0)
    last = collect_differences(Tokens(), *sides, sites="site", positions="last", progress=False)
    assert last["site"].mean == 1 and last["site"].count == 2


def test_statistics_that_are_not_those_of_pairs_are_refused():
    positive, negative = torch.randn(9, D) + 1, torch.randn(9, D)
    with pytest.raises(StatisticsError):
        PrincipalDirection(paired=True)(positive=statistics(positive), negative=statistics(negative))


# --- what cannot be --------------------------------------------------------------------------------------------------
def test_constant_rows_have_no_principal_direction_whatever_their_value_and_batches():
    row = torch.tensor([0.1, 0.3, 0.7])
    with pytest.raises(StatisticsError, match="do not vary"):
        fit(
            IDENTITY,
            positive=row.expand(7, D),
            negative=row.expand(5, D),
            sites="0",
            estimator=PrincipalDirection(),
            batch_size=2,
            progress=False,
        )


def test_one_row_on_each_side_gives_the_unit_vector_between_them():
    seen = direction(torch.tensor([[1.0, 2.0, 2.0]]), torch.zeros(1, D))
    assert_allclose(seen, np.array([1.0, 2.0, 2.0]) / 3)


def test_missing_sites_other_sizes_and_an_empty_side_are_refused():
    here, rows = statistics(torch.randn(4, D)), torch.randn(4, D)
    with pytest.raises(SiteNotFoundError, match="collect both at the same sites"):
        PrincipalDirection()(positive=here, negative=Statistics({"1": Moments.of(rows, covariance=True)}))
    with pytest.raises(ShapeError, match="3 features, negative 2"):
        PrincipalDirection()(positive=here, negative=statistics(rows[:, :2]))
    with pytest.raises(StatisticsError, match="no rows"):
        PrincipalDirection()(positive=here, negative=statistics(rows[:0]))
