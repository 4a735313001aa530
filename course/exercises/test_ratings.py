"""Checks of exercise 6: two judgments by hand, scipy's optimiser on the same objective, every way
to split the judgments in two.
"""

from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_expit


def transitive(size):
    """Each judgment beat all that come after it, in both orders."""
    return np.triu(np.ones((size, size)), 1)


def test_the_likelihood_by_hand(task):
    """Three wins at odds of 2 to 1 and one win at odds of 1 to 2."""
    assert task.log_likelihood([np.log(2), 0], [[0, 3], [1, 0]]) == pytest.approx(
        3 * np.log(2 / 3) + np.log(1 / 3)
    )
    assert task.log_likelihood([0, 2000], [[0, 1], [0, 0]]) == pytest.approx(-2000)


def test_three_wins_to_one_are_the_logarithm_of_three_apart(task):
    np.testing.assert_allclose(
        task.elo([[0, 3], [1, 0]]), [np.log(3) / 2, -np.log(3) / 2], atol=1e-4
    )


def test_ratings_are_those_of_a_general_optimiser(task):
    rng = np.random.default_rng(0)
    for size, ridge in ((3, 0.05), (6, 0.05), (11, 0.5)):
        B = rng.random((size, size)) * (1 - np.eye(size)) * (rng.random((size, size)) < 0.7)
        scaled = B * size * (size - 1) / 2 / B.sum()
        found = minimize(
            lambda e: ridge / 2 * e @ e - (scaled * log_expit(e[:, None] - e[None])).sum(),
            np.zeros(size),
            tol=1e-9,
        ).x
        ours = task.elo(B, ridge)
        assert abs(ours.mean()) < 1e-9
        np.testing.assert_allclose(ours, found - found.mean(), atol=1e-4)


def test_a_regulariser_of_known_strength(task):
    """One win and no defeat: the slope of the likelihood, sigmoid(-d), equals that of the penalty
    of +-d/2, ridge d / 2.
    """
    for ridge in (0.5, 0.1, 1e-6):
        e = task.elo([[0, 1], [0, 0]], ridge)
        d = e[0] - e[1]
        assert d > 0 and 1 / (1 + np.exp(d)) == pytest.approx(ridge * d / 2, rel=1e-3)


def test_a_thousand_times_as_many_of_the_same_kind_change_nothing(task):
    B = np.array([[0, 2, 1], [1, 0, 0.5], [0, 0.5, 0]])
    np.testing.assert_allclose(task.elo(1000 * B, 0.1), task.elo(B, 0.1), atol=1e-6)
    np.testing.assert_allclose(task.elo(B + 9 * np.eye(3), 0.1), task.elo(B, 0.1), atol=1e-6)


def test_the_order_of_judgments_that_lost_to_none_below_them_survives(task):
    e = task.elo(transitive(11))
    assert np.isfinite(e).all() and (np.diff(e) < -0.1).all() and np.abs(e).max() < 200


def test_where_nobody_met_all_are_equal(task):
    assert task.elo(np.zeros((3, 3))).tolist() == [0, 0, 0]


def finite_by_brute_force(B):
    """Every group has beaten somebody outside of it; otherwise the others may be moved up without
    end.
    """
    everyone = range(len(B))
    return all(
        any(B[m][n] > 0 for m in group for n in everyone if n not in group)
        for size in range(1, len(B))
        for group in combinations(everyone, size)
    )


def test_when_the_maximum_is_finite(task):
    rng, seen = np.random.default_rng(1), set()
    for _ in range(300):
        size = rng.integers(2, 6)
        B = rng.random((size, size)) * (1 - np.eye(size)) * (rng.random((size, size)) < 0.45)
        expected = finite_by_brute_force(B)
        assert bool(task.has_finite_maximum(B)) == expected, B
        seen.add(expected)
    assert seen == {True, False}


def test_two_classes_have_no_finite_maximum_though_everyone_won_and_lost(task):
    B = [[0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert not task.has_finite_maximum(B)
