"""Thresholds hold what they promise, and what the rows cannot support is refused with the number that could."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeguard.errors import CalibrationRefused
from saeguard.guarding.calibrating import interval, rate, threshold

NUMBERS = [float(i) for i in range(3000)]
stats = pytest.importorskip("scipy.stats")


@given(st.integers(0, 60), st.integers(1, 60), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_is_that_of_clopper_and_pearson(k, n, confidence):
    k = min(k, n)
    expected = stats.binomtest(k, n).proportion_ci(confidence, method="exact")

    assert interval(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.integers(300, 3000), st.sampled_from([0.01, 0.02, 0.05]), st.sampled_from([0.9, 0.95]))
def test_certain_rank_is_the_least_whose_tail_is_small_enough(n, level, confidence):
    found = threshold(NUMBERS[:n], level=level, confidence=confidence)
    above = found.above

    assert found.value == n - 1 - above
    assert stats.binom.cdf(above, n, level) <= 1 - confidence < stats.binom.cdf(above + 1, n, level)


@pytest.mark.parametrize("method", ["conformal", "certain"])
def test_new_rows_fire_at_most_as_often_as_promised(method):
    """Over 2,000 calibration sets of 400 uniform scores the share of new rows above is 1 - value."""
    generator = np.random.default_rng(0)
    shares = np.array([
        1 - threshold(generator.random(400).tolist(), level=0.05, method=method).value for _ in range(2000)
    ])  # fmt: skip

    if method == "conformal":
        assert shares.mean() <= 0.05 + 3 * shares.std() / math.sqrt(2000)
    else:
        assert (shares > 0.05).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(("method", "least"), [("conformal", 99), ("certain", 299)])
def test_refusal_names_the_fewest_rows_that_would_do(method, least):
    with pytest.raises(CalibrationRefused, match=f"at least {least}"):
        threshold(NUMBERS[: least - 1], method=method)

    assert threshold(NUMBERS[:least], method=method).above == 0


def test_percentile_is_numpys():
    assert threshold([0.0, 1.0, 2.0, 10.0], level=0.05, method="percentile").value == np.percentile([0, 1, 2, 10], 95)


def test_rows_of_no_score_count_as_quiet_and_nan_is_refused():
    assert threshold([-math.inf] * 299 + [1.0] * 20, level=0.05).value == 1.0
    assert rate([-math.inf, 2.0], 1.0)["above"] == 1
    for bad in ([], [math.nan], [math.inf], [-math.inf] * 400):
        with pytest.raises(CalibrationRefused):
            threshold(bad, level=0.5)
    for level in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(CalibrationRefused):
            threshold([1.0] * 400, level=level)
