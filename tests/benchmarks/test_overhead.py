"""The benchmark runs, and its conclusion follows from its numbers; how long anything takes is not tested."""

import json
from itertools import product

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import decoding, interventions
from benchmarks.models import (
    BUFFER,
    BY_HAND,
    FOLD,
    INLINE,
    MANY,
    NO_OP,
    NOISE_FLOOR,
    ONE,
    TAP,
    check_equal,
    compiled,
    compiled_variants,
    settings,
    variants,
)
from benchmarks.overhead import main, verdict, within_noise
from benchmarks.timing import Ratio, Timing

APP = typer.Typer()
APP.command()(main)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmarks") / "overhead.json"
    threads = torch.get_num_threads()
    result = CliRunner().invoke(APP, ["--quick", "--repeats", "2", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert torch.get_num_threads() == threads
    return result.output, json.loads(out.read_text())


@pytest.mark.slow
def test_the_file_says_what_ran_where(quick):
    _, found = quick
    assert list(found)[:3] == ["command", "versions", "cpu"]
    assert list(found)[3:] == ["timings", "interventions", "decoding", "recompiles", "conclusion"]
    assert found["command"] == "python -m benchmarks.overhead --repeats 2 --quick"
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["name"]


def test_every_intervention_is_timed_beside_its_formula(quick):
    output, found = quick
    assert [timing["setting"] for timing in found["interventions"]] == [s.name for s in settings(quick=True)]
    for timing, setting in zip(found["interventions"], settings(quick=True), strict=True):
        assert timing["ratios"].keys() == interventions.ways(setting).keys()
    assert "positions" in str(list(found["interventions"][-1]["ratios"])) and all(n in output for n in ("Rotate", "->"))


@pytest.mark.parametrize("name", interventions.NAMES)
def test_a_formula_that_is_another_one_is_not_timed(name):
    setting = settings(quick=True)[-1]
    made = interventions.ways(setting)
    interventions.check_equal(setting, made)
    wrong = made | {name + interventions.BY_HAND: made[NOISE_FLOOR]}
    with pytest.raises(AssertionError, match="another output than its formula"):
        interventions.check_equal(setting, wrong)


def test_every_variant_is_timed_on_every_model_with_every_number_of_threads(quick):
    output, found = quick
    names = [setting.name for setting in settings(quick=True)]
    eager, fast = found["timings"][: 2 * len(names)], found["timings"][2 * len(names) :]
    assert [(t["setting"], t["threads"]) for t in eager] == list(product(names, (1, 2)))
    assert [(t["setting"], t["threads"]) for t in fast] == [(f"{name}, compiled", 1) for name in names]
    assert all(list(t["ratios"]) == [NOISE_FLOOR, NO_OP, BY_HAND, ONE, MANY, TAP, BUFFER, FOLD] for t in eager)
    assert all(list(t["ratios"]) == [NOISE_FLOOR, INLINE, ONE, MANY, BUFFER, FOLD] for t in fast)
    for timing in found["timings"]:
        assert all(0 < r["lower"] <= r["median"] <= r["upper"] for r in timing["ratios"].values())
        assert list(timing["within_noise"]) == [ONE, MANY]
    assert "hand-written edit within noise" in output


def test_decoding_is_timed_beside_hooks_by_hand_and_compiles_nothing_anew(quick):
    output, found = quick
    eager, fast = found["decoding"]
    by_hand = {name + decoding.BY_HAND for name in (decoding.GENERATED, decoding.GATED)}
    assert eager["ratios"].keys() == {NOISE_FLOOR, decoding.GENERATED, decoding.GATED} | by_hand
    assert fast["ratios"].keys() == {NOISE_FLOOR, decoding.GENERATED, decoding.GATED, ONE}
    assert found["recompiles"] == 0
    assert "0 recompiles" in output


@pytest.mark.parametrize("name", [decoding.GENERATED, decoding.GATED])
def test_decoding_that_writes_other_tokens_is_not_timed(name):
    own = decoding.setting(quick=True)
    made = decoding.ways(own)
    decoding.check_equal(own, made)
    with pytest.raises(AssertionError, match="writes other tokens than its formula"):
        decoding.check_equal(own, made | {name + decoding.BY_HAND: made[NOISE_FLOOR]})
    with pytest.raises(AssertionError, match="changes nothing"):
        decoding.check_equal(own, dict.fromkeys(made, made[NOISE_FLOOR]))


def timing(*, by_hand, one, many):
    ratios = {BY_HAND: by_hand, ONE: one, MANY: many}
    return Timing(
        "toy", 1, 1.0, 1, 2, {name: Ratio(median, median - 0.1, median + 0.1) for name, median in ratios.items()}
    )


def test_the_conclusion_is_computed():
    fast, slow = timing(by_hand=1.2, one=1.25, many=1.1), timing(by_hand=1.2, one=1.35, many=1.1)
    assert within_noise(fast, ONE)
    assert not within_noise(slow, ONE)
    assert verdict([fast]) == "Steerer <= hand-written edit within noise: yes, in all 2 comparisons."
    assert "no, in 1 of 4: Steerer, 1 concept on toy" in verdict([fast, slow])


def test_a_ratio_is_the_median_with_its_quartiles():
    assert Ratio.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Ratio(3.0, 2.0, 4.0)
    assert Ratio(2.0, 1.0, 4.0).inverse() == Ratio(0.5, 0.25, 1.0)


@pytest.mark.parametrize("broken", [ONE, TAP, FOLD])
def test_a_variant_that_gives_another_output_is_not_timed(broken):
    setting = settings(quick=True)[0]
    ways = variants(setting)
    check_equal(setting, ways)
    with pytest.raises(AssertionError, match=f"{broken} gives another output"):
        check_equal(setting, ways | {broken: ways[NOISE_FLOOR]})


def test_steering_that_changes_nothing_is_not_timed():
    setting = settings(quick=True)[0]
    ways = variants(setting)
    with pytest.raises(AssertionError, match="nothing to time"):
        check_equal(setting, dict.fromkeys(ways, ways[NOISE_FLOOR]))


@pytest.mark.parametrize("broken", [ONE, BUFFER])
def test_a_compiled_variant_that_gives_another_output_is_not_timed(broken):
    setting = settings(quick=True)[0]
    fast = compiled(setting, backend="eager")
    try:
        ways = compiled_variants(setting, setting.model, backend="eager")
        check_equal(fast, ways)
        with pytest.raises(AssertionError, match=f"{broken} gives another output"):
            check_equal(fast, ways | {broken: ways[NOISE_FLOOR]})
    finally:
        torch.compiler.reset()
