"""choose_sites: of a vector's sites those at which it tells data that it has not seen apart best."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.moments import exact
from actsteer.collecting.observe import Observation, Step
from actsteer.collecting.processes import announced, in_step
from actsteer.errors import StatisticsError
from actsteer.sites import fingerprint
from actsteer.sites.axes import Axes
from actsteer.steering.gates.threshold import split
from actsteer.tokens.positions import Positions
from actsteer.tokens.whose import Masks
from actsteer.vectors.vector import SteeringVector


def choose_sites(
    model: nn.Module,
    v: SteeringVector,
    *,
    positive: Batches,
    negative: Batches,
    count: int,
    positions: Positions = "all",
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    batch_size: int = 256,
    stop: bool = True,
    progress: bool = True,
) -> SteeringVector:
    """The vector at the `count` of its sites where h·v tells held-out rows of two sides apart with the best accuracy.

    At every site that is the balanced accuracy of the best threshold, the largest over t of
    ½ (share of the positive rows with h·v > t + share of the negative ones with h·v ≤ t), from ½ to 1; on few rows
    chance alone exceeds ½. Of equals the first is kept. A pass over each side keeps a number per row and site. Each
    process judges by its own rows: give all of them the same.

    Args:
        v: the vector, fitted on other data than `positive` and `negative`; of attention heads at
            "layers.*.self_attn.o_proj:in[head=*]", say.
        positive, negative: data with and without the concept, as for `fit`.
        count: how many sites are kept.
        positions, axis, row_axis, token_axis, mask, stop: as for `collect`; an axis that is not given is the vector's.

    Returns:
        The vector at these sites, in its order, with metadata "accuracy SITE" for each.

    Raises:
        ValueError: a count that is not from 1 to the number of sites.
        ModelMismatchError: the vector was made for another architecture.
        StatisticsError: a side has no rows, or scores that are not finite.

    Source: inference-time intervention (ITI), Li et al. 2023, arXiv:2306.03341, which chooses heads so, by the accuracy
    of a logistic probe; fit v with `LogisticDirection` to have the probe's direction.

    >>> from actsteer import fit
    >>> model, x = nn.Sequential(nn.Identity()), torch.tensor([[1.0, 5.0], [2.0, -5.0], [-1.0, 5.0], [-2.0, -4.0]])
    >>> v = fit(model, positive=x[:2], negative=x[2:], sites=["0[0:1]", "0[1:2]"])
    >>> choose_sites(model, v, positive=x[:2] + 0.5, negative=x[2:] + 0.5, count=1).sites
    ('0[0:1]',)
    """
    if not isinstance(count, int) or not 1 <= count <= len(v):
        raise ValueError(f"count: expected from 1 to the number of sites, {len(v)}, got {count}")
    fingerprint.check(model, v.metadata, what="the vector")
    known = {site: int(v.metadata[f"axis {site}"]) for site in v if f"axis {site}" in v.metadata}
    directions = {site: exact(v[site]) for site in v}
    kept: dict[str, list[Tensor]] = {}

    def keep(site: str, rows: Tensor, owners: Tensor) -> None:
        kept[site].append((exact(rows) @ directions[site].to(rows.device)).cpu())

    found: list[dict[str, Tensor]] = []
    with announced():
        observation = Observation(
            model,
            v.sites,
            axis=known if axis is None else axis,
            row_axis=row_axis,
            token_axis=token_axis,
            mask=mask,
            positions=positions,
            stop=stop,
        )
        for label, side in (("positive", positive), ("negative", negative)):
            kept = {site: [] for site in v}
            batches = iterate(side, batch_size=batch_size, progress=progress, label=label)
            observation.run(Step(batch, keep) for batch in in_step(batches, model))
            if bad := [s for s, own in kept.items() if not own or not all(bool(row.isfinite().all()) for row in own)]:
                raise StatisticsError(
                    f"site {bad[0]!r}: expected rows of finite activations on the {label} side; is it empty, or has it "
                    "inf or nan?"
                )
            found.append({site: torch.cat(own) for site, own in kept.items()})
    high, low = found
    accuracy = {site: split(high[site], low[site])[1] for site in v}
    best = set(sorted(v, key=lambda site: -accuracy[site])[:count])
    return SteeringVector(
        {site: v[site] for site in v if site in best},
        metadata=v.metadata | {f"accuracy {site}": f"{accuracy[site]:.4g}" for site in v if site in best},
    )
