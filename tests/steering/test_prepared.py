"""Prepared: what does not depend on the activation is done once, and the edit stays the same."""

import copy

import pytest
import torch
from torch import nn

from actsteer import (
    Ablate,
    Add,
    Affine,
    Chain,
    Clamp,
    KeepNorm,
    LowRank,
    Prepared,
    ProjectionAbove,
    Rotate,
    Soft,
    Steerer,
    SteeringVector,
    VectorBank,
    ZeroDirectionError,
)
from actsteer.steering.interventions.intervention import prepared
from tests.zoo import normal

D = 5
H, V = normal(6, D), normal(D, seed=2)
EDIT = LowRank({"0": (normal(2, D, seed=3), normal(2, D, seed=4), normal(2, seed=5))})
ONE = torch.ones((), dtype=torch.float64)


def scale(h, v, c):
    """An intervention that does not prepare."""
    return h * (1 + c * v)


EXACT = {  # c · x is exact where c is a power of two, and so is the rest
    "add": Add(),
    "relative": Add(relative=True),
    "ablate": Ablate(),
    "one-sided": Ablate(one_sided=True),
    "clamp": Clamp(2.5),
    "rotate": Rotate(0.7),
    "rotate in a plane": Rotate(0.7, plane=normal(D, seed=8)),
    "norm kept": KeepNorm(Ablate()),
    "chain": Chain(Ablate(), Add(), KeepNorm(Add(relative=True))),
}
RULES = EXACT | {
    "affine": Affine({"0": (normal(D, D, seed=6), normal(D, seed=7))}).at("0"),
    "low rank": EDIT.at("0"),
    "of others that do not": Chain(scale, KeepNorm(scale)),
}
NEEDS_ONE = [name for name in EXACT if name != "add"]
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@rules
@pytest.mark.parametrize("c", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("shape", [(6, D), (2, 3, D), (1, D), (D,), (0, D)], ids=str)
def test_prepared_it_is_the_same_edit(rule, c, shape):
    h = H.reshape(-1)[: torch.Size(shape).numel()].reshape(shape)
    assert isinstance(rule, Prepared)
    torch.testing.assert_close(rule.prepare(V, c * ONE)(h), rule(h, V, c * ONE), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("c", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_c_scales_without_rounding_it_is_the_same_bit_for_bit(rule, c, dtype):
    h, v = H.to(dtype), V.to(dtype)
    assert torch.equal(rule.prepare(v, c * ONE)(h), rule(h, v, c * ONE))


@rules
def test_it_keeps_the_dtype_and_changes_nothing_in_place(rule):
    h, v = H.float(), V.float()
    edit = rule.prepare(v, 0.3 * ONE)
    first = edit(h)
    assert first.dtype is torch.float32
    assert torch.equal(edit(h), first)
    assert torch.equal(h, H.float()) and torch.equal(v, V.float())


@rules
def test_gradients_are_the_same(rule):
    one, other = H.clone().requires_grad_(), H.clone().requires_grad_()
    rule.prepare(V, 0.3 * ONE)(one).square().sum().backward()
    rule(other, V, 0.3 * ONE).square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_what_does_not_prepare_is_called():
    assert not isinstance(scale, Prepared)
    assert torch.equal(prepared(scale, V, 0.3 * ONE)(H), scale(H, V, 0.3 * ONE))


# --- in a Steerer ----------------------------------------------------------------------------------------------------
class Counted:
    """An intervention of the user's own that counts what is asked of it."""

    def __init__(self):
        self.prepared, self.called = [], 0

    def __call__(self, activation, direction, c):
        self.called += 1
        return scale(activation, direction, c)

    def prepare(self, direction, c):
        self.prepared.append((direction.dtype, float(c)))
        return lambda activation: scale(activation, direction, c)


def steered(x, rule, **options):
    model = nn.Sequential(nn.Identity())
    with Steerer(model, SteeringVector({"0": V}), intervention=rule, **options):
        return model(x)


def test_it_prepares_once_for_each_dtype_and_strength():
    model, rule = nn.Sequential(nn.Identity()), Counted()
    with Steerer(model, SteeringVector({"0": V}), c=2, intervention=rule) as steerer:
        del rule.prepared[:]  # whether it needs a direction was asked before
        for _ in range(3):
            assert torch.equal(model(H), scale(H, V, 2))
        assert rule.prepared == [(torch.float64, 2.0)]
        model(H.bfloat16())
        assert rule.prepared[1:] == [(torch.float32, 2.0)]
        steerer.c = 3
        for _ in range(3):
            assert torch.equal(model(H), scale(H, V, 3))
        assert rule.prepared[2:] == [(torch.float64, 3.0)]
    assert rule.called == 0


GATE = ProjectionAbove(SteeringVector({"0": V}), 0.0)
WAYS = {
    "number": {"c": 0.7},
    "rows": {"c": torch.linspace(-1, 2, 6)},
    "gate": {"c": 0.7, "gate": GATE},
    "soft gate": {"c": 0.7, "gate": Soft(GATE)},
}


@rules
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_steerer_gives_what_the_intervention_gives(rule, way, gradients):
    weights = way["gate"](H).double()[:, None] if "gate" in way else torch.ones(6, 1, dtype=torch.float64)
    c = torch.as_tensor(way["c"], dtype=torch.float64).reshape(-1, 1) * weights
    x = H.clone().requires_grad_(gradients)
    seen = steered(x, rule, **way)
    torch.testing.assert_close(seen.detach(), torch.where(c == 0, H, rule(H, V, c)), rtol=1e-12, atol=1e-12)
    assert seen.requires_grad == gradients


def test_a_gate_that_is_a_step_leaves_the_rows_where_it_does_not_fire_bit_for_bit():
    out, fires = steered(H, Rotate(0.7), gate=GATE), GATE(H)
    assert 0 < int(fires.sum()) < len(H)
    assert torch.equal(out[~fires], H[~fires])
    assert torch.equal(out[fires], Rotate(0.7)(H, V, ONE)[fires])


@pytest.mark.parametrize("rule", [Ablate(), Rotate(0.7), KeepNorm(Add())], ids=str)
def test_what_is_bound_in_inference_mode_works_with_gradients(rule):
    model, x = nn.Sequential(nn.Identity()), H.clone().requires_grad_()
    with Steerer(model, SteeringVector({"0": V.float()}), intervention=rule):
        with torch.inference_mode():
            model(H)
        model(x).square().sum().backward()
    other = H.clone().requires_grad_()
    rule(other, V.float().double(), ONE).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


# --- a direction of zero ---------------------------------------------------------------------------------------------
ZERO = SteeringVector({"0": V, "1": 0 * V})
WITH_ONE = {name: RULES[name] for name in NEEDS_ONE}
WITHOUT = {name: rule for name, rule in RULES.items() if name not in NEEDS_ONE}
with_one = pytest.mark.parametrize("rule", WITH_ONE.values(), ids=WITH_ONE)


def two():
    return nn.Sequential(nn.Identity(), nn.Identity())


@with_one
def test_an_edit_along_no_direction_is_refused_when_the_steerer_is_made(rule):
    with pytest.raises(ZeroDirectionError, match=r"site '1', concept 'vector': the direction is zero, .* needs one"):
        Steerer(two(), ZERO, intervention=rule)


@pytest.mark.parametrize("rule", WITHOUT.values(), ids=WITHOUT)
def test_an_edit_that_needs_no_direction_is_made_with_zero(rule):
    model = two()
    with Steerer(model, ZERO, intervention=rule):
        torch.testing.assert_close(model(H), rule(rule(H, V, ONE), 0 * V, ONE))


@with_one
def test_a_direction_that_is_not_used_is_not_asked_for_and_a_refused_strength_changes_nothing(rule):
    model = two()
    bank = VectorBank({"a": SteeringVector({"0": V, "1": V}), "none": ZERO})
    with Steerer(model, bank, c={"a": 0.5}, intervention=rule) as steerer:
        expected = model(H)
        with pytest.raises(ZeroDirectionError, match="site '1', concept 'none'"):
            steerer.c = {"a": 1.0, "none": 1.0}
        assert torch.equal(model(H), expected)
        steerer.c = {"a": 0.5, "none": 0.0}
        assert torch.equal(model(H), expected)


@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_a_concept_without_strength_is_not_read_from_its_file(tmp_path):
    bank = VectorBank({"a": SteeringVector({"0": V}), "none": SteeringVector({"0": 0 * V})})
    bank.save(tmp_path / "bank.safetensors")
    loaded = VectorBank.load(tmp_path / "bank.safetensors")
    with Steerer(two(), loaded, c={"a": 1.0}, intervention=Ablate()):
        assert type(loaded._vectors["none"]) is not SteeringVector
    with pytest.raises(ZeroDirectionError, match="concept 'none'"):
        Steerer(two(), loaded, intervention=Ablate())


def test_one_that_becomes_zero_in_the_dtype_of_the_activation_is_refused_at_the_first_pass():
    model = two().float()
    steerer = Steerer(model, SteeringVector({"0": V * 1e-300}), intervention=Ablate())
    with steerer, pytest.raises(ZeroDirectionError, match=r"site '0': in torch.float32, the direction is zero"):
        model(H.float())


def test_a_direction_that_is_trained_may_be_zero():
    model = two()
    with Steerer(model, SteeringVector({"0": V}), intervention=Ablate()) as steerer:
        directions = steerer.requires_grad_()["0"]
        with torch.no_grad():
            directions.zero_()
        assert torch.equal(model(H), H)


def test_a_copy_prepares_for_itself():
    model = two()
    steerer = Steerer(model, SteeringVector({"0": V}), intervention=Ablate())
    with steerer:
        expected = model(H)
    with copy.deepcopy(steerer) as again:
        assert torch.equal(again.model(H), expected)
