"""Norms: of rows and directions from 1e-30 to 1e30, and what edits and gates make of them."""

import math

import pytest
import torch
from torch import Tensor, nn

from actsteer import Ablate, Add, Chain, Clamp, CosineAbove, KeepNorm, ProjectionAbove, Rotate, Steerer, SteeringVector
from actsteer.steering.norms import norms, norms_by_largest, unit
from tests.zoo import normal

SIZES = [2.0**-100, 2.0**-60, 1.0, 2.0**60, 2.0**100]  # 1e-30 to 1e30; powers of two scale without rounding
H, V = normal(6, 5).float(), normal(5, seed=2).float()
ONE = torch.ones(())
sizes = pytest.mark.parametrize("size", SIZES, ids="{:.0e}".format)


class WithoutFloat64(Tensor):
    """A tensor of a device that has no float64."""

    is_mps = True


@sizes
@pytest.mark.parametrize("norm", [norms, norms_by_largest, lambda rows: norms(rows.as_subclass(WithoutFloat64))])
def test_a_norm_is_that_of_float64(size, norm):
    rows = torch.cat([size * H, torch.zeros(1, 5)])
    truth = rows.double().square().sum(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close(norm(rows).as_subclass(Tensor).double(), truth, rtol=1e-6, atol=0)


@sizes
@pytest.mark.parametrize("norm", [norms, norms_by_largest])
def test_the_gradient_of_a_norm_is_the_unit_row_and_zero_at_zero(size, norm):
    rows = torch.cat([size * H, torch.zeros(1, 5)]).requires_grad_()
    norm(rows).sum().backward()
    expected = torch.cat([H / H.norm(dim=-1, keepdim=True), torch.zeros(1, 5)])
    torch.testing.assert_close(rows.grad, expected, rtol=1e-5, atol=1e-6)


@sizes
def test_a_unit_direction_has_norm_one_whatever_its_length(size):
    assert torch.equal(unit(size * V), unit(V))
    torch.testing.assert_close(unit(size * V).norm(), ONE)
    assert torch.equal(unit(torch.zeros(5)), torch.zeros(5))


def test_the_gradient_of_a_unit_direction_is_across_it():
    torch.autograd.gradcheck(unit, (V.double().requires_grad_(),))
    zero = torch.zeros(5, requires_grad=True)
    unit(zero).sum().backward()
    assert bool(zero.grad.isfinite().all())


# --- edits -----------------------------------------------------------------------------------------------------------
LINEAR = {  # f(s h) = s f(h)
    "ablate": Ablate(),
    "one-sided": Ablate(one_sided=True),
    "relative": Add(relative=True),
    "rotate": Rotate(0.7),
    "norm kept": KeepNorm(Ablate()),
    "chain": Chain(Rotate(0.3), KeepNorm(Add(relative=True))),
}
DIRECTED = LINEAR | {"clamp": Clamp(2.0), "clamp, norm kept": KeepNorm(Clamp(2.0))}


@sizes
@pytest.mark.parametrize("rule", LINEAR.values(), ids=LINEAR)
def test_an_edit_does_to_large_and_small_rows_what_it_does_to_others(rule, size):
    expected = size * rule(H, V, 0.5 * ONE)
    assert not torch.equal(expected, size * H)
    torch.testing.assert_close(rule(size * H, V, 0.5 * ONE), expected, rtol=1e-5, atol=1e-6 * size)
    torch.testing.assert_close(rule.prepare(V, 0.5 * ONE)(size * H), expected, rtol=1e-5, atol=1e-6 * size)


@sizes
@pytest.mark.parametrize("rule", DIRECTED.values(), ids=DIRECTED)
def test_an_edit_does_the_same_along_long_and_short_directions(rule, size):
    expected = rule(H, V, 0.5 * ONE)
    torch.testing.assert_close(rule(H, size * V, 0.5 * ONE), expected)
    torch.testing.assert_close(rule.prepare(size * V, 0.5 * ONE)(H), expected)


@sizes
def test_a_clamp_sets_the_projection_of_rows_of_every_size(size):
    edited = Clamp(3.0 * size)(size * H, V, ONE)
    torch.testing.assert_close(edited @ unit(V), torch.full((6,), 3.0 * size))


@pytest.mark.parametrize("c", [1.0, torch.linspace(-1, 2, 6)], ids=["number", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2.0**-100, 2.0**100], ids="{:.0e}".format)
@pytest.mark.parametrize("rule", LINEAR.values(), ids=LINEAR)
def test_a_steerer_edits_rows_of_every_size(rule, size, dtype, c):
    model, rows, v = nn.Sequential(nn.Identity()), H.to(dtype), SteeringVector({"0": V})
    with Steerer(model, v, c=c, intervention=rule):
        torch.testing.assert_close(model(size * rows), size * model(rows), rtol=1e-5, atol=1e-5 * size)


def test_what_is_scaled_to_a_norm_may_be_much_smaller_than_that():
    def tiny(h, v, c):
        return 1e-30 * h

    torch.testing.assert_close(KeepNorm(tiny)(1e30 * H, V, ONE), 1e30 * H)


# --- gates -----------------------------------------------------------------------------------------------------------
@sizes
@pytest.mark.parametrize("threshold", [-0.25, 0.0, 0.25])
def test_a_cosine_does_not_depend_on_how_long_row_and_direction_are(size, threshold):
    rows = torch.cat([H, torch.zeros(1, 5)])
    gate, other = (CosineAbove(SteeringVector({"0": s * V}), threshold) for s in (1.0, size))
    truth = (rows.double() @ V.double()) / (rows.double().norm(dim=-1) * V.double().norm()).clamp(min=1e-300)
    torch.testing.assert_close(other.score(size * rows).double(), truth, rtol=1e-5, atol=1e-6)
    decided = (truth > threshold).tolist()
    assert gate(rows).tolist() == other(size * rows).tolist() == other.prepare(rows)(size * rows).tolist() == decided


@sizes
def test_a_projection_is_in_the_units_of_the_rows(size):
    gate = ProjectionAbove(SteeringVector({"0": V}), 0.0)
    torch.testing.assert_close(gate.projection(size * H), size * gate.projection(H), rtol=1e-5, atol=0)
    assert all(map(math.isfinite, gate.projection(size * H).tolist()))
