"""optimize: train a direction, or a low-rank edit, at every site by gradient, the model frozen."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from actsteer.collecting.batches import Batches, call, rows_in
from actsteer.collecting.collect import described_axes
from actsteer.collecting.eval_mode import eval_mode
from actsteer.collecting.observe import Observation, Step
from actsteer.collecting.positions import Positions
from actsteer.errors import LossError, SiteNotFoundError
from actsteer.estimators.retention import divergence
from actsteer.estimators.stream import Loss, Targets, check_loss, check_pairing, endless, once, takes_target
from actsteer.estimators.trained import Trained, TrainedLowRank, TrainedVector
from actsteer.sites import fingerprint
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites, find_sites
from actsteer.steering.gates.gate import AnyGate
from actsteer.steering.interventions.low_rank import LowRank
from actsteer.steering.steerer import Steerer
from actsteer.vectors.vector import SteeringVector

CHECKS = 20
"""How often the validation loss is looked at, in a run of all steps."""


@overload
def optimize(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    loss: Loss,
    steps: int = ...,
    targets: Targets | None = ...,
    lr: float = ...,
    batch_size: int = ...,
    rank: None = ...,
    max_norm: float | None = ...,
    l2: float = ...,
    retain: Batches | None = ...,
    retain_weight: float = ...,
    validation: Batches | None = ...,
    validation_targets: Targets | None = ...,
    patience: int = ...,
    start: SteeringVector | None = ...,
    gate: AnyGate | None = ...,
    positions: Positions | None = ...,
    axis: Axes | None = ...,
    concept: str | None = ...,
    generator: torch.Generator | None = ...,
    progress: bool = ...,
) -> SteeringVector: ...


@overload
def optimize(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    loss: Loss,
    steps: int = ...,
    targets: Targets | None = ...,
    lr: float = ...,
    batch_size: int = ...,
    rank: int,
    max_norm: float | None = ...,
    l2: float = ...,
    retain: Batches | None = ...,
    retain_weight: float = ...,
    validation: Batches | None = ...,
    validation_targets: Targets | None = ...,
    patience: int = ...,
    start: SteeringVector | None = ...,
    gate: AnyGate | None = ...,
    positions: Positions | None = ...,
    axis: Axes | None = ...,
    concept: str | None = ...,
    generator: torch.Generator | None = ...,
    progress: bool = ...,
) -> LowRank: ...


@torch.inference_mode(mode=False)
def optimize(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    loss: Loss,
    steps: int = 1000,
    targets: Targets | None = None,
    lr: float = 0.02,
    batch_size: int = 256,
    rank: int | None = None,
    max_norm: float | None = None,
    l2: float = 0.0,
    retain: Batches | None = None,
    retain_weight: float = 1.0,
    validation: Batches | None = None,
    validation_targets: Targets | None = None,
    patience: int = 5,
    start: SteeringVector | None = None,
    gate: AnyGate | None = None,
    positions: Positions | None = None,
    axis: Axes | None = None,
    concept: str | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> SteeringVector | LowRank:
    """The vector v that minimises loss(model(x)) while every site adds v_l, trained by Adam; the weights stay.

    With `rank` it is a low-rank edit, h + Rᵀ(W h + b - R h), whose strength depends on the activation. Starts from
    zero, or from `start`; the learning rate falls linearly to zero. The model runs in evaluation mode and is left
    untouched. Inside a `with Steerer(...)` block it is trained on top of that steering.

    Args:
        batches: as for `collect`; one tensor is shuffled anew in every epoch, an iterable is repeated in its order.
        sites: names, globs or a predicate; one direction, or edit, is trained at each.
        loss: `loss(output)`, or `loss(output, target)`; 0-dim. The target comes from `targets`; without them it is
            the batch itself.
        steps: gradient steps, one batch each.
        targets: what `loss` compares with, one for each row of a tensor or for each batch of an iterable.
        lr: Adam's learning rate, in the activation's own units per step.
        rank: r of the low-rank edit; None trains a vector.
        max_norm: the largest norm of the direction at each site, in the activation's own units.
        l2: adds l2 · Σ ‖v_l‖² to the loss; of an edit, the squares of W - R and b.
        retain: other data, on which the answers are to stay: adds `retain_weight` · KL(unsteered ‖ steered), a batch
            of it in each step.
        validation, validation_targets: data on which the loss, a mean over a batch's rows, is looked at at the start
            and 20 times in a run; the best vector or edit is returned, and training ends when `patience` looks in a row
            were not better.
        start: a vector to start from, at some or all of the sites, and no others.
        gate, positions: train with the steering where it will be used, as for `Steerer`.
        axis: the feature axis, as for `collect`; the vector remembers it.
        concept: what the vector stands for.
        generator: makes the shuffling and an edit's first directions, and so the result, reproducible.

    Raises:
        SiteNotFoundError, BatchError, LossError: no such site; batches or a loss that cannot be used.
        StatisticsError: a site never ran.
        ShapeError: the directions are not finite; the loss diverged.

    Source: steering vectors by gradient, Subramani et al. 2022; bias-only tuning, BitFit, Ben Zaken et al. 2022;
    low-rank edits, ReFT, Wu et al. 2024; a retention term, learning without forgetting, Li & Hoiem 2016.

    >>> model = nn.Sequential(nn.Identity(), nn.ReLU())
    >>> v = optimize(model, torch.zeros(4, 2), sites="0", loss=lambda output: (output - 1).square().mean(), lr=0.1,
    ...              start=SteeringVector({"0": torch.full((2,), 0.5)}), steps=100)
    >>> bool((v["0"] - 1).abs().max() < 1e-2)
    True
    """
    _check(steps=steps, lr=lr, rank=rank, max_norm=max_norm, l2=l2, retain_weight=retain_weight, patience=patience)
    if rank is not None and (start is not None or max_norm is not None):
        raise ValueError(
            "rank: a low-rank edit starts where it changes nothing, and has no norm of its own; leave both out"
        )
    names = find_sites(model, sites)
    stream = endless(batches, targets, batch_size=batch_size, generator=generator)
    others = None if retain is None else endless(retain, None, batch_size=batch_size, generator=generator)
    if validation is not None:
        check_pairing(validation, validation_targets)
    pair = next(stream)
    vector = zeros_at(model, pair[0], names, axis)
    begun = in_single(vector) if start is None else in_single(vector, start)
    low_rank = None if rank is None else TrainedLowRank(vector, rank, generator)
    steerer = Steerer(model, begun, gate=gate, positions=positions, axis=axis, intervention=low_rank)
    trained: Trained = TrainedVector(steerer, vector) if low_rank is None else low_rank
    if max_norm is not None:
        trained.confine(max_norm)
    optimizer = torch.optim.Adam(trained.leaves, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    compares = targets is not None or takes_target(loss)

    def measured(batch: Any, target: Any) -> Tensor:
        output = call(model, batch)
        return loss(output, target) if compares else loss(output)

    def validated() -> float:
        assert validation is not None
        with torch.no_grad():
            pairs = once(validation, validation_targets, batch_size=batch_size)
            seen = [(rows_in(batch), float(measured(batch, target))) for batch, target in pairs]
        return sum(rows * value for rows, value in seen) / sum(rows for rows, _ in seen)

    best = None if validation is None else _Best(trained, patience)
    with eval_mode(model, frozen=True), torch.enable_grad(), steerer:
        if best is not None:
            best.has_passed(validated())  # the start may be best
        bar = trange(steps, desc="optimize", unit="step", disable=not progress, delay=2.0)
        for step in bar:
            if step:
                pair = next(stream)
            value = measured(*pair)
            check_loss(value)
            if l2:
                value = value + l2 * trained.penalty()
            if others is not None:
                value = value + retain_weight * divergence(model, steerer, next(others)[0])
            gradients = torch.autograd.grad(value, trained.leaves, allow_unused=True)
            if all(gradient is None for gradient in gradients):
                raise LossError(
                    "loss: expected one that depends on what is trained; is the site used for the model's answer?"
                )
            for leaf, gradient in zip(trained.leaves, gradients, strict=True):
                leaf.grad = gradient
            if max_norm is not None:
                trained.slide(max_norm)
            optimizer.step()
            schedule.step()
            if max_norm is not None:
                trained.confine(max_norm)
            if progress and step % 10 == 0 and bar.format_dict["elapsed"] > bar.delay:
                bar.set_postfix(loss=f"{float(value):.4g}", refresh=False)
            if best is not None and (step + 1) % max(1, steps // CHECKS) == 0 and best.has_passed(validated()):
                break
    if best is not None:
        best.restore()
    described = fingerprint.described(model) | {"estimator": "optimize", "steps": str(step + 1)}
    return trained.result(concept=concept, metadata=described | vector.metadata)


class _Best:
    """What was best on the validation data so far."""

    def __init__(self, trained: Trained, patience: int) -> None:
        self._trained, self._patience = trained, patience
        self._loss, self._since = math.inf, 0
        self._kept = [leaf.detach().clone() for leaf in trained.leaves]

    def has_passed(self, loss: float) -> bool:
        """Keep what is better; whether it has not become better for too long."""
        self._since += 1
        if loss < self._loss:
            self._loss, self._since = loss, 0
            self._kept = [leaf.detach().clone() for leaf in self._trained.leaves]
        return self._since >= self._patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best back."""
        for leaf, kept in zip(self._trained.leaves, self._kept, strict=True):
            leaf.copy_(kept)


