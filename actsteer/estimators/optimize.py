"""optimize: train a steering vector, or a low-rank edit, by gradient, the model frozen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import trange
from typing_extensions import TypeVar

from actsteer.collecting.batches import Batches
from actsteer.collecting.collect import described_axes
from actsteer.collecting.eval_mode import eval_mode
from actsteer.collecting.observe import Observation, Step
from actsteer.errors import LossError, SiteNotFoundError
from actsteer.estimators.in_training import Ball, InTraining, LowRankInTraining, SteeringInTraining, VectorInTraining
from actsteer.estimators.measured import Measured
from actsteer.estimators.retention import Retain, divergence
from actsteer.estimators.stream import Loss, Targets, asked_for, check_loss, endless, takes_target
from actsteer.estimators.validation import Best, Validation
from actsteer.sites import fingerprint
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites, find_sites
from actsteer.steering.gates.gate import AnyGate
from actsteer.steering.interventions.low_rank import LowRank
from actsteer.steering.numbers import finite
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import Steering
from actsteer.tokens.positions import Positions
from actsteer.tokens.whose import Masks
from actsteer.vectors.vector import SteeringVector

CHECKS = 20
"""How often the validation loss is looked at, in a run of all steps."""


Trained = TypeVar("Trained", bound=SteeringVector | LowRank | Steering, default=SteeringVector)


@torch.inference_mode(mode=False)
def optimize(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    loss: Loss,
    targets: Targets | None = None,
    train: Trained | None = None,
    c: float | Sequence[float] | None = None,
    reads: Sites | None = None,
    steps: int = 1000,
    lr: float = 0.02,
    batch_size: int = 256,
    max_norm: float | None = None,
    l2: float = 0.0,
    retain: Batches | Retain | None = None,
    validation: Batches | Validation | None = None,
    gate: AnyGate | None = None,
    positions: Positions | None = None,
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    concept: str | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Trained:
    """What is given as `train`, trained: it minimises loss(model(x)) while it steers, by Adam; the weights stay.

    The learning rate falls linearly to zero. The model runs in evaluation mode and is left untouched. Inside a
    `with Steerer(...)` block it is trained on top of that steering. With `c=[-1, 1]` and a loss that is told c, as
    `preference`, it is trained to do at -c the contrary of what it does at c.

    Args:
        batches: as for `collect`; one tensor is shuffled anew in every epoch, an iterable is repeated in its order.
        sites: names, globs or a predicate; one direction, or edit, is trained at each.
        loss: `loss(output)`, or `loss(output, target)`; 0-dim. The target comes from `targets`; without them it is
            the batch itself. If it has a parameter `c`, without a default, it is told the strength of the step; a
            parameter `plain`, what the unsteered model gives on the same batch.
        targets: what `loss` compares with, one for each row of a tensor, for each batch of an iterable, or for the one
            call that a mapping or a tuple is.
        train: a SteeringVector, from which training starts; a site that it lacks starts at zero, as all do where
            nothing is given. Or a LowRank edit: `LowRank(rank=4)` starts where it changes nothing, one that has sites
            starts there. Or a Steering by one of these, whose positions hold and whose gate is trained with it:
            `Steering(v, gate=AtSites.soft(w))`, or one `Soft(ProbeAbove(w))` for all sites.
        c: the strength, 1 or that of the Steering unless given; or several, of which every step takes another one, each
            as often, in an order drawn anew in every round. The loss on validation data is the mean over them.
        reads: sites whose activations the loss gets, site -> activation, in the place of the output: in its own shape
            with the features last, as `record(keep_shape=True)` gives what they are compared with.
        steps: gradient steps, one batch each.
        lr: Adam's learning rate, in the activation's units per step.
        max_norm: the largest norm of the direction at each site, in the activation's units; of vectors alone.
        l2: adds l2 · Σ ‖v_l‖² to the loss; of an edit, the squares of A and b; of a gate nothing.
        retain: other data, on which the answers are to stay; `Retain(data, weight=...)` says how much it counts.
        validation: other data, by whose loss the best is kept and training ends early; `Validation(data, targets=...,
            patience=...)` says with which targets and when.
        gate, positions: train with the steering where it will be used, as for `Steerer`.
        axis, row_axis, token_axis, mask: as for `collect`; the result remembers the feature axis.
        concept: what the result stands for; that of `train` unless given, and of a Steering always.
        generator: makes the shuffling and an edit's first directions, and so the result, reproducible.

    Raises:
        SiteNotFoundError, BatchError, LossError: no such site; batches or a loss that cannot be used.
        StatisticsError: a site never ran.
        ShapeError: the result is not finite, because the loss diverged; `train` is of another size.
        ValueError: a strength of 0.
        TypeError: what cannot be trained.

    Warns:
        UserWarning: strengths of both signs, and a loss that is not told c, so that both are to do the same.

    Source: steering vectors by gradient, Subramani et al. 2022; bias-only tuning, BitFit, Ben Zaken et al. 2022;
    low-rank edits, ReFT, Wu et al. 2024; both directions, BiPO, Cao et al. 2024, and RePS, Wu et al. 2025; a gate
    trained with the vector, DSAS, Ferrando et al. 2025.

    >>> model = nn.Sequential(nn.Identity(), nn.ReLU())
    >>> v = optimize(model, torch.zeros(4, 2), sites="0", loss=lambda output: (output - 1).square().mean(), lr=0.1,
    ...              train=SteeringVector({"0": torch.full((2,), 0.5)}), steps=100)
    >>> bool((v["0"] - 1).abs().max() < 1e-2)
    True
    """
    if not callable(loss):
        raise TypeError(f"loss: expected a function of the output, or of output and target, got {loss!r}")
    given: Any = SteeringVector({}) if train is None else train
    whole = SteeringInTraining(train) if isinstance(train, Steering) else None
    if whole is not None:
        given, (gate, positions) = whole.starts, whole.options(gate=gate, positions=positions, concept=concept)
    _check(given, steps=steps, lr=lr, max_norm=max_norm, l2=l2)
    strengths = _checked_strengths(c if c is not None else 1.0 if whole is None else whole.c)
    if min(strengths) < 0 < max(strengths) and "c" not in asked_for(loss):
        said = f"c={list(strengths)}: the loss has no parameter c, so that c and -c are trained to do the same"
        warnings.warn(f"{said}; write it as loss(output, target, *, c), or train at one sign", stacklevel=3)
    kept = retain if isinstance(retain, Retain | None) else Retain(retain)
    checked = validation if isinstance(validation, Validation | None) else Validation(validation)
    names = find_sites(model, sites)
    if elsewhere := [site for site in given.sites if site not in names]:
        raise SiteNotFoundError(f"train has the sites {elsewhere}, which are not trained; these are: {names}")
    stream = endless(batches, targets, batch_size=batch_size, generator=generator)
    others = None if kept is None else endless(kept.batches, None, batch_size=batch_size, generator=generator)
    pair = next(stream)
    where: dict[str, Any] = {"row_axis": row_axis, "token_axis": token_axis, "mask": mask}
    zeros = zeros_at(model, pair[0], names, axis, **where, positions="all" if positions is None else positions)
    begun = in_single(zeros, given if isinstance(given, SteeringVector) else None)
    low_rank = LowRankInTraining(given, zeros, generator) if isinstance(given, LowRank) else None
    how: dict[str, Any] = {"gate": gate, "positions": positions, "axis": axis, "intervention": low_rank, **where}
    steerer = Steerer(model, begun, c=strengths[0], **how)
    moving: InTraining = low_rank or VectorInTraining(steerer, zeros)
    ball = None if max_norm is None else Ball(moving.leaves, max_norm)
    trained = moving if whole is None else whole.around(moving)
    optimizer = torch.optim.Adam(trained.leaves, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    compares = targets is not None or takes_target(loss)
    measured = Measured(loss, compares=compares, steerer=steerer, reads=reads)

    def at(strength: float, batch: Any, target: Any) -> Tensor:
        if steerer.c != strength:
            steerer.c = strength
        return measured(batch, target)

    def at_each(batch: Any, target: Any) -> float:
        return sum(float(at(strength, batch, target)) for strength in strengths) / len(strengths)

    best = None if checked is None else Best(checked, trained.leaves, batch_size)
    drawn = _rounds(strengths, generator)
    with eval_mode(model, frozen=True), torch.enable_grad(), steerer, measured.attached():
        if best is not None:
            best.has_passed(at_each)  # the start may be best
        bar = trange(steps, desc="optimize", unit="step", disable=not progress, delay=2.0)
        due = monotonic() + 2.0
        for step in bar:
            if step:
                pair = next(stream)
            value = at(next(drawn), *pair)
            check_loss(value)
            if l2:
                value = value + l2 * trained.penalty()
            if others is not None and kept is not None:
                value = value + kept.weight * divergence(model, steerer, next(others)[0], mask=mask)
            gradients = torch.autograd.grad(value, trained.leaves, allow_unused=True)
            if all(gradient is None for gradient in gradients):
                raise LossError(
                    "loss: expected one that depends on what is trained; is the site used for the model's answer?"
                )
            for leaf, gradient in zip(trained.leaves, gradients, strict=True):
                leaf.grad = gradient
            if ball is not None:
                ball.slide()
            optimizer.step()
            schedule.step()
            if ball is not None:
                ball.confine()
            if progress and (now := monotonic()) >= due:  # reading the loss waits for the device
                bar.set_postfix(loss=f"{float(value.detach()):.4g}", refresh=False)
                due = now + 0.2
            if best is not None and (step + 1) % max(1, steps // CHECKS) == 0 and best.has_passed(at_each):
                break
    if best is not None:
        best.restore()
    metadata = fingerprint.described(model) | {"estimator": "optimize", "steps": str(step + 1)} | zeros.metadata
    if strengths != (1.0,):
        metadata["strengths"] = ", ".join(f"{strength:g}" for strength in strengths)
    name = given.concept if concept is None else concept
    return cast("Trained", trained.result(metadata | ({} if name is None else {"concept": name})))


def _check(train: Any, *, steps: int, lr: float, max_norm: float | None, l2: float) -> None:
    if not isinstance(train, SteeringVector | LowRank):
        raise TypeError(f"train: expected a SteeringVector, or an edit such as LowRank(rank=4), got {train!r}")
    if isinstance(train, LowRank) and max_norm is not None:
        raise ValueError("max_norm: what a low-rank edit adds depends on the activation; limit it by l2=")
    if steps < 1 or lr <= 0:
        raise ValueError(f"expected steps >= 1 and lr > 0, got steps={steps}, lr={lr}")
    for name, number in {"max_norm": max_norm, "l2": l2}.items():
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name}: expected a number >= 0, got {number}")


def _checked_strengths(c: Any) -> tuple[float, ...]:
    strengths = tuple(finite(strength, "c") for strength in ((c,) if isinstance(c, int | float) else c))
    if not strengths or not all(strengths):
        raise ValueError(f"c: expected a number other than 0, with which nothing is steered, or several, got {c!r}")
    return strengths


def _rounds(strengths: Sequence[float], generator: torch.Generator | None) -> Iterator[float]:
    """One after another without end, each once in every round, in an order that is drawn anew."""
    while True:
        order = [0] if len(strengths) == 1 else torch.randperm(len(strengths), generator=generator).tolist()
        yield from (strengths[place] for place in order)


def in_single(zeros: SteeringVector, start: SteeringVector | None = None) -> SteeringVector:
    """Zeros, or a start, in float32 at least: small steps add up there."""
    whole = zeros if start is None else zeros + start
    kinds = {site: torch.promote_types(zeros[site].dtype, torch.float32) for site in zeros}
    return SteeringVector({site: whole[site].to(kinds[site]) for site in zeros}, metadata=zeros.metadata)


def zeros_at(
    model: nn.Module,
    batch: Any,
    names: tuple[str, ...],
    axis: Axes | None,
    *,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    positions: Positions = "all",
) -> SteeringVector:
    """Zero at every site, in the activation's dtype and device; the metadata has the axes."""
    zeros: dict[str, Tensor] = {}

    def keep(site: str, rows: Tensor, owners: Tensor) -> None:
        zeros[site] = rows.new_zeros(rows.shape[1])

    where: dict[str, Any] = {"axis": axis, "row_axis": row_axis, "token_axis": token_axis, "mask": mask}
    observation = Observation(model, names, **where, positions=positions, stop=True)
    observation.run([Step(batch, keep)])
    return SteeringVector({site: zeros[site] for site in names}, metadata=described_axes(observation.axes, axis))
