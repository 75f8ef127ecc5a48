"""A page of a user's code: `mypy --strict` passes it against the installed wheel, and it runs there.

`.ci/release` and `tests/test_release.py` do both. What a user may get wrong stands in `rejected`, which nothing calls.
"""

import tempfile
from pathlib import Path
from typing import Any, Literal, assert_type

import torch
from torch import Tensor, nn

from actsteer import (
    ConceptErasure,
    LowRank,
    MeanDifference,
    OutputMetric,
    ProjectionAbove,
    Rows,
    Statistics,
    Steerer,
    Steering,
    SteeringVector,
    VectorBank,
    calibrate,
    collect,
    find_sites,
    fit,
    fold,
    optimize,
    record,
    sweep,
)


class Median:
    """An estimator."""

    reads: Literal["rows"] = "rows"

    def __call__(self, *, positive: Rows, negative: Rows) -> SteeringVector:
        """Between the medians of both sides."""
        return SteeringVector({s: positive[s].median(0).values - negative[s].median(0).values for s in positive})


class Sparse:
    """A gate."""

    site = "1"
    per: Literal["sequence"] = "sequence"

    def __call__(self, h: Tensor) -> Tensor:
        """Fires where most features are 0."""
        return (h == 0).double().mean(dim=1) > 0.5


def stretch(h: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """An intervention, with names of the user's."""
    return h + c * (h @ v)[..., None] * v / (v @ v)


def main(folder: Path) -> None:
    """What the README shows, with the types that an editor shows."""
    torch.manual_seed(0)
    left, right = torch.randn(64, 2) - 2, torch.randn(64, 2) + 2
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2)).requires_grad_(False)

    assert_type(find_sites(model, "*"), tuple[str, ...])
    v = assert_type(fit(model, positive=right, negative=left, sites="1", concept="right"), SteeringVector)
    assert_type(fit(model, positive=right, negative=left, sites="1", estimator=Median()), SteeringVector)
    assert_type(fit(model, positive=right, negative=left, sites="1", estimator=ConceptErasure()), LowRank)
    sides = [assert_type(collect(model, side, sites="1", covariance=True), Statistics) for side in (right, left)]
    assert_type(sides[0]["1"].mean, Tensor)
    w = assert_type(MeanDifference()(positive=sides[0], negative=sides[1]), SteeringVector)
    assert_type(record(model, left, sites="1"), dict[str, Tensor])

    assert_type(2 * v - w / 2, SteeringVector)
    assert_type(v @ w, Tensor)
    assert_type(v.project(onto=w).to(torch.float64)["1"], Tensor)
    bank = VectorBank({"right": v, "wide": SteeringVector({"1": torch.ones(16)})})
    assert_type(bank.combine({"right": 1.0, "wide": -0.5}), SteeringVector)
    assert_type(bank.cosines(), Tensor)
    bank.save(folder / "sides.safetensors")
    loaded = assert_type(VectorBank.load(folder / "sides.safetensors"), VectorBank)
    assert loaded["right"].equal(v)

    plain = model(left)
    with Steerer(model, loaded, c={"right": 1.5, "wide": 0}) as steerer:
        assert_type(steerer, Steerer)
        steered = model(left)
        steerer.c = torch.zeros(64)
        assert torch.equal(model(left), plain)
    assert torch.equal(model(left), plain) and not torch.equal(steered, plain)
    with Steerer(model, v, c=1.5, gate=Sparse(), intervention=stretch):
        model(left)
    steering = Steering(v, c=1.5, gate=ProjectionAbove.between(-v, positive=sides[1], negative=sides[0]))
    steering.save(folder / "steering.safetensors")
    assert_type(Steering.load(folder / "steering.safetensors"), Steering)

    rows = sweep(model, v, c=[0, 1], evaluate=lambda steered: {"right": float(steered(left).argmax(dim=1).sum())})
    assert_type(rows, list[dict[str, Any]])
    ones, loss = torch.ones(64, dtype=torch.long), nn.functional.cross_entropy
    assert_type(optimize(model, left, sites="1", loss=loss, targets=ones, steps=2), SteeringVector)
    edit = optimize(model, left, sites="1", loss=lambda y: y.square().mean(), steps=2, train=LowRank(rank=1))
    assert_type(edit, LowRank)
    effect = OutputMetric(inputs=left, score=lambda logits: logits[:, 1])
    assert_type(calibrate(model, v, evaluate=effect, retain=right, controls=0).best, Steering)
    assert_type(fold(model, v, 1.5, verify_on=left), nn.Sequential)


def rejected(model: nn.Module, v: SteeringVector, x: Tensor) -> None:
    """What a type checker refuses; an ignore that is not needed is an error too."""
    v + 1.0  # type: ignore[operator]
    v * "2"  # type: ignore[operator]
    v["1"] = x  # type: ignore[index]
    SteeringVector({1: x})  # type: ignore[dict-item]
    Steerer(model, v, 2.0)  # type: ignore[call-arg]
    Steerer(model, v, strength=2.0)  # type: ignore[call-arg]
    Steerer(model, v, c="2")  # type: ignore[arg-type]
    Steerer(model, {"1": x})  # type: ignore[arg-type]
    Steerer(model, v, gate=lambda rows: rows.sum(dim=1) > 0)  # type: ignore[arg-type]
    Steerer(model, v, backend="hooks")  # type: ignore[arg-type]
    Steerer(model, v, positions="middle")  # type: ignore[arg-type]
    fit(model, x, -x, sites="1")  # type: ignore[call-arg]
    fit(model, positive=x, negative=-x)  # type: ignore[call-arg]
    fit(model, positive=x, negative=-x, sites="1", estimator="mean")  # type: ignore[arg-type]
    optimize(model, x, sites="1", loss="cross_entropy")  # type: ignore[arg-type]
    VectorBank({"right": x})  # type: ignore[dict-item]
    VectorBank({"right": v}).combine(["right"])  # type: ignore[arg-type]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
