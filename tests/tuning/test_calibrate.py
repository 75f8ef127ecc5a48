"""calibrate: what it chooses is the best that was measured, within the budget, and more than what means nothing."""

import math
import warnings

import pytest
import torch
from torch import nn

from actsteer import (
    Ablate,
    Add,
    AttachedError,
    Calibration,
    LowRank,
    OutputMetric,
    ProjectionAbove,
    Replace,
    SiteNotFoundError,
    StatisticsError,
    Steerer,
    Steering,
    SteeringVector,
    StrengthError,
    VectorBank,
    calibrate,
    record,
    steerers,
)
from actsteer.errors import OutputError
from actsteer.tuning.told import code_of_metric
from tests.oracles import state
from tests.tuning.trained import SITES, is_two, kept, points, rows, toward_two, trained, two
from tests.zoo import llama, normal

QUICK = {"controls": 0, "progress": False}


STOPS = {"calls": 0, "at": math.inf}


def counted(model):
    """A metric that is interrupted after so many calls."""
    STOPS["calls"] += 1
    if STOPS["calls"] > STOPS["at"]:
        raise KeyboardInterrupt
    return is_two()(model)


def kl(model, vectors, x, **how):
    """KL(unsteered ‖ steered) of every row, by its formula."""
    with torch.no_grad():
        p = model(x).double().softmax(dim=1)
        with Steerer(model, vectors, **how):
            q = model(x).double().softmax(dim=1)
    return (p * (p / q).log()).sum(dim=1)


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(scope="module")
def found(model):
    return calibrate(
        model,
        toward_two(model),
        evaluate=is_two(),
        retain=kept(),
        budget=0.3,
        rows=rows(model),
        controls=39,
        progress=False,
    )


# --- what is chosen ----------------------------------------------------------------------------------------------
def test_a_direction_that_means_something_beats_every_control_within_the_budget(found):
    assert found.found
    assert found.percentile == 100.0
    assert len(found.controls) == 2 * 39
    assert found.chosen["effect"] > max(*found.controls, found.unsteered)
    assert found.chosen["feasible"]
    assert found.best.c == found.chosen["c"]
    assert found.best.vectors.sites == found.chosen["sites"]


def test_the_best_is_a_steering_that_does_what_the_table_says(model, found):
    metric = is_two()
    with Steerer(model, found.best):
        effect = metric(model)
    low, high = found.chosen["effect_interval"]
    assert low < float(effect.mean()) < high


def test_the_cost_is_the_kl_by_its_formula(model):
    x = kept()[:1]  # one row is in both halves
    found = calibrate(model, toward_two(model), evaluate=is_two(), retain=x, budget=math.inf, **QUICK)
    for row in found.table:
        lost = kl(model, toward_two(model), x, c=row["c"], sites=list(row["sites"]))
        assert row["cost"] == pytest.approx(float(lost.mean()), rel=1e-3, abs=1e-6)


def test_no_feasible_row_has_a_larger_effect_by_more_than_the_halves_differ(found):
    best = max(row["effect"] for row in found.table if row["feasible"])
    _, high = found.chosen["effect_interval"]
    assert best <= high
    assert all(row["effect"] is None or math.isfinite(row["effect"]) for row in found.table)


def test_what_is_over_the_budget_is_not_evaluated_and_what_is_chosen_is_not_over_it(found):
    over = [row for row in found.table if not row["feasible"]]
    assert over
    assert all(row["effect"] is None for row in over)


