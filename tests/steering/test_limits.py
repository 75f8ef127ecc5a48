"""Limits: strengths, shifts and activations that a dtype cannot hold are refused, and never become inf in silence."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from actsteer import (
    Ablate,
    Clamp,
    CosineAbove,
    KeepNorm,
    ProbeAbove,
    ProjectionAbove,
    Rotate,
    ShapeError,
    Soft,
    Steerer,
    SteeringVector,
    StrengthError,
    VectorBank,
    sweep,
)
from actsteer.steering import edit

V = SteeringVector({"0": torch.tensor([1.0, -2.0, 0.0])})
X = torch.tensor([[1.0, 0.5, -2.0], [0.25, 0.0, 1.0]])
GATE = ProjectionAbove(V, -1e3)


def model(dtype=torch.float32):
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.Identity()).to(dtype).eval()


def alone():
    return nn.Sequential(nn.Identity())


# --- c · v -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
@pytest.mark.parametrize("c", [2e38, {"vector": -2e38}, torch.tensor([1.0, 2e38])], ids=["number", "named", "rows"])
def test_a_sum_beyond_float32_is_refused_when_it_is_set(backend, c):
    message = r"site '0': expected c · v within the range of torch.float32, in which it is added, up to 3.403e\+38, got"
    with pytest.raises(StrengthError, match=message):
        Steerer(alone(), V, c=c, backend=backend)
    with Steerer(
        net := alone(), V, c=0.5 if not isinstance(c, torch.Tensor) else torch.ones(2), backend=backend
    ) as one:
        expected = net(X)
        with pytest.raises(StrengthError, match=message):
            one.c = c
        assert torch.equal(net(X), expected)


def test_a_sum_of_concepts_that_overflows_is_refused_and_the_other_sites_keep_theirs():
    bank = VectorBank({"a": SteeringVector({"0": V["0"], "1": V["0"]}), "b": SteeringVector({"1": V["0"]})})
    net = nn.Sequential(nn.Identity(), nn.Identity())
    with Steerer(net, bank, c=1) as steerer:
        expected = net(X)
        with pytest.raises(StrengthError, match="site '1'"):
            steerer.c = 1.5e38
        assert torch.equal(net(X), expected)
        assert steerer.c == 1


@pytest.mark.parametrize("c", [1e5, torch.tensor([0.0, 1e5])], ids=["number", "rows"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gate": GATE}, {"positions": "last"}, {"backend": "hook"}, {"backend": "buffer"}],
    ids=["plain", "gate", "positions", "hook", "buffer"],
)
def test_a_shift_beyond_float16_is_refused_at_the_first_pass(options, c):
    net, x = alone(), X.half()[:, None].expand(2, 4, 3)
    with Steerer(net, V, c=c, **options) as steerer:
        for _ in range(2):
            with pytest.raises(StrengthError, match=r"site '0': .*range of torch.float16.*up to 6.55e\+04, got 2e\+05"):
                net(x)
        assert bool(net(x.float()).isfinite().all())
        steerer.c = c / 10
        assert bool(net(x).isfinite().all())


def test_a_padded_batch_is_no_way_around_it():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Identity()

        def forward(self, x, attention_mask=None):
            return self.block(x)

    net, x = Padded(), torch.zeros(2, 3, 3, dtype=torch.float16)
    steerer = Steerer(net, SteeringVector({"block": V["0"]}), c=1e5)
    with steerer, pytest.raises(StrengthError, match="float16"):
        net(x, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))


def test_a_bias_that_cannot_hold_it_is_refused_and_stays():
    net = model(torch.float16)
    with pytest.raises(StrengthError, match=r"site '0': .*torch.float16"), Steerer(net, V, c=1e5, backend="fold"):
        pass
    assert net[0].bias is None
    with Steerer(net, V, c=1, backend="fold") as steerer:
        expected = net(X.half())
        with pytest.raises(StrengthError, match=r"site '0': .*torch.float16"):
            steerer.c = 1e5
        assert torch.equal(net(X.half()), expected)
    assert net[0].bias is None


@pytest.mark.parametrize("c", [3e4, -3e4])
def test_what_just_fits_is_added(c):
    net = alone()
    with Steerer(net, V, c=c):
        assert torch.equal(net(torch.zeros(1, 3).half()), (c * V["0"])[None].half())
    with Steerer(net, V, c=1.5 * 10**38):
        assert torch.equal(net(X), X + 1.5e38 * V["0"])


def test_large_numbers_whose_sum_overflows_are_finite():
    v, net = SteeringVector({"0": torch.full((3,), 6e4)}), alone()
    with Steerer(net, v):
        assert torch.equal(net(torch.zeros(1, 3).half()), torch.full((1, 3), 6e4).half())


def test_it_is_looked_at_once_and_not_in_every_pass(monkeypatch):
    seen = []
    monkeypatch.setattr(edit, "check_sum", lambda shift, dtype, *, site: seen.append(dtype))
    net = alone()
    with Steerer(net, V, gate=GATE) as steerer:
        for dtype in (torch.float16, torch.float16, torch.float16):
            net(X.to(dtype))
        assert seen == [torch.float16]
        steerer.c = 2
        net(X.half())
        assert seen == [torch.float16, torch.float16]


def test_another_device_is_not_waited_for():
    with Steerer(net := alone(), V, c=1e5):
        assert net(torch.zeros(1, 3, dtype=torch.float32, device="meta")).is_meta
    with Steerer(net, V, c=torch.tensor([1e39], dtype=torch.float64, device="meta"), intervention=Ablate()):
        assert net(torch.zeros(1, 3, device="meta")).is_meta


# --- c ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "c", [1e39, -1e39, torch.tensor([1.0, 1e39], dtype=torch.float64)], ids=["1e39", "-1e39", "rows"]
)
@pytest.mark.parametrize(
    "options",
    [{"intervention": Ablate()}, {"intervention": KeepNorm(Rotate(1.0))}, {"intervention": lambda h, v, c: h + c * v}],
    ids=["ablate", "rotate", "custom"],
)
def test_a_strength_is_checked_in_the_dtype_in_which_it_is_used(options, c):
    v = V / 1e20
    message = (
        r"site '0': expected c within the range of torch.float32, in which it is used, up to 3.403e\+38, got 1e\+39"
    )
    with Steerer(net := alone(), v, c=c, **options):
        with pytest.raises(StrengthError, match=message):
            net(X)
        assert bool(net(X.double()).isfinite().all())


def test_a_strength_that_only_a_small_vector_makes_small_is_refused_too():
    with pytest.raises(StrengthError, match=r"site '0': .* torch.float32"):
        Steerer(alone(), V / 1e20, c=1e39)
    steerer = Steerer(net := alone(), V / 1e20, c=1e39, gate=GATE)
    with steerer, pytest.raises(StrengthError, match=r"site '0': .* torch.float32"):
        net(X)


def test_in_float64_it_may_be_as_large():
    v = SteeringVector({"0": V["0"].double() / 1e20})
    with Steerer(net := alone(), v, c=1e39):
        torch.testing.assert_close(net(X.double()), X.double() + 1e19 * V["0"].double())


LARGE = [10**400, -(10**400), Fraction(10**400)]


@pytest.mark.parametrize("number", LARGE, ids=["large", "negative", "fraction"])
def test_an_integer_beyond_a_float_is_refused_in_words(number):
    message = "expected a number within the range of a float, got one beyond it"
    for c in (number, {"vector": number}, lambda step: number):
        with pytest.raises(StrengthError, match=message):
            Steerer(alone(), V, c=c)
    with pytest.raises(StrengthError, match=message):
        sweep(alone(), V, c=[0, number], evaluate=lambda net: {})
    steerer = Steerer(alone(), V)
    with pytest.raises(StrengthError, match=message):
        steerer.c = number
    for make in (
        lambda: Clamp(number),
        lambda: Rotate(number),
        lambda: ProjectionAbove(V, number),
        lambda: CosineAbove(V, number),
        lambda: ProbeAbove(V, offset=number),
        lambda: Soft(GATE, width=abs(number)),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_no_part_of_an_edit(number):
    for make in (lambda: Clamp(number), lambda: Rotate(number), lambda: Soft(GATE, width=number)):
        with pytest.raises(ValueError, match="expected a finite number, got"):
            make()
    with pytest.raises(ValueError, match="offset: expected a finite number"):
        ProbeAbove(V.select("0"), offset=number)


def test_a_threshold_may_be_infinite_and_is_a_number():
    assert GATE(X).all() and not ProjectionAbove(V, float("inf"))(X).any()
    for gate in (ProjectionAbove, CosineAbove):
        with pytest.raises(ValueError, match="threshold: expected a number, got nan"):
            gate(V, float("nan"))


@pytest.mark.parametrize("number", [1e39, -1e39])
def test_a_schedule_gives_numbers_within_float32(number):
    with pytest.raises(
        StrengthError, match=r"c\(0\): expected a number of at most 3.403e\+38, as in float32, got -?1e\+39"
    ):
        Steerer(alone(), V, c=lambda step: number)


# --- activations of one byte -----------------------------------------------------------------------------------------
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gate": GATE}, {"c": torch.ones(2)}, {"intervention": Ablate()}, {"intervention": Ablate(), "gate": GATE}],
    ids=["add", "gate", "rows", "ablate", "gated ablate"],
)
def test_float8_is_refused_in_words(dtype, backend, options):
    net, x = alone(), X.to(dtype)
    with Steerer(net, V, backend=backend, **options):
        with pytest.raises(
            ShapeError, match=rf"site '0': expected an activation in float16, .*, got {dtype}, .*; steer"
        ):
            net(x)
        assert net(X).dtype is torch.float32
    assert torch.equal(net(x).float(), x.float())


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_a_gate_reads_float8(dtype):
    net = nn.Sequential(nn.Identity(), Wide())
    v, gate = SteeringVector({"1": V["0"]}), ProjectionAbove(V, 0.05)
    with Steerer(net, v, gate=gate):
        fires = gate(X.to(dtype).float())
        assert 0 < int(fires.sum()) < len(X)
        assert torch.equal(net(X.to(dtype)), X.to(dtype).float() + fires[:, None] * V["0"])


class Wide(nn.Module):
    def forward(self, x):
        return x.float()
