"""Gates: which rows are steered, decided anew in every forward pass."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import (
    Gate,
    GateError,
    Moments,
    ProjectionAbove,
    ShapeError,
    SiteNotFoundError,
    Statistics,
    StatisticsError,
    Steerer,
    SteeringVector,
    StrengthError,
    VectorBank,
    ZeroDirectionError,
    record,
)
from tests.strategies import eighths
from tests.zoo import CASES, exact, identity, normal

AXIS = SteeringVector({"0": torch.tensor([0.0, 2.0])})
V = SteeringVector({"1": torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)}, concept="nine")
X = normal(6, 4)


def above(site, direction, threshold=0.0):
    return ProjectionAbove(SteeringVector({site: direction}), threshold)


def steered(model, x, vectors, **options):
    with Steerer(model, vectors, **options):
        return model(x)


class Weight:
    """A gate of the user's own: how much, by any function of the rows."""

    per = "sequence"

    def __init__(self, site, function):
        self.site = site
        self.function = function

    def __call__(self, rows):
        return self.function(rows)


# --- the decision --------------------------------------------------------------------------------------------------
@given(eighths(5, 3), eighths(3).filter(lambda v: bool(v.any())), st.integers(-16, 16).map(lambda k: k / 8 + 1 / 16))
def test_it_fires_where_the_scalar_projection_exceeds_the_threshold(rows, direction, threshold):
    gate = above("0", direction, threshold)
    expected = [sum(h * v for h, v in zip(row, direction.tolist(), strict=True)) for row in rows.tolist()]
    norm = sum(v * v for v in direction.tolist()) ** 0.5
    torch.testing.assert_close(gate.projection(rows), torch.tensor(expected, dtype=torch.float64) / norm)
    clear = [abs(p / norm - threshold) > 1e-9 for p in expected]
    fired = [bool(f) == (p / norm > threshold) for f, p in zip(gate(rows), expected, strict=True)]
    assert all(right or not sure for right, sure in zip(fired, clear, strict=True))


@pytest.mark.parametrize("scale", [0.25, 1.0, 1e30])
def test_the_length_of_the_direction_does_not_matter(scale):
    rows = torch.tensor([[9.0, 1.0], [0.0, 1.25], [0.0, -5.0]])
    assert above("0", scale * AXIS["0"], 1.0)(rows).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_it_reads_activations_of_any_dtype(dtype):
    assert ProjectionAbove(AXIS, 1.0)(torch.tensor([[9.0, 1.0], [0.0, 1.25]], dtype=dtype)).tolist() == [False, True]


def test_it_is_a_gate_and_shows_what_it_does():
    assert isinstance(ProjectionAbove(AXIS, 1.0), Gate)
    assert repr(ProjectionAbove(AXIS, 1.0)) == "ProjectionAbove(site='0', threshold=1)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ProjectionAbove(AXIS + V, 0.0), ShapeError, r"a gate reads one site, the vector has \('0', '1'\)"),
        (lambda: ProjectionAbove(SteeringVector({}), 0.0), ShapeError, r"a gate reads one site, the vector has \(\)"),
        (lambda: ProjectionAbove(0 * AXIS, 0.0), ZeroDirectionError, "site '0': the direction is zero"),
        (
            lambda: ProjectionAbove(AXIS, 0.0)(torch.zeros(2, 3)),
            ShapeError,
            "gate at site '0': the activation has 3 features, the gate's direction 2; was it fitted",
        ),
    ],
)
def test_what_cannot_be_a_gate_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- steering where it fires ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("c", [2.0, "rows"])
def test_a_gate_is_a_strength_of_zero_or_one_per_row(case, c):
    model, x, direction = case.build(), case.inputs(), normal(case.d, seed=3)
    means = []
    for row in x.split(1, dim=case.rows):
        kept = record(model, [row], sites=case.site, progress=False)[case.site]
        means.append((kept.mean(dim=0) @ direction / direction.norm()).item())
    threshold = (sorted(means)[1] + sorted(means)[2]) / 2  # it fires for some rows, and not for the others
    decided = torch.tensor([mean > threshold for mean in means], dtype=torch.float64)
    c = 2.0 if c == 2.0 else torch.arange(len(means), dtype=torch.float64) - 1.5
    v = SteeringVector({case.site: normal(case.d, seed=2)})
    gated = steered(model, x, v, c=c, gate=above(case.site, direction, threshold))
    assert torch.equal(gated, steered(model, x, v, c=c * decided))


