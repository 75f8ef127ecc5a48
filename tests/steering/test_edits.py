"""Every intervention: its formula, the laws that all of them share, and how a Steerer applies several."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from actsteer import (
    Ablate,
    Add,
    Affine,
    Chain,
    Clamp,
    ConceptNotFoundError,
    Intervention,
    KeepNorm,
    LowRank,
    Replace,
    Rotate,
    ShapeError,
    SiteNotFoundError,
    SoftProjection,
    Steerer,
    SteeringVector,
    VectorBank,
)
from tests.oracles import state
from tests.zoo import bits

G = torch.Generator().manual_seed(0)
D = 4
H, V = torch.randn(6, D, generator=G, dtype=torch.float64), torch.randn(D, generator=G, dtype=torch.float64)
U = V / V.norm()
W, B = torch.randn(D, D, generator=G, dtype=torch.float64), torch.randn(D, generator=G, dtype=torch.float64)
READS, ADDS, OFFSETS = (torch.randn(size, generator=G, dtype=torch.float64) for size in ((2, D), (2, D), (2,)))
ONE = torch.ones((), dtype=torch.float64)
ALONG = (H @ U)[:, None]

RULES = {  # what the row becomes at c = 1
    "add": (Add(), H + V),
    "relative": (Add(relative=True), H + H.norm(dim=1, keepdim=True) * U),
    "ablate": (Ablate(), H - ALONG * U),
    "one-sided": (Ablate(one_sided=True), torch.where(ALONG > 0, H - ALONG * U, H)),
    "clamp": (Clamp(2.5), H - ALONG * U + 2.5 * U),
    "replace": (Replace({"0": B}).at("0"), B.expand_as(H)),
    "replace all": (Replace({"0": H.flip(0)}).at("0"), H.flip(0)),
    "affine": (Affine({"0": (W, B)}).at("0"), H @ W.T + B),
    "soft projection": (SoftProjection({"0": torch.outer(U, U) / 2}).at("0"), ALONG * U / 2),
    "low rank": (LowRank({"0": (READS, ADDS, OFFSETS)}).at("0"), H + (H @ READS.T + OFFSETS) @ ADDS),
}
KEEPING = {name: KeepNorm(rule) for name, (rule, _) in RULES.items()}
ALL = {name: rule for name, (rule, _) in RULES.items()} | {f"{name}, norm kept": rule for name, rule in KEEPING.items()}
ALL |= {"rotate": Rotate(0.7), "chain": Chain(Ablate(), Add())}
BY_ROW = {name: rule for name, rule in ALL.items() if "replace all" not in name}  # that one has its rows itself
every = pytest.mark.parametrize("rule", ALL.values(), ids=ALL)
every_by_row = pytest.mark.parametrize("rule", BY_ROW.values(), ids=BY_ROW)


# --- the formulas ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rule", "expected"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("c", [1.0, 0.5, -1.0, 2.0])
def test_c_scales_the_change(rule, expected, c):
    torch.testing.assert_close(rule(H, V, c * ONE), H + c * (expected - H))


@pytest.mark.parametrize("name", KEEPING)
def test_the_norm_is_kept_and_the_rest_is_the_same_edit(name):
    edited, expected = KEEPING[name](H, V, ONE), RULES[name][1]
    torch.testing.assert_close(edited.norm(dim=1), H.norm(dim=1))
    torch.testing.assert_close(edited, expected * (H.norm(dim=1) / expected.norm(dim=1))[:, None])


@pytest.mark.parametrize("angle", [0.3, 1.0, -0.5])
def test_a_rotation_turns_by_its_angle_in_the_plane_and_keeps_the_norm(angle):
    edited = Rotate(1.0)(H, V, angle * ONE)
    torch.testing.assert_close(edited.norm(dim=1), H.norm(dim=1))
    before, after = (torch.acos((rows @ U) / rows.norm(dim=1)) for rows in (H, edited))
    torch.testing.assert_close(after, (before - angle).clamp(0, math.pi))
    for row, turned in zip(H, edited, strict=True):
        assert np.linalg.matrix_rank(torch.stack([row, U, turned]).numpy(), tol=1e-9) == 2


def test_a_rotation_goes_no_further_than_the_direction_or_its_opposite():
    far = torch.tensor(10.0, dtype=torch.float64)
    norms = H.norm(dim=1, keepdim=True)
    torch.testing.assert_close(Rotate(1.0)(H, V, far), norms * U)
    torch.testing.assert_close(Rotate(1.0)(H, V, -far), -norms * U)


def test_along_the_direction_no_plane_is_spanned_and_nothing_turns():
    rows = torch.stack([V, -2 * V, 0 * V])
    assert torch.equal(Rotate(1.0)(rows, V, ONE), rows)


def test_a_chain_does_one_after_the_other():
    expected = Add()(Ablate()(H, V, ONE), V, ONE)
    assert torch.equal(Chain(Ablate(), Add())(H, V, ONE), expected)
    assert not torch.allclose(Chain(Add(), Ablate())(H, V, ONE), expected)


def test_replacing_and_mapping_at_one_are_exact():
    assert torch.equal(Replace({"0": B}).at("0")(H, V, ONE), B.expand_as(H))
    assert torch.equal(Replace({"0": H.flip(0)}).at("0")(H, V, ONE), H.flip(0))


# --- the laws --------------------------------------------------------------------------------------------------------
@every
def test_it_is_an_intervention_and_changes_nothing_in_place(rule):
    rows, direction = H.clone(), V.clone()
    rule(rows, direction, ONE)
    assert isinstance(rule, Intervention)
    assert torch.equal(rows, H) and torch.equal(direction, V)


@every_by_row
def test_no_row_changes_another(rule):
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    c = torch.linspace(-1, 2, 6, dtype=torch.float64)[:, None]
    edited = rule(H, V, c)
    torch.testing.assert_close(rule(H[order], V, c[order]), edited[order], rtol=1e-12, atol=1e-12)
    for index, row in enumerate(H):
        torch.testing.assert_close(rule(row[None], V, c[index]), edited[index : index + 1], rtol=1e-12, atol=1e-12)


@every_by_row
def test_positions_are_edited_like_rows(rule):
    c = torch.tensor([0.0, 1.5], dtype=torch.float64)
    edited = rule(H.reshape(2, 3, D), V, c[:, None, None])
    torch.testing.assert_close(edited.reshape(6, D), rule(H, V, c.repeat_interleave(3)[:, None]))


@every
def test_gradients_reach_the_activation_and_stay_finite(rule):
    rows = H.clone().requires_grad_()
    rule(rows, V, ONE).square().sum().backward()
    assert bool(rows.grad.isfinite().all())


DIRECTED = {n: r for n, r in BY_ROW.items() if not any(kind in n for kind in ("replace", "affine", "low rank"))}


@pytest.mark.parametrize("rule", DIRECTED.values(), ids=DIRECTED)
def test_a_zero_direction_or_activation_makes_no_nan(rule):
    assert bool(rule(torch.zeros(2, D), torch.ones(D), torch.tensor(1.0)).isfinite().all())
    assert bool(rule(H, torch.zeros_like(V), ONE).isfinite().all())


# --- in a Steerer ----------------------------------------------------------------------------------------------------
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, x):
        return self.second(2 * self.first(x))


BANK = VectorBank({"v": SteeringVector({"first": V, "second": U}), "w": SteeringVector({"first": B})})


def steered(x, vectors=BANK, **options):
    model = Two()
    before = state(model)
    with Steerer(model, vectors, **options):
        output = model(x)
    assert state(model) == before and torch.equal(model(x), 2 * x)
    return output


@pytest.mark.parametrize("rule", DIRECTED.values(), ids=DIRECTED)
def test_a_bank_is_applied_concept_by_concept_at_every_site(rule):
    c = {"v": 0.5, "w": -1.0}
    first = rule(rule(H, V, 0.5 * ONE), B, -ONE)
    torch.testing.assert_close(steered(H, c=c, intervention=rule), rule(2 * first, U, 0.5 * ONE))


def unlimited(h, v, c):
    """An intervention of the user's own that is nowhere finite."""
    return h * math.inf + math.nan


