"""Intervals and corrections against closed forms, hand values and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillknows import stats
from stillknows.stats import (
    auc,
    binomial_bounds,
    bootstrap,
    bootstrap_counts,
    bounds,
    harmonic_mean,
    holm,
    ks_bounds,
    ks_two_sample,
    mean_interval,
    p_value_at_most,
    resampled_auc,
    resampled_mean,
    resampled_top_auc,
    resampled_tpr_at_fpr,
    tpr_at_fpr,
)
from stillknows.types import Floats


def mean(a: Floats) -> Floats:
    return a.mean(-1)


def at_least(k: int, n: int, p: float) -> float:
    """P(X >= k) for X binomial."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize("n", [1, 2, 20, 29, 36, 299, 4000])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_no_success_and_all_successes_have_a_closed_form(n: int, level: float) -> None:
    edge = 1 - (1 - level) ** (1 / n)
    assert binomial_bounds(0, n, level) == pytest.approx((0, edge), abs=1e-9)
    assert binomial_bounds(n, n, level) == pytest.approx((1 - edge, 1), abs=1e-9)


def test_sample_sizes_that_the_docstring_promises() -> None:
    assert binomial_bounds(0, 29, 0.95)[1] < 0.1 < binomial_bounds(0, 28, 0.95)[1]
    assert binomial_bounds(0, 299, 0.95)[1] < 0.01 < binomial_bounds(0, 298, 0.95)[1]


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_binomial_bounds_are_where_the_tails_have_the_level(trial: tuple[int, int]) -> None:
    k, n = trial
    low, high = binomial_bounds(k, n, 0.95)
    assert 0 <= low <= k / n <= high <= 1
    if k > 0:
        assert at_least(k, n, low) == pytest.approx(0.05, abs=1e-6)
    if k < n:
        assert 1 - at_least(k + 1, n, high) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.2], [0.2]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.04, 0.001, 0.02, 0.9], [0.08, 0.004, 0.06, 0.9]),
        ([0.5, 0.6, 0.7], [1, 1, 1]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm_by_hand(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms())
def test_holm_lies_between_nothing_and_bonferroni_and_keeps_the_order(p_values: list[float], rng) -> None:
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1, p * len(p_values)) + 1e-12
    order = list(range(len(p_values)))
    rng.shuffle(order)
    assert holm([p_values[i] for i in order]) == pytest.approx([adjusted[i] for i in order])


def test_bootstrap_is_determined_by_its_seed() -> None:
    x = np.random.default_rng(0).normal(size=12)
    assert bootstrap(mean, x).tolist() == bootstrap(mean, x).tolist()
    assert bootstrap(mean, x).tolist() != bootstrap(mean, x, seed=1).tolist()
    assert bootstrap(mean, x).shape == (stats.RESAMPLES,)


def test_bootstrap_draws_rows_jointly() -> None:
    x = np.arange(9.0)
    assert bootstrap(lambda a, b: (a - b).mean(-1), x, x - 2) == pytest.approx(2, abs=1e-12)
    assert np.ptp(bootstrap(lambda a, b: a.sum(-1) / b.sum(-1), x, x)) == 0


def test_bootstrap_is_the_statistic_of_the_drawn_rows() -> None:
    """The product with the table of counts, against the rows themselves."""
    rng = np.random.default_rng(3)
    a, b = rng.random(31), rng.random(31) + 1
    rows = np.random.default_rng(5).integers(0, 31, size=(stats.RESAMPLES, 31))
    expected = a[rows].sum(-1) / b[rows].sum(-1)
    found = bootstrap(lambda a, b: a.sum(-1) / b.sum(-1), a, b, seed=5)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_draws_keep_the_rows_of_a_unit_together_in_any_order() -> None:
    units = ["b", "a", "b", "c", "a"]
    found = bootstrap_counts(units)
    assert found.shape == (stats.RESAMPLES, 5)
    assert (found[:, 0] == found[:, 2]).all()
    assert (found[:, 1] == found[:, 4]).all()
    assert set((found[:, [0, 1, 3]]).sum(1)) == {3}
    order = [3, 1, 0, 4, 2]
    assert (bootstrap_counts([units[i] for i in order]) == found[:, order]).all()
    assert (bootstrap_counts(units, seed=1) != found).any()


