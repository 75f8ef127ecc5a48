"""ConceptErasure, Centroids and SparseFeature: the laws that hold for all data, and what a probe still finds."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from sklearn.linear_model import LogisticRegression
from torch import nn

from actsteer import (
    Centroids,
    ConceptErasure,
    MeanDifference,
    Moments,
    SparseFeature,
    Statistics,
    Steerer,
    VectorBank,
    collect,
)
from tests.strategies import eighths

IDENTITY = nn.Sequential(nn.Identity())
D = 4
SPREAD = torch.cat([torch.eye(D), -torch.eye(D)]).double()


@pytest.fixture(autouse=True, scope="module")
def _edits_in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@st.composite
def labelled(draw, classes=3):
    """Rows of several classes with means apart, in a space that they fill."""
    parts = [torch.cat([SPREAD, draw(eighths(draw(st.integers(0, 3)), D))]) + draw(eighths(D)) for _ in range(classes)]
    labels = torch.cat([torch.full((len(part),), label) for label, part in enumerate(parts)])
    rows = torch.cat(parts)
    means = torch.stack([part.mean(0) for part in parts])
    sizes = torch.linalg.svdvals(means - rows.mean(0))[: classes - 1]
    assume(bool((sizes > 0.05).all()))
    return rows, labels


def erasure(rows, labels, *, covariance=True, **options):
    return ConceptErasure(**options).classes(
        collect(IDENTITY, rows, by=labels, sites="0", covariance=covariance, progress=False, batch_size=5)
    )


def steered(rows, edit, **options):
    with Steerer(IDENTITY, edit, **options):
        return IDENTITY(rows)


def erased(rows, labels, **options):
    return steered(rows, erasure(rows, labels, **options))


def normal(count, seed=0):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


# --- erasure ---------------------------------------------------------------------------------------------------------
@given(labelled())
def test_all_classes_have_the_mean_of_all_rows_afterwards_and_that_stays(data):
    rows, labels = data
    seen = erased(rows, labels)
    for label in labels.unique():
        assert_allclose(seen[labels == label].mean(0), rows.mean(0), atol=1e-9)


@given(labelled(), st.sampled_from([0.25, 1.0, None]))
def test_so_they_have_with_any_shrinkage(data, shrinkage):
    rows, labels = data
    seen = erased(rows, labels, shrinkage=shrinkage)
    for label in labels.unique():
        assert_allclose(seen[labels == label].mean(0), rows.mean(0), atol=1e-9)


@given(labelled())
def test_shrunk_in_full_it_is_the_orthogonal_projection_and_needs_variances_alone(data):
    rows, labels = data
    means = torch.stack([rows[labels == label].mean(0) for label in labels.unique()]) - rows.mean(0)
    among = np.linalg.pinv(means.numpy(), rcond=1e-6) @ means.numpy()  # projects on the span of the differences
    expected = rows.numpy() - (rows - rows.mean(0)).numpy() @ among
    assert ConceptErasure(shrinkage=1.0).reads == "variances"
    for covariance in ("diagonal", True):
        assert_allclose(erased(rows, labels, covariance=covariance, shrinkage=1.0), expected, atol=1e-9)


@given(labelled(classes=2), st.sampled_from([0.0, 0.25, 1.0]))
def test_shrunk_of_two_classes_it_is_the_closed_form_with_the_shrunk_covariance(data, shrinkage):
    rows, labels = data
    covariance = np.cov(rows.T.numpy())
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / D * np.eye(D)
    delta = (rows[labels == 1].mean(0) - rows[labels == 0].mean(0)).numpy()
    reads = np.linalg.solve(covariance, delta)
    amounts = (rows - rows.mean(0)).numpy() @ reads / (delta @ reads)
    assert_allclose(erased(rows, labels, shrinkage=shrinkage), rows.numpy() - np.outer(amounts, delta), atol=1e-8)


@given(labelled(), st.data())
def test_no_other_edit_that_makes_the_means_equal_is_closer_to_the_rows(data, draw):
    """LEACE: the erased rows are affine in the rows; other affine edits that erase are those plus what erases too."""
    rows, labels = data
    edit = erasure(rows, labels)
    seen = steered(rows, edit)
    adds = edit["0"][1]
    free = torch.eye(D) - torch.linalg.pinv(adds) @ adds  # maps that see nothing of the means' differences
    other = seen + (rows - rows.mean(0)) @ free @ draw.draw(eighths(D, D)) / 8
    for label in labels.unique():
        assert_allclose(other[labels == label].mean(0), rows.mean(0), atol=1e-9)
    assert (seen - rows).square().sum() <= (other - rows).square().sum() + 1e-9


@given(labelled())
def test_what_was_erased_is_not_erased_again(data):
    rows, labels = data
    edit = erasure(rows, labels)
    seen = steered(rows, edit)
    assert_allclose(steered(seen, edit), seen, atol=1e-9)


@given(labelled(), eighths(D), eighths(D, D))
def test_it_follows_every_affine_change_of_the_features(data, shift, mixing):
    rows, labels = data
    mixing = mixing / 16 + torch.eye(D) * 4
    assume(np.linalg.cond(mixing.numpy()) < 20)
    assert_allclose(erased(rows @ mixing + shift, labels), erased(rows, labels) @ mixing + shift, atol=1e-7)


@given(labelled(), st.permutations(range(3)), st.integers(0, 99))
def test_neither_the_names_of_the_classes_nor_the_order_of_the_rows_matters(data, names, seed):
    rows, labels = data
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    other = erased(rows[order], torch.tensor(names)[labels[order]])
    assert_allclose(other, erased(rows, labels)[order], atol=1e-8)


@given(labelled(classes=2))
def test_of_two_classes_it_is_the_closed_form_and_what_two_sides_give(data):
    rows, labels = data
    sides = [Statistics({"0": Moments.of(rows[labels == label], covariance=True)}) for label in (1, 0)]
    edit = ConceptErasure()(positive=sides[0], negative=sides[1])
    delta = (rows[labels == 1].mean(0) - rows[labels == 0].mean(0)).numpy()
    reads = np.linalg.solve(np.cov(rows.T.numpy()), delta)
    amounts = (rows - rows.mean(0)).numpy() @ reads / (delta @ reads)
    assert edit.rank == 1
    assert_allclose(steered(rows, edit), rows.numpy() - np.outer(amounts, delta), atol=1e-8)
    assert_allclose(erased(rows, labels), steered(rows, edit), atol=1e-9)


@given(labelled(), st.sampled_from([0.0, 0.5]))
def test_half_the_strength_is_half_the_way(data, c):
    rows, labels = data
    edit = erasure(rows, labels)
    assert_allclose(steered(rows, edit, c=c), rows + c * (steered(rows, edit) - rows), atol=1e-10)


def test_probes_find_nothing_in_what_is_erased_and_much_in_what_is_not():
    labels = torch.arange(300) % 3
    rows = normal(300) + torch.eye(3, D)[labels] * 4
    probe = LogisticRegression(C=1e3, tol=1e-8, max_iter=1000)
    assert probe.fit(rows.numpy(), labels.numpy()).score(rows.numpy(), labels.numpy()) > 0.95
    after = erased(rows, labels).numpy()
    fitted = probe.fit(after, labels.numpy())
    assert abs(fitted.coef_).max() < 1e-4
    assert_allclose(fitted.predict_proba(after), 1 / 3, atol=1e-4)


def test_unequal_classes_leave_a_probe_their_shares_and_no_more():
    labels = (torch.arange(200) < 30).long()
    rows = normal(200) + 3 * labels[:, None]
    after = erased(rows, labels).numpy()
    fitted = LogisticRegression(C=1e3, tol=1e-8, max_iter=1000).fit(after, labels.numpy())
    assert_allclose(fitted.predict_proba(after)[:, 1], 30 / 200, atol=1e-4)


def test_features_that_do_not_vary_are_left_alone():
    labels = torch.arange(60) % 2
    rows = normal(60) + labels[:, None]
    rows[:, 1], rows[:, 3] = 7.0, rows[:, 0] * 2  # one constant, one that repeats another
    seen = erased(rows, labels)
    assert_allclose(seen[:, 1], 7.0, atol=1e-8)
    assert_allclose(seen[:, 3], 2 * seen[:, 0], atol=1e-6)
    assert_allclose(seen[labels == 0].mean(0), seen[labels == 1].mean(0), atol=1e-7)


def test_classes_whose_means_lie_on_a_line_lose_one_direction():
    labels = torch.arange(90) % 3
    noise = normal(30).repeat_interleave(3, dim=0)  # the same in every class
    rows = noise + labels[:, None] * torch.tensor([1.0, 2.0, 0.0, -1.0])
    assert erasure(rows, labels).rank == 1


# --- centroids -------------------------------------------------------------------------------------------------------
@given(labelled(), eighths(D))
def test_centroids_are_mean_differences_against_the_rest_and_do_not_see_a_shift(data, shift):
    rows, labels = data
    bank = Centroids()(collect(IDENTITY, rows + shift, by=labels, sites="0", progress=False, batch_size=5))
    assert isinstance(bank, VectorBank) and bank.concepts == ("0", "1", "2")
    for label, concept in enumerate(bank.concepts):
        sides = [Statistics({"0": Moments.of(rows[chosen])}) for chosen in (labels == label, labels != label)]
        expected = MeanDifference()(positive=sides[0], negative=sides[1])
        assert_allclose(bank[concept]["0"], expected["0"], atol=1e-9)
        assert bank[concept].concept == concept


@given(labelled())
def test_centroids_weighted_by_what_is_not_in_their_class_sum_to_zero(data):
    """n_k (n - n_k) v_k sums to Σ n · n_k (μ_k - μ) = 0."""
    rows, labels = data
    bank = Centroids()(collect(IDENTITY, rows, by=labels, sites="0", progress=False))
    counts = labels.bincount().double()
    weights = dict(zip(bank.concepts, (counts * (len(rows) - counts)).tolist(), strict=True))
    assert_allclose(bank.combine(weights)["0"], 0, atol=1e-8)


# --- sparse features -------------------------------------------------------------------------------------------------
@given(eighths(5, D), eighths(6, D), eighths(4, D))
def test_the_feature_is_that_of_the_largest_absolute_cosine_with_the_sign_of_the_difference(
    decoder, positive, negative
):
    difference = (positive.mean(0) - negative.mean(0)).numpy()
    norms = np.linalg.norm(decoder.numpy(), axis=1)
    assume(bool((norms > 0).all()))
    cosines = decoder.numpy() @ difference / norms
    ranked = np.sort(abs(cosines))
    assume(ranked[-1] > ranked[-2] + 1e-6)
    best = int(abs(cosines).argmax())
    sides = [Statistics({"0": Moments.of(side)}) for side in (positive, negative)]
    found = SparseFeature(decoder)(positive=sides[0], negative=sides[1])
    assert torch.equal(found["0"], np.sign(cosines[best]) * decoder[best])
    assert found.metadata["feature 0"] == str(best)
    assert SparseFeature(decoder)(positive=sides[1], negative=sides[0]).equal(-found)
    named = SparseFeature(decoder, feature=best)(positive=sides[0], negative=sides[1])
    assert named.equal(found)


@pytest.mark.parametrize(
    ("rows", "default", "wanted"),
    [
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_the_edit_has_the_dtype_of_the_rows_or_the_default_one_if_that_is_wider(rows, default, wanted):
    torch.set_default_dtype(default)
    x = normal(12).to(rows)
    sides = [Statistics({"0": Moments.of(x + side, covariance=True)}) for side in (0, 4)]
    edit = ConceptErasure()(positive=sides[1], negative=sides[0])
    assert {part.dtype for part in edit["0"]} == {wanted}
