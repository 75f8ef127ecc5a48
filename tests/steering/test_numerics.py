"""Numerics: the output's dtype and device decide, nothing is edited in place, and nothing kept from a call is stale."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import Ablate, ProjectionAbove, Steerer, SteeringVector, VectorBank
from tests.zoo import bits, exact, identity, normal

V = torch.tensor([1.0, -2.0, 0.5, 4.0])
EAGER = pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])


def projecting(h, v, c):
    """h -> h + c (h · v) v, which saves the direction for the backward pass."""
    return h + c * (h @ v)[..., None] * v


def mirror(h, v, c):
    """h -> h + c (v - h)."""
    return h + c * (v - h)


# --- dtypes ------------------------------------------------------------------------------------------------------
@pytest.mark.case(24)
@EAGER
@pytest.mark.parametrize("intervention", [None, mirror], ids=["Add", "custom"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("site", ["1", "2:in"])
def test_the_models_dtype_is_kept(backend, intervention, gated, dtype, site):
    model, x = exact().to(dtype), torch.ones(2, 4, dtype=dtype)
    gate = ProjectionAbove(SteeringVector({"0": torch.ones(4)}), -1e3) if gated else None
    hidden = model[1](model[0](x))
    edited = hidden + 2 * V.to(dtype) if intervention is None else mirror(hidden, V.to(dtype), 2)
    with Steerer(model, SteeringVector({site: V}), c=2, backend=backend, intervention=intervention, gate=gate):
        out = model(x)
    assert out.dtype is dtype
    assert torch.equal(out, model[4](model[3](model[2](edited))))


@pytest.mark.case(24)
@EAGER
@pytest.mark.parametrize("intervention", [None, mirror], ids=["Add", "custom"])
def test_autocast_decides_the_dtype_at_the_site(backend, intervention):
    model, x = exact().float(), torch.ones(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model[0](x)
        assert hidden.dtype is torch.bfloat16
        edited = hidden + 2 * V.bfloat16() if intervention is None else mirror(hidden, V.bfloat16(), 2)
        with Steerer(model, SteeringVector({"0": V}), c=2, backend=backend, intervention=intervention):
            out = model(x)
        assert out.dtype is torch.bfloat16
        assert torch.equal(out, model[1:](edited))


FINE = torch.tensor([1 + 2**-12, 0.3])  # more digits than bfloat16 has


@pytest.mark.case(24)
@pytest.mark.parametrize("when", ["made", "set", "attached", "gated", "trained"])
@pytest.mark.parametrize("rows", [False, True], ids=["number", "rows"])
def test_under_autocast_a_float32_activation_is_steered_at_full_precision(when, rows):
    bank = VectorBank({"a": SteeringVector({"0": FINE}), "b": SteeringVector({"0": -3 * FINE})})
    c = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0, 0.0])} if rows else {"a": 1.0, "b": 2.0}
    gate = ProjectionAbove(SteeringVector({"0": FINE}), -1.0) if when == "gated" else None
    model, x = identity(), torch.zeros(2, 2)
    with Steerer(model, bank, c=c, gate=gate) as steerer:
        if when == "trained":
            steerer.requires_grad_()
        expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steerer = (
            Steerer(model, bank, c=c if when == "made" else 0.0, gate=gate) if when in ("made", "set") else steerer
        )
        if when == "set":
            steerer.c = c
        with steerer:
            out = model(x)
    assert out.dtype is torch.float32
    assert torch.equal(out, expected)


@pytest.mark.case(24)
def test_an_intervention_that_computes_in_float32_gives_back_the_models_dtype():
    model, x = exact().bfloat16(), torch.ones(2, 4, dtype=torch.bfloat16)

    def careful(h, v, c):
        return h.float() + c.float() * v.float()

    with Steerer(model, SteeringVector({"1": V}), c=2):
        expected = model(x)
    with Steerer(model, SteeringVector({"1": V}), c=2, intervention=careful):
        assert torch.equal(model(x), expected)


@pytest.mark.case(24)
@EAGER
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_outputs_device_decides(backend, gated):
    model, v = identity(), SteeringVector({"0": V})
    gate = ProjectionAbove(SteeringVector({"0": V}), -1e3) if gated else None
    with Steerer(model, v, backend=backend, gate=gate):
        for _ in range(2):  # what is kept from one device serves no other
            out = model(torch.zeros(2, 4, device="meta"))
            assert out.device.type == "meta"
            assert out.shape == (2, 4)
            assert torch.equal(model(torch.zeros(2, 4)), V.expand(2, 4))


# --- inference tensors -------------------------------------------------------------------------------------------
@pytest.mark.case(25)
@EAGER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("made", ["vector", "steerer", "c", "gate", "everything", "attached"])
@pytest.mark.parametrize("intervention", [None, projecting], ids=["Add", "projecting"])
def test_what_is_made_in_inference_mode_works_with_gradients(backend, dtype, made, intervention):
    model, x = exact(), normal(3, 4).requires_grad_()
    parts = {
        "vector": lambda: SteeringVector({"1": V.to(dtype)}),
        "gate": lambda: ProjectionAbove(SteeringVector({"0": V.to(dtype)}), 0.0),
        "c": lambda: torch.tensor([0.5, -1.0, 2.0]),
    }

    def build(name):
        with torch.inference_mode(mode=made in (name, "everything")):
            return parts[name]()

    v, gate, c = (build(name) for name in ("vector", "gate", "c"))
    with torch.inference_mode(mode=made in ("steerer", "everything")):
        steerer = Steerer(model, v, c=torch.ones(3), gate=gate, intervention=intervention, backend=backend)
    with torch.inference_mode(mode=made in ("c", "everything")):
        steerer.c = c
    with torch.inference_mode(mode=made in ("attached", "everything")):
        steerer.attach()
        model(x)
    model(x).sum().backward()
    steerer.detach()
    hidden = model[1](model[0](x.detach()))
    weight = (c * (model[0](x.detach()) @ V.double() > 0))[:, None].double()
    x.grad, got = None, x.grad
    wanted = hidden + weight * V if intervention is None else projecting(hidden, V.double(), weight)
    assert wanted.shape == (3, 4)
    inputs = x.detach().clone().requires_grad_()
    hidden = model[1](model[0](inputs))
    edited = hidden + weight * V if intervention is None else projecting(hidden, V.double(), weight)
    model[4](model[3](model[2](edited))).sum().backward()
    torch.testing.assert_close(got, inputs.grad)


@pytest.mark.case(25)
def test_directions_asked_for_in_inference_mode_can_be_trained():
    model = exact()
    with Steerer(model, SteeringVector({"1": V})) as steerer:
        with torch.inference_mode():
            directions = steerer.requires_grad_()["1"]
        model(normal(3, 4)).sum().backward()
        assert directions.grad is not None


# --- in place ----------------------------------------------------------------------------------------------------
@pytest.mark.case(26)
@EAGER
@pytest.mark.parametrize("intervention", [None, mirror], ids=["Add", "custom"])
@pytest.mark.parametrize(
    ("module", "site"),
    [(module, site) for module in (nn.Identity(), nn.Dropout(0.5), nn.Flatten()) for site in ("0", "0:in")],
    ids=str,
)
def test_the_callers_input_is_not_changed(backend, intervention, module, site):
    model = nn.Sequential(module, nn.Identity()).eval()
    x = torch.tensor([[1.0, 2.0, 0.25, 4.0], [8.0, 0.5, 2.0, 1.0]])  # positive: ReLU gives it out as it is
    kept = x.clone()
    with Steerer(model, SteeringVector({site: V.abs()}), c=0.5, backend=backend, intervention=intervention):
        outs = [model(x) for _ in range(3)]
        assert torch.equal(bits(x), bits(kept))
    expected = x + 0.5 * V.abs() if intervention is None else mirror(x, V.abs(), 0.5)
    assert all(torch.equal(out, expected) for out in outs)
    assert torch.equal(model(x), kept)


@pytest.mark.case(26)
@EAGER
@pytest.mark.parametrize("intervention", [None, mirror], ids=["Add", "custom"])
@pytest.mark.parametrize("module", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)], ids=str)
@pytest.mark.parametrize("site", ["0", "0:in"])
def test_behind_a_module_that_writes_into_its_input_the_edit_is_there_too(backend, intervention, module, site):
    model = nn.Sequential(module, nn.Identity()).eval()
    x = torch.tensor([[1.0, 2.0, 0.25, 4.0], [8.0, 0.5, 2.0, 1.0]])
    with Steerer(model, SteeringVector({site: V.abs()}), c=0.5, backend=backend, intervention=intervention):
        for _ in range(3):
            expected = x + 0.5 * V.abs() if intervention is None else mirror(x, V.abs(), 0.5)
            assert torch.equal(model(x), expected)
            assert torch.equal(x, expected)


@pytest.mark.case(26)
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.parametrize("c", [0.0, 1.0])
def test_an_in_place_module_behind_the_site_does_not_reach_what_is_kept(backend, c):
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    x = torch.zeros(2, 4)
    with Steerer(model, SteeringVector({"0": V}), c=c, backend=backend):
        for _ in range(3):
            assert torch.equal(model(x), (x + c * V).relu())
    assert torch.equal(x, torch.zeros(2, 4))


@pytest.mark.case(26)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.Tanh()], ids=str)
def test_an_activation_that_saves_its_output_can_go_backward(activation):
    model, x = nn.Sequential(activation), normal(2, 4).requires_grad_()
    activation(x).sum().backward()
    expected, x.grad = x.grad, None
    with Steerer(model, SteeringVector({"0": V})):
        model(x).sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize(
    "options", [{"gate": ProjectionAbove(SteeringVector({"0": torch.ones(4)}), -1e9)}, {"intervention": Ablate()}]
)
def test_directions_that_were_trained_and_are_frozen_again_are_not_remembered(options):
    model, x = nn.Sequential(nn.Identity()), torch.full((2, 4), 2.0)
    with Steerer(model, SteeringVector({"0": V}), **options) as steerer:
        directions = steerer.requires_grad_()["0"].requires_grad_(requires_grad=False)
        for _ in range(3):
            with torch.no_grad():
                directions[:, :2] *= 0.5
            with Steerer(nn.Sequential(nn.Identity()), steerer.vectors, **options) as fresh:
                assert torch.equal(model(x), fresh.model(x))


# --- nothing stale -----------------------------------------------------------------------------------------------
BASES = [
    torch.tensor([1.0, -2.0, 0.5, 4.0]),
    torch.tensor([0.25, 0.5, -1.0, 2.0]),
]
calls = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([(2, 4), (3, 4), (2, 3, 4), (4,), (1, 4), (0, 4)]),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        "mode": st.sampled_from(["grad", "no_grad", "inference", "autocast"]),
        "wants_grad": st.booleans(),
        "training": st.booleans(),
        "device": st.sampled_from(["cpu", "cpu", "cpu", "meta"]),
        "train_directions": st.sampled_from([None, None, None, "ask", "step", "freeze"]),
        "c": st.sampled_from([None, 0.0, 1.0, -0.5, {"a": 2.0}, {"a": 0.5, "b": -1.0}, "rows"]),
        "attach": st.sampled_from(["stay", "stay", "stay", "again"]),
    }
)


@given(st.lists(calls, min_size=1, max_size=8), st.sampled_from(["hook", "tap"]), st.booleans(), st.booleans())
def test_any_sequence_of_calls_is_at_each_one_what_a_plain_model_says(sequence, backend, gated, custom):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    bank = VectorBank({name: SteeringVector({"0": base}) for name, base in zip("ab", BASES, strict=True)})
    gate = ProjectionAbove(SteeringVector({"0": torch.ones(4)}), -1e9) if gated else None
    steerer = Steerer(model, bank, gate=gate, intervention=mirror if custom else None, backend=backend).attach()
    directions, c, trained = torch.stack(BASES), dict.fromkeys("ab", 1.0), None
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
    for call in sequence:
        shape = call["shape"]
        if call["attach"] == "again":
            steerer.detach()
            steerer.attach()
        if call["train_directions"] == "ask" and trained is None:
            trained = steerer.requires_grad_()["0"]
        elif trained is not None and call["train_directions"] is not None:
            with torch.no_grad():
                trained.mul_(0.5)
            trained.requires_grad_(requires_grad=call["train_directions"] == "step")
            directions = trained.detach().clone()
        if call["c"] is not None:
            c = torch.arange(shape[0], dtype=torch.float64) if call["c"] == "rows" else call["c"]
            if call["c"] == "rows" and len(shape) == 1:
                c = 1.0
            steerer.c = c
            c = {name: c.get(name, 0.0) for name in "ab"} if isinstance(c, dict) else dict.fromkeys("ab", c)
        rows = {len(value) for value in c.values() if isinstance(value, torch.Tensor)}
        if (rows and (len(shape) == 1 or rows != {shape[0]})) or (gated and len(shape) == 1):
            continue  # refused, as other tests say
        model.train(call["training"])
        x = torch.full(shape, 2.0, dtype=call["dtype"], device=call["device"])
        if call["mode"] != "inference":
            x.requires_grad_(requires_grad=call["wants_grad"])
        enter = modes.get(call["mode"], lambda: torch.autocast("cpu", dtype=torch.bfloat16))
        with enter():
            out = model(x)
        expected = x.detach()
        strengths = [value if isinstance(value, torch.Tensor) else torch.tensor(float(value)) for value in c.values()]
        spread = [s.reshape(-1, *[1] * (len(shape) - 1)) if s.ndim else s for s in strengths]
        if custom:
            for strength, direction in zip(spread, directions, strict=True):
                expected = mirror(expected, direction.to(x), strength.to(x))
        else:
            expected = expected + sum(s.to(x) * d.to(x) for s, d in zip(spread, directions, strict=True))
        assert out.dtype is call["dtype"]
        assert out.device == x.device
        assert out.shape == x.shape
        if call["device"] == "cpu":
            assert torch.equal(out.detach(), expected)
        recorded = call["mode"] in ("grad", "autocast")
        asked = x.requires_grad or (trained is not None and trained.requires_grad)
        if custom and not any(bool(strength.any()) for strength in strengths):  # it is the activation itself
            assert asked if out.requires_grad else not (recorded and x.requires_grad)
        else:
            assert out.requires_grad == (recorded and asked)
        if out.requires_grad and x.requires_grad and not custom and call["device"] == "cpu":
            (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
            assert torch.equal(gradient, torch.ones_like(x))
    steerer.detach()
    assert torch.equal(model(torch.zeros(2, 4)), torch.zeros(2, 4))
