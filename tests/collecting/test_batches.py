"""Batches: every form of data becomes the same calls, and the model is left as it was found."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from actsteer import BatchError, collect
from actsteer.collecting.batches import call, iterate
from actsteer.collecting.eval_mode import eval_mode
from tests.oracles import state

X = torch.arange(12.0).reshape(6, 2)


def listed(batches, batch_size=4):
    return list(iterate(batches, batch_size=batch_size, progress=False, label=""))


class Sum(nn.Module):
    """Two inputs, by position or by name."""

    def forward(self, x, y=0):
        return x + 2 * y


@given(st.integers(1, 10), st.integers(1, 12))
def test_one_tensor_is_split_by_batch_size_in_order(rows, batch_size):
    x = torch.arange(rows)
    batches = listed(x, batch_size)
    assert torch.equal(torch.cat(batches), x)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(batches[-1]) <= batch_size


FORMS = {
    "list": [X[:4], X[4:]],
    "tuple": (X[:4], X[4:]),
    "loader": DataLoader(X, batch_size=4),
    "split": X.split(4),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_an_iterable_is_passed_through_whatever_the_batch_size(form):
    assert [batch.tolist() for batch in listed(form, batch_size=1)] == [X[:4].tolist(), X[4:].tolist()]


def test_a_generator_is_read_once_and_lazily():
    read = []
    batches = iterate((read.append(i) or X[i] for i in range(3)), batch_size=1, progress=False, label="")
    assert read == []
    next(batches)
    assert read == [0]


@pytest.mark.parametrize(
    "batch",
    [(X, X), [X, X], {"x": X, "y": X}, next(iter(DataLoader(TensorDataset(X, X), batch_size=6)))],
    ids=["tuple", "list", "dict", "loader"],
)
def test_a_batch_is_positional_or_keyword_arguments(batch):
    assert torch.equal(call(Sum(), batch), 3 * X)


def test_a_tensor_is_the_one_argument():
    assert torch.equal(call(Sum(), X), X)
    assert torch.equal(call(Sum(), (X,)), X)


# --- eval_mode -------------------------------------------------------------------------------------------------
def disturbed_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.Linear(2, 1)))
    model[1].eval()
    model[2][0].eval()
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("frozen", [False, True])
def test_inside_the_model_evaluates_and_is_frozen_if_asked(frozen):
    model = disturbed_model()
    with eval_mode(model, frozen=frozen):
        assert not any(module.training for module in model.modules())
        assert [p.requires_grad for p in model.parameters()] == [False] + [not frozen] * 5


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_afterwards_the_model_is_as_it_was_found_however_it_ends(frozen, error):
    model = disturbed_model()
    before = state(model)
    if error is None:
        with eval_mode(model, frozen=frozen):
            pass
    else:
        with pytest.raises(error), eval_mode(model, frozen=frozen):
            raise error
    assert state(model) == before


# --- errors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("empty", [[], (), X[:0], torch.tensor(1.0), iter([])])
def test_no_batches_are_an_error(empty):
    with pytest.raises(BatchError, match="batches: there are none; is the generator used up, or the tensor empty"):
        listed(empty)


def test_a_used_up_generator_is_an_error():
    batches = (X for _ in range(2))
    listed(batches)
    with pytest.raises(BatchError, match="there are none; is the generator used up"):
        listed(batches)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_is_positive(batch_size):
    with pytest.raises(BatchError, match=f"batch_size: expected 1 or more, got {batch_size}"):
        listed(X, batch_size)


def test_one_mapping_asks_for_a_list():
    with pytest.raises(
        BatchError, match=r"expected an iterable of inputs, got one mapping; wrap it in a list: \[batch\]"
    ):
        listed({"x": X})


@pytest.mark.parametrize(("batches", "kind"), [("text", "str"), (3, "int"), (None, "NoneType"), (Sum(), "Sum")])
def test_what_is_no_iterable_of_inputs_is_named(batches, kind):
    with pytest.raises(BatchError, match=f"batches: expected a tensor or an iterable of inputs, got {kind}"):
        listed(batches)


@pytest.mark.parametrize(("batch", "kind"), [("text", "str"), (np.ones(2), "ndarray"), (3, "int"), (None, "NoneType")])
def test_what_is_no_batch_is_named(batch, kind):
    with pytest.raises(BatchError, match=f"a tuple of positional or a mapping of keyword arguments, got {kind}"):
        call(Sum(), batch)


@pytest.mark.parametrize("batch", [(torch.zeros(1, 2), torch.zeros(1)), [torch.zeros(1, 2)] * 2, {"x": torch.zeros(1)}])
def test_a_batch_that_does_not_fit_the_forward_is_refused(batch):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(BatchError, match=r"does not fit Sequential.forward: .*; feed the inputs alone"):
        collect(model, [batch], sites="0")
    assert not model[0]._forward_hooks


def test_a_type_error_inside_the_model_is_the_model_s_own():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(x + "text")

    with pytest.raises(TypeError, match="unsupported operand"):
        collect(Broken(), torch.zeros(1, 2), sites="inner")
