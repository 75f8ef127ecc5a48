"""Strength: every way to say c, and what is refused."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actsteer import ConceptNotFoundError, StrengthError
from actsteer.steering.strength import strengths_of

AB = ("a", "b")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_kept_exactly_for_every_concept(c):
    for strength in strengths_of(c, AB):
        assert strength.dtype is torch.float64
        assert strength.shape == ()
        assert strength.item() == c


@pytest.mark.parametrize(
    "c",
    [2, 2.0, np.float32(2), np.int64(2), Fraction(2), torch.tensor(2), torch.tensor(2.0, dtype=torch.bfloat16)],
    ids=repr,
)
def test_every_kind_of_number_is_a_number(c):
    assert [strength.item() for strength in strengths_of(c, AB)] == [2.0, 2.0]


def test_a_mapping_is_spread_in_the_banks_order_with_zero_for_the_others():
    rows = torch.tensor([1.0, 2.0])
    strengths = strengths_of({"c": rows, "a": -1}, ("a", "b", "c"))
    assert [strength.tolist() for strength in strengths] == [-1.0, 0.0, [1.0, 2.0]]
    assert [strength.item() for strength in strengths_of({}, AB)] == [0.0, 0.0]


def test_a_tensor_is_copied():
    c = torch.ones(2)
    strength = strengths_of(c, AB)[0]
    c.zero_()
    assert strength.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("c", "error", "message"),
    [
        ({"x": 1.0}, ConceptNotFoundError, r"c names no concept of the bank: 'x'\. There are: 'a', 'b'\."),
        ({"aa": 1.0}, ConceptNotFoundError, r"Close names: 'a'\."),
        (float("nan"), StrengthError, "c: expected a finite number, got nan"),
        ({"b": float("inf")}, StrengthError, r"c\['b'\]: expected a finite number, got inf"),
        (torch.tensor([1.0, float("inf")]), StrengthError, "c: expected finite numbers, got tensor"),
        (torch.tensor(float("nan")), StrengthError, "c: expected finite numbers"),
        (torch.ones(2, 1, 1), StrengthError, r"one strength per row .* got torch.float32 of shape \(2, 1, 1\)"),
        (torch.tensor([True]), StrengthError, r"got torch\.bool"),
        (torch.tensor([1j]), StrengthError, r"got torch\.complex64"),
        (torch.ones(2, requires_grad=True), StrengthError, "gradients do not reach c; detach it"),
        ([1.0, 2.0], StrengthError, r"c: expected a number or a tensor of shape .* got \[1\.0, 2\.0\]"),
        (None, StrengthError, "got None"),
        ({"a": "1"}, StrengthError, r"c\['a'\]: expected a number or a tensor"),
        (
            {"a": torch.ones(2), "b": torch.ones(3)},
            StrengthError,
            r"c has \[2, 3\] rows for different concepts; give each",
        ),
    ],
)
def test_what_is_no_strength_is_refused(c, error, message):
    with pytest.raises(error, match=message):
        strengths_of(c, AB)


@pytest.mark.case(25)
@pytest.mark.parametrize("c", [2.0, torch.tensor([1.0, -2.0])], ids=["number", "rows"])
def test_a_strength_given_in_inference_mode_works_with_gradients(c):
    with torch.inference_mode():
        made = c.clone() if isinstance(c, torch.Tensor) else c
        strength = strengths_of(made, AB)[0]
    x = torch.ones(2, requires_grad=True)
    with torch.inference_mode(mode=False):
        (x * strength.clone()).sum().backward()
    assert torch.equal(x.grad, torch.as_tensor(c).expand(2).float())
