"""one_by_one: every site is fitted on what the earlier ones leave, so that an estimator's laws hold at all of them."""

from contextlib import nullcontext

import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.linear_model import LogisticRegression
from torch import nn

from actsteer import (
    Affine,
    BatchError,
    ConceptErasure,
    GaussianMap,
    LogisticDirection,
    LowRank,
    MeanDifference,
    PrincipalDirection,
    ShapeError,
    SiteNotFoundError,
    Steerer,
    SteeringVector,
    VectorBank,
    collect,
    fit,
    one_by_one,
    record,
)
from tests.oracles import state

D = 4


class Blocks(nn.Module):
    """Three blocks with a residual stream, registered in another order than that in which they run."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.middle = (
            nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in range(3)
        )

    def forward(self, x):
        x = x + self.first(x)
        x = x + self.middle(x)
        return x + self.last(x)


SITES = ["last", "first", "middle:in", "last:in"]
IN_ORDER = ("first", "middle:in", "last:in", "last")


@pytest.fixture(autouse=True, scope="module")
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Blocks()


def sides(count=60):
    """Two sides that differ in their means, and in how they vary."""
    generator = torch.Generator().manual_seed(1)
    high, low = (torch.randn(count, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return 0.7 * high + torch.tensor([1.0, -1.0, 0.5, 0.0]), low


POSITIVE, NEGATIVE = sides()
DATA = {"positive": POSITIVE, "negative": NEGATIVE, "batch_size": 25, "progress": False}
BOTH = {"sites": SITES, "progress": False}


def means(model, edit, *, sites=IN_ORDER):
    """Site -> both sides' means, while the model is steered."""
    with Steerer(model, edit):
        seen = [collect(model, side, sites=sites, progress=False) for side in (POSITIVE, NEGATIVE)]
    return {site: tuple(side[site].mean for side in seen) for site in sites}


# --- scrubbing -------------------------------------------------------------------------------------------------------
def test_after_scrubbing_the_means_are_equal_at_every_site_and_after_erasing_each_as_if_alone_they_are_not(model):
    scrubbed, apart = (
        fit(model, sites=SITES, estimator=ConceptErasure(), one_by_one=how, **DATA) for how in (True, False)
    )
    for positive, negative in means(model, scrubbed).values():
        assert_allclose(positive, negative, atol=1e-12)
    later = means(model, apart)
    assert_allclose(*later.pop("first"), atol=1e-12)  # nothing is edited before it
    assert all(float((positive - negative).norm()) > 1e-3 for positive, negative in later.values())


def test_no_probe_at_any_site_of_a_scrubbed_model_beats_the_shares_of_the_classes(model):
    edit = fit(model, sites=SITES, estimator=ConceptErasure(), one_by_one=True, **DATA)
    labels = torch.arange(2 * len(POSITIVE)) < len(POSITIVE)
    plain = record(model, [POSITIVE, NEGATIVE], **BOTH)
    with Steerer(model, edit):
        scrubbed = record(model, [POSITIVE, NEGATIVE], **BOTH)
    for site in IN_ORDER:
        probe = LogisticRegression(C=1e3, tol=1e-8, max_iter=1000)
        assert probe.fit(plain[site].numpy(), labels.numpy()).score(plain[site].numpy(), labels.numpy()) > 0.6
        after = probe.fit(scrubbed[site].numpy(), labels.numpy()).predict_proba(scrubbed[site].numpy())
        assert_allclose(after, 0.5, atol=1e-5)


def test_several_classes_are_scrubbed_with_the_function(model):
    rows, labels = torch.cat([POSITIVE, NEGATIVE, NEGATIVE.flip(0) * 0.5 - 1]), torch.arange(180) // 60

    def erased(site):
        seen = collect(model, rows, by=labels, sites=site, covariance=True, progress=False)
        return ConceptErasure().classes(seen)

    edit = one_by_one(model, rows[:2], sites=SITES, fitted=erased)
    with Steerer(model, edit):
        classes = collect(model, rows, by=labels, **BOTH)
    for site in SITES:
        for label in (1, 2):
            assert_allclose(classes[label][site].mean, classes[0][site].mean, atol=1e-12)


# --- the negative side alone -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("estimator", [MeanDifference(), GaussianMap(diagonal=True)], ids=repr)
def test_the_negative_side_gets_the_plain_positive_means_at_every_site(model, estimator):
    edit = fit(model, sites=SITES, estimator=estimator, one_by_one="negative", **DATA)
    goal = collect(model, POSITIVE, **BOTH)
    for site, (_, moved) in means(model, edit).items():
        assert_allclose(moved, goal[site].mean, atol=1e-12)
    apart = means(model, fit(model, sites=SITES, estimator=estimator, **DATA))
    assert float((apart["last"][1] - goal["last"].mean).norm()) > 1e-3


