"""Intervals count the patients who count.

Agreement with statsmodels, coverage, rare events, few and unequal clusters.
"""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats as sps
from statsmodels.stats.proportion import proportion_confint

from smsbench import Bootstrap
from smsbench.calibration import ece, max_calibration_error
from smsbench.resampling import (
    Statistic,
    bootstrap_rows,
    bootstrap_sums,
    bounded_ends,
    percentile_ends,
    resample_totals,
    rows_used,
)
from smsbench.stats import (
    auroc,
    auroc_interval,
    classification,
    effective_number,
    exact_bounds,
    mean,
    proportion,
    together,
)

LEVEL = 0.95


def enough(held, studies, floor=0.93):
    """A coverage of `floor` is not refuted.

    The count lies above its binomial lower tail at one in a thousand.
    """
    return held >= sps.binom.ppf(0.001, studies, floor)


def holds(interval, truth):
    return interval.low <= truth <= interval.high


def clustered(rng, patients, films, truth, rho):
    "Hits and owners; films of a patient are alike to the degree `rho`."
    owner = np.repeat(np.arange(patients), rng.integers(1, films + 1, patients))
    latent = np.sqrt(rho) * rng.normal(size=patients)[owner] + np.sqrt(1 - rho) * rng.normal(
        size=len(owner)
    )
    return latent < sps.norm.ppf(truth), owner


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.floats(0, 1), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_independent_rows_have_the_bounds_of_clopper_and_pearson(n, share, level):
    k = round(share * n)
    hit = np.arange(n) < k
    low, high = proportion_confint(k, n, 1 - level, 'beta')
    assert np.allclose(exact_bounds(k / n, n, level), (low, high), atol=1e-9)
    got = proportion(hit).bootstrap(np.arange(n), Bootstrap(200, level=level))
    assert got.low <= low + 1e-6 and got.high >= high - 1e-6
    assert (got.n, got.n_clusters, got.n_effective) == (n, n, n)
    if k in (0, n):
        assert np.allclose((got.low, got.high), (low, high), atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(0, 500), st.integers(0, 99))
def test_patients_who_do_not_count_hold_nothing_up(positives, others, seed):
    rng = np.random.default_rng(seed)
    sick = np.r_[np.ones(positives, bool), np.zeros(others, bool)]
    said = np.where(sick, rng.random(len(sick)) < 0.9, False)
    got = classification(said, sick)['sensitivity'].bootstrap(np.arange(len(sick)), Bootstrap(200))
    low, high = proportion_confint(said[sick].sum(), positives, method='beta')
    assert got.low <= low + 1e-6 and got.high >= high - 1e-6 and got.n_effective == positives


def test_twelve_of_twelve_among_a_thousand_patients():
    sick = np.arange(1000) < 12
    got = classification(sick, sick)['sensitivity'].bootstrap(np.arange(1000))
    assert np.allclose((got.low, got.high), proportion_confint(12, 12, method='beta'))
    sums = np.column_stack([sick, sick])
    assert rows_used(sums, lambda t: t[..., :1] / t[..., 1:]).sum() == 12
    same = bootstrap_sums(sums, np.arange(1000), lambda t: t[..., :1] / t[..., 1:], bounds=(0, 1))
    assert abs(same.low - got.low) < 1e-12


@pytest.mark.parametrize('truth', [0.9, 0.95])
def test_sensitivity_of_fifteen_positives_among_three_hundred(truth):
    held, percentile, studies = 0, 0, 300
    sick = np.arange(300) < 15
    for seed in range(studies):
        said = sick & (np.random.default_rng(seed).random(300) < truth)
        stat = classification(said, sick)['sensitivity']
        held += holds(stat.bootstrap(np.arange(300), Bootstrap(200, seed=seed)), truth)
        percentile += holds(
            Statistic(stat.sums, stat.compute, used=sick).bootstrap(
                np.arange(300), Bootstrap(200, seed=seed)
            ),
            truth,
        )
    assert enough(held, studies), held / studies
    assert not enough(percentile, studies)  # quantiles alone would not do


@pytest.mark.parametrize(
    'patients, films, truth, rho',
    [
        (15, 1, 0.9, 0),
        (30, 1, 0.97, 0),
        (12, 8, 0.7, 0.6),
        (30, 8, 0.9, 0.6),
        (30, 8, 0.97, 0.3),
        (60, 6, 0.98, 0),
    ],
)
def test_proportions_cover(patients, films, truth, rho):
    held, studies = 0, 300
    for seed in range(studies):
        hit, owner = clustered(
            np.random.default_rng([seed, patients, films]), patients, films, truth, rho
        )
        held += holds(proportion(hit).bootstrap(owner, Bootstrap(200, seed=seed)), truth)
    assert enough(held, studies), held / studies


