"""discover: directions that change a later activation most, without any examples of a concept."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import trange

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.eval_mode import eval_mode
from actsteer.errors import ShapeError, SiteNotFoundError, StatisticsError
from actsteer.estimators.jacobian import Squared, strongest
from actsteer.estimators.optimize import in_single, zeros_at
from actsteer.estimators.target import Target
from actsteer.sites import fingerprint
from actsteer.sites.axes import Axes
from actsteer.sites.listen import listen
from actsteer.sites.resolve import Sites, find_sites, resolve
from actsteer.steering.steerer import Steerer
from actsteer.tokens.positions import Positions, check
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector

Method: TypeAlias = Literal["trained", "jacobian"]
_STEPS: dict[Method, int] = {"trained": 200, "jacobian": 15}


@torch.inference_mode(mode=False)
def discover(
    model: nn.Module,
    batches: Batches,
    *,
    site: Sites,
    target: Sites,
    norm: float,
    count: int = 1,
    method: Method = "trained",
    steps: int | None = None,
    lr: float | None = None,
    positions: Positions = "all",
    target_positions: Positions = "all",
    batch_size: int = 256,
    axis: Axes | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> VectorBank:
    """Directions v of a given norm that maximise the mean over rows of ‖target(x; v) - target(x)‖², one after another.

    Each is orthogonal to those before it. What a direction stands for shows in the model's answers alone. By "jacobian"
    they are those of an infinitely small norm: the right singular vectors of d target / d v over all rows, the largest
    singular values first; the metadata has these per row, √(mean ‖J v‖² / ‖v‖²), as "gain".

    Args:
        batches: data, as for `collect`; all of them are used in every step.
        site: where the direction is added.
        target: the site, after it, whose activation is to change.
        norm: ‖v‖, in the activation's units; what training finds depends on it.
        count: how many directions; the concepts are called "0", "1", and so on.
        method: "trained", by gradient ascent; or "jacobian", without training, for which every operation between the
            site and the target needs a forward derivative in torch.
        steps: of Adam for each direction, 200 unless given; or products with the Jacobian for all of them, 15.
        lr: Adam's learning rate, as a share of the norm, 0.05 unless given.
        positions: where the direction is added, as for `Steerer`.
        target_positions: of which the change counts, as for `collect`; "last", for what a model says next.
        generator: makes the first guesses, and so the result, reproducible.

    Raises:
        SiteNotFoundError, BatchError: no such sites, or several of them; no batches.
        StatisticsError: a site never ran, or the target does not react to it.
        UnsupportedModelError: an operation without a forward derivative, for "jacobian".

    Source: mechanistically eliciting latent behaviors (MELBO), Mack & Turner 2024, with both exponents 2; by the
    Jacobian, linear deep causal transcoding, Mack & Turner 2024.

    >>> model = nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
    >>> _ = model.requires_grad_(False)[1].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> bank = discover(model, torch.zeros(4, 2), site="0", target="1", norm=2.0, count=2, method="jacobian")
    >>> bank["0"]["0"].abs().round(decimals=2), bank["1"]["0"].abs().round(decimals=2)
    (tensor([2., 0.]), tensor([0., 2.]))
    """
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(map(repr, get_args(Method)))}, got {method!r}")
    steps = _STEPS[method] if steps is None else steps
    _check(method, norm=norm, count=count, steps=steps, lr=lr)
    for where in (positions, target_positions):  # of data that is steered, so that both must allow them
        check(where, steers=True)
        check(where, steers=False)
    name, looked_at = _one(model, site, "site"), _one(model, target, "target")
    places = resolve(model, (name, looked_at))
    here, there = ((own.module, own.side, own.path) for own in (places[name], places[looked_at]))
    if here == there:  # whatever part of it each of them names
        raise StatisticsError(f"target {looked_at!r} is the site itself; choose one after it")
    data = list(iterate(batches, batch_size=batch_size, progress=False, label=""))
    zero = zeros_at(model, data[0], (name,), axis)
    d = len(zero[name])
    if count > d:
        raise ShapeError(f"count: there are {d} orthogonal directions of {d} features, got {count}")
    moved = Target(model, looked_at, target_positions)
    steerer = Steerer(model, in_single(zero), axis=axis, positions=positions)
    with eval_mode(model, frozen=True), torch.enable_grad(), steerer:
        leaf = steerer.requires_grad_()[name]
        remove = listen(moved.place, moved)
        try:
            with torch.no_grad():
                plain = [moved.read(batch) for batch in data]
            silent = partial(_silent, name, looked_at)
            options: dict[str, Any] = {"count": count, "steps": steps, "generator": generator, "progress": progress}
            if method == "trained":
                change = partial(_change, moved, data, plain)
                found = _trained(leaf, change, silent, norm=norm, lr=0.05 if lr is None else lr, **options)
                told: list[dict[str, str]] = [{} for _ in found]
            else:
                units, squares = strongest(Squared(moved.read, leaf, data), d, **options)
                for index, square in enumerate(squares.tolist()):
                    if not square > 10 * torch.finfo(leaf.dtype).eps * float(squares[0]):  # rounding, or nan
                        raise silent(index)
                found = list(norm * units.to(leaf))
                gains = (squares / sum(len(rows) for rows in plain)).sqrt().tolist()
                told = [{"gain": repr(gain)} for gain in gains]
        finally:
            remove()
    described = zero.metadata | {"estimator": "discover", "target": looked_at} | fingerprint.described(model)
    return VectorBank(
        {
            str(i): SteeringVector({name: v.to(zero[name].dtype)}, concept=str(i), metadata=described | own)
            for i, (v, own) in enumerate(zip(found, told, strict=True))
        }
    )


def _check(method: Method, *, norm: float, count: int, steps: int, lr: float | None) -> None:
    if not (math.isfinite(norm) and norm > 0) or count < 1 or steps < 1 or not (lr is None or lr > 0):
        raise ValueError(f"expected norm, lr > 0 and count, steps >= 1, got {norm=}, {lr=}, {count=}, {steps=}")
    if method == "jacobian" and lr is not None:
        raise ValueError(f"lr: nothing is trained by method='jacobian', got {lr}")


def _silent(site: str, target: str, index: int) -> StatisticsError:
    return StatisticsError(
        f"target {target!r} does not react to site {site!r} in direction {index}; choose a later target, another norm, "
        "or a smaller count"
    )


def _trained(
    leaf: Float[Tensor, "1 d"],
    change: Callable[[], Tensor],
    silent: Callable[[int], StatisticsError],
    *,
    norm: float,
    lr: float,
    count: int,
    steps: int,
    generator: torch.Generator | None,
    progress: bool,
) -> list[Float[Tensor, " d"]]:
    """The directions that gradient ascent finds; the leaf moves."""
    found: list[Tensor] = []
    for index in range(count):
        start = torch.randn(leaf.shape[1], generator=generator).to(leaf)
        _place(leaf, start, found, norm)
        optimizer = torch.optim.Adam([leaf], lr=lr * norm)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for step in trange(steps, desc=f"discover {index + 1}/{count}", disable=not progress, delay=2.0):
            now = change()
            gradient = None
            if now.requires_grad:
                (gradient,) = torch.autograd.grad(-now, [leaf], allow_unused=True)
            if gradient is None or (not step and not bool(gradient.any())):
                raise silent(index)
            leaf.grad = _without(gradient[0], [*found, leaf.detach()[0]])[None]
            optimizer.step()
            schedule.step()
            _place(leaf, leaf.detach()[0].clone(), found, norm)
        found.append(leaf.detach()[0].clone())
    return found


@torch.no_grad()
def _place(leaf: Tensor, wanted: Float[Tensor, " d"], found: list[Tensor], norm: float) -> None:
    """Set the direction to the nearest one of this norm that is orthogonal to those found before."""
    wanted = _without(_without(wanted, found), found)  # twice, for accuracy
    leaf.copy_((norm / wanted.norm() * wanted)[None])


def _without(vector: Float[Tensor, " d"], others: list[Tensor]) -> Float[Tensor, " d"]:
    """The component that is orthogonal to all the others; they are orthogonal to one another."""
    for other in others:
        vector = vector - (vector @ other) / (other @ other) * other
    return vector


def _change(target: Target, data: list[Any], plain: list[Tensor]) -> Tensor:
    """How far the target moves from where it was: the mean over rows of the squared distance."""
    moved = [(target.read(b) - p).square().sum() for b, p in zip(data, plain, strict=True)]
    return torch.stack(moved).sum() / sum(len(rows) for rows in plain)


def _one(model: nn.Module, sites: Sites, which: str) -> str:
    names = find_sites(model, sites)
    if len(names) != 1:
        raise SiteNotFoundError(f"{which}: expected one site, got {list(names)[:8]}")
    return names[0]
