"""calibrate and its evidence on SmolLM2: what one set of prompts chooses holds on another."""

import warnings
from dataclasses import replace

import pytest
import torch

from actsteer import Evidence, SteeringVector, TextMetric, VectorBank, calibrate, residual_sites
from actsteer.integrations.transformers import fit_pairs, text_batches
from actsteer.steering.steerer import Steerer
from actsteer.tuning.remeasure import remeasured
from reference.language.model import cache, load, packaged
from tests.tuning.test_evidence import NOTICED, SAME, changed

REAL = [pytest.mark.real, pytest.mark.skipif(not (cache().exists() or packaged()), reason="SmolLM2 is not installed")]
PAIRS = [
    ("The waves broke over the deck", "The wind blew over the field"),
    ("Fishermen sail out to sea", "Workers drive out to the office"),
    ("The ocean is full of whales", "The garden is full of flowers"),
    ("We dived down to the reef", "We walked down to the shop"),
    ("The captain found a new island", "The teacher found a new book"),
    ("A dolphin swam beside the ship", "A dog ran beside the car"),
]
SEA = ("sea", "ocean", "whale", "ship", "boat", "wave", "fish", "sail", "dolphin", "island", "reef", "captain", "coast")
CHOOSE = ["List three animals:", "My favourite place is", "Yesterday I saw", "The children drew", "On holiday we"]
CHOOSE += ["The story begins with", "She dreamed of", "The picture shows", "We heard the sound of", "He collects"]
HOLD = ["Name three things you can see:", "My favourite film is about", "Last week I found", "The students wrote about"]
HOLD += ["In summer they", "The book ends with", "He is afraid of", "The map shows", "We could smell", "She loves"]
NEUTRAL = [
    "The capital of France is Paris, and the river there is the Seine.",
    "I went to the market and bought apples, pears and bread.",
    "The meeting was moved to Thursday because the room was taken.",
    "Two plus two is four, and four plus four is eight.",
    "Please write a short letter to the bank about the card.",
    "The train leaves at nine from the main station.",
]


def on_the_sea(texts):
    return [float(any(word in text.lower() for word in SEA)) for text in texts]


@pytest.fixture(scope="module")
def found():
    model, tokenizer = load()
    sites = residual_sites(model, [9, 12, 15])
    v = fit_pairs(model, tokenizer, PAIRS, sites=sites, concept="sea", progress=False)
    metric = TextMetric(tokenizer=tokenizer, prompts=CHOOSE, score=on_the_sea, max_new_tokens=16)
    retain = text_batches(tokenizer, NEUTRAL)
    how = {"evaluate": metric, "retain": retain, "budget": 1.0, "doses": [0.1, 0.2, 0.3], "refine": 1, "steps": 3}
    return model, tokenizer, calibrate(model, v, **how, controls=2, progress=False), metric, retain


@pytest.mark.slow
class TestReal:
    pytestmark = REAL

    def test_block_and_strength_chosen_on_one_set_of_prompts_hold_on_another(self, found):
        model, tokenizer, result, _, _ = found
        assert result.found
        held_out = TextMetric(tokenizer=tokenizer, prompts=HOLD, score=on_the_sea, max_new_tokens=16)
        plain = held_out(model).mean()
        with Steerer(model, result.best):
            steered = held_out(model).mean()
        assert steered >= plain + 0.3

    @pytest.mark.parametrize("how", NOTICED)
    def test_a_corruption_is_noticed(self, found, how):
        model, _, result, metric, retain = found
        known = Evidence.of(result.best)
        other, its_model = corrupted(result.best, model, how)
        recorded = [own for own in known.compared(other, its_model) if not own.holds]
        assert recorded
        if how in ("sign flipped", "scaled by 2", "renormalised", "shuffled features"):
            measured = [
                *remeasured(model, other, known, retain=retain),
                *remeasured(model, other, known, evaluate=metric),
            ]
            assert len(measured) == 2
            assert not all(own.holds for own in measured)

    @pytest.mark.parametrize(
        "how", [how for how in SAME if not any(word in how for word in ("concept", "vector", "name"))]
    )
    def test_what_changes_nothing_is_not_flagged(self, found, how):
        model, _, result, _, retain = found
        known, other = Evidence.of(result.best), SAME[how](result.best)
        seen = [*known.compared(other, model), *remeasured(model, other, known, retain=retain)]
        assert [own for own in seen if not own.holds] == []


def corrupted(steering, model, how):
    """(the steering, the model) after a corruption."""
    generator = torch.Generator().manual_seed(0)
    moved = {
        s: f"model.layers.{int(s.rpartition('.')[2]) + (1 if how == 'next site' else -1)}"
        for s in steering.vectors.sites
    }
    directions = {
        "sign flipped": lambda d: {s: -v for s, v in d.items()},
        "next site": lambda d: {moved[s]: v for s, v in d.items()},
        "previous site": lambda d: {moved[s]: v for s, v in d.items()},
        "scaled by 2": lambda d: {s: 2 * v for s, v in d.items()},
        "scaled by 0.1": lambda d: {s: 0.1 * v for s, v in d.items()},
        "another precision": lambda d: {s: v.half() for s, v in d.items()},
        "renormalised": lambda d: {s: v / v.norm() for s, v in d.items()},
        "shuffled features": lambda d: {s: v[torch.randperm(len(v), generator=generator)] for s, v in d.items()},
        "another concept's direction": lambda d: {s: torch.randn(len(v), generator=generator) for s, v in d.items()},
    }
    if how in directions:
        return changed(steering, directions[how]), model
    if how == "other positions":
        return replace(steering, positions="last"), model
    with warnings.catch_warnings(action="ignore"):
        other = type(model)(model.config).eval()
    return steering, other


def test_of_the_tests_themselves():
    """The corruptions are those of the small model, and change the vectors that they are given."""
    v = SteeringVector({"model.layers.9": torch.arange(1.0, 5.0)})
    from actsteer import Steering

    steering = Steering(VectorBank({"sea": v}))
    for how in NOTICED:
        if how in ("other positions", "another base model"):
            continue
        other, _ = corrupted(steering, None, how)
        assert (
            other.vectors.sites != v.sites
            or not torch.equal(other.vectors["sea"]["model.layers.9"].float(), v["model.layers.9"])
            or how == "another precision"
        )