def test_the_dose_is_in_units_of_the_typical_norm(model, found):
    v, x = toward_two(model), kept()
    for row in found.table[:: len(found.table) // 7]:
        acts = record(model, x, sites=list(row["sites"]), progress=False)
        ratios = [float(v[site].norm() / acts[site].norm(dim=1).median()) for site in row["sites"]]
        unit = (sum(ratio**2 for ratio in ratios) / len(ratios)) ** 0.5
        assert row["dose"] == pytest.approx(row["c"] * unit, rel=1e-5)


def test_every_site_and_groups_around_the_best_one_and_all_are_tried(found):
    tried = list(dict.fromkeys(row["sites"] for row in found.table))
    assert tried[:3] == [(site,) for site in SITES]
    assert tried[-1] == SITES
    assert len(tried) == 5
    assert len(tried[3]) == 2


def test_shuffled_labels_are_given_strength_0(model):
    generator, zero = torch.Generator().manual_seed(0), 0
    for _ in range(5):
        both = torch.cat([points(2, 60, seed=30), points(0, 60, seed=31)])[torch.randperm(120, generator=generator)]
        sides = tuple(record(model, own, sites=["3"], progress=False) for own in (both[:60], both[60:]))
        v = SteeringVector({"3": sides[0]["3"].mean(dim=0) - sides[1]["3"].mean(dim=0)})
        found = calibrate(
            model,
            v,
            evaluate=is_two(),
            retain=kept(),
            rows=sides,
            controls=29,
            refine=1,
            progress=False,
            generator=generator,
        )
        zero += found.best.c == 0
        assert found.found == (found.best.c != 0)
        assert ("c = 0" in found.verdict) == (not found.found)
    assert zero >= 4


def test_what_does_more_than_not_steering_but_not_more_than_what_means_nothing_is_given_strength_0(model):
    """A control as the vector: random directions do something too, some of them more than others."""
    generator, refused = torch.Generator().manual_seed(2), 0
    for _ in range(6):
        v = SteeringVector({"3": torch.randn(64, generator=generator)})
        how = {"evaluate": is_two(), "retain": kept(), "budget": 0.3, "controls": 19, "progress": False}
        found = calibrate(model, v, **how, generator=generator)
        if found.chosen["effect"] > found.unsteered and found.chosen["effect"] <= max(found.controls):
            assert found.best.c == 0
            assert found.verdict.startswith("c = 0: ")
            as_much = [effect for effect in found.controls if effect >= found.chosen["effect"]]
            assert found.verdict.endswith(f": {len(as_much)} of them do as much")
            refused += 1
    assert refused >= 2


def test_where_nothing_is_within_the_budget_the_strength_is_0(model):
    found = calibrate(model, toward_two(model), evaluate=is_two(), retain=kept(), budget=1e-12, **QUICK)
    assert found.chosen is None
    assert found.best.c == 0
    assert found.verdict == "c = 0: no strength is within the budget"
    assert "over the budget" in str(found)


def test_where_not_steering_is_best_the_strength_is_0(model):
    worse = OutputMetric(inputs=points(2, 50, seed=3), score=lambda logits: logits.log_softmax(dim=1)[:, 2])
    found = calibrate(model, -toward_two(model), evaluate=worse, retain=kept(), budget=0.5, **QUICK)
    assert found.best.c == 0
    assert "no more than unsteered" in found.verdict


def test_negative_doses_find_the_other_direction(model):
    doses = [sign * 0.1 * 2**power for sign in (1, -1) for power in range(6)]
    found = calibrate(model, -toward_two(model), evaluate=is_two(), retain=kept(), budget=0.3, doses=doses, **QUICK)
    assert found.best.c < 0
    assert found.found


# --- the budget --------------------------------------------------------------------------------------------------
def test_the_budget_bounds_what_it_names(model):
    v = toward_two(model)
    loose = calibrate(model, v, evaluate=is_two(), retain=kept(), budget={"mean": 1.0, "p95": 3.0}, **QUICK)
    tight = calibrate(model, v, evaluate=is_two(), retain=kept(), budget={"mean": 1.0, "p95": 0.5}, **QUICK)
    assert list(loose.chosen["costs"]) == ["mean", "p95"]
    assert loose.chosen["costs"]["p95"][0] > tight.chosen["costs"]["p95"][0]
    assert loose.chosen["effect"] > tight.chosen["effect"]


def test_a_metric_may_be_bounded_in_the_place_of_the_kl(model):
    x, v, truth = kept(), toward_two(model), torch.arange(3, 12).repeat_interleave(15)

    def evaluate(own):
        with torch.no_grad():
            return {"gained": is_two()(own), "lost": (own(x).argmax(dim=1) != truth).double()}

    found = calibrate(model, v, evaluate=evaluate, retain=x, budget={"lost": 0.4}, **QUICK)
    assert list(found.chosen["costs"]) == ["lost"]
    with Steerer(model, found.best):
        assert float(evaluate(model)["lost"].mean()) < 0.5
    assert all(row["effect"] is not None for row in found.table)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"p96": 1.0}, r"budget: \['p96'\] are neither mean nor p95 nor among evaluate's metrics, \['effect'\]"),
        ({"effect": 1.0}, "evaluate: every metric, .* is in the budget"),
        (-1, "budget: expected a number of 0 or more for 'mean', got -1"),
        (float("nan"), "budget: expected a number of 0 or more for 'mean', got nan"),
        ({}, "budget: expected a bound"),
    ],
)
def test_a_budget_that_bounds_nothing_is_refused(model, budget, message):
    with pytest.raises(ValueError, match=message):
        calibrate(model, toward_two(model), evaluate=is_two(), retain=kept(), budget=budget, **QUICK)