@pytest.mark.parametrize("site", ["0", "1"])
def test_a_gate_reads_at_the_steered_site_or_an_earlier_one_before_the_edit(site):
    model = exact()
    rows = model[:2](X) if site == "1" else model[:1](X)
    decided = (rows @ V["1"] > 0).double()
    assert 0 < decided.sum() < len(X)
    gate = above(site, V["1"])
    assert torch.equal(steered(model, X, V, c=3, gate=gate), steered(model, X, V, c=3 * decided))


@pytest.mark.parametrize("site", ["2", "4", ""])
def test_a_gate_at_a_later_site_is_refused(site):
    with pytest.raises(GateError, match=f"site '1' runs before site '{site}', where its gate reads; fit the gate at"):
        steered(exact(), X, V, gate=above(site, V["1"]))


def test_each_concept_has_its_own_gate_or_none():
    model = exact()
    bank = VectorBank({"a": V, "b": SteeringVector({"1": torch.ones(4)}), "c": -V})
    gates = {"a": above("0", torch.ones(4)), "c": above("1", V["1"])}
    rows = {"a": (model[:1](X).sum(dim=1) > 0).double(), "c": (model[:2](X) @ V["1"] > 0).double()}
    strengths = {"a": 2 * rows["a"], "b": torch.full((6,), 3.0), "c": rows["c"]}
    assert torch.equal(
        steered(model, X, bank, c={"a": 2, "b": 3, "c": 1}, gate=gates), steered(model, X, bank, c=strengths)
    )


def test_one_gate_serves_every_concept():
    bank = VectorBank({"a": V, "b": -2 * V})
    gate = above("0", torch.ones(4))
    assert torch.equal(steered(exact(), X, bank, gate=gate), steered(exact(), X, -1 * V, gate=gate))


def test_a_concepts_gate_does_not_matter_where_the_concept_has_no_direction():
    model = exact()
    bank = VectorBank({"a": SteeringVector({"1": V["1"]}), "b": SteeringVector({"3": V["1"]})})
    gate = above("2", torch.ones(4))
    with Steerer(model, bank.select("a").combine({"a": 1})), Steerer(model, bank["b"], gate=gate):
        expected = model(X)
    assert torch.equal(steered(model, X, bank, gate={"b": gate}), expected)


@pytest.mark.parametrize("intervention", [None, lambda h, v, c: h + c * v], ids=["Add", "custom"])
def test_a_gate_may_give_weights(intervention):
    gate = Weight("0", lambda rows: rows.sum(dim=1) / 8)
    weights = exact()[:1](X).sum(dim=1).detach() / 8
    options = {"intervention": intervention}
    out = steered(exact(), X, V, c=2, gate=gate, **options)
    torch.testing.assert_close(out, steered(exact(), X, V, c=2 * weights, **options), rtol=1e-12, atol=1e-12)


def test_gradients_flow_through_the_weights():
    x = normal(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: steered(exact(), x, V, gate=Weight("0", lambda rows: rows.sum(dim=1).sigmoid())), (x,), fast_mode=True
    )


@pytest.mark.parametrize("intervention", [None, lambda h, v, c: h + c * v], ids=["Add", "custom"])
@pytest.mark.parametrize(
    "function",
    [lambda rows: rows > 0, lambda rows: rows[:, :1] > 0, lambda rows: rows[:2, 0] > 0],
    ids=["(rows, d)", "(rows, 1)", "(2,)"],
)
def test_a_decision_that_is_not_one_per_row_is_refused(function, intervention):
    with pytest.raises((GateError, StrengthError), match="rows"):
        steered(exact(), X, V, gate=Weight("0", function), intervention=intervention)


@pytest.mark.parametrize("intervention", [None, lambda h, v, c: h + c * v], ids=["Add", "custom"])
def test_strengths_that_do_not_agree_with_the_gates_rows_are_refused(intervention):
    with pytest.raises(StrengthError, match="rows"):
        steered(exact(), X, V, c=torch.ones(5), gate=above("0", V["1"]), intervention=intervention)


def test_a_gate_of_another_size_is_refused():
    with pytest.raises(ShapeError, match="gate at site '0': the activation has 4 features, the gate's direction 3"):
        steered(exact(), X, V, gate=above("0", torch.ones(3)))


def test_a_gate_needs_rows():
    model = nn.Sequential(nn.Conv2d(2, 2, 1))
    with pytest.raises(
        GateError, match=r"gate at site '0': .* shape \(2, 3, 3\) and no axis of rows; give the model a batch"
    ):
        steered(model, torch.zeros(2, 3, 3), SteeringVector({"0": torch.ones(2)}), gate=above("0", torch.ones(2)))


