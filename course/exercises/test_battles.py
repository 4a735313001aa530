"""Checks of exercise 5: a matrix by hand, and the definition as a double loop."""

import numpy as np
import pytest

# With 0 first, 0 beats 1 and 2 beats 0; with 1 first, 1 beats 0 and nobody wins against 2; with 2
# first, 2 beats 0 and 1 beats 2.
VERDICTS = [[0, 1, -1], [1, 0, 0], [1, -1, 0]]


def random_verdicts(rng, size):
    return rng.integers(-1, 2, (size, size)) * (1 - np.eye(size, dtype=int))


def test_the_rarer_win_weighs_more(task):
    """The first place won three times, the second twice."""
    assert task.position_weights([VERDICTS]) == pytest.approx((2 / 5, 3 / 5))


def test_wins_are_counted_over_the_whole_iteration(task):
    """Another answer adds two wins of the first place: 5 to 2. The mean of both answers' own
    weights would be 1/5 and 4/5.
    """
    assert task.position_weights([VERDICTS, [[0, 1], [1, 0]]]) == pytest.approx((2 / 7, 5 / 7))


def test_without_a_winner_the_places_weigh_the_same(task):
    assert task.position_weights([np.zeros((4, 4), dtype=int)]) == (
        0.5,
        0.5,
    ) and task.position_weights([]) == (0.5, 0.5)


def test_battles_by_hand(task):
    """With the weights 0.4 and 0.6: 0 and 1 each won in the first place, 2 beat 0 in both, and 1
    beat 2 in the second place alone.
    """
    np.testing.assert_allclose(
        task.battle_matrix(VERDICTS, 0.4, 0.6), [[0, 0.4, 0], [0.4, 0, 0.6], [1, 0, 0]]
    )


def test_battles_are_the_definition(task):
    rng = np.random.default_rng(0)
    for size in (2, 3, 7):
        r, w1 = random_verdicts(rng, size), rng.random()
        expected = [
            [w1 * (r[m][n] == 1) + (1 - w1) * (r[n][m] == -1) for n in range(size)]
            for m in range(size)
        ]
        np.testing.assert_allclose(task.battle_matrix(r.tolist(), w1, 1 - w1), expected)


def test_a_win_in_both_orders_is_one_battle_whatever_the_weights(task):
    for w1 in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(
            task.battle_matrix([[0, 1], [-1, 0]], w1, 1 - w1), [[0, 1], [0, 0]]
        )
