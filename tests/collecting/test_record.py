"""record: the activations themselves, in the order of the data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import nn

from actsteer import BatchError, SiteNotFoundError, StatisticsError, Steerer, SteeringVector, collect, record
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
    with pytest.raises(StatisticsError, match=r"sites \['unused'\] never ran"):
        record(model, X, sites="unused")
