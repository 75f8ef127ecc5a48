"""record: the activations themselves, in the order of the data."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import nn
from torch._dynamo.testing import CompileCounter

from actsteer import (
    BatchError,
    Moments,
    Replace,
    ShapeError,
    SiteNotFoundError,
    StatisticsError,
    Steerer,
    SteeringVector,
    collect,
    record,
)
from tests.oracles import state
from tests.strategies import eighths

IDENTITY = nn.Sequential(nn.Identity())
MODEL = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
X = torch.tensor([[0.0, 2.0], [4.0, 2.0], [2.0, -1.0]])


@given(eighths(5, 2, dtype=torch.float32), st.integers(1, 6))
def test_the_rows_come_out_in_the_order_of_the_data_whatever_the_batch_size(x, batch_size):
    assert torch.equal(record(IDENTITY, x, sites="0", batch_size=batch_size)["0"], x)


def test_the_activations_are_those_of_the_forward_pass():
    found = record(MODEL, X, sites="*")
    assert list(found) == ["0", "1", "2"]
    assert torch.equal(found["0"], MODEL[0](X))
    assert torch.equal(found["1"], MODEL[0](X).relu())
    assert torch.equal(found["2"], MODEL(X))


def test_the_mean_of_what_is_recorded_is_what_is_collected():
    rows = record(MODEL, X, sites="1")["1"]
    assert_allclose(rows.double().mean(dim=0), collect(MODEL, X, sites="1")["1"].mean, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "shape", "rows"),
    [
        (nn.Linear(3, 3), (2, 5, 3), lambda y: y.reshape(10, 3)),
        (nn.MaxPool2d(1), (2, 3, 4, 5), lambda y: y.movedim(1, -1).reshape(40, 3)),
        (nn.MaxPool1d(1), (2, 3, 4), lambda y: y.mT.reshape(8, 3)),
    ],
    ids=["sequence", "image", "line"],
)
def test_every_position_is_a_row(module, shape, rows):
    x = torch.randn(shape)
    assert torch.equal(record(nn.Sequential(module), x, sites="0")["0"], rows(module(x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_the_activation_s(dtype):
    assert record(IDENTITY, X.to(dtype), sites="0")["0"].dtype is dtype


def test_a_later_edit_in_place_is_not_seen_and_the_data_is_not_shared():
    x = -X.abs()
    found = record(nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), [x.clone()], sites="0")["0"]
    assert torch.equal(found, x)
    record(IDENTITY, [x], sites="0")["0"].zero_()
    assert bool(x.any())


def test_what_is_recorded_works_in_autograd():
    weight = torch.ones(2, requires_grad=True)
    (record(IDENTITY, X, sites="0")["0"] * weight).sum().backward()
    assert torch.equal(weight.grad, X.sum(dim=0))


def test_steered_activations_are_recorded_inside_a_steerer():
    with Steerer(IDENTITY, SteeringVector({"0": torch.ones(2)}), c=2):
        assert torch.equal(record(IDENTITY, X, sites="0")["0"], X + 2)


def test_the_model_is_left_as_it_was_found():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).train()
    before = state(model)
    record(model, X, sites="*")
    assert state(model) == before


def test_the_errors_are_those_of_collect():
    with pytest.raises(SiteNotFoundError, match="Sequential has no site '7'"):
        record(MODEL, X, sites="7")
    with pytest.raises(BatchError, match="there are none"):
        record(MODEL, [], sites="0")
    model = nn.Module()
    model.add_module("unused", nn.ReLU())
    model.forward = lambda x: x
    with pytest.raises(StatisticsError, match=r"these sites never ran: 'unused' \(the module is unused"):
        record(model, X, sites="unused")


# --- whatever people have --------------------------------------------------------------------------------------------
class Named(nn.Module):
    """Calls its part by name alone."""

    def __init__(self):
        super().__init__()
        self.part, self.head = Part(), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.part(hidden=x)["hidden"])


class Part(nn.Module):
    """Takes its input by name, and gives a dict."""

    def forward(self, *, hidden, mask=None):
        return {"loss": hidden.mean(), "hidden": 2 * hidden, "cache": (hidden, None)}


SIDES = {
    "part:in": 1,
    "part:in.hidden": 1,
    "part": 2,
    "part:out.hidden": 2,
    "part:out.cache": 1,
    "head:in": 2,
    ":in": 1,
}


@pytest.mark.parametrize(("site", "times"), SIDES.items())
@pytest.mark.case(20, 23)
def test_every_side_and_part_is_recorded(site, times):
    assert torch.equal(record(Named(), X, sites=site)[site], times * X)
    assert torch.equal(collect(Named(), X, sites=site)[site].mean, times * X.double().mean(dim=0))


def test_a_list_may_mix_names_patterns_modules_and_predicates():
    found = record(MODEL, X, sites=[MODEL[0], "1:in", "re:[12]", lambda name, _: name == "2"])
    assert list(found) == ["0", "1:in", "1", "2"]
    assert torch.equal(found["1:in"], found["0"])


@pytest.mark.parametrize("site", ["1", "1:in", "part:in"])
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_inside_a_steerer_the_steered_activation_is_recorded_on_either_side(site, backend):
    model = Named() if site.startswith("part") else nn.Sequential(nn.Identity(), nn.Identity())
    with Steerer(model, SteeringVector({site: torch.ones(2)}), c=2, backend=backend):
        assert torch.equal(record(model, X, sites=site)[site], X + 2)
    assert torch.equal(record(model, X, sites=site)[site], X)


@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.parametrize("other", ["hook", "tap"])
@pytest.mark.parametrize("site", ["0", "0:in"])
def test_inside_two_steerers_the_sum_is_recorded(site, backend, other):
    v = SteeringVector({site: torch.ones(2)})
    with Steerer(IDENTITY, v, backend=backend), Steerer(IDENTITY, v, c=4, backend=other):
        assert torch.equal(record(IDENTITY, X, sites=site)[site], X + 5)


# --- compiled --------------------------------------------------------------------------------------------------------
@pytest.fixture
def compiler():
    """Counts what is compiled; the process has compiled nothing before or after."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