# --- honest ------------------------------------------------------------------------------------------------------
def test_half_of_the_data_chooses_and_the_other_reports(model):
    """Noise tells them apart: which rows are reported follows from the table, and the others have chosen."""
    noise, drawn = torch.Generator().manual_seed(5), []

    def evaluate(own):
        with torch.no_grad():
            own(kept())
        drawn.append(torch.randn(30, generator=noise, dtype=torch.float64))
        return drawn[-1]

    how = {"retain": kept(), "budget": math.inf, "refine": 1, **QUICK}
    found = calibrate(model, toward_two(model), evaluate=evaluate, **how)
    every = torch.stack(drawn[1:])  # the first is of the unsteered model
    reported = torch.tensor([row["effect"] for row in found.table], dtype=torch.float64)
    share = torch.linalg.lstsq(every, reported[:, None]).solution[:, 0]
    is_reported = share > 1 / 30
    assert torch.allclose(share, is_reported.double() / 15, atol=1e-9)
    assert int(is_reported.sum()) == 15
    chosen = int(every[:, ~is_reported].mean(dim=1).argmax())
    assert found.chosen is found.table[chosen]
    assert chosen != int(reported.argmax())
    assert found.unsteered == pytest.approx(float(drawn[0][is_reported].mean()))


def test_one_number_is_chosen_and_reported_on_the_same_data_unless_there_is_other(model):
    v, half = toward_two(model), lambda own: float(is_two(seed=40)(own).mean())
    same = calibrate(model, v, evaluate=half, retain=kept(), budget=0.3, **QUICK)
    assert same.reported_on_choice
    assert "chosen and reported on the same data" in same.verdict
    assert same.chosen["effect_interval"] is None
    other = calibrate(model, v, evaluate=half, confirm=is_two(seed=41), retain=kept(), budget=0.3, **QUICK)
    assert not other.reported_on_choice
    assert other.chosen["effect_interval"] is not None
    assert sum(row["effect_interval"] is not None for row in other.table) == 1  # of the best, on the other data
    assert other.unsteered_interval is not None
    with Steerer(model, other.best):
        assert other.chosen["effect"] == pytest.approx(float(is_two(seed=41)(model).mean()))
    assert other.unsteered == pytest.approx(float(is_two(seed=41)(model).mean()))


def test_random_controls_have_the_norms_of_the_vectors_and_lie_where_activations_vary(model):
    from actsteer.tuning.controls import random_banks
    from actsteer.tuning.retained import Retained

    x = torch.cat([points(cloud, 300, seed=50 + cloud) for cloud in range(3)])
    where = {"where": {}, "mask": None, "batch_size": 100, "keep_outputs": False, "progress": False}
    generator = torch.Generator().manual_seed(0)
    seen = Retained(model, x, ["3"], controls=4000, **where, generator=generator)
    rows = record(model, x, sites="3", progress=False)["3"].double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    expected = (unit - unit.mean(dim=0)).T @ (unit - unit.mean(dim=0))
    drawn = seen.drawn["3"]
    assert torch.allclose(drawn.T @ drawn / len(drawn), expected, atol=0.08 * float(expected.max()))
    v = VectorBank({"two": toward_two(model).select("3")})
    for bank in random_banks(v, {"3": drawn}, 5):
        assert torch.allclose(bank["two"].norm(), v["two"].norm())


def test_the_same_generator_finds_the_same(model):
    def once():
        own = torch.Generator().manual_seed(3)
        how = {"evaluate": is_two(), "retain": kept(), "controls": 3, "rows": rows(model), "progress": False}
        return calibrate(model, toward_two(model), **how, generator=own)

    one, other = once(), once()
    assert one.table == other.table
    assert one.controls == other.controls


