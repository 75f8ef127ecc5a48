"""Measuring: what is within a budget, by the half that chooses; and what is lost, by its formula."""

import math

import pytest
import torch
from torch import nn

from actsteer import PrincipalDirection, Steering, SteeringVector, VectorBank
from actsteer.tuning.budget import Budget
from actsteer.tuning.candidates import candidate
from actsteer.tuning.controls import check_rows, shuffled_banks
from actsteer.tuning.doses import Doses
from actsteer.tuning.measuring import Measuring
from actsteer.tuning.memory import Memory
from actsteer.tuning.retained import Retained
from tests.tuning.trained import is_two, toward_two, trained
from tests.zoo import llama

WHERE = {"axis": None, "row_axis": None, "token_axis": None, "mask": None}


class Lost:
    """What is lost on 60 rows, in the place of a model's."""

    owners = torch.arange(60)
    rows = torch.randn(60, generator=torch.Generator().manual_seed(4)).exp().double()

    def kl(self, doses, strengths):
        return [c * self.rows for c in strengths]


def measuring(budget, *, rows=None):
    model, lost = trained(), Lost()
    lost.rows = Lost.rows if rows is None else rows
    how = {"evaluate": is_two(), "confirm": None, "where": WHERE, "batch_size": 64, "together": True}
    made = Measuring(
        model, lost, budget=Budget(budget), generator=torch.Generator().manual_seed(0), memory=Memory(None, {}), **how
    )
    v = toward_two(model).select("1")
    own = candidate(0, Steering(v), ["1"], units=VectorBank({"two": v}), norms={"1": float(v["1"].norm())}, doses=None)
    assert own.unit == pytest.approx(1.0)
    return made, own


def halves_of(made):
    """The rows that choose: those whose loss alone changes a point's cost."""
    chosen = []
    for row in range(60):
        single = torch.zeros(60, dtype=torch.float64)
        single[row] = 1.0
        other, own = measuring({"mean": 1.0}, rows=single)
        chosen.append(other.measure(own, [1.0])[0].cost > 0)
    return torch.tensor(chosen)


def test_a_point_costs_the_upper_end_of_the_interval_of_the_half_that_chooses():
    made, own = measuring({"mean": 2.0})
    chooses = halves_of(made)
    assert int(chooses.sum()) == 30
    (point,) = made.measure(own, [0.5])
    rows = 0.5 * Lost.rows[chooses]
    drawn = rows[torch.randint(30, (4000, 30), generator=torch.Generator().manual_seed(1))].mean(dim=1)
    upper = float(drawn.quantile(0.975))
    assert point.cost == pytest.approx(upper / 2.0, rel=0.05)
    assert point.cost > 1.1 * float(rows.mean()) / 2.0


def test_figures_are_of_the_other_half_the_mean_and_the_percentile_by_name():
    made, own = measuring({"mean": 9.0, "p95": 9.0})
    reports = ~halves_of(made)
    (point,) = made.measure(own, [0.5])
    costs = made.row(point)["costs"]
    rows = (0.5 * Lost.rows[reports]).sort().values
    assert costs["mean"][0] == pytest.approx(float(rows.mean()))
    assert costs["p95"][0] == pytest.approx(float(rows[math.ceil(0.95 * 30) - 1]))


def test_what_is_over_the_budget_is_not_evaluated():
    made, own = measuring({"mean": 1.0})
    inside, over = made.measure(own, [0.01, 100.0])
    assert "effect" in inside.figures
    assert set(over.figures) == {"kl"}
    assert not over.feasible


# --- what is lost ------------------------------------------------------------------------------------------------
class Masked(nn.Module):
    """A class that can never be."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x).index_fill(1, torch.tensor([2]), -torch.inf)


def retained(model, batches, sites, **how):
    told = {"where": {}, "mask": None, "batch_size": 64, "generator": torch.Generator(), "progress": False}
    return Retained(model, batches, sites, controls=0, keep_outputs=True, **told, **how)


def test_a_class_that_can_never_be_costs_nothing():
    from actsteer import Steerer

    model, x = Masked(), torch.randn(8, 4)
    seen = retained(model, x, ["inner"])
    with Steerer(model, SteeringVector({"inner": torch.tensor([1.0, 0.0, 5.0, 0.0])}), c=0.0) as steerer:
        (lost,) = seen.kl(Doses(model, steerer, batch_size=64), [2.0])
    p = x[:, [0, 1, 3]].double().softmax(dim=1)
    q = (x[:, [0, 1, 3]] + torch.tensor([2.0, 0.0, 0.0])).double().softmax(dim=1)
    assert torch.allclose(lost, (p * (p / q).log()).sum(dim=1), atol=1e-5)


def test_pads_are_not_lost_and_every_token_is_its_texts():
    lm = llama()
    ids = torch.randint(1, lm.config.vocab_size, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])
    seen = retained(lm, [{"input_ids": ids, "attention_mask": mask}] * 2, ["model.layers.0"])
    assert seen.owners.tolist() == [0] * 5 + [1] * 2 + [2] * 4 + [3] * 5 + [4] * 2 + [5] * 4


# --- controls ----------------------------------------------------------------------------------------------------
def test_of_pairs_the_sides_are_swapped_by_chance():
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(40, 6, generator=generator) * 0.1 + 1
    sides = {"0": positive}, {"0": torch.zeros(40, 6)}
    bank = VectorBank({"up": SteeringVector({"0": torch.ones(6)})})
    estimator = PrincipalDirection(paired=True)
    found = list(shuffled_banks(bank, {"up": sides}, estimator, count=40, generator=generator))
    cosines = torch.stack([own["up"].cosine(bank["up"]) for own in found])
    assert 5 < int((cosines > 0).sum()) < 35


class First:
    """Of joint statistics: the mean of the positive row less that of the negative one."""

    reads = "joint"

    def __call__(self, *, positive, negative):
        toward, away = positive["0"].mean.chunk(2)
        return SteeringVector({"0": (toward - away).float()})


def test_joint_statistics_are_swapped_as_pairs_are():
    generator = torch.Generator().manual_seed(0)
    sides = {"0": torch.eye(6)}, {"0": torch.zeros(6, 6)}
    bank = VectorBank({"up": SteeringVector({"0": torch.ones(6)})})
    assert check_rows(bank, sides, First()) == {"up": sides}
    found = [own["up"]["0"] for own in shuffled_banks(bank, {"up": sides}, First(), count=20, generator=generator)]
    assert all(torch.allclose((6 * own).abs(), torch.ones(6)) for own in found)  # a sign for each pair
    assert 30 < int((torch.stack(found) > 0).sum()) < 90
