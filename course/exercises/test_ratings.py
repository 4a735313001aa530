"""Checks of exercise 6: two judgments by hand, scipy's optimiser on the same objective, every way
to split the judgments in two.
"""

from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_expit

from exercises.diagnosis import expect


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
    half = np.log(3) / 2
    expect(task.elo([[0, 3], [1, 0]]), [half, -half], "elo([[0, 3], [1, 0]])",
           [([-half, half], "the winner is rated lowest: the sign of the gradient"),
            ([2 * half, 0], "the ratings' mean is 0"),
            ([0, -2 * half], "the ratings' mean is 0"),
            ([400 / np.log(10) * half, -400 / np.log(10) * half], "natural logarithms, not chess "
             "points")], tolerance=1e-4)


def test_ratings_are_those_of_a_general_optimiser(task):
    rng = np.random.default_rng(0)
    for size, ridge in ((3, 0.05), (6, 0.05), (11, 0.5)):
        B = rng.random((size, size)) * (1 - np.eye(size)) * (rng.random((size, size)) < 0.7)
        scaled = B * size * (size - 1) / 2 / B.sum()
        found, unscaled = (
            minimize(
                lambda e: ridge / 2 * e @ e - (of * log_expit(e[:, None] - e[None])).sum(),
                np.zeros(size),
                tol=1e-9,
            ).x
            for of in (scaled, B)
        )
        expect(task.elo(B, ridge), found - found.mean(), f"elo({B.round(3).tolist()}, {ridge})",
               [(unscaled - unscaled.mean(), "scale B to one battle per pair first"),
                (found, "the ratings' mean is 0")], tolerance=1e-4)


def test_a_regulariser_of_known_strength(task):
    """One win and no defeat: the slope of the likelihood, sigmoid(-d), equals that of the penalty
    of +-d/2, ridge d / 2.
    """
    for ridge in (0.5, 0.1, 1e-6):
        e = task.elo([[0, 1], [0, 0]], ridge)
        d = e[0] - e[1]
        assert d > 0, f"the winner is rated lower: {d}"
        slope, penalty = 1 / (1 + np.exp(d)), ridge * d / 2
        assert slope == pytest.approx(penalty, rel=1e-3), (
            f"at ridge {ridge:g} the slope of the likelihood is {slope:.3g} and that of the "
            f"penalty {penalty:.3g}: the maximum is not reached. scipy's minimize stops too early "
            "by its own tolerance (tol=1e-9); Newton's steps must end when they are below 1e-9"
        )


def test_a_thousand_times_as_many_of_the_same_kind_change_nothing(task):
    B = np.array([[0, 2, 1], [1, 0, 0.5], [0, 0.5, 0]])
    for other, why in (
        (1000 * B, "scale B to one battle per pair before the ridge is added"),
        (B + 9 * np.eye(3), "nobody battles with itself: leave the diagonal out, of the scale too"),
    ):
        got = task.elo(other, 0.1)
        expect(got, task.elo(B, 0.1), f"elo({other.tolist()}, 0.1)", [(got, why)], tolerance=1e-5)


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
        assert bool(task.has_finite_maximum(B)) == expected, (
            f"has_finite_maximum({B.round(2).tolist()}) should be {expected}: who has beaten whom, "
            "and by way of whom?"
        )
        seen.add(expected)
    assert seen == {True, False}


def test_two_classes_have_no_finite_maximum_though_everyone_won_and_lost(task):
    B = [[0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert not task.has_finite_maximum(B)
