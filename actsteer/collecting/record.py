"""record: the raw activations themselves, for small data and for plots."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.observe import Observation, Step
from actsteer.collecting.positions import Positions
from actsteer.collecting.processes import announced, in_step
from actsteer.errors import StatisticsError
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites, find_sites


def record(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sites,
    positions: Positions = "all",
    axis: Axes | None = None,
    batch_size: int = 256,
    stop: bool = True,
    progress: bool = True,
) -> dict[str, Float[Tensor, "n d"]]:
    """The activations at each site, site -> (n, d), in the order of the data; every position counts as a row.

    Takes the memory of all of them: for means and covariances use `collect`, which keeps sums.

    Args:
        positions, axis, stop: which positions count, along which axis the features lie, and whether a pass ends with
            the last site, as for `collect`.

    Raises:
        SiteNotFoundError, BatchError, StatisticsError: as `collect`.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> record(model, torch.zeros(5, 2), sites="*")["1"].shape
    torch.Size([5, 3])
    """
    kept: dict[str, list[Tensor]] = {}

    def keep(site: str, rows: Tensor, owners: Tensor) -> None:
        kept[site].append(rows.clone())  # a later module may edit its input in place

    with announced():
        names = find_sites(model, sites)
        kept |= {site: [] for site in names}
        stream = iterate(batches, batch_size=batch_size, progress=progress, label="record")
        observation = Observation(model, names, axis=axis, positions=positions, stop=stop)
        observation.run(Step(batch, keep) for batch in in_step(stream, model))
    if empty := [site for site, rows in kept.items() if not rows]:
        raise StatisticsError(f"sites {empty} saw no rows; is every batch empty?")
    return {site: torch.cat(rows) for site, rows in kept.items()}
