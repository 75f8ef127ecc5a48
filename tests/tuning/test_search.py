"""search: a section within the budget ends at the best point, and infeasible ones are left behind."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actsteer import Steering, SteeringVector
from actsteer.tuning.candidates import DOSES, grown
from actsteer.tuning.intervals import Sample, halves
from actsteer.tuning.search import Point, search

V = SteeringVector({site: torch.tensor([1.0]) for site in "abcdef"})
NORMS = dict.fromkeys("abcdef", 1.0)


def searched(effect, cost, **how):
    """What is found of functions of the sites and the dose."""

    def measure(candidate, doses):
        return [
            Point(candidate, dose, effect(candidate.sites, dose), cost(candidate.sites, dose), {}) for dose in doses
        ]

    given_ = {"sites": tuple("abcdef"), "groups": None, "doses": None, "refine": 3, "steps": 20} | how
    points = search([Steering(V)], measure, units=Steering(V).vectors, norms=NORMS, **given_)
    return max(points, key=lambda point: point.rank), points


@given(peak=st.floats(0.06, 3.0), site=st.sampled_from("abcdef"))
def test_a_peak_within_the_budget_is_found(peak, site):
    best, _ = searched(
        lambda sites, dose: -abs(math.log(dose / peak)) + (sites == (site,)), lambda sites, dose: dose / 100
    )
    assert best.candidate.sites == (site,)
    assert best.dose == pytest.approx(peak, rel=1e-2)


@given(bound=st.floats(0.06, 3.0))
def test_an_effect_that_grows_ends_at_the_budget(bound):
    best, points = searched(lambda sites, dose: dose, lambda sites, dose: dose / bound)
    assert best.feasible
    assert best.dose == pytest.approx(bound, rel=1e-2)
    assert best.dose <= bound
    assert any(not point.feasible for point in points) or bound >= DOSES[-1]


@given(bound=st.floats(0.06, 3.0))
def test_negative_strengths_are_searched_on_their_side(bound):
    doses = [sign * own for sign in (1, -1) for own in DOSES]
    best, _ = searched(lambda sites, dose: -dose, lambda sites, dose: abs(dose) / bound, doses=doses)
    assert -bound <= best.dose < 0
    assert best.dose == pytest.approx(-bound, rel=1e-2)


def test_at_one_effect_the_cheaper_point_is_better():
    best, _ = searched(lambda sites, dose: 1.0, lambda sites, dose: dose / 10, refine=0)
    assert best.dose == DOSES[0]


def test_groups_grow_around_the_best_site():
    tried = []
    searched(lambda sites, dose: float(sites == ("e",)), lambda sites, dose: tried.append(sites) or 0.0, refine=0)
    assert list(dict.fromkeys(tried))[6:] == [("d", "e"), ("c", "d", "e", "f"), tuple("abcdef")]


@given(count=st.integers(1, 40), data=st.data())
def test_every_group_holds_the_best_site_and_is_of_neighbours(count, data):
    sites = [str(number) for number in range(count)]
    best = data.draw(st.sampled_from(sites))
    groups = list(grown(sites, best))
    for group in groups:
        start = sites.index(group[0])
        assert best in group
        assert list(group) == sites[start : start + len(group)]
    assert [len(group) for group in groups] == [
        *(2**k for k in range(1, 6) if 2**k < count),
        *([count] if count > 1 else []),
    ]


# --- intervals ---------------------------------------------------------------------------------------------------
@given(rows=st.integers(2, 60), seed=st.integers(0, 1000))
def test_halves_are_disjoint_cover_all_and_differ_by_one_row_at_most(rows, seed):
    one, other = halves(rows, torch.Generator().manual_seed(seed))
    assert bool((one ^ other).all())
    assert 0 <= int(other.sum()) - int(one.sum()) <= 1


def test_an_interval_covers_the_mean_it_is_of_in_about_95_of_100():
    generator, hits = torch.Generator().manual_seed(0), 0
    for seed in range(300):
        values = torch.randn(60, generator=generator).exp().double()
        sample = Sample(torch.arange(60), torch.ones(60, dtype=torch.bool), seed=seed)
        low, high = sample.interval(values, "mean")
        assert low <= sample.of(values, "mean") <= high
        hits += low <= math.exp(0.5) <= high
    assert 250 <= hits <= 297


def test_of_texts_whole_ones_are_drawn():
    """Tokens of a text that are all alike tell no more than one: the interval is that of the texts."""
    texts = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    everywhere = torch.ones(30, dtype=torch.bool)
    alone = Sample(torch.arange(30), everywhere, seed=1).interval(texts, "mean")
    owners = torch.arange(30).repeat_interleave(20)
    assert Sample(owners, everywhere, seed=1).interval(texts[owners], "mean") == pytest.approx(alone)


def test_the_95th_percentile():
    values = torch.arange(1000).double()[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    sample = Sample(torch.arange(1000), torch.ones(1000, dtype=torch.bool), seed=0)
    assert sample.of(values, "p95") == 949.0
    low, high = sample.interval(values, "p95")
    assert 920 < low < 949 < high < 975
