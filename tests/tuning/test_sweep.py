"""sweep: one row of metrics per strength, each as if it had been steered alone."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from actsteer import (
    ConceptNotFoundError,
    ProjectionAbove,
    SiteNotFoundError,
    Steerer,
    SteeringNotApplied,
    SteeringVector,
    StrengthError,
    VectorBank,
    sweep,
)
from tests.oracles import state
from tests.zoo import exact, identity, normal

X = normal(5, 4)
V = SteeringVector({"1": torch.tensor([1.0, -2.0, 0.5, 4.0]), "3": torch.ones(4)}, concept="nine")
BANK = VectorBank({"nine": V, "eight": SteeringVector({"1": torch.ones(4)})})
ROWS = torch.arange(5.0)


def metrics(model):
    return {"sum": model(X).sum().item(), "largest": model(X).max().item()}


@pytest.mark.parametrize(
    ("vectors", "strengths"),
    [(V, [0, 1.0, -2, 0.5]), (BANK, [{"nine": 1.0}, {"eight": -1.0, "nine": 2.0}, 3]), (V, [ROWS, 1.0]), (V, [])],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sites": "3"},
        {"intervention": lambda h, v, c: h * (1 + c * v)},
        {"gate": ProjectionAbove(SteeringVector({"0": torch.ones(4)}), 0.0)},
        {"axis": -1, "backend": "hook"},
        {"axis": {"1": 1, "3": -1}, "backend": "tap"},
    ],
    ids=["plain", "sites", "intervention", "gate", "axis", "axis of each site"],
)
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_each_row_is_the_model_steered_with_that_strength_alone(vectors, strengths, options):
    model, rows = exact(), []
    for c in strengths:
        with Steerer(model, vectors, c=c, **options):
            rows.append({"c": c, **metrics(model)})
    before = state(model)
    assert sweep(model, vectors, c=iter(strengths), evaluate=metrics, progress=False, **options) == rows
    assert state(model) == before


@pytest.mark.parametrize("number", [3, 2.5, torch.tensor(2.5), torch.tensor(3), np.float64(2.5)])
def test_a_metric_that_is_one_number_is_called_value(number):
    def evaluate(model):
        model(normal(2, 4))
        return number

    rows = sweep(exact(), V, c=[0.0, 1.0], evaluate=evaluate, progress=False)
    assert rows == [{"c": 0.0, "value": float(number)}, {"c": 1.0, "value": float(number)}]
    assert not any(isinstance(row["value"], torch.Tensor) for row in rows)


@pytest.mark.parametrize("wrong", [None, "0.5", torch.ones(2), [1.0]])
def test_what_is_no_metric_is_refused(wrong):
    def evaluate(model):
        model(normal(2, 4))
        return wrong

    with pytest.raises(TypeError, match="evaluate: expected one number, or a mapping name -> metric, got"):
        sweep(exact(), V, c=[0.0], evaluate=evaluate, progress=False)


def test_a_row_has_the_strength_first_as_it_was_given():
    c = {"nine": 1.0}
    (row,) = sweep(exact(), V, c=[c], evaluate=metrics, progress=False)
    assert list(row) == ["c", "sum", "largest"]
    assert row["c"] is c


def test_evaluate_gets_the_model_that_is_steered():
    model, given = exact(), []
    sweep(model, V, c=[1, 2], evaluate=lambda m: given.append(m) or {"ran": m(X) is not None}, progress=False)
    assert given == [model, model]


def fails(model):
    raise ZeroDivisionError("failed")


def skips_a_site(model):
    members = dict(model._modules)
    for name in ("2", "3", "4"):
        del model._modules[name]
    try:
        return metrics(model)
    finally:
        model._modules.update(members)


@pytest.mark.parametrize(
    ("c", "evaluate", "error", "message"),
    [
        (
            [1],
            lambda model: {"c": 1},
            ValueError,
            "evaluate: 'c' is the strength's own column; give the metric another name",
        ),
        ([1], fails, ZeroDivisionError, "failed"),
        ([1, "2"], metrics, StrengthError, "c: expected a number or a tensor"),
        ([{"ten": 1}], metrics, ConceptNotFoundError, "c names no concept of the bank: 'ten'"),
        ([1], skips_a_site, SteeringNotApplied, "these sites did not: {'3': 'ReLU'}"),
    ],
)
def test_whatever_fails_leaves_the_model_as_it_was(c, evaluate, error, message):
    model = exact()
    before = state(model)
    with pytest.raises(error, match=message):
        sweep(model, V, c=c, evaluate=evaluate, progress=False)
    assert state(model) == before


def test_strict_can_be_switched_off():
    (row,) = sweep(exact(), V, c=[1], evaluate=skips_a_site, strict=False, progress=False)
    assert row["c"] == 1


def test_the_sites_are_checked_before_anything_is_evaluated():
    with pytest.raises(SiteNotFoundError, match="no site '7'"):
        sweep(exact(), V, c=[1], evaluate=fails, sites="7", progress=False)


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False)])
def test_the_bar_can_be_switched_off(progress, shown, monkeypatch):
    disabled = []
    from actsteer.tuning import sweep as module

    monkeypatch.setattr(module, "tqdm", lambda rows, *, disable, **_: disabled.append(disable) or rows)
    sweep(exact(), V, c=[1], evaluate=metrics, progress=progress)
    assert disabled == [not shown]


SQUARE = torch.arange(64.0).reshape(4, 4, 4)


@pytest.mark.parametrize("site", ["0", "0:in", "1:in"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_a_sweep_goes_along_the_axis_that_it_is_given(site, axis):
    model, direction = identity(), V["1"]
    spread = [1, 1, 1]
    spread[axis] = 4
    rows = sweep(
        model,
        SteeringVector({site: direction}),
        c=[0, 2, -1],
        evaluate=lambda m: {"out": m(SQUARE)},
        axis={site: axis},
        progress=False,
    )
    for row in rows:
        assert torch.equal(row["out"], SQUARE + row["c"] * direction.reshape(spread))


@pytest.fixture
def compiler():
    """Counts what is compiled; the process has compiled nothing before or after."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("sites", [["1", "3"], ["1:in", "3"]])
@pytest.mark.case(2, 7)
def test_a_sweep_over_compiled_code_is_the_eager_one_and_compiles_once_more(compiler, sites):
    model = exact()
    v = SteeringVector(dict.fromkeys(sites, V["1"]))
    strengths = [k / 8 for k in range(12)]
    with torch.no_grad():
        expected = sweep(model, v, c=strengths, evaluate=metrics, progress=False)
        run = torch.compile(model, backend=compiler)
        plain = run(X)
        assert sweep(run, v, c=strengths, evaluate=metrics, progress=False) == expected
        assert torch.equal(run(X), plain)
    assert compiler.frame_count <= 2
