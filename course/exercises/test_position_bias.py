"""Checks of exercise 7: simulated meta-judges whose advantage is known. Seeds are fixed, so that a
solution passes always or never.
"""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from exercises.meta_judges import planted, simulate

SEEDS = range(5)


def diagnosed(d, true, battles):
    """An estimate and what it should be, and the usual mistake that gives just this estimate."""
    wins = Counter(v for battle in battles for row in battle["verdicts"] for v in row)
    both = Counter(
        r[m][n]
        for r in (battle["verdicts"] for battle in battles)
        for m, n in combinations(range(len(r)), 2)
        if r[m][n] == r[n][m] != 0
    )
    log_odds = math.log((both[1] + 0.5) / (both[-1] + 0.5))
    share = math.log((wins[1] + 0.5) / (wins[-1] + 0.5))
    told = f"d is {d:.2f} and should be {true:g}"
    for value, what in (
        (log_odds, "the ratio of both probabilities is exp(2 d), not exp(d)"),
        (-log_odds / 2, "the sign: the first place helps if d is positive"),
        (log_odds / 4, "halved twice"),
        (share, "the log-odds of the share of wins depend on how different the judgments are"),
        (share / 2, "the log-odds of the share of wins depend on how different the judgments are"),
        (wins[1] / max(1, wins[1] + wins[-1]) - 0.5, "a share of wins is not yet a strength"),
    ):
        if abs(d - value) < 0.02:
            return f"{told}: {what}"
    return told


def test_the_biased_ones_are_found_and_no_other(task):
    """Of six, three are biased: one whose judgments differ so much that the place seldom matters,
    one towards the second place, one a little. The others look biased to whoever takes a verdict
    that did not parse for a defeat, or a handful of comparisons for evidence.
    """
    for seed in SEEDS:
        meta_judges, advantages = planted(seed)
        found = task.biased(meta_judges)
        biased = {name for name, d in advantages.items() if d}
        for name in biased ^ set(found):
            estimate, error = task.position_advantage(meta_judges[name])
            raise AssertionError(
                f"seed {seed}: {name} is {'' if name in biased else 'not '}biased; your estimate "
                f"is {estimate:.2f} +- {error:.2f}. Verdicts of 0 are no defeats, the error is "
                "that of half a log-odds, and biased is who is three errors from zero"
            )
        for name, d in found.items():
            true = advantages[name]
            told = diagnosed(d, true, meta_judges[name])
            assert d == pytest.approx(true, abs=0.3), f"seed {seed}, {name}: {told}"


def meetings(firsts, seconds):
    """Records of two judgments each, of which the first place won both meetings, or the second."""
    return [{"verdicts": [[0, v], [v, 0]]} for v in [1] * firsts + [-1] * seconds]


def test_three_standard_errors_are_the_limit(task):
    """The first place won both meetings of 34 answers, the second of 16: 2.5 errors from zero. Of
    40 and 12 it is 3.6.
    """
    error = task.position_advantage(meetings(34, 16))[1]
    why = {0.106: ": you count each meeting twice, as (m, n) and as (n, m)",
           0.301: ": it is that of half a log-odds"}
    told = next((said for value, said in why.items() if abs(error - value) < 0.005), "")
    assert error == pytest.approx(0.15, abs=0.01), (
        f"of 34 to 16 meetings the standard error is {error:.3f} and should be 0.150{told}")
    found = task.biased({"near": meetings(34, 16), "far": meetings(40, 12)})
    assert set(found) == {"far"}, (
        f"of 34 to 16 meetings, 2.5 standard errors, and 40 to 12, 3.6, you call {sorted(found)} "
        "biased: the limit is three"
    )


def test_the_estimate_does_not_depend_on_how_different_the_judgments_are(task):
    """The share of wins of the first place does: it falls to one half the more the judgments
    differ.
    """
    for spread in (0.0, 1.0, 4.0):
        battles = simulate(np.random.default_rng(0), 1.0, spread, 0.1, 400)
        d, _ = task.position_advantage(battles)
        assert d == pytest.approx(1.0, abs=0.12), f"spread {spread}: {diagnosed(d, 1.0, battles)}"


def test_the_standard_error_is_the_spread_of_the_estimates(task):
    """Over 200 meta-judges the estimates vary by about as much as each says of itself, and their
    mean is right.
    """
    for advantage in (0.0, 0.7):
        estimates = np.array(
            [
                task.position_advantage(
                    simulate(np.random.default_rng(seed), advantage, 1.0, 0.2, 12)
                )
                for seed in range(200)
            ]
        )
        spread, told = estimates[:, 0].std(), estimates[:, 1].mean()
        assert 0.8 < spread / told < 1.25, (
            f"the estimates vary by {spread:.2f}, and say {told:.2f} of themselves: is the error "
            "that of half a log-odds?"
        )
        assert estimates[:, 0].mean() == pytest.approx(advantage, abs=0.08)


def test_turned_round_it_is_the_negative(task):
    """Each verdict exchanged with its opposite: what helped the first place now helps the second as
    much.
    """
    battles = simulate(np.random.default_rng(0), 0.6, 1.0, 0.1, 40)
    opposite = [
        {**battle, "verdicts": (-np.array(battle["verdicts"])).tolist()} for battle in battles
    ]
    assert task.position_advantage(opposite)[0] == pytest.approx(
        -task.position_advantage(battles)[0], abs=1e-6
    )
    assert task.position_advantage(battles)[0] > 0.4
