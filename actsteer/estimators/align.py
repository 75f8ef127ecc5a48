"""align: a linear map between the activations of two models, fitted on inputs that both were shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from actsteer.collecting.pairs import CrossMoments
from actsteer.collecting.statistics import Statistics
from actsteer.errors import ShapeError, SiteNotFoundError
from actsteer.estimators.estimator import ridged
from actsteer.sites import fingerprint
from actsteer.vectors.site_map import SiteMap

Method: TypeAlias = Literal["ridge", "procrustes", "identity"]


def align(
    stats_a: Statistics,
    stats_b: Statistics,
    paired: Mapping[tuple[str, str], CrossMoments],
    *,
    method: Method = "ridge",
    ridge: float = 1e-2,
) -> SiteMap:
    """The map W of A's activations to B's: b - μ_b ≈ (a - μ_a) W; a direction v of A is v W in B.

        ridge        W = (C_aa + λ (tr C_aa / d) I)⁻¹ C_ab    (Hoerl & Kennard 1970)
        procrustes   W = U Vᵀ from C_ab = U S Vᵀ, an isometry onto what both share    (Schönemann 1966)
        identity     W = I, for two models of one origin

    Args:
        stats_a, stats_b: the statistics of both models, A's with covariance for the ridge.
        paired: what `collect_pairs` gives: (site of A, site of B) -> cross moments, on inputs like those of `stats_a`.
        ridge: λ, as a share of the mean variance.

    Raises:
        SiteNotFoundError, ShapeError: the statistics lack a site, or have another size there; two pairs of one site.
        StatisticsError: a covariance that was not collected, or one that is singular and needs a ridge.

    Source: model stitching, Lenc & Vedaldi 2015; steering vectors carried between models, Lee et al. 2025.

    >>> from actsteer import collect, collect_pairs
    >>> from torch import nn
    >>> a, b = nn.Sequential(nn.Identity()), nn.Sequential(nn.Linear(2, 3))
    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> stats = [collect(model, x, sites="0", covariance=True) for model in (a, b)]
    >>> found = align(*stats, collect_pairs(a, b, x, sites={"0": "0"}), ridge=0.0)
    >>> torch.allclose(found["0"][1].float(), b[0].weight.T, atol=1e-5)
    True
    """
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(map(repr, get_args(Method)))}, got {method!r}")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge: expected a share >= 0, got {ridge}")
    if not paired:
        raise SiteNotFoundError("paired: expected one pair of sites or more; see collect_pairs")
    if len({site for site, _ in paired}) < len(paired):
        raise ShapeError(f"paired: a site leads to one other, got the pairs {list(paired)}; choose among them")
    maps: dict[str, tuple[str, Tensor]] = {}
    for (site, other), cross in paired.items():
        sizes = (stats_a[site].d, stats_b[other].d)
        joint = cross.covariance
        if tuple(joint.shape) != sizes:
            raise ShapeError(
                f"sites {site!r} and {other!r}: the pairs have {tuple(joint.shape)} features, the statistics {sizes}; "
                "were they collected on the same models?"
            )
        maps[site] = (other, _weight(joint, stats_a, site, method, ridge))
    kept = {*fingerprint.KEYS, *(f"axis {other}" for other, _ in maps.values())}  # of the model that it leads to
    described = {key: text for key, text in stats_b.metadata.items() if key in kept}
    return SiteMap(maps, metadata={"aligned by": method} | described)


def _weight(joint: Tensor, stats: Statistics, site: str, method: Method, ridge: float) -> Tensor:
    if method == "identity":
        if joint.shape[0] != joint.shape[1]:
            raise ShapeError(f"site {site!r}: the identity needs equal sizes, got {tuple(joint.shape)}")
        return torch.eye(len(joint)).to(joint)
    if method == "procrustes":
        left, _, right = torch.linalg.svd(joint, full_matrices=False)
        turned: Tensor = left @ right
        return turned
    return ridged(stats[site].covariance, joint, ridge=ridge, site=site, rows=stats[site].count)
