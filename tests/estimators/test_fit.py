"""fit: with every estimator it is what collecting, or recording, and estimating by hand give."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

from actsteer import (
    BatchError,
    ConceptErasure,
    LayerMean,
    LogisticDirection,
    LowRank,
    MeanDifference,
    NullSpace,
    PrincipalDirection,
    RidgeDirection,
    SiteNotFoundError,
    SparseFeature,
    SteeringVector,
    WhitenedMeanDifference,
    collect,
    collect_differences,
    fit,
    record,
)
from tests.oracles import state

SITE, D = "embed", 3
GENERATOR = torch.Generator().manual_seed(0)
TABLE = torch.randn(8, D, generator=GENERATOR)
VECTOR = SteeringVector({SITE: torch.tensor([1.0, 0.0, 0.0])}, concept="own")

SUMS = {
    "mean": MeanDifference(),
    "layer": LayerMean(),
    "whitened": WhitenedMeanDifference(),
    "ridge": RidgeDirection(alpha=0.5),
    "principal": PrincipalDirection(),
    "sparse": SparseFeature(torch.randn(6, D, generator=GENERATOR)),
    "erasure": ConceptErasure(),
    "null space": NullSpace(VECTOR, tolerance=0.5),
}
ROWS = {"logistic": LogisticDirection(C=0.5), "streamed": LogisticDirection(C=0.5, streamed=True)}
EVERY = SUMS | ROWS | {"paired": PrincipalDirection(paired=True)}
POSITIONS = ["all", "last", 0, [0, 1], slice(1, 3), "mean"]

every_estimator = pytest.mark.parametrize("estimator", EVERY.values(), ids=EVERY)
of_sums = pytest.mark.parametrize("estimator", SUMS.values(), ids=SUMS)


class Words(nn.Module):
    """Token numbers to activations (B, S, D); dropout and batch statistics show whether anything is disturbed."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(TABLE)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(D, 2)

    def forward(self, ids, attention_mask=None):
        return self.head(self.drop(self.embed(ids)))


MODEL = Words().train()


