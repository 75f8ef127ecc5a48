"""A small trained model: clouds of points, and a direction toward one of them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from actsteer import OutputMetric, SteeringVector, fit, record

SITES = ("1", "3", "5")
CLOUDS = 12


def points(cloud: int, count: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(CLOUDS)[cloud].repeat_interleave(3) * 1.5 + torch.randn(count, 3 * CLOUDS, generator=generator)


@cache
def _states() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = untrained()
    x, y = torch.cat([points(cloud, 200, seed=cloud) for cloud in range(CLOUDS)]), torch.arange(200 * CLOUDS) // 200
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(60):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step(), optimizer.zero_grad()
    return model.state_dict()


def untrained() -> nn.Module:
    layers = [
        nn.Linear(3 * CLOUDS, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, CLOUDS),
    ]
    return nn.Sequential(*layers)


def trained() -> nn.Module:
    model = untrained()
    model.load_state_dict(_states())
    return model.eval().requires_grad_(False)


def toward_two(model: nn.Module, *, concept: str = "two") -> SteeringVector:
    """From all other clouds to the third, at every site."""
    v = fit(model, positive=points(2, 100, seed=12), negative=_others(), sites=list(SITES), concept=concept)
    assert isinstance(v, SteeringVector)
    return v


def rows(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `toward_two` was made of."""
    return tuple(record(model, own, sites=list(SITES)) for own in (points(2, 100, seed=12), _others()))


def is_two(*, seed: int = 20, count: int = 100) -> OutputMetric:
    """How surely the model takes points of the first cloud for some of the third."""
    return OutputMetric(inputs=points(0, count, seed=seed), score=two)


def two(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=1)[:, 2]


def kept() -> Tensor:
    """Points of clouds that are to stay what they are."""
    return torch.cat([points(cloud, 15, seed=40 + cloud) for cloud in range(3, CLOUDS)])


def _others() -> Tensor:
    return torch.cat([points(cloud, 20, seed=60 + cloud) for cloud in range(CLOUDS) if cloud != 2])
