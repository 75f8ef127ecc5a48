"""optimize: train one direction per site by gradient, the model frozen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from actsteer.collecting.batches import Batches, call, iterate
from actsteer.collecting.collect import described_axes
from actsteer.collecting.observe import Observation
from actsteer.collecting.undisturbed import undisturbed
from actsteer.errors import BatchError, LossError
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites, find_sites, fingerprint
from actsteer.steering.gates import Gate
from actsteer.steering.steerer import Steerer
from actsteer.vectors.vector import SteeringVector

Loss = Callable[..., Tensor]


@torch.inference_mode(mode=False)
def optimize(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    loss: Loss,
    steps: int = 1000,
    targets: Tensor | Iterable[Any] | None = None,
    lr: float = 0.02,
    batch_size: int = 256,
    start: SteeringVector | None = None,
    gate: Gate | None = None,
    axis: Axes | None = None,
    concept: str | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> SteeringVector:
    """The vector v that minimises loss(model(x)) while every site adds v_l, trained by Adam; the weights stay.

    Starts from zero, or from `start`; the learning rate falls linearly to zero. The model runs in evaluation mode and
    is left untouched. Inside a `with Steerer(...)` block the vector is trained on top of that steering.

    Args:
        batches: as for `collect`; one tensor is shuffled anew in every epoch, an iterable is repeated in its order.
        sites: names, globs or a predicate; one direction is trained at each.
        loss: `loss(output)`, or `loss(output, target)`; 0-dim. The target comes from `targets`; without them it is
            the batch itself.
        steps: gradient steps, one batch each.
        targets: what `loss` compares with, one for each row of a tensor or for each batch of an iterable.
        lr: Adam's learning rate, in the activation's own units per step.
        start: a vector to start from, at some or all of the sites.
        gate: train with the steering gated, as it will be used.
        axis: the feature axis, as for `collect`; the vector remembers it.
        concept: what the vector stands for.
        generator: makes the shuffling, and so the result, reproducible.

    Raises:
        SiteNotFoundError, BatchError, LossError: no such site; batches or a loss that cannot be used.
        StatisticsError: a site never ran.
        ShapeError: the directions are not finite; the loss diverged.

    Source: steering vectors by gradient, Subramani et al. 2022; bias-only tuning, BitFit, Ben Zaken et al. 2022.

    >>> model = nn.Sequential(nn.Identity(), nn.ReLU())
    >>> v = optimize(model, torch.zeros(4, 2), sites="0", loss=lambda output: (output - 1).square().mean(), lr=0.1,
    ...              start=SteeringVector({"0": torch.full((2,), 0.5)}), steps=100)
    >>> bool((v["0"] - 1).abs().max() < 1e-2)
    True
    """
    if steps < 1 or lr <= 0:
        raise ValueError(f"expected steps >= 1 and lr > 0, got steps={steps}, lr={lr}")
    names = find_sites(model, sites)
    stream = _endless(batches, targets, batch_size=batch_size, generator=generator)
    batch, target = next(stream)
    vector = _start(model, batch, names, start, axis)
    steerer = Steerer(model, vector, gate=gate, axis=axis)
    trained = steerer.requires_grad_()  # one row each
    optimizer = torch.optim.Adam(trained.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    compares = targets is not None or _takes_target(loss)
    with undisturbed(model, frozen=True), torch.enable_grad(), steerer:
        for step in trange(steps, desc="optimize", unit="step", disable=not progress, delay=2.0):
            if step:
                batch, target = next(stream)
            output = call(model, batch)
            value = loss(output, target) if compares else loss(output)
            _check(value)
            gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
            for direction, gradient in zip(trained.values(), gradients, strict=True):
                direction.grad = gradient
            optimizer.step()
            schedule.step()
    described = {"estimator": "optimize", "model": fingerprint(model), "steps": str(steps)}
    directions = {site: rows[0] for site, rows in trained.items()}
    return SteeringVector(directions, concept=concept, metadata=described | vector.metadata)


def _start(
    model: nn.Module, batch: Any, names: tuple[str, ...], start: SteeringVector | None, axis: Axes | None
) -> SteeringVector:
    """Zero at every site, in the activation's dtype and device, with `start` written over it."""
    zeros: dict[str, Tensor] = {}

    def keep(site: str, rows: Tensor, owners: Tensor) -> None:
        zeros[site] = rows.new_zeros(rows.shape[1])

    observation = Observation(model, names, keep, axis=axis, positions="all")
    observation.run([batch])
    described = described_axes(observation.axes, axis)
    vector = SteeringVector({site: zeros[site] for site in names})
    vector = vector if start is None else (vector + start).select(*names)
    return SteeringVector({site: vector[site] for site in vector}, metadata=described)


def _endless(
    batches: Batches, targets: Tensor | Iterable[Any] | None, *, batch_size: int, generator: torch.Generator | None
) -> Iterator[tuple[Any, Any]]:
    """Pairs (batch, target) without end."""
    if isinstance(batches, Tensor) != isinstance(targets, Tensor) and targets is not None:
        raise BatchError("targets: expected a tensor for batches in one tensor, and an iterable for an iterable")
    if isinstance(batches, Tensor) and isinstance(targets, Tensor) and len(batches) != len(targets):
        raise BatchError(f"targets: expected one for each of the {len(batches)} rows, got {len(targets)}")
    while True:
        if isinstance(batches, Tensor):
            order = torch.randperm(len(batches), generator=generator)
            for rows in iterate(order, batch_size=batch_size, progress=False, label=""):
                batch = batches[rows.to(batches.device)]
                yield batch, targets[rows.to(targets.device)] if isinstance(targets, Tensor) else batch
        else:
            whole = iterate(batches, batch_size=1, progress=False, label="")
            if targets is None:
                yield from ((batch, batch) for batch in whole)
                continue
            missing: Any = object()
            for batch, target in zip_longest(whole, targets, fillvalue=missing):
                if batch is missing or target is missing:
                    raise BatchError("targets: expected one for each batch in every epoch; pass lists, not generators")
                yield batch, target


def _check(value: Any) -> None:
    if not isinstance(value, Tensor):
        got = type(value).__name__
    elif value.ndim or not value.requires_grad:
        got = f"shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
    else:
        return
    raise LossError(f"loss: expected a 0-dim tensor that depends on the output, got {got}")


def _takes_target(loss: Loss) -> bool:
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except ValueError:  # a builtin such as torch.mean
        return False
    parameters = signature.parameters.values()
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters) > 1