def test_mean_interval_resamples_units_and_weighs_rows() -> None:
    """One unit of three rows and one of one row: their resamples are all of the first, all of the second, or both."""
    values, units = np.array([0.0, 0.0, 0.0, 1.0]), ["a", "a", "a", "b"]
    assert set(resampled_mean(values, bootstrap_counts(units))) == {0, 1 / 4, 1}
    assert mean_interval(values, units) == (0.25, 0, 1, 2)


def test_bootstrap_has_the_spread_of_the_mean() -> None:
    x = np.random.default_rng(0).normal(size=200)
    resamples = bootstrap(mean, x)
    assert resamples.mean() == pytest.approx(x.mean(), abs=0.005)
    assert resamples.std() == pytest.approx(x.std() / math.sqrt(200), rel=0.05)


def test_units_that_agree_give_one_point() -> None:
    assert bounds(bootstrap(mean, np.full(5, 0.25)), 0.95) == (0.25, 0.25)


def test_bounds_are_one_sided_percentiles() -> None:
    x = np.random.default_rng(0).permutation(np.arange(1, 1001) / 1000)
    assert bounds(x, 0.95) == pytest.approx((0.05, 0.95), abs=0.0011)
    assert bounds(x, 0.75) == (0.25, 0.75)
    assert bounds(np.array([3.0]), 0.95) == (3, 3)


def test_undefined_ratios_are_left_out_and_infinities_count() -> None:
    assert bounds(np.array([np.nan, 1.0, np.nan, 1.0]), 0.95) == (1, 1)
    assert bounds(np.array([np.inf] * 10 + [1.0] * 90), 0.95) == (1, np.inf)
    assert bounds(np.array([np.nan]), 0.95) == (-np.inf, np.inf)
    zero = np.zeros(4)
    assert np.isnan(bootstrap(lambda a, b: a.sum(-1) / b.sum(-1), zero, zero)).all()


def test_p_value_by_hand() -> None:
    assert p_value_at_most(np.array([0.1, 0.2, 0.3]), 0.2) == 3 / 4
    assert p_value_at_most(np.array([0.3, 0.4, np.nan]), 0.2) == 1 / 3
    assert p_value_at_most(np.array([np.nan]), 0.2) == 1
    assert p_value_at_most(np.full(stats.RESAMPLES, 1.0), 0.1) == 1 / (stats.RESAMPLES + 1)


