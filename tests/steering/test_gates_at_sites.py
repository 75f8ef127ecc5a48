"""AtSites: another gate at each steered site, and nothing else than one Steerer for each site."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from actsteer import (
    And,
    AtSites,
    LogisticDirection,
    LowRank,
    Not,
    Or,
    ProjectionAbove,
    SiteNotFoundError,
    Soft,
    Steerer,
    Steering,
    SteeringVector,
    UnsupportedModelError,
    VectorBank,
    WhitenedMeanDifference,
    collect,
    fit,
    record,
)
from actsteer.integrations.vllm.served import served
from tests.oracles import state
from tests.zoo import bits, exact, normal

SITES = ("1", "3")
V = SteeringVector({"1": normal(4, seed=2), "3": normal(4, seed=3)}, concept="nine")
ROWS, TOKENS = normal(6, 4), normal(9, 3, 4)


def above(site, seed, per="sequence", threshold=0.0):
    return ProjectionAbove(SteeringVector({site: normal(4, seed=seed)}), threshold, per=per)


def both(per):
    return {"1": above("1", 11, per), "3": above("3", 12, per)}


KINDS = {
    "steps": lambda per: both(per),
    "weights": lambda per: {site: Soft(gate, width=0.5) for site, gate in both(per).items()},
    "combined": lambda per: {"1": Or(above("1", 11, per), above("0", 5, per)), "3": Not(above("3", 12, per))},
    "elsewhere": lambda per: {"1": above("0", 11, per), "3": above("1", 12, per)},
    "shared": lambda per: dict.fromkeys(SITES, above("0", 11, per)),
}


def steered(x, vectors, **options):
    model = exact()
    with torch.no_grad(), Steerer(model, vectors, **options):
        return model(x)


def one_by_one(x, vectors, gates, **options):
    """With a Steerer for each site."""
    model = exact()
    first, second = (Steerer(model, vectors, sites=site, gate=gates[site], **options) for site in SITES)
    with torch.no_grad(), first, second:
        return model(x)


@pytest.mark.parametrize("x", [ROWS, TOKENS], ids=["rows", "tokens"])
@pytest.mark.parametrize("per", ["sequence", "last", "token"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_steerer_for_each_site_with_its_gate(kind, per, x):
    gates = KINDS[kind](per)
    found = steered(x, V, c=2, gate=AtSites(gates))
    assert torch.equal(found, one_by_one(x, V, gates, c=2))
    assert not torch.equal(found, steered(x, V, c=2)) and not torch.equal(found, exact()(x))


def test_one_gate_at_all_sites_is_that_gate():
    gate = above("0", 11)
    assert torch.equal(steered(ROWS, V, gate=AtSites(dict.fromkeys(SITES, gate))), steered(ROWS, V, gate=gate))


def test_it_combines_with_others_inside_and_around():
    gates, other = both("token"), above("0", 5, "token")
    inside = AtSites({site: And(other, Not(gate)) for site, gate in gates.items()})
    around = And(other, Not(AtSites({"1": AtSites(both("token")), "3": gates["3"]})))
    assert torch.equal(steered(TOKENS, V, gate=inside), steered(TOKENS, V, gate=around))


def test_every_concept_may_have_its_own():
    bank = VectorBank({"a": V, "b": SteeringVector({"3": normal(4, seed=4)})})
    gates = {"a": AtSites({"1": above("1", 11, "token"), "3": above("2", 12, "token")}), "b": above("3", 7, "token")}
    model = exact()
    with torch.no_grad(), Steerer(model, bank["b"], gate=gates["b"]), Steerer(model, bank["a"], gate=gates["a"]):
        expected = model(ROWS)
    found = steered(ROWS, bank, gate={"a": gates["a"], "b": AtSites({"3": gates["b"]})})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_edit_that_has_its_sites_is_gated_at_each():
    edit = LowRank({site: (normal(2, 4, seed=6), normal(2, 4, seed=7), torch.ones(2).double()) for site in SITES})
    assert torch.equal(steered(ROWS, edit, gate=AtSites(both("token"))), one_by_one(ROWS, edit, both("token")))


def test_a_strength_of_zero_is_bit_for_bit_the_plain_model():
    gate = AtSites({site: Soft(own) for site, own in both("token").items()})
    assert torch.equal(bits(steered(TOKENS, V, c=0, gate=gate)), bits(exact()(TOKENS)))


def test_a_steered_site_without_a_gate_is_refused_before_anything_is_attached():
    model = exact()
    before = state(model)
    with pytest.raises(SiteNotFoundError, match="no gate for the steered site '3'; leave it out with sites="):
        Steerer(model, V, gate=AtSites({"1": above("1", 11)}))
    assert state(model) == before
    with Steerer(model, V, gate=AtSites({"1": above("1", 11)}), sites="1"):
        model(ROWS)


def test_a_gate_of_a_site_that_is_not_steered_is_not_asked():
    class Fails:
        site, per = "3", "token"

        def __call__(self, rows):
            raise AssertionError("asked")

    gate = AtSites({"1": above("1", 11), "3": Fails()})
    assert torch.equal(steered(ROWS, V, gate=gate, sites="1"), steered(ROWS, V, gate=above("1", 11), sites="1"))
    with pytest.raises(AssertionError, match="asked"):
        steered(ROWS, V, gate=gate)


@pytest.mark.parametrize("given", [{}, None, above("1", 11), {"1": "gate"}, {"1": ProjectionAbove}], ids=str)
def test_what_is_no_mapping_to_gates_is_refused(given):
    with pytest.raises(TypeError, match="expected"):
        AtSites(given)


def test_it_owns_the_mapping():
    gates = both("token")
    gate = AtSites(gates)
    del gates["3"]
    assert gate.sites == SITES


def test_saved_copied_and_pickled_it_does_the_same(tmp_path):
    gate = AtSites({site: Soft(own, width=0.3) for site, own in both("token").items()})
    gate.save(tmp_path / "gate.safetensors")
    Steering(V, c=2, gate=gate).save(tmp_path / "steering.safetensors")
    expected = steered(TOKENS, V, c=2, gate=gate)
    twins = [AtSites.load(tmp_path / "gate.safetensors"), copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))]
    for twin in (*twins, Steering.load(tmp_path / "steering.safetensors").gate):
        assert torch.equal(steered(TOKENS, V, c=2, gate=twin), expected) and repr(twin) == repr(gate)


def test_explain_says_for_each_site_what_reads_there():
    text = Steerer(exact(), V, gate=Not(AtSites(both("token")))).explain()
    first, second = text.split("'3': the output")
    assert "a gate reads each token at '1'" in first and "at '3'" not in first
    assert "a gate reads each token at '3'" in second and "at '1'" not in second


def test_an_engine_that_decides_for_all_sites_alike_refuses_it():
    with pytest.raises(UnsupportedModelError, match="decides for all sites alike"):
        served(Steering(V, gate=AtSites(both("token"))))


# --- soft gates, fitted to tell what is to be steered from what is to stay ----------------------------------------
def clusters():
    """What is to be steered and what is to stay, apart in a few directions, and a model for both."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    steered, kept = normal(80, 6).float() + 1.5, normal(80, 6, seed=2).float() - 1.5
    return model.requires_grad_(False), steered, kept


