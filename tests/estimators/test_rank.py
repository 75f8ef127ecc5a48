"""optimize with train=LowRank: low-rank edits trained by gradient."""

import pytest
import torch
from torch import nn

from actsteer import LowRank, Steerer, optimize
from tests.oracles import state

X = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(32) % 3


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def trained(model=None, **options):
    options = {"sites": ["1", "3"], "train": LowRank(rank=2), "steps": 40, "lr": 0.05, "progress": False} | options
    options |= {"loss": nn.functional.cross_entropy, "targets": TARGETS, "generator": torch.Generator().manual_seed(0)}
    return optimize(model or network(), options.pop("batches", X), **options)


def test_it_is_an_edit_of_that_rank_with_orthonormal_rows():
    edit = trained()
    assert isinstance(edit, LowRank) and edit.sites == ("1", "3") and edit.rank == 2
    for site in edit.sites:
        reads, adds, offsets = edit[site]
        assert reads.shape == adds.shape == (2, 6) and offsets.shape == (2,)
        torch.testing.assert_close(adds @ adds.T, torch.eye(2), rtol=1e-5, atol=1e-5)


def test_steering_by_it_is_the_formula():
    model, edit = network(), trained()
    with Steerer(model, edit), torch.no_grad():
        seen = model(X)

    def edited(site, h):
        reads, adds, offsets = edit[site]
        return h + (h @ reads.T + offsets) @ adds

    with torch.no_grad():
        h = edited("1", model[:2](X))
        expected = model[4](edited("3", model[3](model[2](h))))
    torch.testing.assert_close(seen, expected)


def test_the_loss_goes_down():
    model, edit = network(), trained(steps=200)
    before = nn.functional.cross_entropy(model(X), TARGETS)
    with Steerer(model, edit):
        assert nn.functional.cross_entropy(model(X), TARGETS) < 0.9 * before


def test_a_generator_makes_it_reproducible_and_the_model_is_left_alone():
    model = network().train()
    before = state(model)
    one, other = trained(model), trained(model)
    for site in one.sites:
        assert all(torch.equal(a, b) for a, b in zip(one[site], other[site], strict=True))
    assert state(model) == before and all(parameter.grad is None for parameter in model.parameters())


def test_a_rank_above_the_features_is_that_of_the_features():
    assert trained(train=LowRank(rank=9), steps=2).rank == 6


def test_a_large_penalty_keeps_it_small():
    free, held = (trained(l2=l2, steps=100) for l2 in (0.0, 10.0))
    for site in free.sites:
        assert held[site][0].norm() < 0.2 * free[site][0].norm()


def test_a_norm_budget_is_for_vectors():
    with pytest.raises(
        ValueError, match="max_norm: what a low-rank edit adds depends on the activation; limit it by l2"
    ):
        trained(max_norm=1.0)


def test_mini_batches_from_a_list_train_it_too():
    edit = optimize(
        network(),
        list(X.split(8)),
        targets=list(TARGETS.split(8)),
        sites="1",
        train=LowRank(rank=1),
        steps=12,
        loss=nn.functional.cross_entropy,
        progress=False,
    )
    assert edit.rank == 1
