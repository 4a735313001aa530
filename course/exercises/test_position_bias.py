"""Checks of exercise 7: simulated meta-judges whose advantage is known. Seeds are fixed, so that a
solution passes always or never.
"""

import numpy as np
import pytest

from exercises.meta_judges import planted, simulate

SEEDS = range(5)


def diagnosed(d, true):
    """An estimate and what it should be, and the usual mistake if it looks like one."""
    told = f"d is {d:.2f} and should be {true:g}"
    for value, what in (
        (2 * true, "the ratio of both probabilities is exp(2 d), not exp(d)"),
        (true / 2, "one half too many"),
        (-true, "the sign: the first place helps if d is positive"),
    ):
        if abs(d - value) < 0.45 * abs(true):
            return f"{told}: {what}"
    return f"{told}: a share of wins depends on how different the judgments are; d does not"


def test_the_biased_ones_are_found_and_no_other(task):
    """Of six, three are biased: one whose judgments differ so much that the place seldom matters,
    one towards the second place, one a little. The others look biased to whoever takes a verdict
    that did not parse for a defeat, or a handful of comparisons for evidence.
    """
    for seed in SEEDS:
        meta_judges, advantages = planted(seed)
        found = task.biased(meta_judges)
        assert set(found) == {name for name, d in advantages.items() if d}, f"seed {seed}"
        for name, d in found.items():
            true = advantages[name]
            assert d == pytest.approx(true, abs=0.3), f"seed {seed}, {name}: {diagnosed(d, true)}"


def test_the_estimate_does_not_depend_on_how_different_the_judgments_are(task):
    """The share of wins of the first place does: it falls to one half the more the judgments
    differ.
    """
    for spread in (0.0, 1.0, 4.0):
        d, _ = task.position_advantage(simulate(np.random.default_rng(0), 1.0, spread, 0.1, 400))
        assert d == pytest.approx(1.0, abs=0.12), f"spread {spread}: {diagnosed(d, 1.0)}"


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
        assert 0.8 < estimates[:, 0].std() / estimates[:, 1].mean() < 1.25
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