ESTIMATORS = {
    "recorded": LogisticDirection(),
    "streamed": LogisticDirection(streamed=True),
    "statistics": WhitenedMeanDifference(),
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_weights_are_those_of_the_fit_at_every_site(estimator):
    model, toward, away = clusters()
    w = fit(model, positive=toward, negative=away, sites=SITES, estimator=estimator, progress=False)
    gate, rows = AtSites.soft(w), record(model, toward, sites=SITES, progress=False)
    for site in SITES:
        logit = rows[site].double().numpy() @ w[site].double().numpy() + float(w.metadata[f"offset {site}"])
        np.testing.assert_allclose(gate.at(site)(rows[site]).numpy(), 1 / (1 + np.exp(-logit)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_what_is_to_stay_stays_and_the_rest_is_moved(estimator):
    """Beside a vector without a gate: a tenth of the divergence on what is to stay, most of it on the rest."""
    model, toward, away = clusters()
    w = fit(model, positive=toward[:40], negative=away[:40], sites=SITES, estimator=estimator, progress=False)
    v = SteeringVector({"1": torch.linspace(-1, 1, 8), "3": torch.linspace(1, -1, 8)})

    def moved(x, **options):
        with Steerer(model, v, c=1, **options):
            steered = model(x).log_softmax(dim=1)
        plain = model(x).log_softmax(dim=1)
        return float((plain.exp() * (plain - steered)).sum(dim=1).mean())

    gate = AtSites.soft(w)
    assert moved(away[40:], gate=gate) < 0.1 * moved(away[40:])
    assert moved(toward[40:], gate=gate) > 0.5 * moved(toward[40:])


def test_from_merged_statistics_it_is_the_same_gate():
    model, toward, away = clusters()
    options = {"sites": SITES, "covariance": True, "progress": False}
    parts = [[collect(model, rows, **options) for rows in side.split(30)] for side in (toward, away)]
    merged = [one.merge(two).merge(three) for one, two, three in parts]
    whole = [collect(model, side, **options) for side in (toward, away)]
    gates = [AtSites.soft(WhitenedMeanDifference()(positive=p, negative=n)) for p, n in (merged, whole)]
    rows = record(model, toward, sites=SITES, progress=False)
    for site in SITES:
        torch.testing.assert_close(gates[0].at(site)(rows[site]), gates[1].at(site)(rows[site]))


def test_a_vector_without_offsets_is_refused():
    with pytest.raises(ValueError, match="metadata has no 'offset 1'"):
        AtSites.soft(V)


def test_the_negative_of_the_weights_is_the_gate_of_the_other_side():
    model, toward, away = clusters()
    w = fit(model, positive=toward, negative=away, sites=SITES, estimator=WhitenedMeanDifference(), progress=False)
    gate, contrary, rows = AtSites.soft(w), AtSites.soft(-w), record(model, toward, sites=SITES, progress=False)
    for site in SITES:
        torch.testing.assert_close(contrary.at(site)(rows[site]), 1 - gate.at(site)(rows[site]))


def test_directions_that_were_trained_in_place_have_no_offset():
    model = nn.Sequential(nn.Identity())
    w = SteeringVector({"0": torch.ones(2)}, concept="w", metadata={"offset 0": "1.0"})
    with Steerer(model, w) as steerer:
        model(torch.ones(1, 2))
        assert steerer.vectors["w"].metadata["offset 0"] == "1.0"
        steerer.requires_grad_()
        assert "offset 0" not in steerer.vectors["w"].metadata
