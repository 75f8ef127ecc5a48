"""The published network and its training: nothing in this file knows about steering."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.mnist.data import Split

HIDDEN = 100
SITES = ("2", "5", "8", "11")
"""The four ReLU outputs."""


def mlp(outputs: int = 10) -> nn.Sequential:
    """784-100-100-100-100-outputs; each hidden block is Linear without bias, LayerNorm, ReLU."""
    layers: list[nn.Module] = []
    for inputs in (784, HIDDEN, HIDDEN, HIDDEN):
        layers += [nn.Linear(inputs, HIDDEN, bias=False), nn.LayerNorm(HIDDEN), nn.ReLU()]
    head = nn.Linear(HIDDEN, outputs)
    with torch.no_grad():
        head.weight.mul_(0.1)
    return nn.Sequential(*layers, head)


def train_classifier(data: Split, *, seed: int, epochs: int, sigma: float = 0.0, outputs: int = 10) -> nn.Sequential:
    """Plain SGD at learning rate 0.1, batches of 64; Gaussian noise of standard deviation `sigma` on the input."""
    return _train(data.x, data.y, seed=seed, epochs=epochs, sigma=sigma, outputs=outputs)


def train_autoencoder(data: Split, *, seed: int, epochs: int) -> nn.Sequential:
    """The same hidden design with 784 outputs, trained to reproduce its input (mean squared error)."""
    return _train(data.x, data.x, seed=seed, epochs=epochs, sigma=0.0, outputs=784)


def _train(x: Tensor, target: Tensor, *, seed: int, epochs: int, sigma: float, outputs: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mlp(outputs)
    loss = F.mse_loss if target.is_floating_point() else F.cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            batch = x[rows]
            if sigma:
                batch = batch + sigma * torch.randn(batch.shape, generator=generator)
            optimizer.zero_grad()
            loss(model(batch), target[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)
