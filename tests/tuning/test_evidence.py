"""Evidence: what changes a steering is noticed, by what was recorded or by measuring; what changes nothing is not.

The table of corruptions: each is noticed, and which of recorded things, or of measured ones, notice it is said here.
"""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from actsteer import (
    Ablate,
    Evidence,
    FileFormatError,
    ProjectionAbove,
    Steering,
    SteeringVector,
    VectorBank,
    calibrate,
)
from actsteer.cli.show import _measured as measured_lines
from actsteer.steering.plan import gates_of
from actsteer.tuning.evidence import KEY, Figure, evidences
from actsteer.tuning.remeasure import remeasured
from actsteer.tuning.told import name_and_revision
from tests.tuning.trained import is_two, kept, points, rows, toward_two, trained, two, untrained
from tests.zoo import llama

# corruption -> what no longer is as recorded (the first word of each), measuring aside
NOTICED = {
    "sign flipped": {"direction"},
    "next site": {"sites"},
    "previous site": {"sites"},
    "scaled by 2": {"‖c·v‖"},
    "scaled by 0.1": {"‖c·v‖"},
    "another precision": {"dtype"},
    "renormalised": {"‖c·v‖"},
    "shuffled features": {"direction"},
    "another concept's direction": {"direction", "‖c·v‖"},
    "other positions": {"positions"},
    "another base model": {"weights"},
}


@pytest.fixture(scope="module")
def good():
    """A calibrated steering at the site in the middle, and its model."""
    model = trained()
    found = calibrate(
        model, toward_two(model), evaluate=is_two(), retain=kept(), budget=0.3, sites=["3"], controls=19, progress=False
    )
    assert found.found
    return model, found.best


def changed(steering, make):
    """The steering with other directions, its evidence and all else kept."""
    bank = VectorBank(
        {
            concept: SteeringVector(make(dict(v.to()._directions)), metadata=v.metadata)
            for concept, v in steering.vectors.items()
        }
    )
    return replace(steering, vectors=bank)


def corrupted(steering, model, how):
    """(the steering, the model) after a corruption."""
    generator = torch.Generator().manual_seed(0)
    match how:
        case "sign flipped":
            return changed(steering, lambda d: {s: -v for s, v in d.items()}), model
        case "next site" | "previous site":
            moved = {"next site": "5", "previous site": "1"}[how]
            return changed(steering, lambda d: dict.fromkeys([moved], *d.values())), model
        case "scaled by 2":
            return changed(steering, lambda d: {s: 2 * v for s, v in d.items()}), model
        case "scaled by 0.1":
            return changed(steering, lambda d: {s: 0.1 * v for s, v in d.items()}), model
        case "another precision":
            return changed(steering, lambda d: {s: v.half() for s, v in d.items()}), model
        case "renormalised":
            return changed(steering, lambda d: {s: v / v.norm() for s, v in d.items()}), model
        case "shuffled features":
            return changed(
                steering, lambda d: {s: v[torch.randperm(len(v), generator=generator)] for s, v in d.items()}
            ), model
        case "another concept's direction":
            return changed(
                steering, lambda d: {s: torch.randn(len(v), generator=generator) for s, v in d.items()}
            ), model
        case "other positions":
            return replace(steering, positions="last"), model
        case _:
            torch.manual_seed(1)
            return steering, untrained().eval()


@pytest.mark.parametrize("how", NOTICED)
def test_a_corruption_is_noticed_by_what_was_recorded(good, how, tmp_path):
    model, steering = good
    other, its_model = corrupted(steering, model, how)
    other.save(tmp_path / "x.safetensors")
    loaded = Steering.load(tmp_path / "x.safetensors")
    known = Evidence.of(loaded)
    wrong = {own.what.split()[0] for own in known.compared(loaded, its_model) if not own.holds}
    assert wrong == NOTICED[how]


@pytest.mark.parametrize("how", [how for how in NOTICED if how not in ("another precision", "other positions")])
def test_a_corruption_that_changes_answers_is_noticed_by_measuring_too(good, how):
    model, steering = good
    other, its_model = corrupted(steering, model, how)
    known = Evidence.of(steering)
    with warnings.catch_warnings(action="ignore"):  # of other weights
        measured = list(remeasured(its_model, other, known, retain=kept(), evaluate=is_two()))
    assert {own.what for own in measured} == {"cost (mean)", "effect"}
    assert not all(own.holds for own in measured)


