"""one_by_one: a vector or an edit for every site, each fitted on what the earlier ones leave."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

from torch import Tensor, nn

from actsteer.collecting.observe import Observation, Step
from actsteer.collecting.processes import announced, in_step
from actsteer.errors import ShapeError
from actsteer.estimators.estimator import Result, check_found, with_metadata
from actsteer.sites.axes import Axes, said_at
from actsteer.sites.resolve import Sites, find_sites
from actsteer.steering.interventions.intervention import Edit
from actsteer.steering.steerer import Steerer
from actsteer.tokens.whose import Masks
from actsteer.vectors.vector import SteeringVector


def one_by_one(
    model: nn.Module,
    batch: Any,
    *,
    sites: Sites,
    fitted: Callable[[str], Result],
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
) -> Result:
    """What `fitted(site)` gives for one site after another, in the order in which they run, all of it in one.

    While a site is fitted the model is steered by what was fitted before, at strength 1 and at every token. So each
    site is fitted on activations as it meets them when the result steers. A site that runs several times in a pass is
    fitted on all of its runs, each without its own edit.

    `fit(..., one_by_one=True)` does this with two sides. Use it for whatever else is fitted from the model: of several
    classes, as below, or on several processes, whose statistics `all_reduce` before they are estimated from.

    Args:
        batch: one input of the model; the order in which the sites run in it is taken.
        sites: names, globs or a predicate, as for `find_sites`.
        fitted: called with the name of a site; gives a vector or an edit of that site alone.
        axis, row_axis, token_axis, mask: as for `Steerer`.

    Raises:
        SiteNotFoundError: the model lacks a site.
        StatisticsError: a site does not run.
        ShapeError: `fitted` gives other sites than it was called with.
        TypeError: it gives neither, or edits that `|` does not join, with more than one site.

    Source: concept scrubbing, Belrose et al. 2023 (arXiv 2306.03819); the same order is used for transport by
    Rodriguez et al. 2024 (arXiv 2410.23054).

    >>> import torch
    >>> from actsteer import ConceptErasure, collect
    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.randn(30, 2)
    >>> labels = torch.arange(30) % 3
    >>> def erased(site):
    ...     return ConceptErasure().classes(collect(model, x, by=labels, sites=site, covariance=True))
    >>> edit = one_by_one(model, x, sites=["0", "1"], fitted=erased)
    >>> with Steerer(model, edit):
    ...     classes = collect(model, x, by=labels, sites="1")
    >>> bool(torch.allclose(classes[0]["1"].mean, classes[2]["1"].mean, atol=1e-5))
    True
    """
    where: dict[str, Any] = {"axis": axis, "row_axis": row_axis, "token_axis": token_axis, "mask": mask}
    found: list[Any] = []
    with ExitStack() as steered:
        for site in _as_they_run(model, batch, sites, where):
            if found:
                _check_joins(found[-1])
                here = {name: said_at(said, _sites(found[-1])) for name, said in where.items()}
                steered.enter_context(Steerer(model, found[-1], **here))
            found.append(fitted(site))
            check_found(found[-1], by=(call := f"fitted({site!r})"))
            if (given := _sites(found[-1])) != (site,):
                raise ShapeError(f"{call}: expected a vector or an edit of this site alone, got {given}")
    whole = found[0]
    metadata: dict[str, str] = {}
    for part in found[1:]:
        whole = whole + part if isinstance(whole, SteeringVector) else whole | part
    for part in reversed(found):
        metadata |= (part if isinstance(part, SteeringVector) else part.constant).metadata
    return with_metadata(cast("Result", whole), metadata, concept=None)


def _as_they_run(model: nn.Module, batch: Any, sites: Sites, where: dict[str, Any]) -> tuple[str, ...]:
    """The sites in the order in which they first run."""
    with announced():
        observation = Observation(model, find_sites(model, sites), **where, positions="all", stop=True)
        observation.run(Step(own, _nothing) for own in in_step([batch], model))
    return tuple(observation.axes)


def _nothing(site: str, rows: Tensor, owners: Tensor) -> None:
    """What is seen is not kept."""


def _sites(found: SteeringVector | Edit) -> tuple[str, ...]:
    return (found if isinstance(found, SteeringVector) else found.constant).sites


def _check_joins(found: SteeringVector | Edit) -> None:
    if not isinstance(found, SteeringVector) and not hasattr(found, "__or__"):
        raise TypeError(
            f"one by one: edits of several sites are joined by `|`, which {type(found).__name__} does not have; give "
            "it __or__, as LowRank and Affine have it, or fit one site alone"
        )
