"""Outputs: the activation is found, replaced in its place, and its feature axis is certain or refused."""

from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from actsteer import OutputError, ShapeError
from actsteer.sites.outputs import positive_axis, read_activation, write_activation

Named = namedtuple("Named", ["hidden", "cache"])
OLD, NEW, REST = torch.zeros(2), torch.ones(2), torch.full((2,), 7.0)
OUTPUTS = {
    "tensor": OLD,
    "tuple": (OLD, REST),
    "tuple of one": (OLD,),
    "list": [OLD, REST, None],
    "named tuple": Named(OLD, REST),
    "torch's named tuple": torch.return_types.max([OLD, REST]),
    "packed sequence": pack_sequence([torch.zeros(2, 3)]),
}
by_kind = pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())


@by_kind
def test_what_is_written_is_read_and_the_rest_stays(output):
    written = write_activation(output, NEW)
    assert type(written) is type(output)
    assert read_activation(written, site="2") is NEW
    if not isinstance(output, torch.Tensor):
        assert len(written) == len(output)
        assert all(now is before for now, before in zip(written[1:], output[1:], strict=True))


@by_kind
def test_writing_what_was_read_changes_nothing_and_never_what_came_in(output):
    activation = read_activation(output, site="2")
    write_activation(output, NEW)
    assert read_activation(output, site="2") is activation
    assert read_activation(write_activation(output, activation), site="2") is activation


def test_the_outputs_of_torch_s_own_modules_can_be_read():
    assert read_activation(nn.LSTM(2, 3)(torch.zeros(4, 1, 2)), site="2").shape == (4, 1, 3)
    assert read_activation(nn.MaxPool1d(1, return_indices=True)(torch.zeros(1, 2, 3)), site="2").shape == (1, 2, 3)
    x = torch.zeros(4, 1, 2)
    assert read_activation(nn.MultiheadAttention(2, 1)(x, x, x), site="2").shape == (4, 1, 2)


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (None, "NoneType"),
        ({"hidden": OLD}, "dict"),
        ((), "tuple"),
        ([], "list"),
        ((None, OLD), "tuple"),
        (((OLD,),), ""),
    ],
)
def test_an_output_without_an_activation_is_refused(output, kind):
    match = rf"site '2': expected a tensor, or a tuple that begins with one, got .*{kind}.*; choose a module inside it"
    with pytest.raises(OutputError, match=match):
        read_activation(output, site="2")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_an_activation_that_is_not_floating_is_refused(dtype):
    with pytest.raises(OutputError, match=rf"site '2': expected floating activations, got {dtype}"):
        read_activation((OLD.to(dtype), OLD), site="2")


# --- the axis ----------------------------------------------------------------------------------------------------
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@given(shapes, st.data())
def test_a_known_axis_is_counted_from_the_front(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    positive = positive_axis(torch.zeros(shape), axis=axis, size=shape[axis], site="2")
    assert positive == list(range(len(shape)))[axis]
    assert positive_axis(torch.zeros(shape), axis=axis, size=None, site="2") == positive


@given(shapes.filter(lambda shape: len(shape) <= 3))
def test_an_open_axis_is_the_last_one_of_rows_and_sequences(shape):
    assert positive_axis(torch.zeros(shape), axis=None, size=shape[-1], site="2") == len(shape) - 1


@given(shapes, st.data())
def test_another_size_is_refused(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    match = (
        rf"site '2': the activation has {shape[axis]} features \(axis {axis} of shape .*\), the vector 9; was it fitted"
    )
    with pytest.raises(ShapeError, match=match):
        positive_axis(torch.zeros(shape), axis=axis, size=9, site="2")


def test_an_open_axis_of_an_image_is_refused():
    match = (
        r"site '2': the activation has shape \(1, 2, 3, 4\), and its module does not tell which axis holds the features"
    )
    with pytest.raises(ShapeError, match=match):
        positive_axis(torch.zeros(1, 2, 3, 4), axis=None, size=4, site="2")


@pytest.mark.parametrize(("shape", "axis"), [((2,), 1), ((2, 3), -3), ((), None), ((), -1)])
def test_an_axis_that_the_activation_lacks_is_refused(shape, axis):
    with pytest.raises(ShapeError, match=r"site '2': expected an activation with a feature axis -?\d, got shape"):
        positive_axis(torch.zeros(shape), axis=axis, size=None, site="2")