def test_clusters_of_very_unequal_size_cover_and_count_as_few():
    sizes, held, studies = np.r_[np.full(3, 30), np.ones(27, int)], 0, 300
    owner = np.repeat(np.arange(30), sizes)
    for seed in range(studies):
        rng = np.random.default_rng(seed)
        got = proportion((rng.random(30) < 0.8)[owner]).bootstrap(owner, Bootstrap(200, seed=seed))
        held += holds(got, 0.8)
    assert (
        got.n_effective == pytest.approx(effective_number(sizes))
        and got.n_effective < 6 < got.n_clusters == 30
    )
    assert enough(held, studies), held / studies


@pytest.mark.parametrize('n', [6, 10, 20])
def test_means_of_few_patients_cover(n):
    held, plain, studies = 0, 0, 400
    for seed in range(studies):
        x = np.random.default_rng(seed).normal(size=n)
        got = mean(x).bootstrap(np.arange(n), Bootstrap(500, seed=seed))
        held += holds(got, 0)
        low, high = percentile_ends(
            resample_totals(x[:, None], Bootstrap(500, seed=seed)) / n, 0.025
        )[:, 0]
        plain += low <= 0 <= high
    assert enough(held, studies), held / studies
    assert plain < held and (n > 6 or not enough(plain, studies))


def test_a_bounded_mean_that_hardly_varies_is_not_blown_up():
    x = np.clip(np.random.default_rng(0).normal(0.3, 0.01, 100), 0, 1)
    got = mean(x, bounds=(0, 1)).bootstrap(np.arange(100))
    se = x.std(ddof=1) / 10
    assert 3.5 * se < got.high - got.low < 5 * se


@pytest.mark.parametrize(
    'positives, patients, distance', [(15, 300, 2), (30, 300, 3), (30, 60, 1), (30, 1000, 4)]
)
def test_auroc_covers_when_few_are_positive(positives, patients, distance):
    truth, held, studies = sps.norm.cdf(distance / 2**0.5), 0, 200
    sick = np.arange(patients) < positives
    for seed in range(studies):
        score = np.random.default_rng(seed).normal(size=patients) + distance * sick
        got = auroc_interval(score, sick, np.arange(patients), boot=Bootstrap(200, seed=seed))
        held += holds(got, truth)
    assert got.n_effective == min(positives, patients - positives)
    assert enough(held, studies), held / studies


def test_auroc_of_one_counts_the_rarer_side():
    sick = np.arange(400) < 15
    assert auroc_interval(sick * 1.0, sick, np.arange(400)).low == pytest.approx(0.025 ** (1 / 15))
    assert auroc_interval(~sick * -1.0, sick, np.arange(400)).low == pytest.approx(
        0.025 ** (1 / 15)
    )


def test_a_calibration_error_of_nothing_has_a_width():
    halves = ece(np.full(60, 0.5), np.arange(60) % 2).bootstrap(np.arange(60))
    certain = ece(np.ones(60), np.ones(60)).bootstrap(np.arange(60))
    assert halves.value == certain.value == 0 == halves.low == certain.low
    assert halves.high > 1.5 * 0.5 / 60**0.5 and certain.high == pytest.approx(
        1 - 0.025 ** (1 / 60)
    )
    assert (
        max_calibration_error(np.full(60, 0.5), np.arange(60) % 2).bootstrap(np.arange(60)).high
        > 0.05
    )
    held, studies = 0, 300
    for seed in range(studies):
        y = np.random.default_rng(seed).random(50) < 0.42
        held += holds(
            ece(np.full(50, 0.5), y).bootstrap(np.arange(50), Bootstrap(200, seed=seed)), 0.08
        )
    assert enough(held, studies), held / studies


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 60), st.integers(2, 20), st.integers(0, 999))
def test_order_of_rows_and_names_of_patients_do_not_matter(n, patients, seed):
    rng = np.random.default_rng(seed)
    who, said, sick, score = (
        rng.integers(0, patients, n),
        rng.random(n) < 0.6,
        rng.random(n) < 0.4,
        rng.integers(0, 9, n) / 9,
    )
    order, names = rng.permutation(n), rng.permutation(patients).astype(str)

    def every(k, w):
        return [
            *together(
                classification(said[k], sick[k]), proportion(said[k]), ece(score[k], sick[k])
            ).bootstrap(w, Bootstrap(60)),
            auroc_interval(score[k], sick[k], w, boot=Bootstrap(60)),
        ]

    for a, b in zip(every(slice(None), who), every(order, names[who[order]])):
        assert [a.value, a.low, a.high, a.n_effective] == pytest.approx(
            [b.value, b.low, b.high, b.n_effective], abs=0, nan_ok=True
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 40), st.integers(2, 5), st.integers(0, 999))
def test_copies_of_films_are_no_patients(patients, copies, seed):
    rng = np.random.default_rng(seed)
    hit, score = rng.random(patients) < 0.8, rng.random(patients)
    owner = np.repeat(np.arange(patients), copies)
    one, many = (
        proportion(hit).bootstrap(np.arange(patients), Bootstrap(100)),
        proportion(hit[owner]).bootstrap(owner, Bootstrap(100)),
    )
    assert (one.n_effective, one.low, one.high) == pytest.approx(
        (many.n_effective, many.low, many.high), abs=1e-6
    )
    a = auroc_interval(score, hit, np.arange(patients), boot=Bootstrap(100))
    b = auroc_interval(score[owner], hit[owner], owner, boot=Bootstrap(100))
    assert (a.value, a.low, a.high) == pytest.approx(
        (b.value, b.low, b.high), abs=1e-6, nan_ok=True
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(1, 6), st.floats(0, 1), st.integers(0, 999))
def test_bounds_lie_in_the_range_and_hold_the_value(patients, films, truth, seed):
    hit, owner = clustered(
        np.random.default_rng(seed), patients, films, min(max(truth, 0.001), 0.999), 0.5
    )
    per = np.bincount(owner, hit, patients), np.bincount(owner, minlength=patients).astype(float)
    value = per[0].sum() / per[1].sum()
    influence = ((per[0] - value * per[1]) / per[1].sum())[:, None]
    ends = [
        bounded_ends(
            np.array([value]),
            influence,
            np.atleast_1d(effective_number(per[1])),
            bounds=np.array([[0, 1]]),
            tail=t,
        )[:, 0]
        for t in (0.025, 0.05, 0.2)
    ]
    for low, high in ends:
        assert -1e-12 <= low <= value + 1e-12 and value - 1e-12 <= high <= 1 + 1e-12
    assert (
        ends[0][0] <= ends[1][0] <= ends[2][0] and ends[0][1] >= ends[1][1] >= ends[2][1]
    )  # surer is wider


