"""Interventions: pure functions of plain tensors."""

import torch
from hypothesis import given

from actsteer import Add, Intervention
from tests.strategies import eighths, scalars

H, V = torch.ones(3, 2), torch.tensor([1.0, -1.0])


def test_add_is_an_intervention_and_a_value():
    assert isinstance(Add(), Intervention)
    assert Add() == Add()
    assert hash(Add()) == hash(Add())


@given(eighths(3, 4), eighths(4), scalars)
def test_add_moves_every_row_along_the_direction(activation, direction, c):
    expected = torch.stack([row + c * direction for row in activation])
    assert torch.equal(Add()(activation, direction, torch.tensor(c, dtype=torch.float64)), expected)


@given(eighths(3, 4), eighths(4), scalars, scalars)
def test_adding_twice_adds_the_strengths(activation, direction, a, b):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert torch.equal(Add()(Add()(activation, direction, a), direction, b), Add()(activation, direction, a + b))


@given(eighths(3, 2, 4), eighths(4), eighths(3))
def test_add_takes_a_strength_per_row(activation, direction, c):
    expected = torch.stack([row + ci * direction for row, ci in zip(activation, c, strict=True)])
    assert torch.equal(Add()(activation, direction, c[:, None, None]), expected)


def test_add_changes_nothing_in_place():
    h, v = H.clone(), V.clone()
    Add()(h, v, torch.tensor(2.0))
    assert torch.equal(h, H)
    assert torch.equal(v, V)
