"""LowRank with all that a Steerer can do: axes, gates, sites, nesting, copies, backends, compiled code."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import (
    Add,
    LowRank,
    OutputError,
    ProjectionAbove,
    ShapeError,
    Steerer,
    SteeringVector,
    StrengthError,
    UnsupportedModelError,
    sweep,
)
from tests.oracles import state
from tests.strategies import eighths
from tests.zoo import bits

D, R = 3, 2
G = torch.Generator().manual_seed(0)
PARTS, OTHERS = (
    tuple(torch.randint(-4, 5, size, generator=G).double() / 4 for size in ((R, D), (R, D), (R,))) for _ in range(2)
)
EDIT = LowRank({"0": PARTS})


def formula(h, parts=PARTS):
    """h + Uᵀ(A h + b), one row at a time and along the last axis."""
    reads, adds, offsets = parts
    rows = [h_i + adds.T @ (reads @ h_i + offsets) for h_i in h.reshape(-1, D)]
    return torch.stack(rows).reshape(h.shape) if rows else h


def chain(length=1):
    return nn.Sequential(*(nn.Identity() for _ in range(length)))


def steered(x, edit=EDIT, model=None, **options):
    model = model or chain()
    with Steerer(model, edit, **options), torch.no_grad():
        return model(x)


# --- the formula, exact on eighths ------------------------------------------------------------------------------------
@given(eighths(4, D), st.sampled_from([-2.0, 0.5, 1.0, 3.0]))
def test_it_is_the_formula_times_the_strength(x, c):
    assert torch.equal(steered(x, c=c), x + c * (formula(x) - x))


@given(eighths(2, 3, D), st.lists(st.sampled_from([0.0, 1.0, -0.5, 4.0]), min_size=2, max_size=2))
def test_every_row_has_its_strength_at_all_its_positions(x, strengths):
    c = torch.tensor(strengths, dtype=torch.float64)
    seen = steered(x, c=c)
    assert torch.equal(seen, x + c[:, None, None] * (formula(x) - x))
    for row, own, strength in zip(seen, x, strengths, strict=True):
        if strength == 0:
            assert torch.equal(bits(row), bits(own))


@given(eighths(5, D), st.permutations(range(5)))
def test_rows_are_independent(x, order):
    assert torch.equal(steered(x[order]), steered(x)[order])
    assert torch.equal(torch.cat([steered(row[None]) for row in x]), steered(x))


@given(eighths(3, D))
def test_what_is_read_and_what_is_added_may_be_mixed_alike(x):
    """Uᵀ(A h + b) is the same for Q U, Q A and Q b with Q a rotation, and for the same rows in another order."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    for q in (turn, turn.flip(0)):
        assert torch.equal(steered(x, LowRank({"0": tuple(q @ part for part in PARTS)})), steered(x))


@given(eighths(3, D))
def test_one_edit_is_the_sum_of_those_of_its_rows_where_each_sees_the_same_activation(x):
    parts = [tuple(part[r : r + 1] for part in PARTS) for r in range(R)]
    apart = sum(steered(x, LowRank({"0": own})) - x for own in parts)
    assert torch.equal(steered(x) - x, apart)


@pytest.mark.parametrize("shape", [(D,), (0, D), (1, D), (2, 0, D), (2, 3, 4, D)], ids=str)
def test_every_shape_is_edited_along_its_last_axis(shape):
    x = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(1)).double() / 8
    seen = steered(x, axis=-1)
    assert seen.shape == x.shape and torch.equal(seen, formula(x))


def test_a_strided_activation_is_edited_and_the_caller_s_tensor_is_not():
    x = torch.randint(-8, 9, (D, 4), generator=torch.Generator().manual_seed(1)).double().T
    before = x.clone()
    assert torch.equal(steered(x), formula(before)) and torch.equal(x, before)


# --- where -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("axis", [1, -2])
def test_a_given_axis_is_edited(axis):
    x = torch.randint(-8, 9, (2, D, D), generator=torch.Generator().manual_seed(1)).double() / 8
    assert torch.equal(steered(x, axis=axis), formula(x.mT).mT)


def test_an_edit_remembers_its_axis():
    x = torch.randint(-8, 9, (2, D, D), generator=torch.Generator().manual_seed(1)).double() / 8
    assert torch.equal(steered(x, LowRank({"0": PARTS}, metadata={"axis 0": "1"})), formula(x.mT).mT)


