"""sweep: one row of metrics per strength."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from actsteer.errors import StrengthError
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites
from actsteer.steering.choose import Backend
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import AllPositions, Gates, Interventions, Steerable
from actsteer.steering.strength import Strengths
from actsteer.tokens.whose import Masks


def sweep(
    model: nn.Module,
    vectors: Steerable,
    *,
    c: Iterable[Strengths],
    evaluate: Callable[[nn.Module], Mapping[str, Any] | float | Tensor],
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
    """Evaluate the steered model at each strength: rows `{"c": c, **metrics}`, in the order of `c`.

    The Steerer is attached once, and only its strength changes between the rows.

    Args:
        vectors: as for `Steerer`; of a Steering all but its strength.
        c: the strengths, each as for `Steerer`.
        evaluate: makes metrics of the model that it is given: name -> metric, none of them called "c", or one number,
            which is then called "value".

    Raises:
        ValueError, TypeError: `evaluate` returns a metric called "c", or no metrics.
        ActsteerError: and what `Steerer` raises.

    >>> import torch
    >>> from actsteer import SteeringVector
    >>> v = SteeringVector({"0": torch.tensor([1.0, 0.0])})
    >>> sweep(nn.Sequential(nn.ReLU()), v, c=[0, 2], evaluate=lambda m: {"sum": m(torch.zeros(1, 2)).sum().item()})
    [{'c': 0, 'sum': 0.0}, {'c': 2, 'sum': 2.0}]
    >>> sweep(nn.Sequential(nn.ReLU()), v, c=[3], evaluate=lambda m: m(torch.zeros(1, 2)).sum())
    [{'c': 3, 'value': 3.0}]
    """
    rows: list[dict[str, Any]] = []
    if not isinstance(c, Iterable) or isinstance(c, str | Mapping):
        raise StrengthError(f"c: expected several strengths, as in c=[0, 1, 2], got {c!r}")
    strengths = list(c)
    if not strengths:
        return []
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
            metrics = _metrics(evaluate(model))
            if "c" in metrics:
                raise ValueError("evaluate: 'c' is the strength's own column; give the metric another name")
            rows.append({"c": strength, **metrics})
    return rows


def _metrics(found: Any) -> Mapping[str, Any]:
    """Metrics by name; one number is called "value"."""
    if isinstance(found, Mapping):
        return found
    if isinstance(found, Real) or (isinstance(found, Tensor) and found.ndim == 0):
        return {"value": found.item() if isinstance(found, Tensor) else found}
    raise TypeError(
        f"evaluate: expected one number, or a mapping name -> metric, got {type(found).__name__}"
        + (f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "")
    )