@pytest.mark.case(1, 9)
def test_a_compiled_model_gives_the_activations_of_the_eager_one_and_stays_compiled(compiler, how):
    model = copy.deepcopy(MODEL)
    run = torch.compile(model, backend=compiler) if how == "wrapped" else model
    if how == "in place":
        model.compile(backend=compiler)
    elif how == "a part":
        model[1] = torch.compile(model[1], backend=compiler)
    expected = record(MODEL, X, sites=["*", "2:in", "0:in"])
    with torch.no_grad():
        plain = run(X)
        compiled = compiler.frame_count  # before torch 2.14 a Sequential that is compiled in place runs eagerly: 0
        for _ in range(3):
            found = record(run, X, sites=["*", "2:in", "0:in"])
            assert list(found) == list(expected)
            assert all(torch.equal(found[site], expected[site]) for site in found)
            assert torch.equal(run(X), plain)
    assert compiler.frame_count == compiled <= 1


@pytest.mark.slow
@pytest.mark.case(1)
def test_inside_a_steerer_a_compiled_model_gives_the_steered_activations(compiler):
    model = copy.deepcopy(MODEL)
    run = torch.compile(model, backend=compiler)
    with torch.no_grad():
        plain = run(X)
        v = SteeringVector({"1": torch.ones(3), "2:in": torch.ones(3)})
        with Steerer(run, v, c=2):
            steered = run(X)
            found = record(run, X, sites=["1", "2:in"])
            assert torch.equal(run(X), steered)
        assert torch.equal(run(X), plain)
    assert torch.equal(found["1"], MODEL[1](MODEL[0](X)) + 2)
    assert torch.equal(found["2:in"], found["1"] + 2)


def test_a_model_that_was_recorded_before_it_was_compiled_is_compiled_once(compiler):
    model = copy.deepcopy(MODEL)
    record(model, X, sites="*")
    run = torch.compile(model, backend=compiler)
    assert torch.equal(run(X), model(X))
    record(run, X, sites="*")
    run(X)
    assert compiler.frame_count == 1


# --- in their own shape ----------------------------------------------------------------------------------------------
class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(9, 3), nn.Linear(3, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.mix(torch.tanh(self.embed(input_ids)))


PADDED = {"input_ids": torch.arange(8).reshape(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}


def test_a_padded_batch_comes_back_in_its_own_shape_and_can_be_patched_back():
    torch.manual_seed(0)
    model = Tokens()
    kept = record(model, [PADDED], sites=["embed", "mix"], keep_shape=True)
    assert torch.equal(kept["embed"], model.embed(PADDED["input_ids"])) and torch.equal(kept["mix"], model(**PADDED))
    other = PADDED | {"input_ids": PADDED["input_ids"] + 1}
    with Steerer(model, Replace({"embed": kept["embed"]})):
        real, patched = PADDED["attention_mask"].bool(), model.mix(torch.tanh(kept["embed"]))
        assert torch.equal(model(**other)[real], patched[real])
    assert len(record(model, [PADDED], sites="mix")["mix"]) == 6  # the rows are those of the tokens


@pytest.mark.parametrize(
    ("module", "x", "wanted"),
    [
        (nn.Linear(2, 2), torch.ones(3, 2), lambda y: y),
        (nn.MaxPool2d(1), torch.rand(2, 3, 4, 5), lambda y: y.movedim(1, -1)),
    ],
)
def test_the_features_of_a_kept_shape_are_last(module, x, wanted):
    found = record(nn.Sequential(module), [x, x], sites="0", keep_shape=True)["0"]
    assert torch.equal(found, wanted(torch.cat([module(x)] * 2)))


def test_a_shape_that_cannot_be_kept_is_refused():
    x = torch.rand(2, 4, 3)
    with pytest.raises(ShapeError, match="record one batch at a time"):
        record(nn.Sequential(nn.Linear(3, 3)), [x, x[:, :2]], sites="0", keep_shape=True)
    with pytest.raises(ValueError, match="has all positions, got 'last'"):
        record(nn.Sequential(nn.Linear(3, 3)), [x], sites="0", keep_shape=True, positions="last")
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=True)
    with pytest.raises(ShapeError, match="packed"):
        record(nn.Sequential(nn.LSTM(3, 3, batch_first=True)), [(packed,)], sites="0", keep_shape=True)


class Labelled(torch.Tensor):
    """A tensor of a class of the user's own."""


def test_what_is_recorded_and_collected_is_plain_whatever_the_model_gives():
    class Labels(nn.Module):
        def forward(self, x):
            return x.as_subclass(Labelled)

    model = nn.Sequential(Labels(), nn.Identity())
    for keep_shape in (True, False):
        rows = record(model, X, sites=["0", "1"], keep_shape=keep_shape)
        assert all(type(tensor) is torch.Tensor and torch.equal(tensor, X) for tensor in rows.values())
    for kept in (False, "diagonal", True):
        own = collect(model, X, sites="1", covariance=kept)["1"]
        assert type(own.mean) is torch.Tensor and own.mean.tolist() == X.double().mean(0).tolist()
        assert not kept or type(own.variance) is torch.Tensor
    assert type(Moments.of(X.as_subclass(Labelled), covariance=True).covariance) is torch.Tensor