def test_channels_of_a_convolution_are_its_features():
    conv = nn.Sequential(nn.Conv2d(1, D, 1)).double()
    x = torch.randn(2, 1, D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = formula(conv(x).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(steered(x, model=conv), expected)


@given(eighths(3, D))
def test_each_site_has_its_own_edit_and_some_may_be_left_out(x):
    both = LowRank({"0": PARTS, "1": OTHERS})
    assert torch.equal(steered(x, both, chain(2)), formula(formula(x), OTHERS))
    assert torch.equal(steered(x, both, chain(2), sites="1"), formula(x, OTHERS))
    seen = steered(x, LowRank({"0:in": PARTS}), chain(2))
    assert torch.equal(seen, formula(x))


@given(eighths(3, D))
def test_two_edits_compose_in_the_order_entered(x):
    model = chain()
    with Steerer(model, EDIT), Steerer(model, LowRank({"0": OTHERS}), c=2.0):
        first = formula(x)
        assert torch.equal(model(x), first + 2 * (formula(first, OTHERS) - first))


@given(eighths(3, D), eighths(D))
def test_an_edit_and_a_vector_compose_in_the_order_entered(x, v):
    model, vector = chain(), SteeringVector({"0": v})
    with Steerer(model, vector), Steerer(model, EDIT):
        assert torch.equal(model(x), formula(x + v))
    with Steerer(model, EDIT), Steerer(model, vector, intervention=Add()):
        assert torch.equal(model(x), formula(x) + v)


# --- which rows ------------------------------------------------------------------------------------------------------
@given(eighths(6, D))
def test_a_gate_chooses_the_rows_and_leaves_the_others_bit_for_bit(x):
    gate = ProjectionAbove(SteeringVector({"0": torch.tensor([1.0, 0.0, 0.0]).double()}), threshold=0.5)
    seen = steered(x, gate=gate)
    fires = x[:, 0] > 0.5
    assert torch.equal(seen[fires], formula(x)[fires])
    assert torch.equal(bits(seen[~fires]), bits(x[~fires]))


def test_a_strength_by_concept_and_a_changed_strength_are_taken():
    model, x = chain(), torch.ones(2, D, dtype=torch.float64)
    with Steerer(model, LowRank({"0": PARTS}, concept="kind"), c={"kind": 2.0}) as steerer:
        assert torch.equal(model(x), x + 2 * (formula(x) - x))
        steerer.c = {"kind": 0.0}
        assert torch.equal(model(x), x)
        steerer.c = -1.0
        assert torch.equal(model(x), x - (formula(x) - x))


def test_a_sweep_takes_an_edit():
    x = torch.ones(1, D, dtype=torch.float64)
    table = sweep(chain(), EDIT, c=[0.0, 2.0], evaluate=lambda m: {"sum": float(m(x).sum())}, progress=False)
    assert [row["sum"] for row in table] == [D, float((x + 2 * (formula(x) - x)).sum())]


# --- how -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
def test_every_backend_gives_the_same_and_leaves_the_model_as_it_was(backend):
    model, x = nn.Sequential(nn.Linear(D, D), nn.ReLU()).double(), torch.ones(4, D, dtype=torch.float64)
    before, plain = state(model), model(x)
    seen = steered(x, LowRank({"1": PARTS}), model, backend=backend)
    torch.testing.assert_close(seen, formula(plain.detach()))
    assert state(model) == before and torch.equal(bits(model(x)), bits(plain))


def test_an_edit_that_depends_on_the_activation_cannot_be_folded():
    with pytest.raises(UnsupportedModelError, match="fold"):
        Steerer(nn.Sequential(nn.Linear(D, D)), EDIT, backend="fold")


def test_an_error_in_the_block_leaves_the_model_as_it_was():
    class Fails(nn.Module):
        def forward(self, x):
            return x / (1 // 0)

    model = nn.Sequential(nn.Identity(), nn.Identity(), Fails())
    before = state(model)
    with pytest.raises(ZeroDivisionError), Steerer(model, LowRank({"0": PARTS, "1": PARTS})):
        model(torch.ones(1, D))
    assert state(model) == before


def test_copies_and_pickles_of_a_steerer_edit_alike():
    x = torch.ones(2, D, dtype=torch.float64)
    steerer = Steerer(chain(), EDIT, c=torch.tensor([1.0, -2.0]))
    for other in (copy.deepcopy(steerer), pickle.loads(pickle.dumps(steerer))):
        with other:
            assert torch.equal(other.model(x), x + torch.tensor([[1.0], [-2.0]]) * (formula(x) - x))


def test_gradients_flow_through_the_edit_to_the_input():
    model, x = chain(), torch.ones(1, D, dtype=torch.float64, requires_grad=True)
    with Steerer(model, EDIT, c=2.0):
        model(x).sum().backward()
    reads, adds, _ = PARTS
    expected = (torch.eye(D, dtype=torch.float64) + 2 * adds.T @ reads).sum(0)
    assert torch.equal(x.grad[0], expected)


def test_made_in_inference_mode_it_works_in_autograd():
    with torch.inference_mode():
        edit = LowRank({"0": tuple(part + 0 for part in PARTS)})
    model, x = chain(), torch.ones(1, D, dtype=torch.float64, requires_grad=True)
    with Steerer(model, edit):
        model(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("c", [2.0, torch.tensor([0.0, 1.0, -1.0])], ids=["one", "per row"])
@pytest.mark.parametrize("gated", [False, True])
def test_compiled_without_a_break_it_is_the_same(c, gated):
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh()).double()
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gate = ProjectionAbove(SteeringVector({"1": torch.ones(D)}), threshold=0.0) if gated else None
    with Steerer(model, LowRank({"1": PARTS}), c=c, gate=gate), torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        assert not torch.equal(expected, model[1](model[0](x)) * 0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    torch.compiler.reset()


# --- what cannot be --------------------------------------------------------------------------------------------------
def test_what_does_not_fit_is_refused_and_nothing_is_attached():
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D + 1))
    before = state(model)
    with pytest.raises(ShapeError, match=r"site '1'.*4 features"):
        Steerer(model, LowRank({"0": PARTS, "1": PARTS}))
    for c in (float("nan"), float("inf"), {"other": 1.0}):
        with pytest.raises((StrengthError, LookupError)):
            Steerer(model, EDIT, c=c)
    with pytest.raises(ShapeError, match="one site or more"):
        LowRank({})
    assert state(model) == before


def test_whole_numbers_are_no_activations():
    with pytest.raises(OutputError, match="floating"):
        steered(torch.ones(2, D, dtype=torch.long))


def test_a_batch_of_another_size_than_the_strengths_is_refused():
    with pytest.raises((StrengthError, ShapeError)):
        steered(torch.ones(4, D), c=torch.ones(3))