def test_the_negative_side_gets_the_plain_positive_covariance_at_every_site(model):
    edit = fit(model, sites=SITES, estimator=GaussianMap(), one_by_one="negative", **DATA)
    goal = collect(model, POSITIVE, covariance=True, **BOTH)
    with Steerer(model, edit):
        moved = collect(model, NEGATIVE, covariance=True, **BOTH)
    for site in SITES:
        assert_allclose(moved[site].mean, goal[site].mean, atol=1e-10)
        assert_allclose(moved[site].covariance, goal[site].covariance, atol=1e-10)


# --- what it is ------------------------------------------------------------------------------------------------------
ESTIMATORS = [
    MeanDifference(),
    ConceptErasure(),
    GaussianMap(),
    PrincipalDirection(paired=True),
    LogisticDirection(streamed=True),
]


def parts(found, site):
    return (found[site],) if isinstance(found, SteeringVector) else found[site]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_each_site_is_what_fit_gives_while_the_model_is_steered_by_those_that_run_before(model, estimator):
    before = state(model)
    found = fit(model, sites=SITES, estimator=estimator, one_by_one=True, concept="kind", **DATA)
    assert state(model) == before
    assert found.sites == IN_ORDER and found.concept == "kind"
    for place, site in enumerate(IN_ORDER):
        with Steerer(model, found, sites=IN_ORDER[:place]) if place else nullcontext():
            expected = fit(model, sites=site, estimator=estimator, concept="kind", **DATA)
        for one, other in zip(parts(found, site), parts(expected, site), strict=True):
            assert_allclose(one, other, rtol=1e-9, atol=1e-12)
        said = {key: text for key, text in expected.metadata.items() if site in key}
        assert found.metadata.items() >= said.items()


@pytest.mark.parametrize("how", [True, "negative"])
def test_of_one_site_it_is_fit(model, how):
    found, plain = (
        fit(model, sites="middle", estimator=ConceptErasure(), one_by_one=one, **DATA) for one in (how, False)
    )
    assert all(map(torch.equal, found["middle"], plain["middle"]))
    assert found.metadata == plain.metadata


def test_what_is_said_of_the_axes_is_said_of_each_site():
    model = nn.Sequential(nn.Identity(), nn.Tanh(), nn.Tanh())
    rows = torch.stack([POSITIVE[:20], NEGATIVE[:20]], dim=2)  # features on axis 1
    options = {"positive": rows + 1, "negative": rows, "sites": ["0", "1"], "progress": False}
    turned = fit(model, axis={"0": 1, "1": 1}, mask={"1": None}, one_by_one=True, **options)
    options |= {"positive": rows.mT + 1, "negative": rows.mT}
    assert turned.allclose(fit(model, one_by_one=True, **options))
    assert {key: text for key, text in turned.metadata.items() if key.startswith("axis")} == {
        "axis 0": "1",
        "axis 1": "1",
    }


# --- joining edits ---------------------------------------------------------------------------------------------------
def low_rank(*sites, seed=0):
    made = torch.Generator().manual_seed(seed)
    return LowRank({s: tuple(torch.randn(*shape, generator=made) for shape in ((1, 2), (1, 2), (1,))) for s in sites})


def affine(*sites, seed=0):
    made = torch.Generator().manual_seed(seed)
    return Affine({s: (torch.randn(2, 2, generator=made), torch.randn(2, generator=made)) for s in sites})


@pytest.mark.parametrize("kind", [low_rank, affine])
def test_joined_edits_have_the_sites_of_both_and_the_right_one_stands(kind):
    one, other = kind("0", "1"), kind("1", "2", seed=1).described({"axis 2": "1"})
    joined = one | other
    assert joined.sites == ("0", "1", "2") and joined.metadata == {"axis 2": "1"}
    for site, source in (("0", one), ("1", other), ("2", other)):
        assert all(map(torch.equal, joined[site], source[site]))
    assert kind("0").described({"concept": "a", "x": "1"}).__or__(kind("1").described({"concept": "a"})).concept == "a"


def test_other_kinds_are_not_joined():
    for one, other in ((low_rank("0"), affine("0")), (affine("0"), low_rank("1"))):
        with pytest.raises(TypeError, match="unsupported operand"):
            _ = one | other