# --- never a decision from before ----------------------------------------------------------------------------------
class Skips(nn.Module):
    """Runs "first" only when asked, then "second"."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, x, *, both=True):
        return self.second(self.first(x) if both else x)


def test_each_forward_decides_anew():
    model, v = identity(), SteeringVector({"1": torch.tensor([1.0])})
    with Steerer(model, v, c=8, gate=above("0", torch.ones(1))) as steerer:
        for x in (torch.tensor([[1.0], [-1.0]]), torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [1.0], [-1.0]])):
            assert torch.equal(model(x), x + 8 * (x > 0))
        steerer.c = 2
        assert torch.equal(model(x), x + 2 * (x > 0))


def test_a_forward_that_passes_the_gates_site_by_is_refused():
    model, x = Skips(), torch.ones(2, 1)
    with Steerer(model, SteeringVector({"second": torch.ones(1)}), gate=above("first", torch.ones(1))):
        assert torch.equal(model(x), x + 1)
        with pytest.raises(GateError, match="site 'second' runs before site 'first'"):
            model(x, both=False)
        assert torch.equal(model(x), x + 1)


def test_a_forward_that_failed_leaves_no_decision():
    model, x = Skips(), torch.ones(2, 1)
    handle = model.second.register_forward_pre_hook(lambda *_: 1 / 0)
    with Steerer(model, SteeringVector({"second": torch.ones(1)}), gate=above("first", torch.ones(1))):
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
        with pytest.raises(GateError, match="runs before"):
            model(x, both=False)


def test_a_part_that_is_run_by_itself_does_not_use_the_last_decision():
    model, x = Skips(), torch.ones(2, 1)
    with Steerer(model, SteeringVector({"second": torch.ones(1)}), gate=above("first", torch.ones(1))):
        model(x)
        with pytest.raises(GateError, match="runs before"):
            model.second(-x)


def test_a_new_block_starts_without_a_decision():
    model, x = Skips(), torch.ones(2, 1)
    steerer = Steerer(model, SteeringVector({"second": torch.ones(1)}), gate=above("first", torch.ones(1)))
    with steerer:
        model(x)
    with steerer, pytest.raises(GateError, match="runs before"):
        model.second(x)


# --- a threshold between -------------------------------------------------------------------------------------------
projections = st.lists(st.integers(-8, 8).map(lambda k: k / 8), min_size=1, max_size=7)


def accuracy(threshold, positive, negative):
    """Twice the balanced accuracy of `> threshold`, exactly."""
    above = Fraction(sum(p > threshold for p in positive), len(positive))
    return above + Fraction(sum(n <= threshold for n in negative), len(negative))


@given(projections, projections)
def test_from_projections_no_threshold_separates_better(positive, negative):
    values = sorted({*positive, *negative})
    middles = [(low + high) / 2 for low, high in pairwise(values)]
    best = max((accuracy(t, positive, negative) for t in middles), default=Fraction(1))
    sides = {"positive": torch.tensor(positive), "negative": torch.tensor(negative)}
    if best <= 1:
        with pytest.raises(StatisticsError, match="no threshold separates the positive side from the negative"):
            ProjectionAbove.between(AXIS, **sides)
    else:
        threshold = ProjectionAbove.between(AXIS, **sides).threshold
        assert threshold in middles
        assert accuracy(threshold, positive, negative) == best


@given(eighths(4, 2), eighths(3, 2))
def test_from_activations_it_is_as_from_their_projections(positive, negative):
    positive = positive + torch.tensor([0.0, 17.0])  # apart, so that a threshold exists
    by_rows = ProjectionAbove.between(AXIS, positive={"0": positive}, negative={"0": negative, "1": normal(2, 9)})
    by_projection = ProjectionAbove.between(AXIS, positive=positive[:, 1], negative=negative[:, 1])
    assert by_rows.threshold == by_projection.threshold
    assert by_rows(positive).all()
    assert not by_rows(negative).any()


def statistics(rows, *, covariance):
    return Statistics({"0": Moments.of(rows, covariance=covariance)})


@given(eighths(5, 2), eighths(4, 2))
def test_from_statistics_both_classes_err_equally_often(positive, negative):
    positive = positive + torch.tensor([0.0, 20.0])
    high, low = positive[:, 1].mean().item(), negative[:, 1].mean().item()
    spreads = [rows[:, 1].std().item() for rows in (positive, negative)]
    with_covariance = [statistics(rows, covariance=True) for rows in (positive, negative)]
    gate = ProjectionAbove.between(AXIS, positive=with_covariance[0], negative=with_covariance[1])
    assert low < gate.threshold < high
    if min(spreads):
        assert (high - gate.threshold) / spreads[0] == pytest.approx((gate.threshold - low) / spreads[1])
    means = [statistics(rows, covariance=False) for rows in (positive, negative)]
    assert ProjectionAbove.between(AXIS, positive=means[0], negative=means[1]).threshold == pytest.approx(
        (high + low) / 2
    )


@pytest.mark.parametrize(
    ("positive", "negative"), [([[0.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]]), ([[0.0, 3.0], [0.0, 4.0]], [[0.0, 1.0]])]
)
def test_a_side_without_a_spread_is_still_told_apart(positive, negative):
    positive, negative = torch.tensor(positive), torch.tensor(negative)
    sides = {"positive": statistics(positive, covariance=True), "negative": statistics(negative, covariance=True)}
    gate = ProjectionAbove.between(AXIS, **sides)
    assert gate(positive).all()
    assert not gate(negative).any()


LOW, HIGH = torch.zeros(3, 2), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("positive", "negative", "error", "message"),
    [
        (
            statistics(LOW, covariance=True),
            statistics(HIGH, covariance=True),
            StatisticsError,
            "is the vector's sign reversed",
        ),
        (
            statistics(LOW, covariance=False),
            statistics(LOW, covariance=False),
            StatisticsError,
            "the positive mean projects to 0",
        ),
        (statistics(HIGH, covariance=True), {"0": LOW}, StatisticsError, "both sides as statistics, or neither"),
        (HIGH[:, 0], statistics(LOW, covariance=True), StatisticsError, "both sides as statistics, or neither"),
        (
            torch.zeros(0),
            LOW[:, 0],
            StatisticsError,
            r"expected scores of shape \(n,\) with n >= 1, got shape \(0,\)",
        ),
        (HIGH, LOW, StatisticsError, r"expected scores of shape \(n,\) with n >= 1, got shape \(3, 2\)"),
        (LOW[:, 0], HIGH[:, 0], StatisticsError, "no threshold separates"),
        ({"0": torch.zeros(3, 5)}, {"0": LOW}, ShapeError, "the gate's direction 2"),
        (Statistics({}), Statistics({}), SiteNotFoundError, "no statistics for site '0'"),
        ({"7": HIGH}, {"7": LOW}, SiteNotFoundError, "'0'"),
        (torch.full((3,), float("nan")), LOW[:, 0], StatisticsError, "finite|separates"),
    ],
)
def test_evidence_that_gives_no_threshold_is_refused(positive, negative, error, message):
    with pytest.raises(error, match=message):
        ProjectionAbove.between(AXIS, positive=positive, negative=negative)


# --- every backend -------------------------------------------------------------------------------------------------
EAGER = pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])


@EAGER
@pytest.mark.parametrize("site", ["0", "0:in", "1", "1:in", ":in"])
@pytest.mark.parametrize("steered_site", ["1", "2:in"])
def test_a_gate_decides_alike_under_every_backend(backend, site, steered_site):
    model, direction = exact(), torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
    rows = {"0": model[:1](X), "0:in": X, "1": model[:2](X), "1:in": model[:1](X), ":in": X}[site]
    decided = (rows @ direction > 0).double()
    assert 0 < decided.sum() < len(X)
    v, gate = SteeringVector({steered_site: V["1"]}), above(site, direction)
    assert torch.equal(
        steered(model, X, v, c=3, gate=gate, backend=backend), steered(model, X, v, c=3 * decided, backend=backend)
    )


@EAGER
@pytest.mark.case(30)
def test_a_gate_that_fails_decides_nothing_and_the_next_forward_is_right(backend):
    model, fails = exact(), [True]

    def decide(rows):
        if fails.pop() if fails else False:
            raise ZeroDivisionError
        return rows.sum(dim=1) > 0

    with Steerer(model, V, gate=Weight("0", decide), backend=backend):
        with pytest.raises(ZeroDivisionError):
            model(X)
        out = model(X)
    assert torch.equal(out, steered(exact(), X, V, gate=above("0", torch.ones(4))))


@EAGER
@pytest.mark.case(31)
def test_gates_of_nested_steerers_read_what_the_earlier_ones_left(backend):
    model = exact()
    with Steerer(model, V, c=8, backend=backend):
        read = (model[:2](X) @ V["1"]).detach()
        threshold = float(read.sort().values[2:4].mean())  # it fires for three of the six rows
        decided = (read > threshold).double()
        assert decided.sum() == 3
        with Steerer(model, -1 * V, c=3 * decided, backend=backend):
            expected = model(X)
        with Steerer(model, -1 * V, c=3, gate=above("1", V["1"], threshold / float(V.norm())), backend=backend):
            assert torch.equal(model(X), expected)


@EAGER
@pytest.mark.case(25)
def test_forwards_with_and_without_gradients_take_turns(backend):
    model = exact()
    expected = steered(model, X, V, gate=above("0", torch.ones(4)))
    with Steerer(model, V, gate=above("0", torch.ones(4)), backend=backend):
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                assert torch.equal(model(X), expected)
