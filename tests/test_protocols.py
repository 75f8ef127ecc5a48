"""A class of the user's own, with only the documented members of its protocol, does everything that ours do."""

import copy
import pickle

import pytest
import torch
from torch import nn

from actsteer import (
    Ablate,
    Add,
    Affine,
    And,
    Chain,
    Combination,
    Edit,
    Estimator,
    Gate,
    Intervention,
    KeepNorm,
    LowRank,
    MeanDifference,
    Not,
    PerSite,
    ProjectionAbove,
    ScoredGate,
    Soft,
    Steerer,
    SteeringVector,
    VectorBank,
    fit,
    fold,
    optimize,
    sweep,
)

D = 4
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, D, generator=G, dtype=torch.float64) + 1, torch.randn(12, D, generator=G, dtype=torch.float64)
V = SteeringVector({"0": torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)}, concept="kind")
ONE = torch.ones((), dtype=torch.float64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Identity(), nn.Linear(D, D)).double()


def steered(x=X, vectors=V, **options):
    model = network()
    with torch.no_grad(), Steerer(model, vectors, **options):
        return model(x)


# --- interventions ---------------------------------------------------------------------------------------------------
class OwnAdd:
    """Add, as a user writes it."""

    def __call__(self, activation, direction, c):
        return activation + c * direction


class OwnAblate:
    """Ablate, as a user writes it."""

    def __call__(self, activation, direction, c):
        unit = direction / direction.norm()
        return activation - c * ((activation @ unit)[..., None] * unit)


class OwnEdit:
    """An edit with sites, as a user writes it: h + c · (b - h)."""

    def __init__(self, goals, metadata=None):
        self.goals, self.metadata = goals, metadata or {}

    def at(self, site):
        return lambda activation, direction, c: torch.lerp(activation, self.goals[site].expand_as(activation), c)

    @property
    def constant(self):
        return SteeringVector(self.goals, metadata=self.metadata)

    def described(self, metadata):
        return OwnEdit(self.goals, metadata)


PAIRS = {"add": (OwnAdd(), Add()), "ablate": (OwnAblate(), Ablate())}
WAYS = {
    "plain": {},
    "a number": {"c": -0.5},
    "rows": {"c": torch.linspace(-1, 2, len(X))},
    "zero": {"c": 0.0},
    "gated": {"gate": ProjectionAbove(V, 0.5)},
    "tap": {"backend": "tap"},
    "buffer": {"backend": "buffer"},
    "thread": {"scope": "context"},
}