STEERED = BY_ROW | {"of the user": unlimited}


@pytest.mark.parametrize("rule", STEERED.values(), ids=STEERED)
@pytest.mark.parametrize("c", [0.0, -0.0, torch.zeros(6), torch.zeros(6, 3)], ids=["0", "-0", "rows", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_at_strength_zero_the_activation_stays_bit_for_bit(rule, c, dtype):
    x = H.to(dtype).clone() if not torch.is_tensor(c) or c.ndim < 2 else H.to(dtype)[:, None].repeat(1, 3, 1)
    x[0] = torch.tensor([0.0, -0.0, math.inf, -math.inf])
    with Steerer(model := Two(), SteeringVector({"first": V}), c=c, intervention=rule):
        assert torch.equal(bits(model.first(x)), bits(x))


def test_rows_at_strength_zero_stay_bit_for_bit_among_others():
    c = torch.tensor([0.0, 1.0, -0.0, 1.0, 1.0, 0.0])
    with Steerer(model := Two(), SteeringVector({"first": V}), c=c, intervention=unlimited):
        seen = model.first(H)
    assert torch.equal(seen[c == 0], H[c == 0]) and not bool(seen[c != 0].isfinite().any())


def test_what_an_intervention_gives_has_the_shape_of_what_it_was_given():
    message = r"expected an activation of the shape .*\(6, 4\), got \(4,\)"
    steerer = Steerer(model := Two(), SteeringVector({"first": V}), intervention=lambda h, v, c: v)
    with pytest.raises(ShapeError, match=message), steerer:
        model.first(H)


@pytest.mark.parametrize("c", [1.0, 0.5, torch.linspace(-1, 2, 6, dtype=torch.float64)], ids=["1", "0.5", "rows"])
def test_the_norm_is_kept_around_an_edit_with_sites_and_inside_a_chain(c):
    edit = LowRank({"first": (READS, ADDS, OFFSETS), "second": (ADDS, READS, OFFSETS)}, concept="kind")
    by_row = c[:, None] if torch.is_tensor(c) else c * ONE
    first = KeepNorm(edit.at("first"))(H, V, by_row)
    expected = KeepNorm(edit.at("second"))(2 * first, V, by_row)
    torch.testing.assert_close(steered(H, KeepNorm(edit), c={"kind": c}), expected)
    bank = SteeringVector({"first": V, "second": U})
    first = Add()(KeepNorm(edit.at("first"))(H, V, by_row), V, by_row)
    expected = Add()(KeepNorm(edit.at("second"))(2 * first, U, by_row), U, by_row)
    torch.testing.assert_close(steered(H, bank, c=c, intervention=Chain(KeepNorm(edit), Add())), expected)
    named = KeepNorm(edit).described({"concept": "other"})
    assert named.constant.concept == "other" and torch.equal(
        named.at("first")(H, V, ONE), KeepNorm(edit.at("first"))(H, V, ONE)
    )


def test_every_concept_may_have_an_intervention_of_its_own():
    seen = steered(H, intervention={"v": Ablate()})
    first = Add()(Ablate()(H, V, ONE), B, ONE)
    torch.testing.assert_close(seen, Ablate()(2 * first, U, ONE))


@pytest.mark.parametrize(
    "edit",
    [
        Affine({"first": (W, B), "second": (-W, B)}),
        LowRank({"first": (READS, ADDS, OFFSETS), "second": (ADDS, READS, OFFSETS)}),
        Replace({"first": H.flip(0), "second": B}),
    ],
    ids=["affine", "low rank", "replace"],
)
def test_an_edit_takes_the_place_of_vectors_at_all_its_sites(edit):
    c = torch.linspace(-1, 2, 6, dtype=torch.float64)[:, None]
    first = edit.at("first")(H, V, c)
    torch.testing.assert_close(steered(H, edit, c=c[:, 0]), edit.at("second")(2 * first, V, c))


@pytest.mark.parametrize("rule", [r for r in DIRECTED.values() if r != Add()], ids=[n for n in DIRECTED if n != "add"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once_at_the_end(rule, dtype):
    v, x = SteeringVector({"first": V.float()}), H.to(dtype)
    with Steerer(model := Two(), v, c=0.5, intervention=rule):
        seen = model.first(x)
    expected = rule(x.float(), V.float(), torch.tensor(0.5)).to(dtype)
    assert torch.equal(seen, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16), Steerer(model, v, c=0.5, intervention=rule):
        assert torch.equal(model.first(x), expected)


@pytest.mark.parametrize("rule", DIRECTED.values(), ids=DIRECTED)
def test_channels_of_a_convolution_are_edited_along_their_axis(rule):
    conv = nn.Sequential(nn.Conv2d(1, D, 1)).double()
    x = torch.randn(2, 1, D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    c = torch.tensor([1.0, -0.5], dtype=torch.float64)
    with torch.no_grad(), Steerer(conv, SteeringVector({"0": V}), c=c, intervention=rule):
        seen = conv(x)
    with torch.no_grad():
        expected = rule(conv(x).movedim(1, -1), V, c[:, None, None, None]).movedim(-1, 1)
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("rule", DIRECTED.values(), ids=DIRECTED)
def test_compiled_it_is_the_same_and_a_change_of_strength_compiles_nothing(rule):
    torch.compiler.reset()
    model, counter = Two(), CompileCounter()
    with Steerer(model, BANK, c=1.0, intervention=rule) as steerer:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for c in (1.0, 0.5, -2.0, 0.0):
            steerer.c = c
            torch.testing.assert_close(compiled(H), steered(H, c=c, intervention=rule))
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConceptNotFoundError, match="intervention names no concept of the bank: 'x'"):
        Steerer(Two(), BANK, intervention={"x": Ablate()})
    for bad, message in (("ablate", "expected one such as Add"), (Ablate, "the class Ablate; call it first")):
        for intervention in (bad, {"v": bad}):
            with pytest.raises(TypeError, match=message):
                Steerer(Two(), BANK, intervention=intervention)
    for rule in (Affine({"first": (W, B)}), KeepNorm(Affine({"first": (W, B)})), Chain(Affine({"first": (W, B)}))):
        with pytest.raises(SiteNotFoundError, match="no edit at site"):
            Steerer(Two(), BANK, intervention=rule)
    with pytest.raises(TypeError, match="has no sites; give the Steerer vectors, and this as intervention="):
        Steerer(Two(), KeepNorm(Ablate()))
    for make in (KeepNorm, Chain):
        with pytest.raises(TypeError, match=f"{make.__name__}: expected"):
            make("ablate")
        with pytest.raises(TypeError, match=r"call what at\(site\) gives"):
            make(Affine({"first": (W, B)}))(H, V, ONE)
    with pytest.raises(ShapeError, match="values of shape"), Steerer(model := Two(), Replace({"first": H})):
        model(H[:3])
    for bad in ({}, {"0": torch.ones(2).int()}, {"0": torch.tensor([math.nan])}, {"0": torch.tensor(1.0)}):
        with pytest.raises(ShapeError):
            Replace(bad)
    for bad in ({}, {"0": (W[:2], B)}, {"0": (W, B[:2])}, {"0": (W * math.inf, B)}):
        with pytest.raises(ShapeError):
            Affine(bad)


def test_an_edit_owns_its_tensors():
    weight, values = W.clone(), B.clone()
    affine, replace = Affine({"0": (weight, B)}), Replace({"0": values}, concept="c")
    weight.zero_(), values.zero_(), affine["0"][0].zero_()
    torch.testing.assert_close(affine.at("0")(H, V, ONE), H @ W.T + B)
    torch.testing.assert_close(replace.at("0")(H, V, ONE), B.expand_as(H))
    assert replace.constant.concept == "c" and replace.sites == affine.sites == ("0",)


@pytest.mark.parametrize("inside", [Ablate(), Add()], ids=["ablate", "add"])
def test_rows_without_a_norm_have_finite_gradients_under_keep_norm(inside):
    x = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 2.0, 2.0]], requires_grad=True)
    steered = KeepNorm(inside)(x, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[0.0], [1.0], [1.0]]))
    assert torch.allclose(steered.norm(dim=1)[2], torch.tensor(3.0))
    steered.sum().backward()
    assert bool(x.grad.isfinite().all())


def test_an_intervention_that_returns_nothing_is_refused_in_words():
    model = torch.nn.Sequential(torch.nn.Identity())
    with (
        Steerer(model, SteeringVector({"0": torch.ones(2)}), intervention=lambda h, v, c: None),
        pytest.raises(ShapeError, match=r"expected an activation of the shape .* got NoneType"),
    ):
        model(torch.ones(1, 2))
