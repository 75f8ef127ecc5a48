"""MomentMatching: after the edit the negative rows have the positive rows' moments, and nothing moves further."""

import pytest
import torch
from torch import nn

from actsteer import Affine, MomentMatching, Moments, Statistics, StatisticsError, Steerer, fit

D = 4
G = torch.Generator().manual_seed(3)
MIX = torch.randn(D, D, generator=G, dtype=torch.float64)
LOW, HIGH = (torch.randn(50, D, generator=G, dtype=torch.float64) @ m + s for m, s in ((MIX, 1.0), (MIX.T, -3.0)))
ONE = torch.ones((), dtype=torch.float64)
MODEL = nn.Sequential(nn.Identity())


def matched(match, low=LOW):
    edit = fit(MODEL, positive=HIGH, negative=low, sites="0", estimator=MomentMatching(match=match), progress=False)
    assert isinstance(edit, Affine)
    return edit.at("0"), edit.at("0")(low, LOW[0], ONE)


@pytest.mark.parametrize("match", ["means", "variances", "covariance"])
def test_the_moments_up_to_there_become_those_of_the_other_side(match):
    rule, moved = matched(match)
    torch.testing.assert_close(moved.mean(0), HIGH.mean(0))
    if match == "means":
        torch.testing.assert_close(moved, LOW - LOW.mean(0) + HIGH.mean(0))
    if match == "variances":
        torch.testing.assert_close(moved.var(0), HIGH.var(0))
        assert torch.equal(rule.weight, rule.weight.diagonal().diag())  # every feature by itself
    if match == "covariance":
        torch.testing.assert_close(moved.T.cov(), HIGH.T.cov())
        torch.testing.assert_close(rule.weight, rule.weight.T)  # symmetric: the map that moves rows least


@pytest.mark.parametrize("match", ["variances", "covariance"])
def test_what_does_not_vary_moves_by_the_means_alone(match):
    still = LOW.clone()
    still[:, 1] = 2.0
    rule, moved = matched(match, still)
    torch.testing.assert_close(moved.mean(0), HIGH.mean(0))
    torch.testing.assert_close(rule.weight[1], torch.eye(D, dtype=torch.float64)[1])


def test_the_edit_steers():
    edit = fit(
        MODEL, positive=HIGH, negative=LOW, sites="0", estimator=MomentMatching(), concept="high", progress=False
    )
    with Steerer(MODEL, edit, c={"high": 1.0}):
        torch.testing.assert_close(MODEL(LOW).T.cov(), HIGH.T.cov())
    assert edit.metadata.items() >= {"estimator": "MomentMatching", "positive count": "50"}.items()


def test_what_was_not_collected_is_refused():
    means, variances = (
        [Statistics({"0": Moments.of(rows, covariance=kept)}) for rows in (HIGH, LOW)] for kept in (False, "diagonal")
    )
    for match, sides in (("variances", means), ("covariance", means), ("covariance", variances)):
        with pytest.raises(StatisticsError):
            MomentMatching(match=match)(positive=sides[0], negative=sides[1])
    with pytest.raises(ValueError, match="match: expected one of"):
        MomentMatching(match="skew")