def test_a_search_that_was_stopped_goes_on_and_ends_as_it_would_have(model, tmp_path, monkeypatch):
    monkeypatch.setattr("actsteer.tuning.memory._EVERY", 0.0)
    path = tmp_path / "search.safetensors"

    def once(stop_at=math.inf, **how):
        STOPS.update(calls=0, at=stop_at)
        how |= {"evaluate": counted, "retain": kept(), "budget": 0.3, "controls": 2, "progress": False}
        return calibrate(model, toward_two(model), **how), STOPS["calls"]

    whole, needed = once()
    with pytest.raises(KeyboardInterrupt):
        once(needed // 2, checkpoint=path)
    assert path.exists()
    assert not steerers(model)
    again, rest = once(checkpoint=path)
    assert rest < 0.8 * needed
    assert again.table == whole.table
    assert again.controls == whole.controls
    other = trained()
    other[0].weight.data[0, 0] += 1.0
    same = {"evaluate": counted, "retain": kept(), "budget": 0.3, "controls": 2, "checkpoint": path, "progress": False}
    for changed in (
        {"model": other},
        {"vectors": 2 * toward_two(model)},
        {"evaluate": is_two()},
        {"retain": kept() + 1},
        {"budget": 0.2},
        {"controls": 3},
        {"doses": [1.0]},
        {"groups": [["1"]]},
        {"gate": ProjectionAbove(toward_two(model).select("1"), 1e-9)},
        {"confirm": is_two()},
        {"rows": rows(model)},
        {"steps": 9},
        {"generator": torch.Generator().manual_seed(1)},
    ):
        how = {"model": model, "vectors": toward_two(model), **same, **changed}
        mismatch = pytest.raises(StatisticsError, match="a checkpoint of another calibration")
        with mismatch, warnings.catch_warnings(action="ignore"):  # of other weights
            calibrate(how.pop("model"), how.pop("vectors"), **how)


def test_metrics_are_told_apart_by_what_they_hold():
    metrics = [is_two(), is_two(seed=9), OutputMetric(inputs=points(0, 100, seed=20), score=lambda out: out[:, 1])]
    metrics += [OutputMetric(inputs=points(0, 100, seed=20), score=two, targets=torch.arange(100)), counted, None]
    found = [code_of_metric(own) for own in metrics]
    assert len(set(found)) == len(found)
    assert code_of_metric(is_two()) == code_of_metric(is_two())


def test_the_model_is_left_as_it_was_found(model):
    before = state(model)
    calibrate(model, toward_two(model), evaluate=is_two(), retain=kept(), **QUICK)
    assert state(model) == before
    assert not model.training


# --- what is searched --------------------------------------------------------------------------------------------
def test_interventions_and_positions_are_tried_where_they_are_given(model):
    found = calibrate(
        model, toward_two(model), evaluate=is_two(), retain=kept(), interventions=[Add(), Ablate()], budget=1.0, **QUICK
    )
    tried = {row["intervention"] for row in found.table}
    assert tried == {repr(Add()), repr(Ablate())}
    assert {row["c"] for row in found.table if row["intervention"] == repr(Ablate())} >= {0.25, 0.5, 0.75, 1.0}


def test_groups_and_sites_of_the_users(model):
    how = {"evaluate": is_two(), "retain": kept(), **QUICK}
    found = calibrate(model, toward_two(model), groups=[["1", "5"], ["3"]], **how)
    assert list(dict.fromkeys(row["sites"] for row in found.table)) == [("1", "5"), ("3",)]
    found = calibrate(model, toward_two(model), sites=["5"], **how)
    assert {row["sites"] for row in found.table} == {("5",)}
    with pytest.raises(SiteNotFoundError, match="groups: '4' is not steered"):
        calibrate(model, toward_two(model), groups=[["4"]], **how)


def test_a_bank_a_gate_and_a_steering_are_taken_as_a_steerer_takes_them(model):
    v = toward_two(model)
    gate = ProjectionAbove(v.select("1"), 0.0)
    bank = VectorBank({"two": v, "same": 0.5 * v})
    steering = Steering(bank, gate={"two": gate}, c=7.0)
    found = calibrate(model, steering, evaluate=is_two(), retain=kept(), budget=0.3, **QUICK)
    assert found.best.concepts == ("two", "same")
    assert found.best.gate["two"] is gate
    assert found.best.c != 7.0


def test_tokens_count_one_by_one_and_pads_do_not():
    lm = llama()
    sites = ["model.layers.0", "model.layers.1"]
    size = lm.config.hidden_size
    torch.manual_seed(0)
    v = SteeringVector({site: torch.randn(size) for site in sites})
    ids = torch.randint(1, lm.config.vocab_size, (4, 6))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0

    def evaluate(own):
        with torch.no_grad():
            return own(input_ids=ids[1:]).logits[:, -1, 3]

    found = calibrate(lm, v, evaluate=evaluate, retain={"input_ids": ids, "attention_mask": mask}, budget=0.5, **QUICK)
    alone = [row[:n].unsqueeze(0) for row, n in zip(ids, mask.sum(dim=1).tolist(), strict=True)]
    each = calibrate(lm, v, evaluate=evaluate, retain=[{"input_ids": own} for own in alone], budget=0.5, **QUICK)
    for one, other in zip(found.table, each.table, strict=True):
        assert one["c"] == pytest.approx(other["c"], rel=1e-3)
        assert one["cost"] == pytest.approx(other["cost"], rel=1e-2, abs=1e-5)


def test_what_is_steered_as_it_is_generated_costs_on_every_token_but_the_first():
    lm = llama()
    torch.manual_seed(0)
    v = SteeringVector({"model.layers.0": torch.randn(lm.config.hidden_size)})
    ids = torch.randint(1, lm.config.vocab_size, (4, 6))

    def evaluate(own):
        made = own.generate(
            ids, max_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        return made.logits[-1][:, 3]

    how = {"evaluate": evaluate, "retain": {"input_ids": ids}, "budget": 5.0, "doses": [0.2, 0.4], **QUICK}
    one = calibrate(lm, v, positions=["generated"], **how)
    other = calibrate(lm, v, positions=[slice(1, None)], **how)
    assert [row["cost"] for row in one.table[:2]] == pytest.approx([row["cost"] for row in other.table[:2]])
    assert one.best.positions == "generated"
    assert one.table[0]["cost"] > 0


@pytest.mark.parametrize("positions", [slice(1, 3), [0, 2], {"vector": "last"}, lambda batch: batch["input_ids"] > 5])
def test_positions_of_every_kind_are_searched_printed_and_shown(positions):
    lm = llama()
    v = SteeringVector(
        {"model.layers.0": torch.randn(lm.config.hidden_size, generator=torch.Generator().manual_seed(0))}
    )
    ids = torch.randint(1, lm.config.vocab_size, (4, 6), generator=torch.Generator().manual_seed(0))

    def evaluate(own):
        with torch.no_grad():
            return own(input_ids=ids).logits[:, -1, 3]

    found = calibrate(lm, v, evaluate=evaluate, retain={"input_ids": ids}, budget=50.0, positions=[positions], **QUICK)
    assert str(found)
    assert "sites" in found._repr_html_()


MASK = torch.zeros(4, 6, dtype=torch.bool)
MASK[:, 2:] = True


@pytest.mark.parametrize(
    ("vectors", "positions", "alike", "same"),
    [
        (SteeringVector, MASK, SteeringVector, slice(2, None)),
        (SteeringVector, MASK.long(), SteeringVector, slice(2, None)),
        (SteeringVector, [[1, 3]] * 4, SteeringVector, [1, 3]),
        (lambda at: Replace({s: v.expand(4, -1) for s, v in at.items()}), "last", Replace, "last"),
        (lambda at: Replace({s: v.expand(4, 6, -1) for s, v in at.items()}), "all", Replace, "all"),
    ],
    ids=["mask", "integers", "indices", "values of tokens", "values of all"],
)
def test_what_is_of_the_rows_of_one_batch_runs_one_strength_at_a_time(vectors, positions, alike, same):
    lm = llama()
    at = {"model.layers.0": torch.randn(lm.config.hidden_size, generator=torch.Generator().manual_seed(0))}
    ids = torch.randint(1, lm.config.vocab_size, (4, 6), generator=torch.Generator().manual_seed(0))
    how = {"evaluate": lambda own: own(input_ids=ids).logits[:, -1, 3].detach(), "retain": {"input_ids": ids}}
    one = calibrate(lm, vectors(at), positions=[positions], budget=50.0, **how, **QUICK)
    other = calibrate(lm, alike(at), positions=[same], budget=50.0, **how, **QUICK)
    assert [row["cost"] for row in one.table] == pytest.approx([row["cost"] for row in other.table], rel=1e-4, abs=1e-7)


def test_rows_on_another_axis_are_the_rows_of_the_halves_or_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5))
    model.batch_first = False  # as a recurrent network of torch says it
    x, v = torch.randn(7, 12, 4), SteeringVector({"0": torch.randn(8)})  # 7 positions of 12 rows
    how = {"evaluate": lambda own: own(x).mean(dim=(0, 2)).detach(), "retain": x, "budget": 5.0, **QUICK}
    with pytest.raises(OutputError, match="pass row_axis=0 or row_axis=1, where the rows of the batch are"):
        calibrate(model, v, **how)
    found = calibrate(model, v, row_axis=1, **how)
    flipped = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5))
    flipped.load_state_dict(model.state_dict())
    how |= {
        "evaluate": lambda own: own(x.transpose(0, 1)).mean(dim=(1, 2)).detach(),
        "retain": x.transpose(0, 1).contiguous(),
    }
    same = calibrate(flipped, v, **how)
    assert [row["cost"] for row in found.table] == pytest.approx([row["cost"] for row in same.table], rel=1e-3)


