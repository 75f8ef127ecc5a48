"""record: the raw activations themselves, for small data and for plots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.observe import Observation, Step
from actsteer.collecting.processes import announced, in_step
from actsteer.errors import ShapeError, StatisticsError
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites, find_sites
from actsteer.tokens.positions import Positions
from actsteer.tokens.whose import Masks


def record(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    positions: Positions = "all",
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    batch_size: int = 256,
    stop: bool = True,
    keep_shape: bool = False,
    progress: bool = True,
) -> dict[str, Float[Tensor, "*shape d"]]:
    """The activations at each site, site -> (n, d), in the order of the data; every position counts as a row.

    Takes the memory of all of them: for means and covariances use `collect`, which keeps sums. `Replace` puts them back
    at the same positions, or at others.

    Args:
        positions, axis, row_axis, token_axis, mask, stop: which positions count, along which axes an activation lies,
            where the batch has its token mask, and whether a pass ends with the last site, as for `collect`.
        keep_shape: give each site's activation in its own shape, (rows, positions, d) of a sequence, pads and all, with
            the features last: as `Replace` takes it to patch it back. Batches follow one another on the first axis.

    Raises:
        SiteNotFoundError, BatchError, StatisticsError: as `collect`.
        ShapeError: keep_shape, and batches of other shapes, or a nested or packed activation.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> record(model, torch.zeros(5, 2), sites="**")["1"].shape
    torch.Size([5, 3])
    >>> record(model, torch.zeros(5, 4, 2), sites="1", keep_shape=True)["1"].shape
    torch.Size([5, 4, 3])
    """
    with announced():
        observation = Observation(
            model,
            find_sites(model, sites),
            axis=axis,
            row_axis=row_axis,
            token_axis=token_axis,
            mask=mask,
            positions=positions,
            stop=stop,
            keep_shape=keep_shape,
        )
        return recorded(observation, iterate(batches, batch_size=batch_size, progress=progress, label="record"))


def recorded(observation: Observation, batches: Iterable[Any]) -> dict[str, Float[Tensor, "*shape d"]]:
    """The activations of these batches; an observation that is used again goes on counting its passes."""
    kept: dict[str, list[Tensor]] = {site: [] for site in observation.sites}

    def keep(site: str, rows: Tensor, owners: Tensor) -> None:
        kept[site].append(rows.clone())  # a later module may edit its input in place

    with announced():
        observation.run(Step(batch, keep) for batch in in_step(batches, observation.model))
    if empty := [site for site, rows in kept.items() if not rows]:
        raise StatisticsError(f"sites {empty} saw no rows; is every batch empty?")
    for site, rows in kept.items():
        if len(shapes := {part.shape[1:] for part in rows}) > 1:
            raise ShapeError(
                f"site {site!r}: activations of shapes {sorted(map(tuple, shapes))} for their rows do not go into "
                "one tensor; record one batch at a time, or pad them alike"
            )
    return {site: torch.cat(rows) for site, rows in kept.items()}