def batches(seed, lengths=(4, 3)):
    """Padded batches on the left and on the right, of five rows each."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        counts = torch.tensor([length, length, 3, 3, length])
        mask = (torch.arange(length) < counts[:, None]).long()
        made.append({"ids": torch.randint(8, (5, length), generator=generator), "attention_mask": mask})
    return made


POSITIVE, NEGATIVE = batches(1), batches(2)


def fitted(estimator, **options):
    options = {"positive": POSITIVE, "negative": NEGATIVE, "sites": SITE, "progress": False} | options
    return fit(MODEL, estimator=estimator, **options)


def parts(found):
    return found[SITE] if isinstance(found, LowRank) else (found[SITE],)


def assert_same(found, expected, **tolerance):
    assert type(found) is type(expected)
    for seen, own in zip(parts(found), parts(expected), strict=True):
        assert_allclose(seen.numpy(), own.numpy(), **({"rtol": 0, "atol": 0} | tolerance))


# --- by hand ---------------------------------------------------------------------------------------------------------
@of_sums
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_of_sums_it_is_collect_twice_and_estimate(estimator, positions):
    options = {"sites": SITE, "positions": positions, "covariance": estimator.reads == "covariance", "progress": False}
    toward, away = (collect(MODEL, side, **options) for side in (POSITIVE, NEGATIVE))
    assert_same(fitted(estimator, positions=positions), estimator(positive=toward, negative=away))


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_of_recorded_rows_it_is_record_twice_and_estimate(positions):
    options = {"sites": SITE, "positions": positions, "progress": False}
    toward, away = (record(MODEL, side, **options) for side in (POSITIVE, NEGATIVE))
    expected = ROWS["logistic"](positive=toward, negative=away)
    assert_same(fitted(ROWS["logistic"], positions=positions), expected)


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_a_stream_gives_what_the_record_gives(positions):
    streamed, recorded = (fitted(estimator, positions=positions) for estimator in ROWS.values())
    assert_same(streamed, recorded, rtol=1e-4, atol=1e-6)
    offsets = [float(v.metadata[f"offset {SITE}"]) for v in (streamed, recorded)]
    assert_allclose(*offsets, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_of_pairs_it_is_the_differences_and_their_negatives(positions):
    seen = collect_differences(MODEL, POSITIVE, NEGATIVE, sites=SITE, positions=positions, progress=False)
    expected = EVERY["paired"](positive=seen, negative=-seen)
    assert_same(fitted(EVERY["paired"], positions=positions), expected)


def test_pads_do_not_count():
    seen = fitted(MeanDifference())[SITE]
    sides = [torch.cat([TABLE[b["ids"][b["attention_mask"].bool()]] for b in side]) for side in (POSITIVE, NEGATIVE)]
    expected = (sides[0].double().mean(0) - sides[1].double().mean(0)).float()
    torch.testing.assert_close(seen, expected)


# --- the laws --------------------------------------------------------------------------------------------------------
@every_estimator
def test_what_is_under_a_pad_changes_nothing(estimator):
    def scribbled(side):
        return [b | {"ids": torch.where(b["attention_mask"].bool(), b["ids"], 7 - b["ids"])} for b in side]

    other = fitted(estimator, positive=scribbled(POSITIVE), negative=scribbled(NEGATIVE))
    assert_same(other, fitted(estimator))


@every_estimator
def test_the_order_of_the_batches_changes_nothing(estimator):
    other = fitted(estimator, positive=POSITIVE[::-1], negative=NEGATIVE[::-1])
    assert_same(other, fitted(estimator), rtol=1e-4, atol=1e-5)


@every_estimator
def test_every_site_is_fitted_as_if_alone(estimator):
    model = nn.Sequential(nn.Identity(), nn.Linear(D, D), nn.ReLU())
    generator = torch.Generator().manual_seed(0)
    sides = {
        "positive": torch.randn(20, D, generator=generator) + 1,
        "negative": torch.randn(20, D, generator=generator),
    }
    if isinstance(estimator, NullSpace):
        estimator = NullSpace(SteeringVector({"0": torch.ones(D), "1": torch.ones(D)}), tolerance=0.5)
        alone = [NullSpace(estimator.vector.select(site), tolerance=0.5) for site in ("0", "1")]
    else:
        alone = [estimator, estimator]
    options = sides | {"progress": False, "batch_size": 8}
    both = fit(model, sites=["0", "1"], estimator=estimator, **options)
    for site, own in zip(("0", "1"), alone, strict=True):
        expected = fit(model, sites=site, estimator=own, **options)
        mine, its = ([found[site]] if isinstance(found, SteeringVector) else found[site] for found in (both, expected))
        for a, b in zip(mine, its, strict=True):
            assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-7)


@every_estimator
def test_the_model_is_left_as_it_was(estimator):
    before, seed = state(MODEL), torch.random.get_rng_state()
    fitted(estimator)
    assert state(MODEL) == before
    assert torch.equal(torch.random.get_rng_state(), seed)


@every_estimator
def test_the_feature_axis_and_the_model_are_remembered(estimator):
    model = nn.Sequential(nn.Identity())
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(20, D, D, generator=generator) + k for k in (1, 0))
    if isinstance(estimator, NullSpace):
        estimator = NullSpace(SteeringVector({"0": torch.ones(D)}, concept="own"), tolerance=0.9)
    options = {"sites": "0", "estimator": estimator, "axis": 1, "progress": False}
    found = fit(model, positive=positive, negative=negative, **options)
    described = collect(model, positive, sites="0", axis=1, progress=False).metadata
    assert found.metadata.items() >= described.items() and described["axis 0"] == "1"
    turned = options | {"axis": -1}
    expected = fit(model, positive=positive.mT, negative=negative.mT, **turned)
    for seen, own in zip(
        *([f["0"]] if isinstance(f, SteeringVector) else f["0"] for f in (found, expected)), strict=True
    ):
        assert_allclose(seen.numpy(), own.numpy(), rtol=1e-4, atol=1e-5)


@every_estimator
def test_a_concept_is_named(estimator):
    assert fitted(estimator, concept="kind").concept == "kind"


# --- what cannot be --------------------------------------------------------------------------------------------------
@every_estimator
def test_a_site_that_does_not_exist_is_named(estimator):
    with pytest.raises(SiteNotFoundError, match="'nowhere'"):
        fitted(estimator, sites="nowhere")


@every_estimator
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_side_without_batches_is_refused(estimator, side):
    with pytest.raises(BatchError):
        fitted(estimator, **{side: []})


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_stream_from_a_generator_is_refused_before_any_pass(side):
    ran = []
    handle = MODEL.embed.register_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(BatchError, match="list, not a generator"):
            fitted(ROWS["streamed"], **{side: iter(batches(3))})
    finally:
        handle.remove()
    assert len(ran) <= 1  # one batch at most, for the metadata


def test_the_oracle_of_the_whitened_direction_sees_all_tokens():
    """One estimator end to end in numpy, from the tokens on."""
    sides = [
        torch.cat([TABLE[b["ids"][b["attention_mask"].bool()]] for b in side]).double().numpy()
        for side in (POSITIVE, NEGATIVE)
    ]
    pooled = sum((len(s) - 1) * np.cov(s.T) for s in sides) / (sum(map(len, sides)) - 2)
    expected = np.linalg.solve(pooled, sides[0].mean(0) - sides[1].mean(0))
    assert_allclose(fitted(WhitenedMeanDifference(shrinkage=0.0))[SITE].numpy(), expected, rtol=1e-5, atol=1e-6)