@pytest.mark.parametrize(("own", "ours"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_an_intervention_steers_as_ours_does(own, ours, options):
    assert isinstance(own, Intervention)
    for wrap in (lambda inner: inner, KeepNorm, lambda inner: Chain(inner, inner), lambda inner: {"kind": inner}):
        expected = steered(intervention=wrap(ours), **options)
        torch.testing.assert_close(steered(intervention=wrap(own), **options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("own", "ours"), PAIRS.values(), ids=PAIRS)
def test_an_intervention_is_swept_folded_copied_and_trained_through_as_ours_is(own, ours):
    model = network()
    rows = [
        sweep(model, V, c=[0.0, 2.0], intervention=rule, evaluate=lambda m: {"sum": m(X).sum().item()}, progress=False)
        for rule in (own, ours)
    ]
    assert [row["sum"] for row in rows[0]] == pytest.approx([row["sum"] for row in rows[1]])
    torch.testing.assert_close(fold(model, V, intervention=own, verify_on=X)(X), steered(intervention=ours))
    steerer = Steerer(model, V, intervention=own)
    for duplicate in (copy.deepcopy(steerer), pickle.loads(pickle.dumps(steerer))):
        with duplicate, torch.no_grad():
            torch.testing.assert_close(duplicate.model(X), steered(intervention=ours))
    gradients = []
    for rule in (own, ours):
        with Steerer(model, V, intervention=rule) as steerer:
            leaves = steerer.requires_grad_()
            model(X).square().sum().backward()
            gradients.append(leaves["0"].grad)
    torch.testing.assert_close(*gradients)


def test_at_strength_zero_whatever_an_intervention_gives_nothing_changes():
    def nowhere_finite(activation, direction, c):
        return activation * float("nan")

    assert torch.equal(steered(intervention=nowhere_finite, c=0), steered(c=0))
    bank, c = VectorBank({"kind": V, "other": 2 * V}), {"kind": 0.0, "other": 1.0}
    folded = fold(network(), bank, c=c, intervention={"kind": nowhere_finite}, verify_on=X)
    torch.testing.assert_close(folded(X), steered(vectors=2 * V))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_intervention_is_rounded_once_as_ours_is(dtype):
    model, v, x = nn.Sequential(nn.Identity()), V.to(dtype=torch.float32), X.to(dtype)
    found = []
    for rule in (OwnAblate(), Ablate()):
        with Steerer(model, v, c=0.7, intervention=rule):
            found.append(model(x))
    assert found[0].dtype is dtype and torch.equal(*found)


def test_an_edit_with_sites_takes_the_place_of_vectors():
    goals = {"0": X[0], "1": Y[0]}
    own = OwnEdit(goals, {"concept": "kind"})
    ours = Affine({site: (torch.zeros(D, D).double(), goal) for site, goal in goals.items()}, concept="kind")
    assert isinstance(own, Edit) and isinstance(own, PerSite)
    for c in (1.0, 0.5, {"kind": torch.linspace(-1, 2, len(X))}):
        torch.testing.assert_close(steered(vectors=own, c=c), steered(vectors=ours, c=c))
        torch.testing.assert_close(steered(vectors=KeepNorm(own), c=c), steered(vectors=KeepNorm(ours), c=c))
    torch.testing.assert_close(steered(intervention=own), steered(intervention=ours))


# --- gates -----------------------------------------------------------------------------------------------------------
class OwnGate:
    """ProjectionAbove, as a user writes it."""

    def __init__(self, per="sequence"):
        self.site, self.per, self.threshold = "0", per, 0.5

    def score(self, rows):
        return rows @ (V["0"] / V["0"].norm()).to(rows)

    def __call__(self, rows):
        return self.score(rows) > self.threshold


class Xor:
    """A combination that we do not have."""

    def __init__(self, *gates):
        self.gates = gates

    def combine(self, weights):
        one, other = weights
        return one ^ other


TOKENS = torch.randn(3, 5, D, generator=G, dtype=torch.float64)


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("x", [X, TOKENS], ids=["rows", "tokens"])
def test_a_gate_decides_as_ours_does(per, x):
    own, ours = OwnGate(per), ProjectionAbove(V, 0.5, per=per)
    other = ProjectionAbove(V, 1.0)
    assert isinstance(own, Gate) and isinstance(own, ScoredGate)
    for wrap in (lambda gate: gate, Not, lambda gate: And(gate, other), lambda gate: {"kind": gate}, Soft):
        assert torch.equal(steered(x, gate=wrap(own)), steered(x, gate=wrap(ours)))
    assert not torch.equal(steered(x, gate=own), steered(x))
    combined = Xor(own, other)
    assert isinstance(combined, Combination)
    either = steered(x, gate=And(ours, Not(other))) + steered(x, gate=And(other, Not(ours))) - steered(x, c=0)
    torch.testing.assert_close(steered(x, gate=combined), either)


def test_a_gate_serves_in_training_as_ours_does():
    def trained(gate):
        loss, generator = lambda output: output.square().mean(), torch.Generator().manual_seed(0)
        return optimize(network(), X, sites="1", loss=loss, gate=gate, steps=5, generator=generator, progress=False)

    assert trained(OwnGate()).equal(trained(ProjectionAbove(V, 0.5)))


class WithoutPer:
    site = "0"

    def __call__(self, rows):
        return rows[:, 0] > 0


def test_what_lacks_a_member_of_the_protocol_is_refused_before_anything_is_attached():
    with pytest.raises(TypeError, match="got WithoutPer, which has no per"):
        Steerer(network(), V, gate=WithoutPer())
    with pytest.raises(TypeError, match="got str, which has no site, no per, no __call__"):
        And(OwnGate(), "gate")
    with pytest.raises(ValueError, match="per: expected one of 'sequence', 'last', 'token', got 'word'"):
        Steerer(network(), V, gate=OwnGate("word"))
    with pytest.raises(TypeError, match="expected an object, got the class OwnGate; call it first"):
        Steerer(network(), V, gate=OwnGate)
    with pytest.raises(TypeError, match="expected a gate with a score and a threshold"):
        Soft(WithoutPer())


# --- estimators ------------------------------------------------------------------------------------------------------
class OwnEstimator:
    """Reads what it is told to, and keeps what it was given, so that a test can look at it."""

    def __init__(self, reads, make=None):
        self.reads, self.make = reads, make

    def __call__(self, *, positive, negative):
        self.seen = positive, negative
        found = SteeringVector({site: torch.ones(D) for site in positive})
        return self.make(found) if self.make else found


OPTIONS = {"positive": X, "negative": Y, "sites": ["0", "1"], "batch_size": 5, "progress": False}


def test_an_estimator_is_given_what_it_reads():
    model = network()
    with torch.no_grad():
        high, low = model[0](X), model[0](Y)
    for reads in ("means", "variances", "covariance"):
        own = OwnEstimator(reads)
        assert isinstance(own, Estimator)
        fit(model, estimator=own, **OPTIONS)
        for statistics, rows in zip(own.seen, (high, low), strict=True):
            assert statistics["0"].count == len(rows)
            torch.testing.assert_close(statistics["0"].mean, rows.mean(0))
            assert statistics["0"].kept == {"means": False, "variances": "diagonal", "covariance": True}[reads]
            if reads != "means":
                torch.testing.assert_close(statistics["0"].variance, rows.var(0))
            if reads == "covariance":
                torch.testing.assert_close(statistics["0"].covariance, rows.T.cov())
    pairs = OwnEstimator("pairs")
    fit(model, estimator=pairs, **OPTIONS)
    for statistics, rows in zip(pairs.seen, (high - low, low - high), strict=True):
        torch.testing.assert_close(statistics["0"].mean, rows.mean(0))
        torch.testing.assert_close(statistics["0"].covariance, rows.T.cov())
    joint = OwnEstimator("joint")
    fit(model, estimator=joint, **OPTIONS)
    for statistics in joint.seen:
        torch.testing.assert_close(statistics["0"].mean, torch.cat([high, low], dim=1).mean(0))
        torch.testing.assert_close(statistics["0"].covariance, torch.cat([high, low], dim=1).T.cov())


def test_an_estimator_of_rows_has_them_at_once_or_block_by_block():
    model, own = network(), OwnEstimator("rows")
    fit(model, estimator=own, **OPTIONS)
    for rows, x in zip(own.seen, (X, Y), strict=True):
        with torch.no_grad():
            expected = model[0](x)
        assert list(rows) == ["0", "1"] and len(rows) == 2
        torch.testing.assert_close(rows["0"], expected)
        for _ in range(2):  # as often as it likes
            blocks = [block["0"] for block in rows.blocks]
            assert [len(block) for block in blocks] == [5, 5, 2]
            torch.testing.assert_close(torch.cat(blocks), expected)


@pytest.mark.parametrize("reads", ["means", "variances", "covariance", "pairs", "joint", "rows"])
def test_what_an_estimator_gives_is_named_and_described_and_survives_a_file(reads, tmp_path):
    model = network()
    options = OPTIONS | {"axis": 1, "concept": "kind"}
    found = fit(model, estimator=OwnEstimator(reads), **options)
    ours = fit(model, estimator=MeanDifference(), **options)
    assert found.concept == "kind"
    assert found.metadata["estimator"] == "tests.test_protocols:OwnEstimator"
    assert found.metadata["axis 0"] == ours.metadata["axis 0"] == "1"
    assert found.metadata["model"] == ours.metadata["model"]
    if reads != "rows":
        assert found.metadata["positive count"] == found.metadata["negative count"] == "12"
    found.save(tmp_path / "own.safetensors", model=model)
    loaded = SteeringVector.load(tmp_path / "own.safetensors", model)
    assert loaded.equal(found) and loaded.metadata.items() >= found.metadata.items()
    assert VectorBank({"kind": found})["kind"].metadata == found.metadata


PARTS = (torch.ones(1, D), torch.ones(1, D), torch.ones(1))
EDITS = {
    "low rank": lambda v: LowRank(dict.fromkeys(v, PARTS), metadata={"kept": "yes"}),
    "affine": lambda v: Affine({site: (torch.eye(D), torch.ones(D)) for site in v}, metadata={"kept": "yes"}),
    "norm kept": lambda v: KeepNorm(LowRank(dict.fromkeys(v, PARTS), metadata={"kept": "yes"})),
    "of the user": lambda v: OwnEdit({site: torch.ones(D).double() for site in v}, {"kept": "yes"}),
}


@pytest.mark.parametrize("make", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("reads", ["means", "pairs", "joint", "rows"])
def test_an_estimator_may_give_any_edit(make, reads):
    model = network()
    estimator = OwnEstimator(reads, make)
    found = fit(model, estimator=estimator, axis=1, concept="kind", **OPTIONS)
    expected = make(["0", "1"])
    assert type(found) is type(expected)
    metadata = found.constant.metadata
    assert metadata.items() >= {"kept": "yes", "concept": "kind", "axis 0": "1"}.items() and "model" in metadata
    for site in ("0", "1"):
        assert torch.equal(found.at(site)(X, V["0"], ONE), expected.at(site)(X, V["0"], ONE))
    assert torch.equal(steered(vectors=found, c={"kind": 0.5}), steered(vectors=expected, c=0.5))


def test_what_is_no_estimator_is_refused_before_the_model_runs():
    model = network()
    model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    for bad, message in (
        (MeanDifference, "expected an object, got the class MeanDifference; call it first"),
        (lambda positive, negative: V, "expected an object with `reads`, one of 'means', 'variances'"),
    ):
        with pytest.raises(TypeError, match=message):
            fit(model, estimator=bad, **OPTIONS)
    with pytest.raises(ValueError, match=r"OwnEstimator.reads: expected one of 'means'.*, got 'sums'"):
        fit(model, estimator=OwnEstimator("sums"), **OPTIONS)


def test_what_an_estimator_gives_is_a_vector_or_an_edit():
    with pytest.raises(
        TypeError, match="OwnEstimator: expected a SteeringVector, or an edit such as LowRank, got dict"
    ):
        fit(network(), estimator=OwnEstimator("means", lambda found: {}), **OPTIONS)
