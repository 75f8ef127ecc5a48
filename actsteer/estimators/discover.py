"""discover: directions that change a later activation most, without any examples of a concept."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import trange

from actsteer.collecting.batches import Batches, arguments, call, iterate
from actsteer.collecting.eval_mode import eval_mode
from actsteer.errors import ShapeError, SiteNotFoundError, StatisticsError
from actsteer.estimators.optimize import in_single, zeros_at
from actsteer.sites import fingerprint
from actsteer.sites.axes import Axes, Layout, layouts
from actsteer.sites.lens import Lens
from actsteer.sites.listen import likely_cause, listen
from actsteer.sites.place import Place
from actsteer.sites.resolve import Sites, find_sites, resolve
from actsteer.sites.wrappers import unwrapped
from actsteer.steering.steerer import Steerer
from actsteer.tokens.inputs import signature_of
from actsteer.tokens.passes import Pass, groups
from actsteer.tokens.real import real_at
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector


@torch.inference_mode(mode=False)
def discover(
    model: nn.Module,
    batches: Batches,
    *,
    site: Sites,
    target: Sites,
    norm: float,
    count: int = 1,
    steps: int = 200,
    lr: float = 0.05,
    batch_size: int = 256,
    axis: Axes | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> VectorBank:
    """Directions v of a given norm that maximise the mean over rows of ‖target(x; v) - target(x)‖², one after another.

    Each is orthogonal to those before it. What a direction stands for shows in the model's answers alone.

    Args:
        batches: data, as for `collect`; all of them are used in every step.
        site: where the direction is added.
        target: the site, after it, whose activation is to change.
        norm: ‖v‖, in the activation's units; what is found depends on it.
        count: how many directions; the concepts are called "0", "1", and so on.
        steps: of gradient ascent (Adam) for each.
        lr: the learning rate, as a share of the norm.
        generator: makes the first guesses, and so the result, reproducible.

    Raises:
        SiteNotFoundError, BatchError: no such sites, or several of them; no batches.
        StatisticsError: a site never ran, or the target does not react to it.

    Source: mechanistically eliciting latent behaviors (MELBO), Mack & Turner 2024, with both exponents 2.

    >>> model = nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
    >>> _ = model.requires_grad_(False)[1].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> bank = discover(model, torch.zeros(4, 2), site="0", target="1", norm=2.0, count=2,
    ...                 generator=torch.Generator().manual_seed(0))
    >>> bank["0"]["0"].abs().round(decimals=2), bank["1"]["0"].abs().round(decimals=2)
    (tensor([2., 0.]), tensor([0., 2.]))
    """
    if not (math.isfinite(norm) and norm > 0) or count < 1 or steps < 1 or not lr > 0:
        raise ValueError(f"expected norm, lr > 0 and count, steps >= 1, got {norm=}, {lr=}, {count=}, {steps=}")
    name, looked_at = _one(model, site, "site"), _one(model, target, "target")
    if name == looked_at:
        raise StatisticsError(f"target {looked_at!r} is the site itself; choose one after it")
    data = list(iterate(batches, batch_size=batch_size, progress=False, label=""))
    zero = zeros_at(model, data[0], (name,), axis)
    d = len(zero[name])
    if count > d:
        raise ShapeError(f"count: there are {d} orthogonal directions of {d} features, got {count}")
    place = resolve(model, [looked_at])[looked_at]
    reader = _Reader(place, layouts(model, {looked_at: place}, axis=None)[looked_at])
    steerer = Steerer(model, in_single(zero), axis=axis)
    with eval_mode(model, frozen=True), torch.enable_grad(), steerer:
        leaf = steerer.requires_grad_()[name]
        remove = listen(place, reader)
        try:
            with torch.no_grad():
                plain = [reader.read(model, batch) for batch in data]
            found: list[Tensor] = []
            for index in range(count):
                start = torch.randn(d, generator=generator).to(leaf)
                _place(leaf, start, found, norm)
                optimizer = torch.optim.Adam([leaf], lr=lr * norm)
                schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
                for step in trange(steps, desc=f"discover {index + 1}/{count}", disable=not progress, delay=2.0):
                    change = _change(model, reader, data, plain)
                    gradient = None
                    if change.requires_grad:
                        (gradient,) = torch.autograd.grad(-change, [leaf], allow_unused=True)
                    if gradient is None or (not step and not bool(gradient.any())):
                        raise StatisticsError(
                            f"target {looked_at!r} does not react to site {name!r} in direction {index}; choose a "
                            "later target, another norm, or a smaller count"
                        )
                    leaf.grad = _without(gradient[0], [*found, leaf.detach()[0]])[None]
                    optimizer.step()
                    schedule.step()
                    _place(leaf, leaf.detach()[0].clone(), found, norm)
                found.append(leaf.detach()[0].clone())
        finally:
            remove()
    described = zero.metadata | {"estimator": "discover", "target": looked_at} | fingerprint.described(model)
    rounded = {str(i): {name: v.to(zero[name].dtype)} for i, v in enumerate(found)}
    return VectorBank({i: SteeringVector(found_at, concept=i, metadata=described) for i, found_at in rounded.items()})


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


def _change(model: nn.Module, reader: _Reader, data: list[Any], plain: list[Tensor]) -> Tensor:
    """How far the target moves from where it was: the mean over rows of the squared distance."""
    moved = [(reader.read(model, b) - p).square().sum() for b, p in zip(data, plain, strict=True)]
    return torch.stack(moved).sum() / sum(len(rows) for rows in plain)


def _one(model: nn.Module, sites: Sites, which: str) -> str:
    names = find_sites(model, sites)
    if len(names) != 1:
        raise SiteNotFoundError(f"{which}: expected one site, got {list(names)[:8]}")
    return names[0]


@final
class _Reader:
    """Keeps the activation at a site, with the features last and gradients to what it was made from."""

    def __init__(self, place: Place, layout: Layout) -> None:
        self._place, self._lens = place, Lens(place, layout)
        self._now: Pass
        self._seen: list[Tensor] = []

    def read(self, model: nn.Module, batch: Any) -> Tensor:
        """The activations on one batch, of each call of the site, in float32 at least; pads are left out."""
        self._seen.clear()
        _, passes = groups(unwrapped(model), {self._place.site: self._place}, {}, data=True)
        self._now = passes[self._place.site].begun(*arguments(batch), signature_of(model))
        call(model, batch)
        if not self._seen:
            raise StatisticsError(f"site {self._place.site!r} never ran: {likely_cause(model, self._place)}")
        return torch.cat(self._seen)

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        view = self._lens.heard(module, args, last)
        for whole, frame in view.rows():
            real = None if view.raw.is_nested else real_at(frame, self._now)
            rows = whole.reshape(-1, whole.shape[-1])
            if real is not None:
                rows = rows[real.movedim(frame.axis, -1).expand(*whole.shape[:-1], 1).flatten().to(rows.device)]
            self._seen.append(rows.to(torch.promote_types(rows.dtype, torch.float32)))
