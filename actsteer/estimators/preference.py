"""Preference: losses of pairs of answers, of which one is preferred at c > 0 and the other at c < 0."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from actsteer.errors import LossError
from actsteer.estimators.retention import logits_of

IGNORED = -100
"""The label of a token that does not count, as in torch's cross entropy."""


def preference(
    output: Any, target: tuple[Int[Tensor, "B ..."], Int[Tensor, "B ..."]], *, c: float, plain: Any
) -> Float[Tensor, ""]:
    """-log σ(β · log p(y₁) / |y₁| - log p(y₂) / |y₂|), the mean over pairs; β = max(1, log p₀(y₂) - log p₀(y₁)).

    y₁ is the chosen answer and y₂ the rejected one; at c < 0 they change places. p is the steered model's, p₀ the
    unsteered one's: the less likely it finds y₁, the more that counts. A loss for `optimize(..., c=[-1, 1])`.

    Args:
        output, plain: of a batch whose first B rows have the chosen answers and whose last B rows the rejected ones,
            in the same order: logits (2B, tokens, vocabulary), of which each is about the next token, or (2B, classes).
        target: the labels of the chosen and of the rejected answers, (B, tokens) each, -100 where a token is not of the
            answer; or (B,) of classes. See `preference_batches` of `integrations.transformers`.
        c: the strength of this step.

    Raises:
        LossError: logits and labels do not fit.

    Source: reference-free preference steering (RePS), Wu et al. 2025 (arXiv 2505.20809), whose second half takes the
    direction out of the activation where this one has c < 0.

    >>> import torch
    >>> from torch import nn
    >>> from actsteer import Steerer, optimize
    >>> model, pairs = nn.Sequential(nn.Identity()), [torch.zeros(2, 3)]  # logits; row 0 is to be 2, and not row 1's 0
    >>> v = optimize(model, pairs, sites="0", loss=preference, targets=[(torch.tensor([2]), torch.tensor([0]))],
    ...              c=[-1, 1], steps=20, lr=0.1, generator=torch.Generator().manual_seed(0))
    >>> v["0"].sign()
    tensor([-1.,  0.,  1.])
    """
    (first, count), (second, others) = _preferred(output, target, c)
    (likely, _), (unlikely, _) = _preferred(plain, target, c)
    weight = (unlikely - likely).clamp(min=1).detach()
    return -logsigmoid(weight * first / count - second / others).mean()


def preference_shift(
    output: Any,
    target: tuple[Int[Tensor, "B ..."], Int[Tensor, "B ..."]],
    *,
    c: float,
    plain: Any,
    beta: float = 0.1,
) -> Float[Tensor, ""]:
    """-log σ(β · ((log p(y₁) - log p₀(y₁)) - (log p(y₂) - log p₀(y₂)))), the mean over pairs: how far steering shifts.

    All else is as in `preference`; `functools.partial(preference_shift, beta=0.5)` is one with another β.

    Args:
        beta: β, above 0, per nat: the larger, the less a pair matters that is told apart already.

    Raises:
        LossError: logits and labels do not fit.
        ValueError: a β that is not above 0.

    Source: bi-directional preference optimization (BiPO), Cao et al. 2024 (arXiv 2406.00045).
    """
    if not beta > 0:
        raise ValueError(f"beta: expected a number above 0, got {beta}")
    (first, _), (second, _) = _preferred(output, target, c)
    (likely, _), (unlikely, _) = _preferred(plain, target, c)
    return -logsigmoid(beta * ((first - likely) - (second - unlikely))).mean()


def _preferred(output: Any, target: Any, c: float) -> list[tuple[Tensor, Tensor]]:
    """The log-probability of each answer, and of how many tokens it is: of those preferred at c, and of the others."""
    logits = logits_of(output)
    if not isinstance(target, tuple | list) or len(target) != 2 or not all(isinstance(own, Tensor) for own in target):
        raise LossError(f"targets: expected labels of the chosen and of the rejected answers, got {target!r:.80}")
    sides = list(zip(logits.chunk(2), target, strict=False))
    if len(logits) % 2 or any(side.shape[:-1] != labels.shape for side, labels in sides):
        raise LossError(
            f"targets: expected labels for the chosen rows, which come first, and as many for the rejected ones, got "
            f"shapes {[tuple(own.shape) for own in target]} for logits of shape {tuple(logits.shape)}"
        )
    return [_likelihood(*side) for side in (sides if c > 0 else sides[::-1])]


def _likelihood(logits: Float[Tensor, "B ... k"], labels: Int[Tensor, "B ..."]) -> tuple[Tensor, Tensor]:
    if labels.ndim > 1:  # each logit is about the token after it
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    lost = cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    counts = (labels != IGNORED).reshape(len(labels), -1).sum(dim=1)
    return -lost.view(len(labels), -1).sum(dim=1), counts.clamp(min=1)
