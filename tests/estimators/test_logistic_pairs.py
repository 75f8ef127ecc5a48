"""LogisticDirection(paired=True): the conditional likelihood of which row of a pair is the positive one."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.linear_model import LogisticRegression
from torch import nn

from actsteer import (
    BatchError,
    LogisticDirection,
    ProbeAbove,
    ShapeError,
    SiteNotFoundError,
    StatisticsError,
    SteeringVector,
    fit,
)
from tests.estimators.test_principal import Tokens, tokens

IDENTITY = nn.Sequential(nn.Identity())
both = pytest.mark.parametrize("streamed", [False, True])


@pytest.fixture(autouse=True, scope="module")
def _vectors_in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pairs(n=30, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = 30 * torch.randn(n, d, generator=generator)
    sides = [shared + torch.randn(n, d, generator=generator) for _ in range(2)]
    return sides[0] + torch.randn(d, generator=generator), sides[1]


def fitted(positive, negative, *, streamed=False, **options):
    options = {"sites": "0", "batch_size": 7, "progress": False} | options
    estimator = LogisticDirection(C=0.7, paired=True, streamed=streamed)
    return fit(IDENTITY, positive=positive, negative=negative, estimator=estimator, **options)


@both
def test_pairs_of_the_same_row_twice_warn_that_nothing_is_steered(streamed):
    with pytest.warns(UserWarning, match="the vector is zero"):
        fitted(pairs()[0], pairs()[0], streamed=streamed)


@both
def test_it_is_scikit_learns_on_the_differences_both_ways_without_an_offset(streamed):
    positive, negative = pairs()
    rows = (positive - negative).numpy()
    labels = np.r_[np.ones(30), -np.ones(30)]
    expected = LogisticRegression(C=0.35, fit_intercept=False, tol=1e-12, max_iter=100_000)  # each pair counts twice
    expected.fit(np.r_[rows, -rows], labels)
    seen = fitted(positive, negative, streamed=streamed)
    assert_allclose(seen["0"], expected.coef_[0], rtol=1e-4, atol=1e-6)
    assert "offset 0" not in seen.metadata
    with pytest.raises(ValueError, match="offset"):
        ProbeAbove(seen)


@both
def test_what_a_pair_shares_does_not_count(streamed):
    positive, negative = pairs()
    moved = 100 * torch.randn(30, 4, generator=torch.Generator().manual_seed(9))
    seen, shifted = fitted(positive, negative, streamed=streamed), fitted(positive + moved, negative + moved)
    assert shifted.allclose(seen, rtol=1e-6, atol=1e-8)
    assert not fitted(positive + moved, negative + moved.flip(0)).allclose(seen, rtol=0.1, atol=0.01)


@both
def test_swapping_the_sides_turns_it_round(streamed):
    positive, negative = pairs()
    assert fitted(negative, positive, streamed=streamed).allclose(-fitted(positive, negative), rtol=1e-6, atol=1e-9)


def test_recorded_rows_and_blocks_of_them_give_the_same():
    positive, negative = pairs()
    estimator = LogisticDirection(C=0.7, paired=True)
    whole = estimator(positive={"0": positive, "1": negative}, negative={"1": positive, "0": negative})
    assert whole.select("0").allclose(fitted(positive, negative), rtol=1e-6, atol=1e-9)
    assert whole["1"].allclose(-whole["0"], rtol=1e-6, atol=1e-9)
    blocks = ([{"0": part} for part in side.split(11)] for side in (positive, negative))
    assert estimator(positive=next(blocks), negative=next(blocks)).allclose(whole.select("0"), rtol=1e-6, atol=1e-9)


@both
def test_sides_that_do_not_pair_up_are_refused(streamed):
    positive, negative = pairs()
    for fewer in (negative[:29], negative[:20]):
        with pytest.raises(BatchError, match=r"pair them up|more batches than the other"):
            fitted(positive, fewer, streamed=streamed)
    sides = {"positive": tokens([2, 4], 1.0), "negative": tokens([4, 2], 0.0)}  # six tokens each, of other rows
    estimator = LogisticDirection(paired=True, streamed=streamed)
    with pytest.raises(BatchError, match="not the same number from each row"):
        fit(Tokens(), sites="site", estimator=estimator, progress=False, **sides)
    last = fit(Tokens(), sites="site", estimator=estimator, positions="last", progress=False, **sides)
    assert isinstance(last, SteeringVector) and float(last["site"]) > 0


def test_recorded_sides_that_do_not_pair_up_are_refused():
    estimator, rows = LogisticDirection(paired=True), torch.eye(3)
    with pytest.raises(BatchError, match=r"expected blocks of one site and shape, got .*\(3, 3\).*\(2, 3\)"):
        estimator(positive={"0": rows}, negative={"0": rows[:2]})
    with pytest.raises(BatchError, match="None"):
        estimator(positive=[{"0": rows}, {"0": rows}], negative=[{"0": rows}])
    with pytest.raises(SiteNotFoundError, match="'1'"):
        estimator(positive={"0": rows}, negative={"1": rows})
    with pytest.raises(ShapeError):
        estimator(positive={"0": rows}, negative={"0": rows[:, :2]})
    with pytest.raises(TypeError, match="one of each"):
        estimator(positive={"0": rows}, negative=[{"0": rows}])
    with pytest.raises(StatisticsError, match="give a list"):
        estimator(positive=({"0": rows} for _ in range(1)), negative=[{"0": rows}])
    with pytest.raises(StatisticsError, match="finite"):
        estimator(positive={"0": rows / 0}, negative={"0": rows})
