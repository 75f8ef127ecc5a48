"""collect: streaming is exact, every position is a row, and the model is left as it was found."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from actsteer import (
    BatchError,
    Moments,
    OutputError,
    ShapeError,
    SiteNotFoundError,
    StatisticsError,
    Steerer,
    SteeringVector,
    collect,
)
from tests.oracles import Lazy, moments, state
from tests.strategies import eighths

IDENTITY = nn.Sequential(nn.Identity())  # its activation is what is fed
X = torch.tensor([[0.0, 2.0], [4.0, 2.0], [2.0, -1.0]])


def splits(rows: int) -> st.SearchStrategy[list[int]]:
    """Sizes of consecutive parts that make up `rows`."""
    cuts = st.lists(st.integers(1, rows - 1), unique=True).map(sorted) if rows > 1 else st.just([])
    return cuts.map(lambda inner: list(np.diff([0, *inner, rows])))


@st.composite
def split_rows(draw):
    rows = draw(st.integers(1, 9))
    return [part.float() for part in draw(eighths(rows, 3)).split([int(size) for size in draw(splits(rows))])]


def agree(one: Moments, other: Moments) -> None:
    """Equal up to float64's rounding."""
    assert one.count == other.count
    assert_allclose(one.mean, other.mean, atol=1e-12)
    assert_allclose(one.scatter, other.scatter, atol=1e-11)


# --- streaming ---------------------------------------------------------------------------------------------------
@given(split_rows())
def test_any_split_gives_the_moments_of_one_batch_and_of_the_oracle(parts):
    whole = torch.cat(parts)
    streamed = collect(IDENTITY, parts, sites="0", covariance=True)["0"]
    mean, scatter = moments(whole)
    agree(streamed, Moments.of(whole, covariance=True))
    assert streamed.count == len(whole)
    assert_allclose(streamed.mean, mean, atol=1e-12)
    assert_allclose(streamed.scatter, scatter, atol=1e-11)
    assert streamed.mean.dtype is streamed.scatter.dtype is torch.float64


@given(split_rows(), st.integers(1, 4))
def test_the_batch_size_does_not_matter(parts, batch_size):
    whole = torch.cat(parts)
    agree(
        collect(IDENTITY, whole, sites="0", covariance=True, batch_size=batch_size)["0"],
        collect(IDENTITY, parts, sites="0", covariance=True)["0"],
    )


def test_a_large_offset_does_not_cost_the_variance():
    rows = torch.tensor([[1e8], [1e8 + 8], [1e8 + 16], [1e8 + 24]])
    parts = collect(IDENTITY, rows, sites="0", covariance=True, batch_size=1)["0"]
    assert float(parts.covariance) == np.var([0, 8, 16, 24], ddof=1)


@given(split_rows().filter(lambda parts: sum(map(len, parts)) > 1))
def test_the_covariance_is_numpy_s_unbiased_one(parts):
    found = collect(IDENTITY, parts, sites="0", covariance=True)["0"].covariance
    assert_allclose(found, np.cov(torch.cat(parts).double().numpy(), rowvar=False, ddof=1), atol=1e-11)


@given(split_rows(), split_rows(), split_rows())
def test_merging_commutes_and_associates(a, b, c):
    one, two, three = (collect(IDENTITY, parts, sites="0", covariance=True) for parts in (a, b, c))
    agree(one.merge(two)["0"], two.merge(one)["0"])
    agree(one.merge(two).merge(three)["0"], one.merge(two.merge(three))["0"])
    agree(one.merge(two)["0"], collect(IDENTITY, [*a, *b], sites="0", covariance=True)["0"])
    assert one.merge(two).metadata == one.metadata


def test_merging_drops_no_covariance_in_silence():
    with_, without = (collect(IDENTITY, X, sites="0", covariance=asked) for asked in (True, False))
    for one, other in ((with_, without), (without, with_)):
        with pytest.raises(StatisticsError, match="collect both alike"):
            one.merge(other)


# --- rows --------------------------------------------------------------------------------------------------------
def test_every_position_of_a_sequence_is_a_row():
    x = torch.randn(4, 5, 3)
    found = collect(nn.Sequential(nn.Linear(3, 2)), x, sites="0", covariance=True)["0"]
    assert found.count == 20
    assert found.mean.shape == (2,)
    agree(collect(IDENTITY, x, sites="0", covariance=True)["0"], Moments.of(x.reshape(20, 3), covariance=True))


def test_every_position_of_an_image_is_a_row_and_the_channels_are_its_features():
    x = torch.randn(2, 3, 4, 5)
    model = nn.Sequential(nn.MaxPool2d(1), nn.ReLU())
    stats = collect(model, x, sites=["0", "1"], covariance=True)
    agree(stats["0"], Moments.of(x.movedim(1, -1).reshape(40, 3), covariance=True))
    agree(stats["1"], Moments.of(x.relu().movedim(1, -1).reshape(40, 3), covariance=True))
    assert stats.metadata["axis 0"] == stats.metadata["axis 1"] == "-3"


