"""opposed_sites: where a vector tells the two sides apart by sign."""

from __future__ import annotations

from actsteer.collecting.statistics import Statistics
from actsteer.errors import ShapeError, SiteNotFoundError, close_names
from actsteer.estimators.estimator import check_alike
from actsteer.vectors.vector import SteeringVector


def opposed_sites(vector: SteeringVector, *, positive: Statistics, negative: Statistics) -> tuple[str, ...]:
    """The vector's sites at which the means of the two sides project on it with opposite sign: (μ₊·v) (μ₋·v) < 0.

    There the direction, seen from 0, separates the classes, and a rotation toward it moves them apart; elsewhere both
    lie on one side of it. `vector.select(*found)` steers at these alone.

    Args:
        vector: directions to be judged, such as those that were fitted from the same statistics.
        positive, negative: statistics of both sides, as for an estimator; means are enough.

    Returns:
        The sites in the vector's order; none if no direction separates.

    Raises:
        SiteNotFoundError: the statistics lack a site of the vector.
        ShapeError: they are of another size there.
        StatisticsError: a side without rows, or that is not finite.

    Source: discriminative layers of selective steering, Dang & Ngo 2026 (arXiv 2601.19375).

    >>> import torch
    >>> from actsteer.collecting.moments import Moments
    >>> high, low = (Statistics({"0": Moments.of(torch.tensor([[x, 3.0]]))}) for x in (1.0, -1.0))
    >>> judged = [SteeringVector({"0": torch.tensor(direction)}) for direction in ([2.0, 0.0], [2.0, 1.0])]
    >>> [opposed_sites(v, positive=high, negative=low) for v in judged]
    [('0',), ()]
    """
    check_alike(positive, negative)
    found: list[str] = []
    for site in vector:
        if site not in positive:
            raise SiteNotFoundError(f"the statistics have no site {site!r}. {close_names(site, positive.sites)}")
        means = [side[site].mean for side in (positive, negative)]
        if len(means[0]) != len(vector[site]):
            raise ShapeError(
                f"site {site!r}: the statistics have {len(means[0])} features, the vector {len(vector[site])}; are "
                "both of one model?"
            )
        toward, away = ((mean @ vector[site].to(mean)).sign() for mean in means)
        if bool(toward * away < 0):
            found.append(site)
    return tuple(found)
