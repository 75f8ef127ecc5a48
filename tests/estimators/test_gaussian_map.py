"""GaussianMap: after the edit the negative rows have the positive rows' moments, and nothing moves further."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import Affine, GaussianMap, Moments, Statistics, StatisticsError, Steerer, fit
from tests.strategies import eighths

D = 4
G = torch.Generator().manual_seed(3)
MIX = torch.randn(D, D, generator=G, dtype=torch.float64)
LOW, HIGH = (torch.randn(50, D, generator=G, dtype=torch.float64) @ m + s for m, s in ((MIX, 1.0), (MIX.T, -3.0)))
MODEL = nn.Sequential(nn.Identity())


def mapped(low=LOW, high=HIGH, *, c=1.0, diagonal=False):
    estimator = GaussianMap(diagonal=diagonal)
    edit = fit(MODEL, positive=high, negative=low, sites="0", estimator=estimator, batch_size=16, progress=False)
    assert isinstance(edit, Affine)
    return edit.at("0"), edit.at("0")(low, low[0], torch.tensor(c, dtype=low.dtype))


spread = eighths(9, D).filter(lambda own: float(torch.linalg.eigvalsh(own.T.cov())[0]) > 1e-3)


@given(low=spread, high=eighths(7, D))
def test_the_moved_rows_have_the_moments_of_the_others(low, high):
    rule, moved = mapped(low, high)
    torch.testing.assert_close(moved.mean(0), high.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rule.weight, rule.weight.T)  # with values >= 0, what makes it the map that moves least
    assert torch.linalg.eigvalsh(rule.weight).min() >= -1e-6
    torch.testing.assert_close(moved.T.cov(), high.T.cov(), rtol=1e-6, atol=1e-6)


@given(low=eighths(9, D), high=eighths(7, D))
def test_with_diagonal_each_feature_by_itself_has_them(low, high):
    rule, moved = mapped(low, high, diagonal=True)
    varies = low.var(0) > 0
    torch.testing.assert_close(moved.mean(0), high.mean(0))
    torch.testing.assert_close(moved.var(0)[varies], high.var(0)[varies], rtol=1e-9, atol=1e-12)
    assert torch.equal(rule.weight, rule.weight.diagonal().diag()) and bool((rule.weight >= 0).all())
    assert torch.equal(rule.weight.diagonal()[~varies], torch.ones(int((~varies).sum())).double())


@given(low=eighths(9, 2), high=eighths(7, D), shift=eighths(D))
def test_rows_in_a_subspace_get_the_moments_within_it_and_move_by_the_means_alone_across_it(low, high, shift):
    basis = torch.linalg.qr(MIX)[0][:2]
    low = (low + 8 * torch.eye(9, 2).double()) @ basis + shift
    rule, moved = mapped(low, high)
    torch.testing.assert_close(moved.mean(0), high.mean(0), rtol=1e-6, atol=1e-6)
    within = basis.T @ basis
    torch.testing.assert_close(moved.T.cov(), within @ high.T.cov() @ within, rtol=1e-6, atol=1e-6)
    across = torch.eye(D).double() - within
    torch.testing.assert_close(rule.weight @ across, across, rtol=1e-9, atol=1e-9)


@given(share=st.integers(0, 8).map(lambda k: k / 8))
def test_c_takes_each_row_that_share_of_its_way(share):
    for diagonal in (False, True):
        whole = mapped(diagonal=diagonal)[1]
        torch.testing.assert_close(mapped(c=share, diagonal=diagonal)[1], LOW + share * (whole - LOW))


def test_no_other_map_with_these_moments_moves_the_rows_less():
    least = (mapped()[1] - LOW).square().sum()
    whiten, colour = (torch.linalg.cholesky(own.T.cov()) for own in (LOW, HIGH))
    for seed in range(20):
        turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed)).double())[0]
        other = (LOW - LOW.mean(0)) @ torch.linalg.inv(whiten).T @ turn @ colour.T + HIGH.mean(0)
        torch.testing.assert_close(other.T.cov(), HIGH.T.cov())
        assert (other - LOW).square().sum() > least


def test_a_side_takes_itself_nowhere_and_back_comes_what_went():
    torch.testing.assert_close(mapped(LOW, LOW)[1], LOW)
    there, moved = mapped()
    back, _ = mapped(HIGH, LOW)
    torch.testing.assert_close(back(moved, moved[0], torch.tensor(1.0).double()), LOW)
    torch.testing.assert_close(back.weight @ there.weight, torch.eye(D).double())


def test_halves_that_merge_give_the_map_of_the_whole():
    sides = {}
    for side, own in (("positive", HIGH), ("negative", LOW)):
        parts = [Statistics({"0": Moments.of(part, covariance=True)}) for part in (own[:13], own[13:])]
        sides[side] = parts[0].merge(parts[1])
    for one, other in zip(GaussianMap()(**sides)["0"], mapped()[0].__dict__.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_edit_steers_and_has_the_dtype_of_the_rows(tmp_path):
    options = {"sites": "0", "estimator": GaussianMap(), "concept": "high", "progress": False}
    edit = fit(MODEL, positive=HIGH, negative=LOW, **options)
    edit.save(tmp_path / "edit.safetensors", model=MODEL)
    with Steerer(MODEL, Affine.load(tmp_path / "edit.safetensors", MODEL), c={"high": 1.0}) as steerer:
        torch.testing.assert_close(MODEL(LOW).T.cov(), HIGH.T.cov())
        steerer.c = 0.0
        assert torch.equal(MODEL(LOW), LOW)
    assert edit.metadata.items() >= {"estimator": "GaussianMap", "positive count": "50"}.items()
    assert fit(MODEL, positive=HIGH.float(), negative=LOW.float(), **options)["0"][0].dtype is torch.float32


def test_what_was_not_collected_is_refused():
    means, variances, single = (
        [Statistics({"0": Moments.of(rows[:n], covariance=kept)}) for rows in (HIGH, LOW)]
        for kept, n in ((False, 50), ("diagonal", 50), (True, 1))
    )
    for diagonal, sides in ((True, means), (False, means), (False, variances), (False, single), (True, single)):
        with pytest.raises(StatisticsError):
            GaussianMap(diagonal=diagonal)(positive=sides[0], negative=sides[1])