SAME = {
    "nothing": lambda s: s,
    "saved and loaded": lambda s: s,
    "twice as long at half the strength": lambda s: replace(
        changed(s, lambda d: {k: 2 * v for k, v in d.items()}), c=s.c / 2
    ),
    "the reverse at the reverse strength": lambda s: replace(
        changed(s, lambda d: {k: -v for k, v in d.items()}), c=-s.c
    ),
    "a wider dtype": lambda s: changed(s, lambda d: {k: v.double() for k, v in d.items()}),
    "all positions, said": lambda s: replace(s, positions="all"),
    "positions by concept": lambda s: replace(s, positions={"two": "all"}),
    "strength by concept": lambda s: replace(s, c={"two": s.c}),
    "a note in the metadata": lambda s: replace(
        s,
        vectors=VectorBank(
            {c: SteeringVector({k: v[k] for k in v}, metadata=v.metadata | {"note": "x"}) for c, v in s.vectors.items()}
        ),
    ),
    "vectors alone": lambda s: s.vectors,
    "another name": lambda s: Steering(VectorBank({"zwei": s.vectors["two"]}), c=s.c),
    "a vector with the strength in it": lambda s: Steering(VectorBank({"two": s.c * s.vectors["two"]}), c=1.0),
}


@pytest.mark.parametrize("how", SAME)
def test_what_changes_nothing_is_not_flagged(good, how, tmp_path):
    model, steering = good
    other = SAME[how](steering)
    other.save(tmp_path / "x.safetensors")
    loaded = type(other).load(tmp_path / "x.safetensors")
    known = Evidence.of(loaded)
    assert known is not None
    found = [*known.compared(loaded, model), *remeasured(model, loaded, known, retain=kept(), evaluate=is_two())]
    assert [own for own in found if not own.holds] == []
    assert {"cost (mean)", "effect"} <= {own.what for own in found}


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_what_was_measured_is_measured_again_however_it_is_batched(good, batch_size):
    model, steering = good
    found = list(remeasured(model, steering, Evidence.of(steering), retain=kept(), batch_size=batch_size))
    assert [own.what for own in found] == ["cost (mean)"]
    assert found[0].holds


def test_of_other_data_nothing_is_said(good):
    model, steering = good
    known = Evidence.of(steering)
    assert list(remeasured(model, steering, known, retain=kept()[:-1], evaluate=is_two(seed=99))) == []


# --- what it holds -----------------------------------------------------------------------------------------------
def test_it_holds_what_was_measured(good):
    model, steering = good
    found = calibrate(
        model,
        toward_two(model),
        evaluate=is_two(),
        retain=kept(),
        budget=0.3,
        rows=rows(model),
        controls=3,
        progress=False,
    )
    known, row = Evidence.of(found.best), found.chosen
    assert known.effect == Figure(row["effect"], *row["effect_interval"])
    assert known.costs["mean"] == Figure(row["cost"], *row["cost_interval"])
    assert known.controls == 6
    assert known.percentile == found.percentile
    assert known.unsteered == Figure(found.unsteered, *found.unsteered_interval)
    assert (row["c"], row["effect"], row["cost"]) in known.curve
    assert [c for c, _, _ in known.curve] == sorted(c for c, _, _ in known.curve)
    assert {"retain", "effect"} == set(known.data)
    assert {"actsteer", "torch", "python", "format"} <= set(known.versions)
    assert known.metric == "tests.tuning.trained:two"
    assert gates_of(steering.vectors, steering.gate) == {}


def test_vectors_banks_and_steerings_carry_it_and_an_operation_that_keeps_metadata_keeps_it(good, tmp_path):
    _, steering = good
    known = Evidence.of(steering)
    bank, v = steering.vectors, steering.vectors["two"]
    assert Evidence.of(bank) == Evidence.of(v) == Evidence.of(-2 * v) == known
    bank.save(tmp_path / "bank.safetensors")
    v.save(tmp_path / "v.safetensors")
    assert Evidence.of(VectorBank.load(tmp_path / "bank.safetensors")) == known
    assert Evidence.of(SteeringVector.load(tmp_path / "v.safetensors")) == known
    assert Evidence.of(SteeringVector({"0": torch.ones(2)})) is None
    assert Evidence.read(known.text) == known


def test_of_a_model_of_hugging_faces_it_has_the_name_and_the_revision_and_not_where_it_lies(tmp_path):
    lm = llama()
    lm.config.name_or_path, lm.config._commit_hash = "people/model", "abc123"
    assert name_and_revision(lm) == {"name": "people/model", "revision": "abc123"}
    (tmp_path / "mine").mkdir()
    lm.config.name_or_path, lm.config._commit_hash = str(tmp_path / "mine"), None
    assert name_and_revision(lm) == {"name": "mine"}
    assert name_and_revision(trained()) == {}


@pytest.mark.parametrize("text", ["", "x", "[]", "{}", "null", '{"effect": 1}', "[" * 10**5])
def test_what_is_no_evidence_is_refused(text):
    v = SteeringVector({"0": torch.ones(2)}, metadata={KEY: text})
    with pytest.raises(FileFormatError, match="evidence: not what calibrate writes"):
        Evidence.of(v)


