"""A mean over rows is a mean over rows, however the rows are cut into batches, and pads are no rows."""

import pytest
import torch
from torch import nn

from actsteer import (
    LowRank,
    MeanDifference,
    PrincipalDirection,
    Retain,
    RidgeDirection,
    Validation,
    collect_pairs,
    discover,
    fit,
    optimize,
)

IDENTITY = nn.Sequential(nn.Identity())


class Weighted(nn.Module):
    """target = site · w, with another w for every row."""

    def __init__(self):
        super().__init__()
        self.site, self.target = nn.Identity(), nn.Identity()

    def forward(self, x, w, attention_mask=None):
        return self.target(self.site(x) * w)


def weighed(strong, weak):
    """Nine rows that amplify the first feature, and one that amplifies the second, more."""
    return torch.cat([torch.tensor([[strong, 0.0]]).repeat(9, 1), torch.tensor([[0.0, weak]])])


@pytest.mark.parametrize("cut", [[10], [9, 1], [5, 5], [1, 8, 1]], ids=str)
def test_discover_weighs_every_row_alike(cut):
    w = weighed(2.0, 4.0)  # 9 · 2² against 1 · 4²
    batches = [(torch.zeros_like(part), part) for part in w.split(cut)]
    options = {"site": "site", "target": "target", "norm": 1.0, "progress": False}
    found = discover(Weighted(), batches, generator=torch.Generator().manual_seed(0), **options)["0"]["site"]
    torch.testing.assert_close(found.abs(), torch.tensor([1.0, 0.0]), rtol=0, atol=1e-3)


def test_discover_does_not_look_at_pads():
    w = torch.tensor([[[2.0, 0.0], [0.0, 9.0]]])
    batch = {"x": torch.zeros_like(w), "w": w, "attention_mask": torch.tensor([[1, 0]])}
    options = {"site": "site", "target": "target", "norm": 1.0, "progress": False}
    found = discover(Weighted(), [batch], generator=torch.Generator().manual_seed(0), **options)["0"]["site"]
    torch.testing.assert_close(found.abs(), torch.tensor([1.0, 0.0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("batch_size", [10, 9, 3])
def test_the_validation_loss_weighs_every_row_alike(batch_size):
    """Training moves v up from 0; nine validation rows ask for that and a tenth, in a batch of its own, loses by it."""
    answers = torch.cat([torch.ones(9, 1), torch.full((1, 1), -2.0)])

    def loss(output, target):
        return (output - target).square().mean()

    options = {"targets": torch.ones(10, 1), "validation": Validation(torch.zeros(10, 1), targets=answers, patience=30)}
    options |= {"sites": "0", "loss": loss, "steps": 100, "lr": 0.02, "progress": False}
    found = optimize(IDENTITY, torch.zeros(10, 1), batch_size=batch_size, **options)["0"]
    assert abs(float(found) - 0.7) < 0.05  # of the ten answers the mean


@pytest.mark.parametrize("estimator", [MeanDifference(), RidgeDirection(), PrincipalDirection()], ids=["m", "r", "p"])
@pytest.mark.parametrize("cut", [[9, 1], [1, 8, 1], [3, 3, 4]], ids=str)
def test_sums_do_not_depend_on_the_cut(estimator, cut):
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(10, 3, generator=generator).double() * 4 + k for k in (1, 0))
    options = {"sites": "0", "estimator": estimator, "progress": False}
    whole = fit(IDENTITY, positive=positive, negative=negative, **options)
    parts = fit(IDENTITY, positive=list(positive.split(cut)), negative=list(negative.split(cut)), **options)
    assert parts.allclose(whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [[10], [9, 1], [1, 8, 1]], ids=str)
@pytest.mark.parametrize("far", [0.0, 2.0**30])
def test_cross_moments_do_not_depend_on_the_cut_nor_on_where_zero_is(cut, far):
    a = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).mul(8).round().double() / 8
    batches = list((a + far).split(cut))
    doubled = nn.Sequential(nn.Linear(3, 3)).double()
    with torch.no_grad():
        doubled[0].weight.copy_(2 * torch.eye(3))
        doubled[0].bias.zero_()
    seen = collect_pairs(IDENTITY, doubled, batches, sites={"0": "0"}, progress=False)["0", "0"]
    assert seen.count == 10
    torch.testing.assert_close(seen.covariance, 2 * torch.cov(a.T), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("train", [None, LowRank(rank=1)], ids=["vector", "edit"])
def test_pads_do_not_count_in_what_is_retained(train):
    """Only the pads of the retained data would object to the training; so retention changes nothing."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.site = nn.Identity()

        def forward(self, x, attention_mask=None):
            h = self.site(x)
            return torch.stack([h[..., 0], h[..., 1] * 0], dim=-1)

    x = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    retain = [{"x": x - torch.tensor([[[40.0, 0.0], [0.0, 0.0]]]), "attention_mask": torch.tensor([[1, 0]])}]
    options = {"sites": "site", "steps": 20, "lr": 0.1, "train": train, "progress": False}

    def trained(**more):
        generator = torch.Generator().manual_seed(0)
        return optimize(Head(), [x], loss=lambda out: -out[..., 0].mean(), generator=generator, **options | more)

    free, kept = trained(), trained(retain=Retain(retain, weight=10.0))
    with_pads = trained(retain=Retain([{"x": retain[0]["x"]}], weight=10.0))
    amount = [v["site"][0] if train is None else v.constant["site"][0] for v in (free, kept, with_pads)]
    torch.testing.assert_close(amount[1], amount[0], rtol=1e-3, atol=1e-4)
    assert amount[2] < 0.9 * amount[0]