# --- refused -----------------------------------------------------------------------------------------------------
def test_bad_arguments_are_refused_before_the_model_runs(model):
    v, calls = toward_two(model), []
    how = {"evaluate": lambda own: calls.append(1) or 0.0, "retain": kept(), "progress": False}
    for wrong, error, message in [
        ({"controls": -1}, ValueError, "controls"),
        ({"steps": 1}, ValueError, "steps"),
        ({"doses": []}, StrengthError, "doses"),
        ({"doses": [0.0]}, StrengthError, "doses"),
        ({"groups": ["1"]}, TypeError, "groups: expected sequences of sites"),
        ({"rows": ({}, {})}, SiteNotFoundError, "rows: the positive side of 'two' has none at"),
    ]:
        with pytest.raises(error, match=message):
            calibrate(model, v, **how, **wrong)
    low_rank = LowRank({"1": (torch.ones(1, 64), torch.ones(1, 64), torch.zeros(1))})
    with pytest.raises(TypeError, match="has no direction to compare with others; give controls=0"):
        calibrate(model, low_rank, **how)
    with pytest.raises(TypeError, match=r"got a gate, ProjectionAbove.*; calibrate_gate\(model, gate, retain=...\)"):
        calibrate(model, ProjectionAbove(v.select("1"), 0.0), **how)
    assert calls == []