def test_a_module_that_runs_twice_counts_twice():
    shared = nn.ReLU()
    found = collect(nn.Sequential(nn.Identity(), shared, shared), X, sites="1")["1"]
    assert found.count == 6


def test_an_empty_batch_among_others_does_not_count():
    assert collect(IDENTITY, [X[:0], X, X[:0]], sites="0")["0"].count == 3


def test_a_later_edit_in_place_is_not_seen():
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    assert collect(model, -X.abs(), sites="0")["0"].mean.tolist() == (-X.abs()).double().mean(dim=0).tolist()


# --- batches -----------------------------------------------------------------------------------------------------
class Two(nn.Module):
    """Takes its input by position or by name, with a second one."""

    def __init__(self):
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x, shift=0.0):
        return self.site(x + shift)


FORMS = {
    "tensor": X,
    "list of tensors": [X[:2], X[2:]],
    "list of rows of one": [(X[:2],), (X[2:], 0.0)],
    "list of dicts": [{"x": X[:2]}, {"x": X[2:], "shift": 0.0}],
    "loader of inputs": DataLoader(X, batch_size=2),
    "list of a loader's tuples": [tuple(b) for b in DataLoader(TensorDataset(X, torch.zeros(3, 2)), batch_size=2)],
}


@pytest.mark.parametrize("batches", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_batches_is_the_same_data(batches):
    found = collect(Two(), batches, sites="site", covariance=True)["site"]
    agree(found, Moments.of(X, covariance=True))


def test_a_generator_is_used_up_by_one_pass():
    batches = (X for _ in range(2))
    assert collect(Two(), batches, sites="site")["site"].count == 6
    with pytest.raises(BatchError, match="there are none; is the generator used up"):
        collect(Two(), batches, sites="site")


# --- the model ---------------------------------------------------------------------------------------------------
@pytest.fixture
def model():
    """Something of everything that a pass could disturb."""
    parts = nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.ReLU(), nn.Linear(3, 1)
    built = nn.Sequential(*parts).train()
    built[4].eval()
    built[0].weight.requires_grad_(False)
    return built


def test_the_model_is_left_as_it_was_found(model):
    before = state(model)
    collect(model, X, sites="*", covariance=True)
    assert state(model) == before


@pytest.mark.parametrize("bad", [[X, "text"], [X, torch.zeros(2, 7)]], ids=["batch", "shape"])
def test_the_model_is_left_as_it_was_found_after_an_error(model, bad):
    before = state(model)
    with pytest.raises((BatchError, RuntimeError)):
        collect(model, bad, sites="*")
    assert state(model) == before


def test_the_model_runs_in_evaluation_mode_without_gradients(model):
    seen = []
    model[3].register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(), model.training, model[2].training)))
    collect(model, X, sites="3")
    assert seen == [(False, False, False)]


def test_hooks_of_the_user_still_run_and_stay(model):
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("user"))
    collect(model, X, sites="0", batch_size=1)
    model.eval()(X)
    assert seen == ["user"] * 4


def test_steered_activations_are_collected_inside_a_steerer():
    v = SteeringVector({"0": torch.tensor([1.0, -1.0])})
    plain = collect(IDENTITY, X, sites="0")["0"].mean
    with Steerer(IDENTITY, v, c=2):
        assert torch.equal(collect(IDENTITY, X, sites="0")["0"].mean, plain + torch.tensor([2.0, -2.0]))
    assert torch.equal(collect(IDENTITY, X, sites="0")["0"].mean, plain)


def test_what_is_collected_works_in_autograd():
    found = collect(IDENTITY, X.double(), sites="0", covariance=True)["0"]
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    ((found.mean * weight).sum() + weight @ found.covariance @ weight).backward()
    assert weight.grad is not None
    assert not found.mean.requires_grad


def test_a_table_that_the_model_makes_meanwhile_still_works_in_autograd():
    model = nn.Sequential(nn.Linear(2, 2), Lazy())
    collect(model, X, sites="0")
    model(X).sum().backward()
    assert model[0].weight.grad is not None


def test_statistics_know_their_model(model):
    stats = collect(model, X, sites=["3", "0"])
    assert stats.sites == ("0", "3")
    assert stats.metadata["model"].startswith("Sequential:19:")
    stats.metadata["model"] = "changed"
    assert stats.metadata["model"] != "changed"


