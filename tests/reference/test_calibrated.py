"""calibrate on MNIST, beside the suite's own search, and on labels that mean nothing."""

import pytest

from reference.mnist.calibrated import against_search, shuffled
from reference.mnist.data import load


@pytest.fixture(scope="module")
def data():
    return load("bundled", None)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_calibrate_does_not_score_below_the_suites_own_search(data, seed):
    """On the held-out images by which both choose; on test images the command prints both."""
    rows = against_search(data, seed=seed)
    assert len(rows) == 5
    for row in rows:
        assert row["ours"][0] >= row["theirs"][0], row
    assert sum(row["ours"][1] for row in rows) >= sum(row["theirs"][1] for row in rows)


@pytest.mark.slow
def test_labels_that_mean_nothing_are_given_strength_0_and_others_are_not(data):
    assert shuffled(data, seed=0, controls=29, means=True).found
    zero = sum(not shuffled(data, seed=seed, controls=29).found for seed in range(20))
    assert zero >= 19