def test_rows_that_did_not_make_the_vector_are_refused(model):
    with pytest.raises(ValueError, match="MeanDifference makes another vector of them than 'two' is"):
        calibrate(model, toward_two(model), evaluate=is_two(), retain=kept(), rows=rows(model)[::-1], controls=1)


def test_a_model_that_returns_no_logits_needs_a_metric_in_the_budget():
    model = nn.Sequential(nn.Identity(), nn.Unflatten(1, (2, 2, 2)))
    v, x = SteeringVector({"0": torch.ones(8)}), torch.randn(10, 8)
    evaluate = OutputMetric(inputs=x, score=lambda out: out.flatten(1).sum(dim=1))
    with pytest.raises(OutputError, match="retain: expected logits"):
        calibrate(model, v, evaluate=evaluate, retain=x, **QUICK)
    both = lambda own: {"gain": evaluate(own), "size": own(x).flatten(1).norm(dim=1)}  # noqa: E731
    found = calibrate(model, v, evaluate=both, retain=x, budget={"size": 5.0}, **QUICK)
    assert found.found


def test_a_model_that_is_steered_already_is_refused(model):
    v = toward_two(model)
    with Steerer(model, v, strict=False), pytest.raises(AttachedError, match="the model is steered already"):
        calibrate(model, v, evaluate=is_two(), retain=kept(), **QUICK)


