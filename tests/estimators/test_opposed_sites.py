"""opposed_sites: where the means of both sides lie on opposite sides of 0 along a vector."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import (
    MeanDifference,
    Moments,
    ShapeError,
    SiteNotFoundError,
    Statistics,
    StatisticsError,
    SteeringVector,
    collect,
    opposed_sites,
)

SITES = ("a", "b", "c")
numbers = st.integers(-4, 4).map(float)
rows = st.lists(numbers, min_size=2, max_size=2)


def statistics(means):
    return Statistics({site: Moments.of(torch.tensor([row])) for site, row in zip(SITES, means, strict=True)})


def found(vector, high, low):
    return opposed_sites(vector, positive=statistics(high), negative=statistics(low))


three = st.lists(rows, min_size=3, max_size=3)


@given(three, three, three)
def test_they_are_those_of_the_formula_whatever_the_scale_and_the_order_of_sides(directions, high, low):
    v = SteeringVector({site: torch.tensor(row) for site, row in zip(SITES, directions, strict=True)})
    products = [
        sum(x * y for x, y in zip(p, d, strict=True)) * sum(x * y for x, y in zip(n, d, strict=True))
        for d, p, n in zip(directions, high, low, strict=True)
    ]
    expected = tuple(site for site, product in zip(SITES, products, strict=True) if product < 0)
    assert found(v, high, low) == found(v, low, high) == found(-v, high, low) == found(1e-30 * v, high, low) == expected


def test_a_shift_of_all_rows_along_the_direction_takes_a_site_away_and_one_across_it_does_not():
    model, x = nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)), torch.eye(2)
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2))
        model[2].weight.copy_(torch.tensor([[1.0, 0.0], [5.0, 5.0]]))  # the second feature is 5 on both sides
    sides = {"positive": collect(model, x[:1], sites="*"), "negative": collect(model, x[1:], sites="*")}
    v = MeanDifference()(**sides)
    assert opposed_sites(v, **sides) == ("0", "1")  # (1, 0) against (0, 1); then (1, 5) against (0, 5)
    shifted = SteeringVector({"2": torch.tensor([1.0, -0.1])})
    assert opposed_sites(shifted, **sides) == ("2",)
    assert v.select(*opposed_sites(v, **sides)).sites == ("0", "1")


def test_what_does_not_fit_is_refused():
    one = [[1.0, 0.0]] * 3
    v = SteeringVector({"a": torch.ones(2)})
    assert found(v, one, one) == ()
    with pytest.raises(SiteNotFoundError, match="no site 'd'"):
        found(SteeringVector({"d": torch.ones(2)}), one, one)
    with pytest.raises(ShapeError, match="site 'a': the statistics have 2 features, the vector 3"):
        found(SteeringVector({"a": torch.ones(3)}), one, one)
    with pytest.raises(StatisticsError, match="not finite"):
        found(v, [[float("nan"), 0.0]] * 3, one)
    with pytest.raises(SiteNotFoundError, match="collect both at the same sites"):
        opposed_sites(v, positive=statistics(one), negative=Statistics({}))
