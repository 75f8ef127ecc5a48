"""QuadraticErasure: all classes have one mean and one covariance afterwards, and no edit is smaller."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import nn

from actsteer import QuadraticErasure, StatisticsError, Steerer, collect
from tests.strategies import eighths

D = 3
MODEL = nn.Sequential(nn.Identity())
SPREAD = torch.cat([torch.eye(D), -torch.eye(D)]).double()


@st.composite
def labelled(draw):
    """Rows of three classes, of other sizes, means and covariances."""
    parts = [torch.cat([SPREAD * (kind + 1), draw(eighths(kind + 1, D))]) + draw(eighths(D)) for kind in range(3)]
    return torch.cat(parts), torch.cat([torch.full((len(part),), kind) for kind, part in enumerate(parts)])


def erased(rows, labels, **options):
    edits = QuadraticErasure(**options)(statistics(rows, labels))
    with ExitStack() as all_of_them:
        for label, edit in edits.items():
            all_of_them.enter_context(Steerer(MODEL, edit, c=(labels == label).double()))
        return MODEL(rows), edits


def statistics(rows, labels, **options):
    return collect(MODEL, rows, by=labels, sites="0", progress=False, **{"covariance": True} | options)


@given(labelled())
def test_all_classes_have_the_mean_of_all_rows_and_one_covariance_which_is_their_barycenter(data):
    rows, labels = data
    found, _ = erased(rows, labels)
    after = statistics(found, labels)
    shares = torch.bincount(labels) / len(labels)
    for label in (0, 1, 2):
        torch.testing.assert_close(after[label]["0"].mean, rows.mean(dim=0))
        torch.testing.assert_close(after[label]["0"].covariance, after[0]["0"].covariance, rtol=1e-6, atol=1e-8)
    goal = after[0]["0"].covariance.numpy()
    root = sqrtm(goal)
    inner = [sqrtm(root @ torch.cov(rows[labels == label].T).numpy() @ root).real for label in (0, 1, 2)]
    expected = np.tensordot(shares.numpy(), np.stack(inner), axes=1)
    np.testing.assert_allclose(goal, expected, rtol=1e-6, atol=1e-6)


@given(labelled(), st.integers(0, 99))
def test_another_covariance_for_all_costs_more(data, seed):
    """Σ_k w_k W₂²(Σ_k, Σ), by Bures' formula."""
    rows, labels = data
    found, _ = erased(rows, labels)
    goal = torch.cov(found[labels == 0].T).numpy()
    nudge = np.random.default_rng(seed).normal(size=(D, D))
    other = goal + 0.05 * (nudge + nudge.T) / 2

    def cost(covariance):
        root = sqrtm(covariance)
        parts = [torch.cov(rows[labels == label].T).numpy() for label in (0, 1, 2)]
        each = [np.trace(own + covariance - 2 * sqrtm(root @ own @ root).real) for own in parts]
        return float(np.dot((torch.bincount(labels) / len(labels)).numpy(), each))

    assert cost(other) > cost(goal)


def test_rows_of_no_class_stay_and_each_edit_bears_its_label(tmp_path):
    rows, labels = torch.cat([SPREAD, 2 * SPREAD + 1]), torch.arange(12) // 6
    _, edits = erased(rows, labels)
    assert [edit.concept for edit in edits.values()] == ["0", "1"]
    with Steerer(MODEL, edits[1], c=(labels == 1).double()):
        assert torch.equal(MODEL(rows)[:6], rows[:6])
    edits[1].save(tmp_path / "one.safetensors")
    assert type(edits[1]).load(tmp_path / "one.safetensors")["0"][0].equal(edits[1]["0"][0])


def test_what_cannot_be_erased_is_refused():
    rows, labels = torch.cat([SPREAD, 2 * SPREAD]), torch.arange(12) // 6
    with pytest.raises(StatisticsError, match="two classes or more"):
        QuadraticErasure()(statistics(rows, torch.zeros(12, dtype=torch.long)))
    with pytest.raises(StatisticsError, match="covariance"):
        QuadraticErasure()(statistics(rows, labels, covariance=False))
    with pytest.raises(StatisticsError, match="the 3 rows of class 1 do not vary in all 3 directions"):
        erased(rows[:9], labels[:9])
    turned = rows.clone()
    turned[6:] = turned[6:] @ torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0] * torch.tensor([1.0, 5.0, 9.0])
    with pytest.raises(StatisticsError, match="did not settle in 1 steps"):
        erased(turned, labels, steps=1)
    with pytest.raises(ValueError, match="tolerance > 0 and steps >= 1"):
        QuadraticErasure(tolerance=0.0)