def test_a_difference_needs_both_sides():
    rng = np.random.default_rng(0)
    few, many = np.arange(500) < 9, np.arange(500) >= 9
    x = rng.random(500) < 0.9
    gap = (proportion(x, few) - proportion(x, many)).bootstrap(np.arange(500), Bootstrap(200))
    assert gap.n_effective == 9 and gap.n == 500 and gap.n_clusters == 500
    sure = (proportion(few, few) - proportion(many, many)).bootstrap(np.arange(500), Bootstrap(200))
    assert sure.value == 0 and (-sure.low, sure.high) == pytest.approx((1 - 0.025 ** (1 / 9),) * 2)


def test_a_floor_is_only_ever_wider():
    x, owner = np.random.default_rng(0).normal(size=200), np.arange(200) // 4

    def centre(x, w):
        return (w * x).sum(-1) / w.sum(-1)

    bare = bootstrap_rows(centre, (x,), owner, boot=Bootstrap(100), batched=True)
    for low, high in ((-9, 9), (0, 0), (np.nan, 5)):
        got = bootstrap_rows(
            centre,
            (x,),
            owner,
            boot=Bootstrap(100),
            batched=True,
            floor=lambda x, owner, tail, e=(low, high): np.array(e),
        )
        assert got.low == np.fmin(low, bare.low) and got.high == np.fmax(high, bare.high)


def test_clip_tables_count_the_patients_behind_a_number():
    from smsbench.clip.compare import compare
    from smsbench.clip.evaluate import Thresholds, classification_metrics

    y = pd.DataFrame(dict(rare=np.arange(1000) < 12, common=np.arange(1000) % 2 == 0)).astype(float)
    half = Thresholds(dict(rare=0.5, common=0.5), 'given', frozenset(), {}, 0)
    scores, who = y * 0.8 + 0.1, np.arange(1000)
    m = classification_metrics(scores, y, who, half, boot=Bootstrap(50)).set_index(
        ['metric', 'subgroup']
    )
    exact = 0.025 ** (1 / 12)
    for metric in ('recall', 'precision', 'f1', 'auroc', 'auprc'):
        row = m.loc[(metric, 'class=rare')]
        assert (
            row.value == 1
            and row.n == 1000
            and row.n_effective == 12
            and row.ci_low == pytest.approx(exact)
        ), metric
    assert (
        m.loc[('specificity', 'class=rare')].n_effective == 988
        and m.loc[('recall', 'class=common')].n_effective == 500
    )
    macro = m.loc[('macro_recall', 'all')]
    assert macro.ci_low == pytest.approx(
        1 - np.hypot(1 - exact, 1 - 0.025 ** (1 / 500)) / 2, abs=1e-6
    )
    same = compare(scores, scores, y, who, (half, half), boot=Bootstrap(50)).set_index(
        ['metric', 'subgroup']
    )
    row = same.loc[('recall_difference', 'class=rare')]
    assert (
        row.value == 0
        and (-row.ci_low, row.ci_high) == pytest.approx((1 - exact,) * 2)
        and row.n_effective == 12
    )


def test_many_statistics_stay_fast():
    import time

    rng = np.random.default_rng(0)
    n, who = 50_000, np.arange(50_000) % 10_000
    stats = [proportion(rng.random(n) < 0.3, rng.random(n) < 0.5, str(k)) for k in range(40)]
    start = time.process_time()
    got = together(*stats).bootstrap(who, Bootstrap(2000))
    assert len(got) == 40 and time.process_time() - start < 30
    assert auroc([1, 2], [0, 1]) == 1