# --- values ------------------------------------------------------------------------------------------------------
def test_moments_copy_what_goes_out():
    found = Moments.of(X, covariance=True)
    found.mean.zero_()
    found.scatter.zero_()
    found.covariance.zero_()
    agree(found, Moments.of(X, covariance=True))


def test_moments_copy_what_comes_in():
    mean, scatter = torch.ones(2), torch.eye(2)
    found = Moments(3, mean, scatter)
    mean.zero_()
    scatter.zero_()
    assert found.mean.tolist() == [1, 1]
    assert found.scatter.tolist() == [[1, 0], [0, 1]]


def test_merging_changes_neither_side():
    one, other = Moments.of(X, covariance=True), Moments.of(-X, covariance=True)
    one.merge(other)
    agree(one, Moments.of(X, covariance=True))
    agree(other, Moments.of(-X, covariance=True))


def test_statistics_read_like_a_mapping_and_can_be_pickled():
    stats = collect(IDENTITY, X, sites="0", covariance=True)
    assert (list(stats), len(stats), stats.sites) == (["0"], 1, ("0",))
    for twin in (pickle.loads(pickle.dumps(stats)), copy.deepcopy(stats)):
        agree(twin["0"], stats["0"])
        assert twin.metadata == stats.metadata
    assert repr(stats) == "Statistics({'0': Moments(count=3, d=2, covariance=True)})"


# --- errors ------------------------------------------------------------------------------------------------------
def test_covariance_is_kept_only_when_asked_for():
    found = collect(IDENTITY, X, sites="0")["0"]
    for name in ("covariance", "scatter"):
        with pytest.raises(StatisticsError, match="no covariance was collected; collect with covariance=True"):
            getattr(found, name)


def test_a_single_row_has_no_covariance():
    with pytest.raises(StatisticsError, match="the covariance of a single row is not defined; collect at least two"):
        _ = collect(IDENTITY, X[:1], sites="0", covariance=True)["0"].covariance


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(number):
    bad = X.clone()
    bad[1, 0] = number
    with pytest.raises(StatisticsError, match="site '0': the activations are not finite; look for inf or nan"):
        collect(IDENTITY, bad, sites="0", batch_size=1)


@pytest.mark.parametrize("kept", ["diagonal", True])
def test_covariances_that_are_not_finite_are_refused(kept):
    large = torch.tensor([[1e200, 0.0], [-1e200, 1.0]], dtype=torch.float64)
    assert collect(IDENTITY, large, sites="0")["0"].mean.tolist() == [0, 0.5]
    with pytest.raises(StatisticsError, match=r"site '0': the activations are not finite.*squares are too large"):
        collect(IDENTITY, large, sites="0", covariance=kept)


def test_a_site_that_never_runs_is_named():
    model = Two()
    model.unused = nn.ReLU()
    with pytest.raises(StatisticsError, match=r"these sites never ran: 'unused' \(the module is unused on this path"):
        collect(model, X, sites=["site", "unused"])


def test_a_wrong_site_is_named_before_the_model_runs():
    model = Two()
    model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(SiteNotFoundError, match=r"Two has no site 'sit'. Close names: 'site'"):
        collect(model, X, sites="sit")


def test_an_output_that_holds_no_activation_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Identity())
    with pytest.raises(OutputError, match=r"site '1': expected floating activations, got torch.int64"):
        collect(model, torch.zeros(2, 2, dtype=torch.int64), sites="1")


def test_activations_of_changing_size_do_not_merge():
    with pytest.raises(ShapeError, match=r"expected rows of shape \(n, 2\), got \(2, 3\); is it the same model"):
        collect(IDENTITY, [X, torch.ones(2, 3)], sites="0")


def test_statistics_of_two_models_or_of_other_sites_do_not_merge():
    stats = collect(IDENTITY, X, sites="0")
    with pytest.raises(SiteNotFoundError, match=r"sites \('0',\) against \('site',\); collect both parts at the same"):
        stats.merge(collect(Two(), X, sites="site"))
    with pytest.raises(StatisticsError, match="collect both parts on one model, in one way"):
        stats.merge(collect(nn.Sequential(nn.Identity(), nn.Linear(2, 2)), X, sites="0"))


def test_a_site_without_statistics_is_named():
    with pytest.raises(SiteNotFoundError, match=r"no statistics for site '1'. There are: '0'"):
        collect(IDENTITY, X, sites="0")["1"]


def test_moments_of_no_rows_have_no_mean_and_are_the_identity():
    empty = Moments.of(X[:0], covariance=True)
    with pytest.raises(StatisticsError, match="the mean of no rows is not defined; collect at least one"):
        _ = empty.mean
    for merged in (empty.merge(own := Moments.of(X, covariance=True)), own.merge(empty)):
        assert torch.equal(merged.mean, own.mean) and torch.equal(merged.scatter, own.scatter) and merged.count == 3