def test_evidence_with_any_part_of_another_kind_is_refused_or_can_be_compared_and_shown(good, capsys):
    document = json.loads(Evidence.of(good[1]).text)

    def places(node, path=()):
        yield path
        for key, own in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            yield from places(own, (*path, key))

    refused = 0
    for path in list(places(document))[1:]:
        for other in (None, "x", "load", 5, [1], {"a": 1}, True):
            changed_ = json.loads(json.dumps(document))
            inner = changed_
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = other
            try:
                found = Evidence.read(json.dumps(changed_))
            except FileFormatError:
                refused += 1
                continue
            list(found.compared(good[1], good[0]))
            list(measured_lines(found))
    assert refused > 200


def test_a_strength_of_1_is_a_strength(good):
    model, steering = good
    known = Evidence.of(steering)
    wrong = [own.what for own in known.compared(replace(steering, c=1.0), model) if not own.holds]
    assert wrong == ["‖c·v‖ of two at 3"]
    assert not all(own.holds for own in remeasured(model, replace(steering, c=1.0), known, retain=kept()))


def test_a_gate_that_is_another_one_is_noticed_though_it_looks_the_same(good):
    model, steering = good
    v = toward_two(model).select("1")
    gated = replace(steering, gate=ProjectionAbove(v, 0.5))
    found = calibrate(model, gated, evaluate=is_two(), retain=kept(), budget=0.3, controls=0, progress=False)
    known = Evidence.of(found.best)
    for gate, holds in ((ProjectionAbove(v, 0.5), True), (ProjectionAbove(-v, 0.5), False), (None, False)):
        other = replace(found.best, gate=gate)
        assert all(own.holds for own in known.compared(other, model)) == holds


def test_what_ablates_is_compared_by_its_strength_and_its_line(good):
    model, _ = good
    how = {"evaluate": is_two(), "retain": kept(), "budget": 5.0, "controls": 0, "progress": False}
    found = calibrate(model, -1 * toward_two(model), interventions=[Ablate()], **how)
    assert found.found
    known, v = Evidence.of(found.best), found.best.vectors
    for other, holds in ((2, True), (-1, True), (0.5, True)):
        bank = VectorBank({c: other * own for c, own in v.items()})
        assert all(own.holds for own in known.compared(replace(found.best, vectors=bank), model)) == holds
    assert not all(own.holds for own in known.compared(replace(found.best, c=found.best.c / 2), model))


def test_of_several_measurements_each_is_compared_with_its_own_concepts(good):
    model, steering = good
    again = calibrate(
        model,
        3 * toward_two(model),
        evaluate=is_two(),
        retain=kept(),
        budget=0.2,
        sites=["5"],
        controls=0,
        progress=False,
    )
    bank = VectorBank({"two": steering.vectors["two"], "other": again.best.vectors["two"]})
    with pytest.raises(ValueError, match="evidence of several measurements"):
        Evidence.of(bank)
    assert [list(own.concepts) for _, own in evidences(bank)] == [["two"], ["other"]]
    assert all(own.holds for known, part in evidences(bank) for own in known.compared(part, model))


def test_where_nothing_is_found_nothing_is_claimed(good):
    model, steering = good
    found = calibrate(model, steering, evaluate=is_two(), retain=kept(), budget=1e-12, controls=0, progress=False)
    assert found.best.c == 0
    assert Evidence.of(found.best) is None


def test_an_effect_that_is_not_named_first_and_a_cost_that_is_a_metric_are_measured_again(good):
    model, _ = good
    found = calibrate(
        model, toward_two(model), evaluate=both, retain=kept(), budget={"wrong": 0.9}, controls=0, progress=False
    )
    known = Evidence.of(found.best)
    assert known.measure == "gain"
    seen = {own.what: own.holds for own in remeasured(model, found.best, known, evaluate=both)}
    assert seen == {"effect": True, "cost (wrong)": True}


def both(model):
    with torch.no_grad():
        return {"wrong": (model(kept()).argmax(dim=1) == 2).double(), "gain": two(model(points(0, 50, seed=7)))}


def test_of_tokens_the_same_texts_are_known_however_they_are_padded():
    lm = llama()
    v = SteeringVector(
        {"model.layers.0": torch.randn(lm.config.hidden_size, generator=torch.Generator().manual_seed(0))}
    )
    ids = torch.randint(1, lm.config.vocab_size, (6, 5), generator=torch.Generator().manual_seed(0))

    def evaluate(model):
        with torch.no_grad():
            return model(input_ids=ids).logits[:, -1, 3]

    from actsteer.collecting.texts import TextBatches

    texts = [row[: 3 + number % 3] for number, row in enumerate(ids)]
    one, other = TextBatches(texts, 2, None), TextBatches(texts, 6, None)
    found = calibrate(lm, v, evaluate=evaluate, retain=one, budget=0.5, controls=0, progress=False)
    (again,) = remeasured(lm, found.best, Evidence.of(found.best), retain=other)
    assert again.what == "cost (mean)"
    assert again.holds
