"""sweep: one row of metrics per strength."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites
from actsteer.steering.choose import Backend
from actsteer.steering.interventions.intervention import Edit
from actsteer.steering.plan import AllPositions, Gates, Interventions
from actsteer.steering.steerer import Steerer
from actsteer.steering.strength import Strengths
from actsteer.tokens.whose import Masks
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector


def sweep(
    model: nn.Module,
    vectors: SteeringVector | VectorBank | Edit,
    *,
    c: Iterable[Strengths],
    evaluate: Callable[[nn.Module], Mapping[str, Any]],
    intervention: Interventions | None = None,
    gate: Gates | None = None,
    positions: AllPositions | None = None,
    sites: Sites | None = None,
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    backend: Backend = "auto",
    strict: bool = True,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Evaluate the steered model at each strength: rows `{"c": c, **evaluate(model)}`, in the order of `c`.

    The Steerer is attached once, and only its strength changes between the rows.

    Args:
        c: the strengths, each as for `Steerer`.
        evaluate: metrics of the model that it is given; a metric is not called "c".

    Raises:
        as `Steerer`; ValueError if `evaluate` returns a metric called "c".

    >>> import torch
    >>> v = SteeringVector({"0": torch.tensor([1.0, 0.0])})
    >>> sweep(nn.Sequential(nn.ReLU()), v, c=[0, 2], evaluate=lambda m: {"sum": m(torch.zeros(1, 2)).sum().item()})
    [{'c': 0, 'sum': 0.0}, {'c': 2, 'sum': 2.0}]
    """
    rows: list[dict[str, Any]] = []
    strengths = list(c)
    steerer = Steerer(
        model,
        vectors,
        intervention=intervention,
        gate=gate,
        positions=positions,
        sites=sites,
        axis=axis,
        row_axis=row_axis,
        token_axis=token_axis,
        mask=mask,
        backend=backend,
        strict=strict,
    )
    with steerer:
        for strength in tqdm(strengths, desc="sweep", disable=not progress, delay=2.0):
            steerer.c = strength
            metrics = evaluate(model)
            if "c" in metrics:
                raise ValueError("evaluate: 'c' is the strength's own column; give the metric another name")
            rows.append({"c": strength, **metrics})
    return rows
