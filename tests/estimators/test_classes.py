"""Estimators of classes, of edits, and of features: against their formulas."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

from actsteer import (
    Centroids,
    ConceptErasure,
    LowRank,
    Moments,
    ShapeError,
    SparseFeature,
    Statistics,
    StatisticsError,
    Steerer,
    VectorBank,
    collect,
    fit,
)

IDENTITY = nn.Sequential(nn.Identity())
LABELS = torch.arange(60) % 3


def rows(d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, d, generator=generator, dtype=torch.float64) * 2
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(60, d, generator=generator, dtype=torch.float64) @ mixing + means[LABELS]


def classes(data, **options):
    return collect(IDENTITY, data, by=LABELS, sites="0", progress=False, **options)


# --- Centroids --------------------------------------------------------------------------------------------------------
def test_a_centroid_is_the_mean_of_a_class_less_that_of_the_rest():
    data = rows()
    bank = Centroids()(classes(data))
    assert isinstance(bank, VectorBank) and len(bank) == 3
    for label, concept in enumerate(bank.concepts):
        expected = data[label == LABELS].mean(0) - data[label != LABELS].mean(0)
        torch.testing.assert_close(bank[concept]["0"].double(), expected, rtol=1e-5, atol=1e-6)


def test_of_two_classes_the_centroids_are_opposite():
    data = rows()
    bank = Centroids()(collect(IDENTITY, data, by=LABELS > 0, sites="0", progress=False))
    one, other = (bank[concept] for concept in bank.concepts)
    assert one.allclose(-other)


def test_a_shift_of_everything_does_not_move_the_centroids():
    one, other = (Centroids()(classes(rows() + shift)) for shift in (0.0, 5.0))
    assert all(one[concept].allclose(other[concept], rtol=1e-4, atol=1e-5) for concept in one.concepts)


def test_one_class_has_no_rest():
    alone = collect(IDENTITY, rows(), by=["a"] * 60, sites="0", progress=False)
    with pytest.raises(StatisticsError, match="no rest"):
        Centroids()(alone)


# --- ConceptErasure ---------------------------------------------------------------------------------------------------
def leace(data, one_hot):
    """The projection of Belrose et al. 2023: x - W⁺ P W (x - μ), with W = Σ^-½ and P onto the columns of W Σ_xz."""
    centred = data - data.mean(0)
    covariance = centred.T @ centred / len(data)
    cross = centred.T @ (one_hot - one_hot.mean(0)) / len(data)
    values, vectors = np.linalg.eigh(covariance)
    whitening, unwhitening = (vectors * values**power @ vectors.T for power in (-0.5, 0.5))
    left, sizes, _ = np.linalg.svd(whitening @ cross, full_matrices=False)
    left = left[:, sizes > 1e-9]
    return data - centred @ (unwhitening @ left @ left.T @ whitening).T


@pytest.mark.parametrize("labels", [LABELS > 0, LABELS], ids=["two", "three"])
def test_erasure_is_leaces(labels):
    data = rows()
    stats = collect(IDENTITY, data, by=labels, sites="0", covariance=True, progress=False)
    edit = ConceptErasure().classes(stats)
    one_hot = np.eye(int(labels.max()) + 1)[labels.long().numpy()]
    with Steerer(IDENTITY, edit):
        erased = IDENTITY(data)
    assert_allclose(erased.numpy(), leace(data.numpy(), one_hot), rtol=1e-5, atol=1e-5)  # kept in float32
    assert edit.rank == len(one_hot[0]) - 1


def test_no_class_can_be_told_from_another_by_its_mean_or_linearly():
    data = rows()
    edit = fit(
        IDENTITY,
        positive=data[LABELS == 0],
        negative=data[LABELS > 0],
        sites="0",
        estimator=ConceptErasure(),
        progress=False,
    )
    assert isinstance(edit, LowRank)
    with Steerer(IDENTITY, edit):
        erased = IDENTITY(data)
    gap = (erased[LABELS == 0].mean(0) - erased[LABELS > 0].mean(0)).abs().max()
    assert gap < 1e-6
    side = (LABELS == 0).double() - (LABELS == 0).double().mean()
    fitted = torch.linalg.lstsq(erased - erased.mean(0), side[:, None], rcond=1e-5, driver="gelsd").solution
    assert fitted.abs().max() < 1e-4  # nothing is better than a constant


def test_the_sides_of_an_erasure_may_be_swapped():
    data = rows()
    sides = [Statistics({"0": Moments.of(part, covariance=True)}) for part in (data[:25], data[25:])]
    one, other = (
        ConceptErasure()(positive=sides[0], negative=sides[1]),
        ConceptErasure()(positive=sides[1], negative=sides[0]),
    )
    with Steerer(IDENTITY, one):
        first = IDENTITY(data)
    with Steerer(IDENTITY, other):
        torch.testing.assert_close(IDENTITY(data), first, rtol=1e-6, atol=1e-7)


def test_there_is_nothing_to_erase_between_equal_means():
    data = rows()
    same = Statistics({"0": Moments.of(data, covariance=True)})
    for shrinkage in (0.0, 1.0):
        with pytest.warns(UserWarning, match=r"one mean already, and nothing is erased at \['0'\]"):
            edit = ConceptErasure(shrinkage=shrinkage)(positive=same, negative=same)
        with Steerer(IDENTITY, edit):
            assert torch.equal(IDENTITY(data), data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_by_one_a_linear_map_of_what_is_erased_is_left_alone(dtype):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Identity(), nn.Linear(5, 5)).to(dtype), rows().to(dtype)
    options = {"sites": ["0", "1"], "estimator": ConceptErasure(), "one_by_one": True, "progress": False}
    with pytest.warns(UserWarning, match=r"nothing is erased at \['1'\]"):
        edit = fit(model, positive=data[:25] + 1, negative=data[25:], **options)
    assert edit["0"][0].any() and not edit["1"][0].any()


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1])
def test_the_shrinkage_of_an_erasure_is_checked(shrinkage):
    with pytest.raises(ValueError, match="shrinkage"):
        ConceptErasure(shrinkage=shrinkage)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0])
def test_the_tolerance_of_an_erasure_is_checked(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        ConceptErasure(tolerance=tolerance)


# --- SparseFeature ----------------------------------------------------------------------------------------------------
DECODER = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, -4.0]])


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(4, 3)
        with torch.no_grad():
            self.decoder.weight.copy_(DECODER.T)


@pytest.mark.parametrize(
    "autoencoder", [DECODER, Autoencoder(), {"W_dec": DECODER}], ids=["tensor", "module", "mapping"]
)
def test_a_feature_is_a_row_of_the_decoder(autoencoder):
    seen = SparseFeature(autoencoder, feature=1).vector("0")["0"]
    torch.testing.assert_close(seen / seen.norm(), torch.tensor([0.0, 1.0, 0.0]))


def test_without_a_name_the_feature_that_separates_the_sides_best_is_chosen():
    low = torch.zeros(4, 3)
    high = low + torch.tensor([0.0, 0.0, -3.0])
    sides = [Statistics({"0": Moments.of(part)}) for part in (high, low)]
    seen = SparseFeature(DECODER)(positive=sides[0], negative=sides[1])["0"]
    torch.testing.assert_close(seen / seen.norm(), torch.tensor([0.0, 0.0, -1.0]))


def test_features_that_do_not_exist_or_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="feature"):
        SparseFeature(DECODER, feature=4)
    with pytest.raises(ValueError, match="name one"):
        SparseFeature(DECODER).vector("0")
    sides = Statistics({"0": Moments.of(torch.randn(4, 5))})
    with pytest.raises(ShapeError, match="3 features"):
        SparseFeature(DECODER)(positive=sides, negative=sides)
    with pytest.raises(ShapeError):
        SparseFeature(nn.ReLU())
