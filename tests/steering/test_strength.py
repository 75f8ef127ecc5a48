"""Strength: every way to say c, and what is refused."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import (
    Ablate,
    Add,
    Clamp,
    ConceptNotFoundError,
    KeepNorm,
    ProjectionAbove,
    Steerer,
    SteeringVector,
    StrengthError,
    VectorBank,
)
from actsteer.files.lazy import Stored
from actsteer.steering.strength import strengths_of
from tests.zoo import bits

AB = {"a": 0, "b": 1}


def each(c, concepts=AB):
    """The strength of each concept."""
    found = strengths_of(c, concepts)
    return [found[place] for place in range(len(found))]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_kept_exactly_for_every_concept(c):
    for strength in each(c):
        assert strength.dtype is torch.float64
        assert strength.shape == ()
        assert strength.item() == c


@pytest.mark.parametrize(
    "c",
    [2, 2.0, np.float32(2), np.int64(2), Fraction(2), torch.tensor(2), torch.tensor(2.0, dtype=torch.bfloat16)],
    ids=repr,
)
def test_every_kind_of_number_is_a_number(c):
    assert [strength.item() for strength in each(c)] == [2.0, 2.0]


def test_a_mapping_is_spread_in_the_banks_order_with_zero_for_the_others():
    rows = torch.tensor([1.0, 2.0])
    strengths = each({"c": rows, "a": -1}, {"a": 0, "b": 1, "c": 2})
    assert [strength.tolist() for strength in strengths] == [-1.0, 0.0, [1.0, 2.0]]
    assert [strength.item() for strength in each({})] == [0.0, 0.0]


def test_a_tensor_is_copied():
    c = torch.ones(2)
    strength = each(c)[0]
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
        strength = each(made)[0]
    x = torch.ones(2, requires_grad=True)
    with torch.inference_mode(mode=False):
        (x * strength.clone()).sum().backward()
    assert torch.equal(x.grad, torch.as_tensor(c).expand(2).float())


@pytest.mark.parametrize(
    ("options", "c"),
    [
        ({"positions": "last"}, 1.0),
        ({}, torch.ones(2, 4)),
        ({}, lambda step: 1.0),
        ({"gate": ProjectionAbove(SteeringVector({"0": torch.ones(3)}), -1.0)}, 1.0),
    ],
    ids=["positions", "columns", "schedule", "gate"],
)
@pytest.mark.parametrize("zero", [0.0, {}, {"": 0.0}], ids=["number", "nothing", "by name"])
def test_a_strength_that_becomes_zero_while_attached_leaves_the_model_as_it_is(options, c, zero):
    model, x = nn.Sequential(nn.Identity()), torch.zeros(2, 4, 3)
    bank = VectorBank({"": SteeringVector({"0": torch.ones(3)})})
    with Steerer(model, bank, c=c, **options) as steerer:
        assert model(x).any()
        steerer.c = zero
        assert torch.equal(model(x), x)
        steerer.c = c
        assert model(x).any()


def test_a_strength_is_the_steerer_s_own():
    model, x, t = nn.Sequential(nn.Identity()), torch.zeros(1, 3), torch.tensor([1.0])
    for c in (t, {"": t}):
        steerer = Steerer(model, VectorBank({"": SteeringVector({"0": torch.ones(3)})}), c=c)
        t.fill_(100.0)
        with copy.deepcopy(steerer) as again:
            assert torch.equal(again.model(x), torch.ones(1, 3))
        t.fill_(1.0)


# --- only concepts with a strength count ----------------------------------------------------------------------
SITES = ("0", "1")
X = torch.tensor([[1.0, -0.5, 0.25], [0.0, -0.0, 2.0]])
NAMES = ("a", "b", "c", "d")
VECTORS = {
    name: SteeringVector(
        {site: torch.tensor([1.0, -2.0, 0.5]) * (index + 1) for site in SITES[: 1 + index % 2]}, concept=name
    )
    for index, name in enumerate(NAMES)
}
ONE_OF_THEM = {
    "add": {},
    "ablate": {"intervention": Ablate()},
    "clamp": {"intervention": Clamp(2.0)},
    "gate": {"gate": ProjectionAbove(SteeringVector({"0": torch.tensor([1.0, 0.0, 0.0])}), 0.5)},
    "mixed": {"intervention": {"a": Ablate(), "c": KeepNorm(Add())}},
}


def two():
    return nn.Sequential(nn.Identity(), nn.Identity())


@pytest.mark.parametrize("options", ONE_OF_THEM.values(), ids=ONE_OF_THEM)
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
@pytest.mark.parametrize("name", NAMES)
def test_naming_one_concept_is_steering_by_it_alone_bit_for_bit(name, options, backend):
    rules = options.get("intervention")
    own = options | ({"intervention": rules.get(name, Add())} if isinstance(rules, dict) else {})
    with Steerer(model := two(), VectorBank({name: VECTORS[name]}), c={name: 0.5}, **own):
        alone = model(X)
    with Steerer(model := two(), VectorBank(VECTORS), c={name: 0.5}, backend=backend, strict=False, **options):
        assert torch.equal(bits(model(X)), bits(alone))


@pytest.mark.parametrize("options", ONE_OF_THEM.values(), ids=ONE_OF_THEM)
def test_strengths_that_come_and_go_leave_nothing_behind(options):
    def steered(c):
        with Steerer(model := two(), VectorBank(VECTORS), c=c, **options):
            return model(X)

    with Steerer(model := two(), VectorBank(VECTORS), **options) as steerer:
        for c in ({"a": 1.0}, 0.0, {"b": 0.5, "d": -1.0}, 1.0, {}, {"d": torch.tensor([1.0, 0.0])}, {"c": 2.0}):
            steerer.c = c
            assert torch.equal(bits(model(X)), bits(steered(c)))


def test_an_intervention_of_strength_zero_is_not_called():
    called = []

    class Counted:
        def __init__(self, name):
            self.name = name

        def __call__(self, activation, direction, c):
            called.append(self.name)
            return activation + c * direction

    rules = {name: Counted(name) for name in NAMES}
    with Steerer(model := two(), VectorBank(VECTORS), c={"b": 1.0}, intervention=rules) as steerer:
        model(X)
        assert called == ["b", "b"]  # at both sites
        steerer.c = {"c": 1.0, "a": 1.0}
        model(X)
    assert called == ["b", "b", "a", "c"]


def test_what_is_in_a_file_is_read_for_a_concept_that_has_a_strength():
    read = []

    def stored(name):
        def directions():
            read.append(name)
            return {site: VECTORS[name][site] for site in VECTORS[name]}

        return Stored(dict.fromkeys(VECTORS[name], 3), VECTORS[name].metadata, directions)

    bank = VectorBank._of({name: stored(name) for name in NAMES})
    with Steerer(model := two(), bank, c={"b": 1.0}) as steerer:
        first = model(X)
        assert read == ["b"]
        steerer.c = {"b": 2.0, "d": 1.0}
        second = model(X)
        assert read == ["b", "d"]
    bank = VectorBank(VECTORS)
    for c, seen in (({"b": 1.0}, first), ({"b": 2.0, "d": 1.0}, second)):
        with Steerer(model, bank, c=c):
            assert torch.equal(model(X), seen)


def test_a_bank_of_mixed_dtypes_is_added_without_the_loss_of_a_bit():
    rows = {
        "half": torch.tensor([2.0**-14, 1.0, 0.0], dtype=torch.float16),
        "brain": torch.tensor([0.0, 2.0**100, 0.0], dtype=torch.bfloat16),
        "double": torch.tensor([0.0, 0.0, 1 + 2.0**-40], dtype=torch.float64),
    }
    bank = VectorBank({name: SteeringVector({"0": row}) for name, row in rows.items()})
    x = torch.zeros(1, 3, dtype=torch.float64)
    expected = sum(row.double() for row in rows.values())
    with Steerer(model := nn.Sequential(nn.Identity()), bank, c=1.0):
        assert torch.equal(model(x)[0], expected)
    assert all(torch.equal(bank[name]["0"], row) and bank[name]["0"].dtype is row.dtype for name, row in rows.items())


def test_what_is_written_into_a_steerers_directions_reaches_no_bank():
    bank = VectorBank(VECTORS)
    steerer = Steerer(two(), bank)
    for leaf in steerer.requires_grad_().values():
        leaf.data.zero_()
    assert all(torch.equal(bank[name]["0"], VECTORS[name]["0"]) and bool(bank[name]["0"].any()) for name in NAMES)
    assert torch.equal(bank.directions("0"), torch.stack([VECTORS[name]["0"] for name in NAMES]))
