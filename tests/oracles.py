"""Slow truth in float64 to compare with, each written independently of what it checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from actsteer import SteeringVector

Array = NDArray[np.float64]


def moments(rows: Tensor) -> tuple[Array, Array]:
    """Mean and scatter in two passes over the rows, one row at a time."""
    array = rows.double().numpy()
    mean = sum(row for row in array) / len(array)
    return mean, sum(np.outer(row - mean, row - mean) for row in array)


def pooled_covariance(positive: Tensor, negative: Tensor) -> Array:
    """The unbiased within-class covariance (S₊ + S₋) / (n₊ + n₋ - 2)."""
    return (moments(positive)[1] + moments(negative)[1]) / (len(positive) + len(negative) - 2)


def discriminant(positive: Tensor, negative: Tensor, shrinkage: float) -> Array:
    """scikit-learn's LDA coefficients, brought from its biased covariance S (n - 2) / n to the unbiased one."""
    n = len(positive) + len(negative)
    rows = torch.cat([positive, negative]).double().numpy()
    labels = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(rows, labels)
    return np.asarray(fitted.coef_[0] * (n - 2) / n)


def posterior(positive: Tensor, negative: Tensor, shrinkage: float, rows: Tensor) -> Array:
    """How likely rows are of the positive side, of two equally frequent Gaussian ones of one covariance, by Bayes."""
    pooled = pooled_covariance(positive, negative)
    shrunk = (1 - shrinkage) * pooled + shrinkage * np.trace(pooled) / len(pooled) * np.eye(len(pooled))
    sides = [
        multivariate_normal(moments(side)[0], shrunk).logpdf(rows.double().numpy()) for side in (positive, negative)
    ]
    return np.asarray(expit(sides[0] - sides[1]))


def ledoit_wolf_of_classes(positive: Tensor, negative: Tensor) -> float:
    """scikit-learn's shrinkage of all rows about the mean of their own class."""
    centred = [rows.double().numpy() - rows.double().numpy().mean(axis=0) for rows in (positive, negative)]
    return float(ledoit_wolf_shrinkage(np.concatenate(centred), assume_centered=True))


def gram_schmidt(rows: Array) -> Array:
    """Modified Gram-Schmidt without normalising, twice over for accuracy."""
    done: list[Array] = []
    for row in rows:
        rest = row.copy()
        for earlier in done + done:
            rest -= (rest @ earlier) / (earlier @ earlier) * earlier
        done.append(rest)
    return np.array(done)


def flat(vector: SteeringVector, sizes: dict[str, int]) -> Array:
    """All sites side by side in float64, zero where the vector lacks one."""
    parts = [vector[site].double().numpy() if site in vector else np.zeros(size) for site, size in sizes.items()]
    return np.concatenate(parts)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that must be left as it was found, as plain values: flags, hooks, attributes and numbers."""
    return {
        name: {
            "class": "tapped" if "_actsteer_plain" in vars(type(module)) else type(module),
            "training": module.training,
            "hooks": [list(module._forward_hooks), list(module._forward_pre_hooks), list(module._backward_hooks)],
            "attributes": sorted(vars(module)),
            "parameters": [
                (k, p.requires_grad, p.grad, p.tolist()) for k, p in module._parameters.items() if p is not None
            ],
            "buffers": [(k, b.tolist()) for k, b in module._buffers.items() if b is not None],
        }
        for name, module in model.named_modules()
    }


class Lazy(nn.Module):
    """Makes a table at its first call, as rotary embeddings do."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(x.shape[-1])
        return x * self.table