# --- what cannot be --------------------------------------------------------------------------------------------------
def runs(model):
    """A list that grows whenever the model runs; with the handle that ends it."""
    seen = []
    return seen, model.register_forward_hook(lambda *_: seen.append(1))


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_generator_is_refused_before_the_model_runs(model, side):
    seen, handle = runs(model)
    with handle, pytest.raises(BatchError, match="list, not a generator"):
        fit(model, sites=SITES, one_by_one=True, **DATA | {side: iter([POSITIVE])})
    assert not seen


def test_a_positive_side_that_is_not_steered_may_be_a_generator(model):
    once, often = (
        fit(model, sites=SITES, one_by_one="negative", **DATA | {"positive": given})
        for given in ((part for part in POSITIVE.split(25)), POSITIVE)
    )
    assert once.equal(often)


@pytest.mark.parametrize(
    ("how", "estimator", "said"),
    [
        ("positive", MeanDifference(), "expected False, True or 'negative', got 'positive'"),
        ("negative", LogisticDirection(), "LogisticDirection reads rows"),
        ("negative", PrincipalDirection(paired=True), "PrincipalDirection reads pairs"),
    ],
)
def test_what_cannot_be_fitted_so_is_said_before_the_model_runs(model, how, estimator, said):
    seen, handle = runs(model)
    with handle, pytest.raises(ValueError, match=said):
        fit(model, sites=SITES, estimator=estimator, one_by_one=how, **DATA)
    assert not seen


def test_a_site_that_does_not_exist_is_named(model):
    with pytest.raises(SiteNotFoundError, match="'nowhere'"):
        fit(model, sites=["first", "nowhere"], one_by_one=True, **DATA)
    with pytest.raises(SiteNotFoundError, match="axis names no site in use: 'nowhere'"):
        fit(model, sites=SITES, one_by_one=True, axis={"nowhere": 1}, **DATA)


class Doubled:
    """An edit as a user writes it, without `|`."""

    def __init__(self, sizes, metadata=()):
        self.sizes, self.metadata = sizes, dict(metadata)

    def at(self, site):
        return lambda activation, direction, c: activation * (1 + c)

    @property
    def constant(self):
        return SteeringVector({site: torch.zeros(d) for site, d in self.sizes.items()}, metadata=self.metadata)

    def described(self, metadata):
        return type(self)(self.sizes, metadata)


class Joined(Doubled):
    def __or__(self, other):
        return Joined(self.sizes | other.sizes)


def test_an_edit_of_ones_own_needs_a_way_to_be_joined(model):
    with pytest.raises(TypeError, match=r"joined by `\|`, which Doubled does not have"):
        one_by_one(model, NEGATIVE, sites=SITES, fitted=lambda site: Doubled({site: D}))
    assert one_by_one(model, NEGATIVE, sites="first", fitted=lambda site: Doubled({site: D})).sizes == {"first": D}


def test_an_edit_of_ones_own_that_has_one_is_joined(model):
    def fitted(site):
        model(NEGATIVE)
        return Joined({site: D}, {"by": "hand"})

    joined = one_by_one(model, NEGATIVE, sites=SITES, fitted=fitted)
    assert tuple(joined.sizes) == IN_ORDER and joined.metadata == {"by": "hand"}


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, x, keep):
        return self.second(self.first(x))


def test_the_sites_before_are_steered_where_the_mask_says():
    batch = {"x": torch.zeros(2, 3, 1), "keep": torch.tensor([[1, 1, 0], [0, 1, 1]])}
    model, seen = Masked(), []

    def fitted(site):
        seen.append(model(**batch)[..., 0])
        return SteeringVector({site: torch.ones(1)})

    one_by_one(model, batch, sites=["first", "second"], mask="keep", fitted=fitted)
    assert torch.equal(seen[0], torch.zeros(2, 3)) and torch.equal(seen[1], batch["keep"].float())


def test_what_is_fitted_is_of_the_site_that_was_asked_for(model):
    vector = SteeringVector({"first": torch.ones(D)})
    with pytest.raises(ShapeError, match=r"fitted\('middle'\).*got \('first',\)"):
        one_by_one(model, NEGATIVE, sites=["middle"], fitted=lambda site: vector)
    with pytest.raises(TypeError, match=r"fitted\('middle'\): expected a SteeringVector, or an edit.*got VectorBank"):
        one_by_one(model, NEGATIVE, sites=["middle"], fitted=lambda site: VectorBank({"a": vector}))
    with pytest.raises(ValueError, match="data gone"):
        one_by_one(model, NEGATIVE, sites=SITES, fitted=failing(vector))
    assert not model.first._forward_hooks and type(model.first) is nn.Sequential


def failing(vector):
    """Fits the first site, and fails at the second."""
    left = [vector]

    def fitted(site):
        if not left:
            raise ValueError("data gone")
        return left.pop()

    return fitted
