"""PairedMap: the regression of what one row of a pair adds to the other, and the best cut of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import (
    Affine,
    BatchError,
    LowRank,
    MeanDifference,
    PairedMap,
    Statistics,
    StatisticsError,
    Steerer,
    collect,
    collect_joint,
    fit,
)
from tests.strategies import eighths

D, N = 5, 60
G = torch.Generator().manual_seed(0)
MODEL = nn.Sequential(nn.Identity())
X = torch.randn(N, D, generator=G).double() @ torch.randn(D, D, generator=G).double() + 3
Y = X @ torch.randn(D, D, generator=G).double() + torch.randn(N, D, generator=G).double() - 2
MAP, OFFSET = torch.randn(D, D, generator=G).double(), torch.randn(D, generator=G).double()
LONG = {"sites": "0", "progress": False}


class Idle(nn.Sequential):
    """Of whose two parts the second never runs."""

    def __init__(self):
        super().__init__(nn.Identity(), nn.Identity())

    def forward(self, x):
        return self[0](x)


def fitted(positive=Y, negative=X, **options):
    return fit(MODEL, positive=positive, negative=negative, estimator=PairedMap(**options), batch_size=16, **LONG)


def moved(edit, rows, c=1.0):
    return edit.at("0")(rows, rows[0], torch.tensor(c).double())


def best_rank(x, y, rank, penalty):
    """The least penalised squares of all maps of a rank: the rows (x, 1), those of the penalty, one SVD of the fit."""
    centred = torch.cat([x - x.mean(0), torch.ones(len(x), 1).double()], dim=1)
    augmented = torch.cat([centred, penalty**0.5 * torch.eye(x.shape[1], x.shape[1] + 1).double()])
    wanted = torch.cat([y - x, torch.zeros(x.shape[1], x.shape[1]).double()])
    weights = torch.linalg.lstsq(augmented, wanted, driver="gelsd").solution
    basis = torch.linalg.svd(augmented @ weights, full_matrices=False).Vh[:rank]
    return x + (centred @ weights) @ basis.T @ basis


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("rank", [None, 1, 3, D, D + 2])
def test_it_is_least_squares_of_augmented_rows_and_the_first_singular_vectors_of_what_they_fit(rank, ridge):
    edit = fitted(rank=rank, ridge=ridge)
    scatter = (X - X.mean(0)).square().sum() / D
    torch.testing.assert_close(moved(edit, X), best_rank(X, Y, rank, ridge * scatter), rtol=1e-9, atol=1e-9)
    assert isinstance(edit, Affine) if rank is None else (isinstance(edit, LowRank) and edit.rank == min(rank, D))


@given(weight=eighths(3, 3), offset=eighths(3))
def test_an_affine_relation_is_found_and_holds_for_other_rows(weight, offset):
    x = X[:, :3]
    edit = fitted(x @ weight.T + offset, x, ridge=0.0)
    other = 10 * Y[:, :3]
    torch.testing.assert_close(moved(edit, other), other @ weight.T + offset, rtol=1e-8, atol=1e-7)


@given(reads=eighths(2, D), adds=eighths(2, D), offsets=eighths(2), share=st.integers(0, 16).map(lambda k: k / 8))
def test_a_change_of_rank_two_is_found_with_two_directions_and_c_goes_straight_there(reads, adds, offsets, share):
    change = (X @ reads.T + offsets) @ adds
    edit = fitted(X + change, X, rank=2, ridge=0.0)
    torch.testing.assert_close(moved(edit, X, share), X + share * change, rtol=1e-7, atol=1e-6)


def test_c_goes_straight_from_the_activation_to_the_whole_map():
    whole = moved(fitted(), X)
    for share in (0.0, 0.25, -1.0, 2.0):
        torch.testing.assert_close(moved(fitted(), X, share), X + share * (whole - X))


def test_no_lower_error_has_another_edit_of_the_rank():
    best = fitted(rank=2, ridge=0.0)
    error = (moved(best, X) - Y).square().sum()
    reads, adds, offsets = best["0"]
    for seed in range(20):
        nudge = 1e-3 * torch.randn(3, 2, D, generator=torch.Generator().manual_seed(seed)).double()
        other = LowRank({"0": (reads + nudge[0], adds + nudge[1], offsets + nudge[2, :, 0])})
        assert (moved(other, X) - Y).square().sum() > error


def test_a_large_ridge_leaves_the_mean_difference():
    for rank in (None, 1):
        edit = fitted(rank=rank, ridge=1e12)
        v = fit(MODEL, positive=Y, negative=X, estimator=MeanDifference(), **LONG)
        torch.testing.assert_close(moved(edit, X), X + v["0"].double(), rtol=1e-6, atol=1e-6)


def test_halves_that_merge_and_a_file_give_the_map_of_the_whole(tmp_path):
    halves = [collect_joint(MODEL, Y[part], X[part], **LONG) for part in (slice(0, 23), slice(23, N))]
    halves[0].save(tmp_path / "half.safetensors")
    joint = Statistics.load(tmp_path / "half.safetensors").merge(halves[1])
    for rank in (None, 2):
        edit = PairedMap(rank=rank)(positive=joint, negative=joint)
        torch.testing.assert_close(moved(edit, X), moved(fitted(rank=rank), X), rtol=1e-10, atol=1e-10)


def test_joint_statistics_hold_those_of_both_sides_and_across():
    joint = collect_joint(MODEL, Y, X, batch_size=7, **LONG)
    torch.testing.assert_close(joint["0"].covariance, torch.cat([Y, X], dim=1).T.cov())
    assert joint["0"].count == N and joint.metadata["pairs"] == "side by side"


def test_the_edit_steers_is_described_and_comes_back_from_a_file(tmp_path):
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2)).double()
    toward = X + (X @ MAP[0] + 2)[:, None] * MAP[1]
    for rank, kind in ((None, Affine), (1, LowRank)):
        estimator = PairedMap(rank=rank, ridge=0.0)
        edit = fit(model, positive=toward, negative=X, concept="more", estimator=estimator, **LONG)
        assert edit.concept == "more" and "pairs" not in edit.metadata
        assert edit.metadata.items() >= {"estimator": "PairedMap", "positive count": str(N)}.items()
        edit.save(tmp_path / "edit.safetensors", model=model)
        with torch.no_grad(), Steerer(model, kind.load(tmp_path / "edit.safetensors", model)) as steerer:
            steered = model(X)
            steerer.c = 0.0
            unsteered = model(X)
        assert torch.equal(unsteered, model(X))
        torch.testing.assert_close(steered, model(toward), rtol=1e-6, atol=1e-6)


def test_the_edit_has_the_dtype_of_the_rows():
    edit = fitted(Y.float(), X.float(), rank=1)
    assert {part.dtype for part in edit["0"]} == {torch.float32}
    assert {part.dtype for part in fitted(Y.bfloat16(), X.bfloat16())["0"]} == {torch.float32}


def test_few_rows_need_a_ridge():
    with pytest.raises(StatisticsError, match=r"site '0': the covariance of 5 features from 4 rows is singular.*ridge"):
        fitted(Y[:4], X[:4], ridge=0.0)
    assert moved(fitted(Y[:4], X[:4]), X[:4]).isfinite().all()
    with pytest.raises(StatisticsError, match="site '0': the 4 rows are all the same"):
        fitted(Y[:4], X[:1].expand(4, D))


def test_what_is_not_paired_is_refused():
    apart = [collect(MODEL, rows[:, :4], covariance=True, **LONG) for rows in (Y, X)]
    joint = [collect_joint(MODEL, *sides, **LONG) for sides in ((Y, X), (X, Y))]
    for positive, negative in (apart, joint):
        with pytest.raises(StatisticsError, match="side by side, and the same as both sides; see collect_joint"):
            PairedMap()(positive=positive, negative=negative)
    with pytest.raises(BatchError, match="not the same number from each row"):
        fitted(Y[:3], X[:4])
    with pytest.raises(BatchError, match="one side has more batches"):
        fitted(Y[:16], X)
    with pytest.raises(BatchError, match="site '1' saw no rows"):
        collect_joint(Idle(), Y, X, sites="1", progress=False)
    for bad in ({"rank": 0}, {"ridge": -1.0}, {"ridge": float("nan")}):
        with pytest.raises(ValueError, match="expected"):
            PairedMap(**bad)
