"""Checks of exercise 5: a matrix by hand, and the definition as a double loop."""

import numpy as np

from exercises.diagnosis import expect

# With 0 first, 0 beats 1 and 2 beats 0; with 1 first, 1 beats 0 and nobody wins against 2; with 2
# first, 2 beats 0 and 1 beats 2.
VERDICTS = [[0, 1, -1], [1, 0, 0], [1, -1, 0]]


def random_verdicts(rng, size):
    return rng.integers(-1, 2, (size, size)) * (1 - np.eye(size, dtype=int))


def test_the_rarer_win_weighs_more(task):
    """The first place won three times, the second twice."""
    expect(task.position_weights([VERDICTS]), (2 / 5, 3 / 5), "three wins in the first place, two "
           "in the second", [((3 / 5, 2 / 5), "w1 is the share of the *second* place's wins: the "
                              "rarer win weighs more"),
                             ((2, 3), "shares of all wins, not counts"),
                             ((2 / 6, 3 / 6), "verdicts without a winner are no wins")])


def test_wins_are_counted_over_the_whole_iteration(task):
    """Another answer adds two wins of the first place: 5 to 2. The mean of both answers' own
    weights would be 1/5 and 4/5.
    """
    expect(task.position_weights([VERDICTS, [[0, 1], [1, 0]]]), (2 / 7, 5 / 7),
           "5 wins in the first place and 2 in the second, of two answers",
           [((1 / 5, 4 / 5), "you average the answers' own weights; count over all of them"),
            ((5 / 7, 2 / 7), "w1 is the share of the *second* place's wins")])


def test_without_a_winner_the_places_weigh_the_same(task):
    for case in ([np.zeros((4, 4), dtype=int)], []):
        expect(task.position_weights(case), (0.5, 0.5), f"{len(case)} answers without any winner",
               [((np.nan, np.nan), "0 / 0: without any winner both weights are 1/2")])


def test_battles_by_hand(task):
    """With the weights 0.4 and 0.6: 0 and 1 each won in the first place, 2 beat 0 in both, and 1
    beat 2 in the second place alone.
    """
    r = np.array(VERDICTS)
    expect(
        task.battle_matrix(VERDICTS, 0.4, 0.6),
        [[0, 0.4, 0], [0.4, 0, 0.6], [1, 0, 0]],
        f"battle_matrix({VERDICTS}, 0.4, 0.6)",
        [
            (0.4 * (r == 1) + 0.6 * (r == -1), "r_nm is the other order, n shown first: transpose"),
            (0.6 * (r == 1) + 0.4 * (r.T == -1), "w1 and w2 are exchanged"),
            (0.4 * (r.T == 1) + 0.6 * (r == -1), "rows and columns are exchanged: B_mn is m's"),
            (0.4 * (r == 1) + 0.6 * (r.T == 1), "with n shown first, m wins where the verdict is "
             "-1"),
            (0.4 * (r == 1), "wins in the second place are missing"),
        ],
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