@pytest.mark.parametrize("draw", ["normal", "uniform", "exponential"])
def test_bounds_cover_about_as_often_as_they_say(draw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 units, 400 data sets, each bound at 95 %: 88 to 99 % of them on either side (percentile bounds run narrow)."""
    monkeypatch.setattr(stats, "RESAMPLES", 500)
    rng = np.random.default_rng(0)
    truth = {"normal": 0.0, "uniform": 0.5, "exponential": 1.0}[draw]
    samples = [getattr(rng, draw)(size=40) for _ in range(400)]
    found = np.array([bounds(bootstrap(mean, x, seed=i), 0.95) for i, x in enumerate(samples)])
    for covered in (found[:, 0] <= truth, found[:, 1] >= truth):
        assert 0.88 < covered.mean() < 0.995


def test_auc_by_hand() -> None:
    """4.5 of 6 pairs: .9 and .8 beat both, .4 loses to .5 and ties with .4."""
    assert auc(np.array([0.9, 0.8, 0.4]), np.array([0.5, 0.4])) == 0.75


samples = st.lists(st.integers(-3, 3), min_size=1, max_size=12).map(lambda x: np.array(x, dtype=np.float64))


@given(samples, samples)
def test_auc_is_the_share_of_pairs_won(a: Floats, b: Floats) -> None:
    won = sum((x > y) + (x == y) / 2 for x in a for y in b) / (len(a) * len(b))
    assert auc(a, b) == pytest.approx(won, abs=1e-12)
    assert auc(b, a) == pytest.approx(1 - won, abs=1e-12)
    assert auc(np.exp(a), np.exp(b)) == pytest.approx(won, abs=1e-12)


def test_tpr_at_fpr_by_hand() -> None:
    """Of the negatives 0 … 99 one may lie above the threshold, which is 98; of 0 … 98 none may, and it is 98, too."""
    positives = np.array([5, 98, 98.5, 97.5])
    assert tpr_at_fpr(positives, np.arange(100.0)) == 1 / 4
    assert tpr_at_fpr(positives, np.arange(99.0)) == 1 / 4
    assert tpr_at_fpr(positives, np.arange(100.0), 0.02) == 3 / 4
    assert tpr_at_fpr(positives, np.arange(100.0), 0.29) == 3 / 4
    assert tpr_at_fpr(positives, np.zeros(200)) == 1
    assert tpr_at_fpr(np.zeros(9), np.zeros(200)) == 0


@pytest.mark.parametrize("values", [3, 40, 1000])
@pytest.mark.parametrize("percent", [1, 2, 29, 58])
def test_tpr_at_fpr_by_its_definition_with_ties(percent: int, values: int) -> None:
    """Above the lowest of the negatives that at most so many percent of them, counted in whole numbers, exceed."""
    rng = np.random.default_rng(values)
    for m in (99, 100, 101, 250):
        positives, negatives = rng.integers(0, values, 200), rng.integers(0, values, m)
        threshold = min(t for t in negatives if 100 * int((negatives > t).sum()) <= percent * m)
        found = tpr_at_fpr(positives.astype(float), negatives.astype(float), percent / 100)
        assert found == pytest.approx(float((positives > threshold).mean()), abs=1e-12)


def test_resamples_of_two_samples_are_what_the_drawn_rows_give() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 23) / 9 + 0.2, rng.integers(0, 9, 41) / 9
    drawn, drawn_b = (
        bootstrap_counts([str(i) for i in range(23)])[:50],
        bootstrap_counts([str(i) for i in range(41)], seed=1)[:50],
    )
    repeated = [(np.repeat(a, w.astype(int)), np.repeat(b, v.astype(int))) for w, v in zip(drawn, drawn_b, strict=True)]
    expected = [auc(x, y) for x, y in repeated]
    assert resampled_auc(a, b, drawn, drawn_b).tolist() == pytest.approx(expected, abs=1e-12)
    for fpr in (0.01, 0.1):
        expected = [np.mean(x > np.sort(y)[::-1][math.floor(fpr * 41)]) for x, y in repeated]
        assert resampled_tpr_at_fpr(a, b, drawn, drawn_b, fpr).tolist() == pytest.approx(expected, abs=1e-12)
    expected = [auc(np.sort(x)[-3:], y) for x, y in repeated]  # ⌈23/10⌉
    assert resampled_top_auc(a, b, drawn, drawn_b).tolist() == pytest.approx(expected, abs=1e-12)


def test_ks_by_hand_and_by_enumeration() -> None:
    """At 2 all of a's lower half is reached and nothing of b. p: the share of all splits of 8 ranks with D ≥ ½."""
    a, b = np.array([1.0, 2, 3, 4]), np.array([3.5, 4.5, 5.5, 6.5])
    d, p = ks_two_sample(a, b)
    assert d == 0.75
    ranks = set(range(8))
    count = 0
    for chosen in itertools.combinations(range(8), 4):
        rest = sorted(ranks - set(chosen))
        gaps = [np.mean(np.array(chosen) <= t) - np.mean(np.array(rest) <= t) for t in range(8)]
        count += max(map(abs, gaps)) >= 0.75
    assert p == pytest.approx(count / math.comb(8, 4), rel=1e-12)


def test_ks_bounds_of_the_same_sample_are_0() -> None:
    a = np.random.default_rng(0).random(30)
    drawn = bootstrap_counts([str(i) for i in range(30)])
    assert ks_bounds(a, a, drawn, drawn) == (0, 0)
    low, high = ks_bounds(a, a + 2, drawn, bootstrap_counts([str(i) for i in range(30)], seed=1))
    assert 0.6 < low < high == 1


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_ks_bounds_cover_the_true_distance(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform on 0..1 against shift..1 + shift: D is the shift. 200 data sets of 60 and 80, each bound at 95 %."""
    monkeypatch.setattr(stats, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    units = [str(i) for i in range(60)], [str(i) for i in range(80)]
    found = []
    for _ in range(200):
        a, b = rng.random(60), rng.random(80) + shift
        found.append(ks_bounds(a, b, bootstrap_counts(units[0]), bootstrap_counts(units[1], seed=1)))
    low, high = np.array(found).T
    assert np.mean(low <= shift) > 0.9
    assert np.mean(high >= shift) > 0.9


def test_harmonic_mean_by_hand() -> None:
    assert harmonic_mean(np.array([[1, 1], [0.5, 0], [0.25, 1]])).tolist() == pytest.approx([3 / 7, 0])


def test_small_tables_of_draws_are_kept_and_large_ones_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "SMALL", 5)
    assert stats.resampled_counts(5, 0) is stats.resampled_counts(5, 0)
    assert stats.resampled_counts(6, 0) is not stats.resampled_counts(6, 0)
    assert (stats.resampled_counts(6, 3) == stats._kept_counts(6, stats.RESAMPLES, 3)).all()
    assert not stats.resampled_counts(5, 0).flags.writeable


def test_a_ratio_without_denominator_is_infinite_without_a_warning() -> None:
    found = bootstrap(lambda a, b: a.sum(-1) / b.sum(-1), np.ones(3), np.zeros(3))
    assert np.isinf(found).all()


def test_outranked_by_hand() -> None:
    found = stats.outranked(np.array([1.0, 2.0]), np.array([1.0, 1.5, 3.0]))
    assert found.tolist() == [[0.5, 0, 0], [1, 1, 0]]


def test_resampled_tpr_at_one_percent_by_hand() -> None:
    """Of 100 negatives one may exceed the threshold: the second-highest is it."""
    positives, negatives = np.array([98.5, 99.5, 200.0]), np.arange(1.0, 101.0)
    drawn = np.ones((1, 3)), np.ones((1, 100))
    assert resampled_tpr_at_fpr(positives, negatives, *drawn).tolist() == [2 / 3]
    assert resampled_tpr_at_fpr(positives, negatives, *drawn, fpr=0.02).tolist() == [1.0]


def test_the_top_is_rounded_up_but_not_by_the_error_of_floats() -> None:
    """0.07 · 100 is 7.000000000000001: seven count, not eight."""
    positives, negatives = np.arange(100.0, 0, -1), np.array([93.5])
    drawn = np.ones((1, 100)), np.ones((1, 1))
    assert resampled_top_auc(positives, negatives, *drawn, top=0.07).tolist() == [1.0]
    assert resampled_top_auc(positives, negatives, *drawn, top=0.071).tolist() == [7 / 8]


def test_ks_bounds_are_a_quantile_of_the_largest_gap_of_each_resample() -> None:
    a, b = np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])
    drawn_a = np.array([[1.0, 1, 1], [3, 0, 0], [0, 0, 3]])
    low, high = ks_bounds(a, b, drawn_a, np.ones((3, 3)))
    assert (low, high) == (0.0, 1.0)  # D is 1/3; the gaps move by 0, 2/3 and 2/3
    low, high = ks_bounds(a, b, np.ones((3, 3)), np.ones((3, 3)))
    assert (low, high) == pytest.approx((1 / 3, 1 / 3))