def _check(*, steps: int, lr: float, rank: int | None, patience: int, **numbers: float | None) -> None:
    if steps < 1 or lr <= 0:
        raise ValueError(f"expected steps >= 1 and lr > 0, got steps={steps}, lr={lr}")
    if patience < 1 or (rank is not None and rank < 1):
        raise ValueError(f"expected patience >= 1 and rank >= 1, got patience={patience}, rank={rank}")
    for name, number in numbers.items():
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name}: expected a number >= 0, got {number}")


def in_single(zeros: SteeringVector, start: SteeringVector | None = None) -> SteeringVector:
    """Zeros, or a start, in float32 at least: small steps add up there."""
    if start is not None and (elsewhere := [site for site in start if site not in zeros]):
        raise SiteNotFoundError(f"start has the sites {elsewhere}, which are not trained; these are: {zeros.sites}")
    whole = zeros if start is None else zeros + start
    kinds = {site: torch.promote_types(zeros[site].dtype, torch.float32) for site in zeros}
    return SteeringVector({site: whole[site].to(kinds[site]) for site in zeros}, metadata=zeros.metadata)


def zeros_at(model: nn.Module, batch: Any, names: tuple[str, ...], axis: Axes | None) -> SteeringVector:
    """Zero at every site, in the activation's dtype and device; the metadata has the axes."""
    zeros: dict[str, Tensor] = {}

    def keep(site: str, rows: Tensor, owners: Tensor) -> None:
        zeros[site] = rows.new_zeros(rows.shape[1])

    observation = Observation(model, names, axis=axis, positions="all", stop=True)
    observation.run([Step(batch, keep)])
    return SteeringVector({site: zeros[site] for site in names}, metadata=described_axes(observation.axes, axis))