def test_data_that_are_not_finite_are_said_to_be():
    model = nn.Sequential(nn.Identity())
    x = torch.randn(9, 4)
    x[:6] = float("nan")
    with pytest.raises(StatisticsError, match=r"retain: the activations at \['0'\] are not finite"):
        calibrate(
            model, SteeringVector({"0": torch.ones(4)}), evaluate=lambda own: own(x).sum(dim=1), retain=x, **QUICK
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda found: found[:-1], "at c = .* and sites .*: expected what the unsteered model has"),
        (lambda found: {"effect": found, "more": found}, "expected what the unsteered model has"),
        (lambda found: found * float("nan"), "at c = .* and sites .*: expected finite numbers"),
    ],
)
def test_a_metric_that_changes_with_the_strength_is_refused(model, changes, message):
    calls = []

    def evaluate(own):
        calls.append(1)
        found = is_two()(own)
        return found if len(calls) == 1 else changes(found)

    with pytest.raises(ValueError, match=message):
        calibrate(model, toward_two(model), evaluate=evaluate, retain=kept(), budget=math.inf, **QUICK)


def test_a_metric_called_as_a_cost_is_refused(model):
    for name in ("mean", "p95", "kl"):
        with pytest.raises(ValueError, match="are names of what is lost on retain"):
            calibrate(model, toward_two(model), evaluate=lambda own, name=name: {name: 1.0}, retain=kept(), **QUICK)


def test_a_cost_that_is_over_the_budget_on_the_other_half_is_said_to_be(model):
    over = 0
    for seed in range(6):
        how = {"evaluate": is_two(), "retain": kept(), "budget": 0.3, "generator": torch.Generator().manual_seed(seed)}
        found = calibrate(model, toward_two(model), **how, **QUICK)
        is_over = found.chosen["cost"] > 0.3
        assert ("on the half that reports the cost is over the budget" in found.verdict) == is_over
        over += is_over
    assert over <= 3


@pytest.mark.parametrize("wrong", [None, "0.5", torch.ones(2, 2), torch.tensor(float("nan")), {}, {"a": None}])
def test_what_is_no_metric_is_refused(model, wrong):
    with pytest.raises((TypeError, ValueError), match="evaluate"):
        calibrate(model, toward_two(model), evaluate=lambda own: wrong, retain=kept(), **QUICK)


# --- shown -------------------------------------------------------------------------------------------------------
def test_the_pareto_front_has_no_row_to_which_another_is_preferable(found):
    front = found.pareto
    assert front
    for row in front:
        assert not any(
            other["effect"] is not None
            and other["effect"] >= row["effect"]
            and other["cost"] <= row["cost"]
            and (other["effect"], other["cost"]) != (row["effect"], row["cost"])
            for other in found.table
        )


def test_it_is_printed_as_a_table_and_a_verdict_and_drawn(found, tmp_path):
    assert isinstance(found, Calibration)
    text = str(found)
    assert text.splitlines()[0].split() == ["sites", "c", "dose", "effect", "cost"]
    assert sum(line.startswith("*") for line in text.splitlines()) == 1
    assert "percentile 100.0 of 78 controls" in text
    assert "\n" not in repr(found)
    shown = found._repr_html_()
    assert shown.count("<tr>") == 1 + len(text.splitlines()[1:-2])
    assert found.verdict in shown
    for suffix in ("png", "svg"):
        found.plot(tmp_path / f"pareto.{suffix}")
        assert (tmp_path / f"pareto.{suffix}").stat().st_size > 5000


def test_a_part_of_the_features_is_calibrated_as_an_activation_that_is_the_part():
    weight, x, retain = normal(3, 4).float(), normal(80, 8).float(), normal(80, 8, seed=2).float()
    found = {}
    for site, start, width in (("0[2:6]", 2, 8), ("0", 0, 4)):
        part = slice(2 - start, 2 - start + width)
        network = nn.Sequential(nn.Identity(), nn.Linear(width, 3, bias=False)).requires_grad_(False)
        network[1].weight.zero_()[:, start : start + 4] = weight
        up = OutputMetric(inputs=x[:, part], score=lambda logits: logits[:, 0].double())
        v = SteeringVector({site: weight[0]})
        found[site] = calibrate(network, v, evaluate=up, retain=retain[:, part], controls=9, progress=False)
    one, other = found.values()
    assert (one.chosen["sites"], other.chosen["sites"]) == (("0[2:6]",), ("0",))
    for name in ("c", "dose", "effect", "cost"):
        assert one.chosen[name] == pytest.approx(other.chosen[name], rel=1e-5)
    assert one.percentile == other.percentile
