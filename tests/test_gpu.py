"""On a CUDA device everything that is collected, estimated, trained, tuned and drawn is what it is on the CPU."""

import copy

import pytest
import torch
from torch import nn

from actsteer import (
    ConceptErasure,
    GaussianMap,
    LayerMean,
    LogisticDirection,
    LowRank,
    MeanDifference,
    NullSpace,
    OutputMetric,
    PrincipalDirection,
    ProjectionAbove,
    Statistics,
    Steerer,
    Steering,
    SteeringVector,
    VectorBank,
    WhitenedMeanDifference,
    calibrate,
    collect,
    discover,
    fit,
    fold,
    look,
    optimize,
    record,
    sweep,
    unfold,
)
from tests.tuning.trained import SITES, kept, points, toward_two, trained, two
from tests.zoo import cnn, gpt2, mlp, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
QUIET = {"progress": False}
POSITIVE, NEGATIVE = normal(40, 12), normal(40, 12, seed=2) - 0.5
ESTIMATORS = {
    type(estimator).__name__: estimator
    for estimator in (
        MeanDifference(),
        LayerMean(),
        WhitenedMeanDifference(),
        PrincipalDirection(),
        LogisticDirection(),
        ConceptErasure(),
        GaussianMap(),
        NullSpace(SteeringVector({site: normal(6) for site in ("2", "5")}), tolerance=0.3),
    )
}


def there(model):
    return copy.deepcopy(model).to(DEVICE)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_what_is_fitted_there_steers_there_as_here(estimator):
    model, x = mlp(), normal(5, 12, seed=3)
    here = fit(model, positive=POSITIVE, negative=NEGATIVE, sites=["2", "5"], estimator=estimator, **QUIET)
    moved = there(model)
    sides = {"positive": POSITIVE.to(DEVICE), "negative": NEGATIVE.to(DEVICE)}
    found = fit(moved, **sides, sites=["2", "5"], estimator=estimator, **QUIET)
    with Steerer(model, here, c=0.5), Steerer(moved, found, c=0.5):
        torch.testing.assert_close(moved(x.to(DEVICE)).cpu(), model(x), rtol=1e-6, atol=1e-8)


def test_rows_are_recorded_there():
    acts = record(there(mlp()), POSITIVE.to(DEVICE), sites=["2"], **QUIET)
    torch.testing.assert_close(acts["2"].cpu(), record(mlp(), POSITIVE, sites=["2"], **QUIET)["2"])


def test_statistics_from_there_merge_with_those_from_here(tmp_path):
    model = mlp()
    one = collect(there(model), POSITIVE.to(DEVICE), sites="2", covariance=True, **QUIET)
    one.save(tmp_path / "one.safetensors")
    both = Statistics.load(tmp_path / "one.safetensors").merge(
        collect(model, NEGATIVE, sites="2", covariance=True, **QUIET)
    )
    whole = collect(model, torch.cat([POSITIVE, NEGATIVE]), sites="2", covariance=True, **QUIET)
    torch.testing.assert_close(both["2"].covariance.cpu(), whole["2"].covariance)
    torch.testing.assert_close(one.merge(one)["2"].mean.cpu(), one["2"].mean.cpu())


def test_extraction_there_keeps_sums_and_not_activations():
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU()).to(DEVICE)
    batch = torch.randn(256, 64, device=DEVICE)

    def peak(batches):
        torch.cuda.reset_peak_memory_stats()
        collect(model, [batch] * batches, sites=["0", "1"], covariance=True, **QUIET)
        return torch.cuda.max_memory_allocated()

    peak(2)
    assert peak(40) == peak(4)


def test_a_vector_from_there_is_saved_and_loaded(tmp_path):
    v = SteeringVector({"2": normal(6).to(DEVICE)})
    VectorBank({"one": v}).save(tmp_path / "bank.safetensors")
    assert VectorBank.load(tmp_path / "bank.safetensors")["one"].to(device="cpu").equal(v.to(device="cpu"))
    Steering(v, c=2.0).save(tmp_path / "steering.safetensors")
    model, x = there(mlp()), normal(3, 12).to(DEVICE)
    with Steerer(model, Steering.load(tmp_path / "steering.safetensors")):
        steered = model(x)
    with Steerer(model, v, c=2.0):
        assert torch.equal(model(x), steered)


def test_text_is_written_there_as_here():
    model, ids = gpt2(), torch.tensor([[3, 5, 2], [7, 1, 4]])
    v = SteeringVector({"transformer.h.0": 3 * normal(8)})
    moved = there(model)
    gate = ProjectionAbove(v, 0.0, per="token")
    for options in (
        {"positions": "generated"},
        {"positions": "prompt"},
        {"gate": gate},
        {"c": torch.tensor([0.0, 3.0])},
    ):
        with Steerer(model, v, **options), Steerer(moved, v, **options):
            here = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
            assert torch.equal(
                moved.generate(ids.to(DEVICE), max_new_tokens=8, do_sample=False, pad_token_id=0).cpu(), here
            )


def test_a_vector_and_an_edit_are_trained_there():
    model = there(trained())
    x, y = points(0, 40, seed=1).to(DEVICE), torch.full((40,), 2, device=DEVICE)
    before = model(x)
    options = {"sites": ["3"], "loss": nn.functional.cross_entropy, "targets": y, "steps": 60, "lr": 0.2, **QUIET}
    for train in (None, LowRank(rank=2)):
        edit = optimize(model, x, train=train, **options)
        with Steerer(model, edit):
            assert (model(x).argmax(dim=1) == 2).float().mean() > 0.9
    assert torch.equal(model(x), before)


def test_directions_are_discovered_there():
    model = mlp()
    options = {"site": "2", "target": "11", "norm": 1.0, "steps": 20, **QUIET}
    bank = discover(there(model), POSITIVE.to(DEVICE), generator=torch.Generator().manual_seed(0), **options)
    assert torch.isclose(bank[bank.concepts[0]]["2"].norm().cpu(), torch.tensor(1.0, dtype=torch.float64))


def test_calibrating_there_chooses_what_it_chooses_here():
    def found(model, device):
        metric = OutputMetric(inputs=points(0, 60, seed=20).to(device), score=two)
        return calibrate(
            model,
            toward_two(trained()),
            evaluate=metric,
            retain=kept().to(device),
            controls=2,
            generator=torch.Generator().manual_seed(0),
            **QUIET,
        )

    here, moved = found(trained(), "cpu"), found(there(trained()), DEVICE)
    assert moved.best.sites == here.best.sites and moved.best.c == pytest.approx(here.best.c, rel=1e-4)


def test_a_page_and_a_table_are_made_there():
    model, x = there(trained()), points(0, 3, seed=1).to(DEVICE)
    v = toward_two(trained()).select(*SITES[:1])
    assert "<html" in look(model, v, inputs=x, c=2.0, **QUIET).html
    rows = sweep(model, v, c=[0, 1], evaluate=lambda m: {"two": two(m(x)).mean().item()})
    assert len(list(rows)) == 2


def test_a_fold_there_gives_what_the_steerer_gives_and_is_undone():
    model, x = there(cnn()), normal(2, 3, 4, 4).to(DEVICE)
    before, v = model(x), SteeringVector({"0": normal(4)})
    with Steerer(model, v, c=2.0):
        steered = model(x)
    fold(model, v, c=2.0, verify_on=x, inplace=True)
    torch.testing.assert_close(model(x), steered)
    unfold(model)
    assert torch.equal(model(x), before)
