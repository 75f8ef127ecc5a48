"""Conceptor and SoftProjection: what is kept of each direction, and the laws of and, or and not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import (
    Conceptor,
    Moments,
    ShapeError,
    SiteNotFoundError,
    SoftProjection,
    Statistics,
    StatisticsError,
    Steerer,
    fit,
)
from tests.strategies import eighths

D = 4
G = torch.Generator().manual_seed(0)
X = torch.randn(30, D, generator=G).double() @ torch.randn(D, D, generator=G).double() + 1
MODEL = nn.Sequential(nn.Identity())
ALL, NOTHING = (SoftProjection({"0": share * torch.eye(D).double()}) for share in (1.0, 0.0))


def of(rows, aperture=0.5):
    return Conceptor(aperture=aperture)(**dict.fromkeys(("positive", "negative"), statistics(rows)))


def statistics(rows, **options):
    return Statistics({"0": Moments.of(rows, **{"covariance": True} | options)})


def same(one, other, tolerance=1e-7):
    torch.testing.assert_close(one["0"], other["0"], rtol=tolerance, atol=tolerance)


SKEW = torch.tensor([[2.0, 0, 0, 0], [1, 2, 0, 0], [0, -1, 2, 0], [1, 0, 1, 2]]).double()
conceptors = st.dictionaries(st.integers(0, D - 1), st.integers(1, 16), min_size=1).map(
    lambda own: of(torch.stack([SKEW[row] * share / 8 for row, share in own.items()]))
)
"""Of every rank, in subspaces that are far from nearly the same, where & and | jump."""
invertible = eighths(D, D).map(lambda rows: of(rows / 8 + 5 * torch.eye(D).double()))


@given(a=conceptors, b=conceptors)
def test_not_and_and_or_obey_de_morgan_and_double_negation(a, b):
    same(~~a, a)
    same(~(a & b), ~a | ~b)
    same(~(a | b), ~a & ~b)


@given(a=conceptors, b=conceptors)
def test_and_and_or_commute_and_keep_no_more_and_no_less_than_each(a, b):
    same(a & b, b & a)
    same(a | b, b | a)
    for less, more in ((a & b, a), (a & b, b), (a, a | b), (b, a | b)):
        assert torch.linalg.eigvalsh(more["0"] - less["0"]).min() > -1e-7


@given(a=invertible, b=invertible, c=invertible)
def test_and_and_or_associate(a, b, c):
    same((a & b) & c, a & (b & c))
    same((a | b) | c, a | (b | c))


@given(a=conceptors)
def test_all_is_neutral_for_and_and_nothing_for_or(a):
    same(a & ALL, a)
    same(a | NOTHING, a)
    same(a & NOTHING, NOTHING)
    same(a | ALL, ALL)


@given(a=invertible, b=invertible)
def test_where_they_can_be_inverted_and_is_the_formula_of_jaeger(a, b):
    inverse = torch.linalg.inv(a["0"]) + torch.linalg.inv(b["0"]) - torch.eye(D).double()
    torch.testing.assert_close((a & b)["0"], torch.linalg.inv(inverse))


@given(a=eighths(2, D), b=eighths(2, D))
def test_or_is_the_conceptor_of_both_together(a, b):
    """R of A | B is the sum of theirs, of as many rows the second moment of all, twice."""
    same(of(a) | of(b), of(2**0.5 * torch.cat([a, b])))


def test_on_projections_they_are_those_of_the_subspaces():
    basis = torch.linalg.qr(X[:D])[0]
    one, other = (SoftProjection({"0": basis[:, own] @ basis[:, own].T}) for own in ([0, 1], [1, 2]))
    same(one & other, SoftProjection({"0": torch.outer(basis[:, 1], basis[:, 1])}))
    same(one | other, SoftProjection({"0": torch.eye(D).double() - torch.outer(basis[:, 3], basis[:, 3])}))
    same(one & ~one, NOTHING)


@pytest.mark.parametrize("aperture", [0.1, 1.0, 30.0])
def test_it_is_the_map_that_loses_least_at_its_cost(aperture):
    kept = of(X, aperture)["0"]
    moment = X.T @ X / len(X)
    torch.testing.assert_close(kept, moment @ torch.linalg.inv(moment + aperture**-2 * torch.eye(D).double()))

    def cost(own):
        return (X @ own.T - X).square().sum(dim=1).mean() + aperture**-2 * own.square().sum()

    for seed in range(10):
        nudge = 1e-3 * torch.randn(D, D, generator=torch.Generator().manual_seed(seed)).double()
        assert cost(kept + nudge) > cost(kept)


def test_fit_steers_c_goes_straight_and_a_file_gives_it_back(tmp_path):
    options = {"sites": "0", "estimator": Conceptor(aperture=0.5), "concept": "kind", "progress": False}
    edit = fit(MODEL, positive=X, negative=-X, batch_size=7, **options)
    same(edit, of(X), 1e-12)
    assert edit.concept == "kind" and edit.metadata["estimator"] == "Conceptor"
    edit.save(tmp_path / "edit.safetensors", model=MODEL)
    again = SoftProjection.load(tmp_path / "edit.safetensors", MODEL)
    assert torch.equal(again["0"], edit["0"]) and again.metadata.items() >= edit.metadata.items()
    with Steerer(MODEL, again, c=0.0) as steerer:
        assert torch.equal(MODEL(X), X)
        for c in (0.25, 1.0, 2.0):
            steerer.c = c
            torch.testing.assert_close(MODEL(X), X + c * (X @ edit["0"] - X))
    other = SoftProjection({"0": edit["0"]}, concept="other", metadata=edit.metadata | {"more": "yes"})
    assert (~edit).concept is (edit & other).concept is (other | edit).concept is None
    assert "more" not in (edit & other).metadata and (edit & other).metadata["model"] == edit.metadata["model"]
    assert fit(MODEL, positive=X.float(), negative=X.float(), **options)["0"].dtype is torch.float32


def test_laws_hold_in_float32_for_what_few_rows_gave():
    a, b = (of(rows.float()) for rows in (X[:2], X[1:4]))
    same(~(a & b), ~a | ~b, 1e-5)
    same((a & b) & a, a & (b & a), 1e-3)


def test_sites_that_one_side_lacks():
    one, other = SoftProjection({"0": torch.eye(2)}), SoftProjection({"1": torch.eye(2) / 2})
    assert (one | other).sites == ("0", "1") and torch.equal((one | other)["1"], other["1"])
    with pytest.raises(SiteNotFoundError, match="expected the same sites"):
        one & other
    with pytest.raises(ShapeError, match="'0'"):
        one & ALL
    with pytest.raises(TypeError):
        one & torch.eye(2)


def test_what_is_no_soft_projection_is_refused():
    for bad, message in (
        (2 * torch.eye(2), "expected a symmetric matrix with eigenvalues from 0 to 1, got from 2 to 2"),
        (-torch.eye(2), "got from -1 to -1"),
        (torch.tensor([[0.5, 0.4], [0.0, 0.5]]), "got another one"),
        (torch.ones(2, 3), "of shape \\(d, d\\)"),
        (torch.full((2, 2), torch.nan), "finite floating"),
    ):
        with pytest.raises(ShapeError, match=message):
            SoftProjection({"0": bad})
    with pytest.raises(ShapeError, match="one site or more"):
        SoftProjection({})
    with pytest.raises(TypeError, match="expected a tensor"):
        SoftProjection({"0": [[1.0]]})
    with pytest.raises(StatisticsError, match="covariance"):
        Conceptor(aperture=1.0)(positive=statistics(X, covariance=False), negative=statistics(X))
    for aperture in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="aperture: expected a number > 0"):
            Conceptor(aperture=aperture)
