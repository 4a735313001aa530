"""benchmarks/position.py's fit of ratings and an advantage of the first place, against an
independent fit.
"""
import math

import numpy as np
import pytest
import statsmodels.api

from benchmarks.position import elo_with_advantage


def tournament(differences):
    """Verdicts of as many players as there are differences + 1, who all fare alike: m, shown first,
    meets m + i + 1 with verdict i.
    """
    size = len(differences) + 1
    return [[0 if m == n else differences[(n - m) % size - 1] for n in range(size)]
            for m in range(size)]


@pytest.mark.parametrize("differences, advantage", [([1, 1, -1], math.log(2)),
                                                    ([1, -1, -1], -math.log(2)), ([1, -1], 0),
                                                    ([1, 1, 1, -1, 0], math.log(3))])
def test_the_advantage_of_the_first_place_by_hand(differences, advantage):
    """All players are alike, so their ratings are 0, and the first place wins w of w + l times: d =
    log(w / l). A verdict of 0 counts for neither.
    """
    ratings, d = elo_with_advantage(tournament(differences))
    np.testing.assert_allclose(ratings, 0, atol=1e-9)
    assert d == pytest.approx(advantage, abs=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_elo_with_advantage_against_an_independent_fit(seed):
    """statsmodels' logistic regression on the same comparisons, the first player's rating fixed at
    zero: all coefficients to 1e-3. By verdicts of players who are not far apart, so that nobody
    wins or loses all and the maximum is finite.
    """
    rng, size = np.random.default_rng(seed), 9
    e, d = rng.normal(0, 0.7, size), rng.normal(0, 1)
    r = np.where(rng.random((size, size)) < 1 / (1 + np.exp(-(e[:, None] - e + d))),
                 1, -1) * (1 - np.eye(size, dtype=int))
    r[0, 1] = 0
    m, n = np.nonzero(r)
    fit = statsmodels.api.Logit(r[m, n] == 1,
                                np.column_stack([np.eye(size)[m] - np.eye(size)[n],
                                                 np.ones(len(m))])[:, 1:]).fit(disp=0)
    ratings, advantage = elo_with_advantage(r)
    np.testing.assert_allclose([*(ratings - ratings[0])[1:], advantage], fit.params, atol=1e-3)
    assert np.ptp(fit.params) > 0.5 and np.abs(fit.params).max() < 10


def test_elo_with_advantage_stays_finite_and_does_not_care_for_names():
    """Whoever is first always wins: nobody is better, and the advantage is large. Players
    renumbered keep their ratings; one alone has none.
    """
    ratings, d = elo_with_advantage(1 - np.eye(5, dtype=int))
    assert np.abs(ratings).max() < 1e-9 and 5 < d < 100
    r = np.random.default_rng(3).integers(-1, 2, (7, 7))
    order = np.random.default_rng(4).permutation(7)
    (ratings, d), (renamed,
                   same) = elo_with_advantage(r), elo_with_advantage(r[np.ix_(order, order)])
    np.testing.assert_allclose(renamed, ratings[order], atol=1e-4)
    assert same == pytest.approx(d, abs=1e-4) and np.ptp(ratings) > 0.1
    assert elo_with_advantage([[0]]) == ([0], 0)


@pytest.mark.parametrize("verdicts", [[1, 2], [[0, 1, 1], [1, 0, 1]], [[0, 2], [0, 0]]])
def test_elo_with_advantage_refuses(verdicts):
    with pytest.raises(ValueError, match="verdicts"):
        elo_with_advantage(verdicts)
