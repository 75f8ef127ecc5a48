"""NullSpace: what is steered, and what is left alone."""

import pytest
import torch
from torch import nn

from actsteer import (
    LowRank,
    Moments,
    NullSpace,
    SiteNotFoundError,
    Statistics,
    StatisticsError,
    Steerer,
    SteeringVector,
    fit,
)

IDENTITY = nn.Sequential(nn.Identity())
G = torch.Generator().manual_seed(0)
BASIS = torch.linalg.qr(torch.randn(8, 8, generator=G, dtype=torch.float64))[0]
LEFT_ALONE = torch.randn(40, 5, generator=G, dtype=torch.float64) @ BASIS[:5]
MEANT = torch.randn(60, 5, generator=G, dtype=torch.float64) @ BASIS[:5] + 3 * BASIS[5] + BASIS[6]
V = SteeringVector({"0": torch.randn(8, generator=G, dtype=torch.float64)}, concept="kind")


def statistics(rows, **options):
    return Statistics({"0": Moments.of(rows, **{"covariance": True} | options)})


def edit(**options):
    return NullSpace(V, **options)(positive=statistics(MEANT), negative=statistics(LEFT_ALONE))


def steered(rows, made):
    with Steerer(IDENTITY, made):
        return IDENTITY(rows)


def test_it_is_a_low_rank_edit_of_rank_one_with_the_vectors_concept():
    made = edit()
    assert isinstance(made, LowRank) and made.rank == 1 and made.concept == "kind"
    assert torch.equal(made["0"][1][0], V["0"])


def test_what_lies_where_the_negative_side_does_is_left_alone():
    other = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) @ BASIS[:5] * 10
    torch.testing.assert_close(steered(other, edit()), other, rtol=1e-9, atol=1e-9)


def test_what_is_meant_is_steered_in_full():
    torch.testing.assert_close(steered(MEANT, edit()), MEANT + V["0"], rtol=1e-4, atol=1e-4)


def test_the_amount_is_the_ridge_regression_of_one_in_the_null_space():
    made = edit(ridge=0.5)
    free = torch.linalg.eigh(LEFT_ALONE.T @ LEFT_ALONE)[1][:, :3]
    rows = MEANT @ free
    second = rows.T @ rows / len(rows)
    penalty = 0.5 * second.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    expected = free @ torch.linalg.solve(second + penalty, rows.mean(0))
    torch.testing.assert_close(made["0"][0][0], expected)


def test_a_space_that_is_full_has_no_null_space_unless_a_tolerance_gives_one():
    full = torch.cat([LEFT_ALONE, 1e-2 * BASIS])
    with pytest.raises(StatisticsError, match="fill all 8 dimensions"):
        NullSpace(V)(positive=statistics(MEANT), negative=statistics(full))
    made = NullSpace(V, tolerance=1e-3)(positive=statistics(MEANT), negative=statistics(full))
    assert (steered(full, made) - full).abs().max() < 0.05


def test_it_goes_with_fit():
    made = fit(IDENTITY, positive=MEANT, negative=LEFT_ALONE, sites="0", estimator=NullSpace(V), progress=False)
    torch.testing.assert_close(steered(MEANT, made), MEANT + V["0"], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(StatisticsError, match="covariance"):
        NullSpace(V)(positive=statistics(MEANT), negative=statistics(LEFT_ALONE, covariance=False))
    other = Statistics({"1": Moments.of(MEANT, covariance=True)})
    with pytest.raises(SiteNotFoundError, match="no negative statistics for site '0'"):
        NullSpace(V)(positive=statistics(MEANT), negative=other)
    for bad in ({"tolerance": 1.0}, {"tolerance": -0.1}, {"ridge": 0.0}):
        with pytest.raises(ValueError, match="expected tolerance"):
            NullSpace(V, **bad)
