"""The method: metareward.py's pure functions against hand arithmetic and independent fits, its
selection stages, and where the code may look.

Each equation's tag stands in the docstring of the test that works it by hand; the last tests look
for every tag in code, README and tests. Hand-made examples are chosen so that the likely slips
(sides swapped, weights swapped, transposed, a tier's edge) give other numbers.
"""
import ast
import math
import random
import sys
import tokenize
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import FUZZ
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from harness.inputs import agreeing_judgments, even_out_scores
from metareward import (
    actor_pair,
    actor_pairs,
    battle_matrix,
    elo,
    finished_answers,
    judge_pair,
    judge_pairs,
    most_varied,
    next_comparisons,
    position_weights,
    rate,
)
from prompts import judge_prompt

ROOT = Path(__file__).parent.parent


def kept(select, *arguments):
    """What a selection returns: (records, how many were dropped by reason)."""
    dropped = Counter()
    return select(*arguments, dropped), dropped


def eft_examples(judged, rubric, seed):
    """The warm start's examples and what was dropped on the way."""
    agreeing, disagreeing = kept(agreeing_judgments, judged)
    examples, too_frequent = kept(even_out_scores, agreeing, rubric, seed)
    return examples, disagreeing + too_frequent


NAN = math.nan


# ---- actor pairs

SCORES, LENGTHS = [5, 4, 3, 2, 1], [500, 300, 100, 400, 200]


@pytest.mark.parametrize("rho, pair", [(0, (0, 4)), (0.3, (1, 3)), (1, (2, 0))])
def test_actor_pair_by_hand(rho, pair):
    """[E1] S_max 5, S_min 1. rho 0: the tiers are {5} and {1}, best against worst whatever their
    lengths: answers 0 and 4. rho 0.3: top from 0.7 x 5 + 0.3 x 1 = 3.8, so {5, 4}, the shorter is 4
    (300); bottom up to 0.7 x 1 + 0.3 x 5 = 2.2, so {2, 1}, the longer is 2 (400): answers 1 and 3.
    rho 1: both tiers hold all; the shortest is answer 2, the longest answer 0. Of the 20 ordered
    pairs, each rho names one of its own.
    """
    assert actor_pair(SCORES, LENGTHS, rho) == pair


@pytest.mark.parametrize("scores, lengths, rho, pair", [
    # unscored answers are neither the shortest nor the longest
    ([NAN, 5, 1, NAN], [1, 900, 10, 999], 1, (2, 1)),
    ([NAN, 5], [1, 2], 0, None), ([NAN, NAN], [1, 2], 0, None), ([3], [1], 0, None),
    ([], [], 0, None),
    ([2, 2, 2], [1, 2, 3], 0.3, None),                      # S_max = S_min
    # the middle answer is the shortest of {3, 5} and the longest of {1, 3}
    ([1, 3, 5], [10, 20, 30], 0.5, None),
    # other lengths, and it is in neither place
    ([1, 3, 5], [30, 20, 10], 0.5, (2, 0)),
    # equal lengths: the best and the worst of the tiers
    ([5, 4, 1, 2], [7, 7, 7, 7], 0.3, (0, 2)),
    ([4, 5, 2, 1], [7, 7, 7, 7], 0.3, (1, 3)),              # in whatever order they come
    # rho 0 and tied scores: length still decides
    ([5, 5, 1, 1], [9, 8, 8, 9], 0, (1, 3)),
])
def test_actor_pair_on_the_edges(scores, lengths, rho, pair):
    assert actor_pair(scores, lengths, rho) == pair


def test_a_score_on_the_edge_of_a_tier_belongs_to_it():
    """rho 0.1, scores 5 and 0: the edges are 4.5 and 0.5; rho 0.32 with 4 and 1: 3.04 and 1.96. A
    hair inside is out. With eleven judgments: 0.68 x 51/11 + 0.32 x 1/11 = 35/11, which floats miss
    from above, as they miss 0.68 x 0.5 + 0.32 x 3 = 1.3 from below.
    """
    assert actor_pair([5, 4.5, 0, 0.5], [2, 1, 1, 2], 0.1) == (1, 3)
    assert actor_pair([5, 4.4999, 0, 0.5001], [2, 1, 1, 2], 0.1) == (0, 2)
    assert actor_pair([4, 3.04, 1, 1.96], [2, 1, 1, 2], 0.32) == (1, 3)
    assert (1 - 0.32) * 51 / 11 + 0.32 * 1 / 11 > 35 / 11
    assert actor_pair([51 / 11, 35 / 11, 1 / 11], [2, 1, 5], 0.32) == (1, 2)
    assert (1 - 0.32) * 0.5 + 0.32 * 3 < 1.3
    assert actor_pair([3, 0.5, 1.3], [5, 1, 2], 0.32) == (0, 2)


def test_the_same_scores_added_in_another_order_are_equal():
    """(0.1 + 0.2 + 0.3) / 3 and (0.3 + 0.2 + 0.1) / 3 differ in the last bit of a float: no reason
    to prefer either answer.
    """
    first, second = float(np.mean([0.1, 0.2, 0.3])), float(np.mean([0.3, 0.2, 0.1]))
    assert first != second and actor_pair([first, second], [1, 2], 0) is None


def actor_pair_in_fractions(scores, lengths, rho):
    """[E1] once more, as the sentence in the paper has it, in exact arithmetic."""
    scored = [i for i, score in enumerate(scores) if score is not None]
    if len({scores[i] for i in scored}) < 2:
        return None
    high, low = max(scores[i] for i in scored), min(scores[i] for i in scored)
    top = sorted((lengths[i], -scores[i], i) for i in scored if (1 - rho) * high
                 + rho * low <= scores[i] <= high)
    bottom = sorted((-lengths[i], scores[i], i)
                    for i in scored if low <= scores[i] <= (1 - rho) * low + rho * high)
    return (top[0][2], bottom[0][2]) if top[0][2] != bottom[0][2] else None


eleven_judgments = st.one_of(st.none(), st.builds(Fraction, st.integers(0, 30),
                                                  st.sampled_from([6, 10, 11])))


@FUZZ
@given(st.lists(st.tuples(eleven_judgments, st.integers(0, 8)), min_size=1, max_size=7),
       st.sampled_from([0, 10, 25, 32, 40, 50, 75, 100]))
def test_actor_pair_against_exact_fractions(answers, percent):
    """Means of up to 11 judgments, where floats miss the edges of tiers by a last bit: the choice
    must be that of exact arithmetic.
    """
    scores, lengths = zip(*answers)
    floats = [NAN if score is None else float(score) for score in scores]
    expected = actor_pair_in_fractions(scores, lengths, Fraction(percent, 100))
    assert actor_pair(floats, lengths, percent / 100) == expected


@pytest.mark.parametrize("scores, lengths, rho, name", [
    ([1, 2], [1], 0, "lengths"), ([[1, 2]], [[1, 2]], 0, "scores"), ([1, 2], [-1, 2], 0, "lengths"),
    ([1, 2], [1, NAN], 0, "lengths"),
    ([1, math.inf], [1, 2], 1, "scores"), ([1, 2], [1, 2], -0.1, "rho"),
    ([1, 2], [1, 2], 1.1, "rho"), ([1, 2], [1, 2], NAN, "rho"),
])
def test_actor_pair_refuses(scores, lengths, rho, name):
    with pytest.raises(ValueError, match=name):
        actor_pair(scores, lengths, rho)


# ---- weights and battles

def test_position_weights_by_hand():
    """[E2] 30 wins shown first, 10 shown second: w1 = 10/40 = 0.25, w2 = 30/40 = 0.75. The rarer
    kind of win weighs more.
    """
    assert position_weights(30, 10) == (0.25, 0.75)
    assert position_weights(7, 0) == (0, 1) and position_weights(0, 7) == (1, 0)
    assert position_weights(0, 0) == (0.5, 0.5)


@pytest.mark.parametrize("wins, name", [((-1, 2), "first_wins"), ((2, -1), "second_wins"),
                                        ((NAN, 1), "first_wins"), ((1, math.inf), "second_wins")])
def test_position_weights_refuse(wins, name):
    with pytest.raises(ValueError, match=name):
        position_weights(*wins)


def test_battle_matrix_by_hand():
    """[E3] w1 1/4, w2 3/4; verdicts[m, n], m shown first: 0 beats 1 in both orders (r_01 = 1, r_10
    = -1): B_01 = 1/4 + 3/4 = 1, B_10 = 0. 0 and 2: whoever is shown first (r_02 = r_20 = 1): B_02 =
    B_20 = w1 = 1/4. 1 and 2: 2 won shown second (r_12 = -1), the other order did not parse (r_21 =
    0): B_21 = w2 = 3/4, B_12 = 0. Swapped weights give 3/4 and 1/4 there, a transposed matrix 0 and
    3/4 the other way round.
    """
    verdicts = [[0, 1, 1],
                [-1, 0, -1],
                [1, 0, 0]]
    expected = [[0, 1, 0.25], [0, 0, 0], [0.25, 0.75, 0]]
    np.testing.assert_array_equal(battle_matrix(verdicts, 0.25, 0.75), expected)


verdict_matrices = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.integers(-1, 1), min_size=n, max_size=n),
                       min_size=n, max_size=n))


@FUZZ
@given(verdict_matrices, st.integers(0, 50), st.integers(0, 50))
def test_position_weights_touch_only_what_the_orders_disagree_about(
        verdicts, first_wins, second_wins):
    """w1 + w2 = 1: who wins in both orders gets exactly 1 and the other 0, whatever the weights.
    Where the orders disagree both get the same; where one did not parse, its winner gets w1 or w2.
    """
    w1, w2 = position_weights(first_wins, second_wins)
    B = battle_matrix(verdicts, w1, w2)
    for m in range(len(verdicts)):
        for n in range(m):
            there, back = verdicts[m][n], verdicts[n][m]
            expected = {(1, -1): (1, 0), (-1, 1): (0, 1), (1, 1): (w1, w1), (-1, -1): (w2, w2),
                        (1, 0): (w1, 0), (0, -1): (w2, 0),
                        (-1, 0): (0, w2), (0, 1): (0, w1), (0, 0): (0, 0)}[there, back]
            assert (B[m, n], B[n, m]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("verdicts, w1, w2, name", [
    ([[0, 1]], 0.5, 0.5, "verdicts"), ([0, 1], 0.5, 0.5, "verdicts"),
    ([[0, 2], [0, 0]], 0.5, 0.5, "verdicts"),
    ([[0, 0.5], [0, 0]], 0.5, 0.5, "verdicts"), ([[0, NAN], [0, 0]], 0.5, 0.5, "verdicts"),
    ([[0, 1], [1, 0]], -0.1, 1.1, "w1"), ([[0, 1], [1, 0]], 0.5, NAN, "w2"),
])
def test_battle_matrix_refuses(verdicts, w1, w2, name):
    with pytest.raises(ValueError, match=name):
        battle_matrix(verdicts, w1, w2)


# ---- Elo

def bradley_terry(B):
    """The maximum of the likelihood itself, without a regulariser, by scipy; the first rating is 0
    until the mean is taken off.
    """
    wins, losers = np.triu(B, 1) + np.tril(B, -1), np.arange(len(B))

    def loss_and_gradient(free):
        e = np.append(0, free)
        gaps = e[:, None] - e[None, :]
        p = 1 / (1 + np.exp(gaps))
        gradient = (wins * p).sum(1) - (wins * p).sum(0)
        return (wins * np.logaddexp(0, -gaps)).sum(), -gradient[1:]

    fit = minimize(loss_and_gradient, np.zeros(len(losers) - 1), jac=True, method="BFGS",
                   options={"gtol": 1e-11, "maxiter": 2000})
    e = np.append(0, fit.x)
    return e - e.mean()


def random_battles(rng, size):
    """Battles of players whose strengths differ by several units: everybody has won something, so
    the maximum is finite.
    """
    e = rng.normal(0, 1.5, size)
    chance = 1 / (1 + np.exp(e[None, :] - e[:, None]))
    return (chance * rng.uniform(0.3, 1.7, (size, size)) + 0.02) * (1 - np.eye(size))


@pytest.mark.parametrize("size", [2, 3, 5, 7, 11])
def test_elo_against_an_independent_fit(size):
    """[E4] On 8 random matrices of each size, whose ratings spread over more than one unit, both
    maxima agree to 1e-4: ratings in another scale (400 / log 10), a ridge of 0.01 or a transposed
    matrix are off by a hundred times that and more.
    """
    rng = np.random.default_rng(size)
    matrices = [random_battles(rng, size) for _ in range(8)]
    for B in matrices:
        np.testing.assert_allclose(elo(B), bradley_terry(B), atol=1e-4)
    assert max(np.ptp(elo(B)) for B in matrices) > 1


@pytest.mark.parametrize("a, b", [(3, 1), (0.25, 0.75), (50, 1), (1, 1)])
def test_elo_of_two_players_by_hand(a, b):
    """[E4] a wins against b: a / (1 + exp d) = b / (1 + exp -d) gives d = log(a / b), so +-log(a /
    b) / 2 around zero. log 3 = 1.0986.
    """
    np.testing.assert_allclose(elo([[0, a], [b, 0]]), [math.log(a / b) / 2, -math.log(a / b) / 2],
                               atol=1e-4)


@FUZZ
@given(st.permutations(range(11)))
def test_a_unanimous_order_survives_with_finite_ratings(order):
    """The maximum is at infinity; the ratings are finite and fall from the first to the last, one
    order out of 11! = 39,916,800.
    """
    B = np.zeros((11, 11))
    for place, winner in enumerate(order):
        B[winner, order[place + 1:]] = 1
    ratings = elo(B)
    assert np.abs(ratings).max() < 100 and (np.diff(ratings[list(order)]) < -1).all()
    assert ratings.mean() == pytest.approx(0)


def test_one_judgment_that_beats_all_others_stands_about_14_above_them():
    """The figure in the docstring of `elo`; the others, equal among themselves, stay equal."""
    B = np.full((11, 11), 0.5)
    B[0], B[:, 0] = 1, 0
    ratings = elo(B)
    assert 13 < ratings[0] - ratings[1] < 15 and np.ptp(ratings[1:]) < 1e-6


def test_an_unbeaten_judgment_leaves_the_others_where_they_are():
    """The rest of a matrix is rated as without it, up to a common shift: a ridge that bites would
    pull them together.
    """
    rng = np.random.default_rng(5)
    B = np.zeros((8, 8))
    B[1:, 1:] = random_battles(rng, 7)
    B[0, 1:] = 1
    ratings, alone = elo(B)[1:], elo(B[1:, 1:])
    np.testing.assert_allclose(ratings - ratings.mean(), alone, atol=1e-3)
    assert elo(B).argmax() == 0


def test_elo_without_a_battle_between_two_groups():
    """0 and 1 fought 3 : 1, 2 and 3 fought 1 : 1, and nobody else: +-log(3) / 2 within the first
    group, 0 and 0 in the second.
    """
    B = [[0, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    np.testing.assert_allclose(elo(B), [math.log(3) / 2, -math.log(3) / 2, 0, 0], atol=1e-4)


def made(N, winner, budget, seed=0):
    """All that `next_comparisons` asks for, round by round, of a judge who knows the order."""
    verdicts, done, rounds = np.zeros((N, N), int), np.zeros((N, N), bool), []
    while pairs := next_comparisons(verdicts, done, budget, seed):
        rounds.append(pairs)
        for m, n in pairs:
            assert m != n and not done[m, n]
            done[m, n], verdicts[m, n] = True, winner(m, n)
    return verdicts, done, rounds


def test_next_comparisons_by_hand():
    """Four judgments, the lower number the better, eight comparisons: once round the circle, then
    the leader and the last meet the two next to them, in the order that is missing.
    """
    verdicts, done, rounds = made(4, lambda m, n: 1 if m < n else -1, 8)
    circle = random.Random(0).sample(range(4), 4)
    assert rounds[0] == list(zip(circle, circle[1:] + circle[:1]))
    assert done.sum() == 8 and all({0, 3} & {*pair} for pair in rounds[1])
    e = elo(battle_matrix(verdicts, 0.5, 0.5))
    assert (e.argmax(), e.argmin()) == (0, 3)


@given(st.integers(0, 12), st.integers(1, 140), st.integers(0, 1000), st.sampled_from([0, 0.3, 1]))
def test_next_comparisons_end_with_the_budget(N, budget, seed, noise):
    """Each at most once, as many as the budget or all there are; in the first round each judgment
    is as often first as second, if the budget has room for it.
    """
    chance = random.Random(seed)
    _, done, rounds = made(N, lambda m, n: chance.choice([-1, 0, 1]) if chance.random() < noise
                           else 1 if m < n else -1, budget, seed)
    assert done.sum() == min(budget, N * (N - 1)) and not done.diagonal().any()
    if rounds and budget >= N:
        first, second = (np.bincount(side, minlength=N) for side in zip(*rounds[0]))
        assert first.tolist() == second.tolist() == [first[0]] * N
    assert made(N, lambda m, n: 1, budget, seed)[2][:1] == rounds[:1]  # the seed's alone


def test_next_comparisons_find_best_and_worst():
    """With 36 of 110 comparisons by a judge who is always right."""
    for seed in range(50):
        quality = np.random.default_rng(seed).permutation(11)
        verdicts, _, _ = made(11, lambda m, n: 1 if quality[m] > quality[n] else -1, 36, seed)
        e = elo(battle_matrix(verdicts, 0.5, 0.5))
        assert (quality[e.argmax()], quality[e.argmin()]) == (10, 0)


@pytest.mark.parametrize("verdicts, done, budget", [
    (np.zeros((2, 3)), np.zeros((2, 3)), 4), (np.zeros((2, 2)), np.zeros((3, 3)), 4),
    (np.zeros((2, 2)), np.zeros((2, 2)), 0), (np.zeros(2), np.zeros(2), 4),
    (np.full((3, 3), 7), np.eye(3)[::-1], 4)])
def test_next_comparisons_refuse(verdicts, done, budget):
    with pytest.raises(ValueError):
        next_comparisons(verdicts, done, budget)


def test_elo_of_nothing():
    """No battles, nobody, or one alone (who cannot fight himself): nobody is better, and nothing is
    divided by zero.
    """
    with np.errstate(all="raise"):
        assert elo(np.zeros((3, 3))).tolist() == [0, 0, 0] and elo(np.zeros((0, 0))).tolist() == []
        assert elo([[5]]).tolist() == [0]


def test_elo_takes_no_account_of_the_diagonal():
    np.testing.assert_array_equal(elo([[9, 3], [1, 7]]), elo([[0, 3], [1, 0]]))


def matrices_of(kind):
    rng = np.random.default_rng(9)
    return {"regular": [random_battles(rng, size) for size in (2, 4, 11)],
            # some unbeaten, some never seen
            "sparse": [battle_matrix(rng.integers(-1, 2, (size, size)), 0.3, 0.7)
                       for size in (3, 4, 6, 11)],
            "unanimous": [np.triu(np.ones((size, size)), 1) for size in (2, 4, 11)]}[kind]


@pytest.mark.parametrize("kind", ["regular", "sparse", "unanimous"])
def test_elo_sees_neither_scale_nor_names(kind):
    """Rescaled battles give the same ratings, also where only the regulariser makes them finite;
    every win turned into a loss changes the sign; players renumbered keep their ratings. Ratings
    are spread, so that zeros for all cannot pass.
    """
    for B in matrices_of(kind):
        ratings = elo(B)
        order = np.random.default_rng(0).permutation(len(B))
        assert np.ptp(ratings) > 0.05 and ratings.mean() == pytest.approx(0, abs=1e-9)
        for scale in (1000, 1e-6):
            np.testing.assert_allclose(elo(B * scale), ratings, atol=1e-4)
        np.testing.assert_allclose(elo(B.T), -ratings, atol=1e-4)
        np.testing.assert_allclose(elo(B[np.ix_(order, order)]), ratings[order], atol=1e-4)


# ---- ratings with an advantage of the first place

@pytest.mark.parametrize("battles", [[1, 2], [[0, 1, 2], [1, 0, 2]], [[0, -1], [0, 0]],
                                     [[0, NAN], [0, 0]], [[0, math.inf], [0, 0]]])
def test_elo_refuses(battles):
    with pytest.raises(ValueError, match="battles"):
        elo(battles)


# ---- judge pairs

@pytest.mark.parametrize("ratings, lengths, limit, pair", [
    ([0.5, 2, -1, 0], [9, 9, 9, 9], None, (1, 2)),
    # equal ratings: the shorter is chosen, the longer rejected
    ([1, 1, -1, -1], [5, 4, 4, 5], None, (1, 3)),
    # equal up to the rounding of a fit
    ([1, 1 - 1e-12, -1, -1 + 1e-12], [5, 4, 4, 5], None, (1, 3)),
    ([0, 0, 0], [1, 2, 3], None, None), ([1], [1], None, None),
    # at the limit; the rejected one may be as long as it likes
    ([1, 0, -1], [1100, 5, 5000], 1100, (0, 2)),
    ([1, 0, -1], [1101, 5, 5], 1100, None),                 # over it: no pair, not the second best
    ([1, 0, -1], [9999, 5, 5], None, (0, 2)), ([1, 0, -1], [9999, 5, 5], 0, (0, 2)),
])
def test_judge_pair_by_hand(ratings, lengths, limit, pair):
    assert judge_pair(ratings, lengths, limit) == pair


def test_equal_judgments_are_told_apart_by_length_not_by_rounding():
    """Judgments of four classes, twins within a class, rated by `elo`, whose twins differ in the
    16th digit: in 60 random tournaments the shortest of the best class is chosen and the longest of
    the worst rejected. By rounding alone a third of them would go wrong.
    """
    rng, seen = np.random.default_rng(0), 0
    while seen < 60:
        kinds = rng.integers(0, 4, 11)
        verdicts = rng.integers(-1, 2, (4, 4))[np.ix_(kinds, kinds)]
        ratings, lengths = elo(battle_matrix(verdicts, 0.3, 0.7)), rng.permutation(11)
        if np.ptp(ratings) < 1e-6:
            continue
        best, worst = (np.flatnonzero(kinds == kinds[place])
                       for place in (ratings.argmax(), ratings.argmin()))
        if max(np.delete(ratings, best),
               default=-99) > ratings.max() - 1e-3 or min(np.delete(ratings, worst),
                                                          default=99) < ratings.min() + 1e-3:
            continue  # two classes of one strength
        seen += 1
        assert judge_pair(ratings, lengths) == (min(best, key=lambda i: lengths[i]),
                                                max(worst, key=lambda i: lengths[i]))


@pytest.mark.parametrize("ratings, lengths, name", [
    ([1, 2], [1], "lengths"), ([1, NAN], [1, 2], "ratings"), ([1, 2], [1, -2], "lengths"),
    ([], [], "ratings")])
def test_judge_pair_refuses(ratings, lengths, name):
    with pytest.raises(ValueError, match=name):
        judge_pair(ratings, lengths)


# ---- the stages that select

def test_finished_answers():
    """Of seven, two are cut off and two duplicates: three items, each under the number it had. A
    text that was cut off does not stand in the way of the same text finished, and an answer to
    another prompt is no duplicate.
    """
    def responses(*texts):
        return [{"text": text.rstrip("~"), "finished": not text.endswith("~"), "tokens": 3}
                for text in texts]

    items, dropped = kept(finished_answers, [
        {"id": "0", "prompt_id": "0", "prompt": "p0", "checks": ["b", "^b"],
         "responses": responses("b~", "a", "a", "b", "c~", "ab", "a")},
        {"id": "1", "prompt_id": "1", "prompt": "p1", "responses": responses("a")}], 5)
    assert dropped == {"answer cut off": 2, "answer a duplicate": 2}
    assert items == [{"id": "0/1", "prompt_id": "0", "prompt": "p0", "text": "a", "truth": 0},
                     {"id": "0/3", "prompt_id": "0", "prompt": "p0", "text": "b", "truth": 5},
                     {"id": "0/5", "prompt_id": "0", "prompt": "p0", "text": "ab", "truth": 2.5},
                     {"id": "1/0", "prompt_id": "1", "prompt": "p1", "text": "a"}]


def judged(prompt_id, *scores_and_lengths):
    return [{"id": f"{prompt_id}/{i}", "prompt_id": prompt_id, "prompt": f"prompt {prompt_id}",
             "score": score, "scores": [],
             "text": f"{prompt_id}{i}".ljust(length, ".")}
            for i, (score, length) in enumerate(scores_and_lengths)]


def test_actor_pairs_keep_their_own_numbers_when_others_are_dropped():
    """rho 0.5, limit 25. Prompt a gives no pair in any of four ways before b, c and g do, answers
    of all prompts in one shuffled list: an index into the wrong list would name another prompt's
    text, and every text and score here is different.
    """
    answers = [*judged("a", (2, 10), (2, 20)), *judged("b", (1.5, 30), (3, 20),
                                                       (5, 10)), *judged("d", (4, 10), (None, 20)),
               *judged("e", (1, 10), (3, 20), (5, 30)), *judged("c", (None, 9), (0.25, 12),
                                                                (4.75, 11)),
               *judged("f", (1, 10), (4, 26)),
               *judged("g", (1, 26), (4.5, 25)), *judged("h", (None, 3))]
    random.Random(0).shuffle(answers)
    pairs, dropped = kept(actor_pairs, answers, 0.5, 25)
    assert dropped == {"actor pair: all scores equal": 1,
                       "actor pair: fewer than two answers with a score": 2,
                       "actor pair: the same answer on both sides": 1,
                       "actor pair: chosen answer too long": 1}
    assert sorted(pairs, key=lambda pair: pair["prompt_id"]) == [
        {"prompt": [{"role": "user", "content": f"prompt {name}"}],
         "chosen": [{"role": "assistant", "content": chosen}],
         "rejected": [{"role": "assistant", "content": rejected}], "kind": "actor",
         "prompt_id": name,
         "chosen_score": chosen_score, "rejected_score": rejected_score}
         for name, chosen, chosen_score, rejected, rejected_score in [
            ("b", "b2........", 5, "b0".ljust(30, "."), 1.5),
            ("c", "c2.........", 4.75, "c1..........", 0.25),
            ("g", "g1".ljust(25, "."), 4.5, "g0".ljust(26, "."), 1)]]


def test_actor_pairs_without_a_limit():
    pairs, dropped = kept(actor_pairs, judged("f", (1, 10), (4, 26)), 0, 0)
    assert len(pairs) == 1 and not dropped


def judgments_of(name, *scores, prompt_id=None, truth=None):
    """An answer with one judgment per score, each with a text of its own."""
    judgments = [{"text": f"{name} judgment {j}", "score": score, "finished": score is not None}
                 for j, score in enumerate(scores)]
    record = {"id": name, "prompt_id": prompt_id or name[0], "prompt": f"prompt {name[0]}",
              "text": f"answer {name}", "judgments": judgments,
              "scores": list(scores), "score": None}
    return record | ({} if truth is None else {"truth": truth})


def test_most_varied_takes_the_answer_that_the_judge_is_least_sure_of():
    """Prompt a: variances 0, 4, 0.25, and one valid judgment (none). Prompt b: no answer has two.
    Prompt c: an answer all judged alike, as the other has but one judgment. Judgments that did not
    parse go, and each score stays with its text.
    """
    answers = [judgments_of("a0", 3, 3, 3), judgments_of("b0", 1, None, None),
               judgments_of("a1", 1, None, 5, truth=4), judgments_of("c0", 5),
               judgments_of("a2", 3, 4), judgments_of("a3", 9, None), judgments_of("b1", None),
               judgments_of("c1", 2, 2)]
    items, dropped = kept(most_varied, answers, 0)
    assert dropped == {"judge pair: no answer with two valid judgments": 1}
    assert items == [{"id": "a1", "prompt_id": "a", "prompt": "prompt a", "text": "answer a1",
                      "truth": 4,
                      "texts": ["a1 judgment 0", "a1 judgment 2"], "scores": [1, 5]},
                     {"id": "c1", "prompt_id": "c", "prompt": "prompt c", "text": "answer c1",
                      "texts": ["c1 judgment 0", "c1 judgment 1"], "scores": [2, 2]}]


def test_most_varied_breaks_ties_at_random_but_repeatably():
    """Three answers vary alike, one of them by floats that round to a hair more, a fourth less:
    over 60 prompts each of the three is taken about 20 times, never the fourth; the same seed takes
    the same, another seed does not.
    """
    answers = [judgments_of(f"a{i}", *scores, prompt_id=f"{p}") for p in range(60)
               for i, scores in enumerate([(1, 4), (4, 1), (1.2, 4.2), (1, 3)])]
    taken = [[item["id"] for item in kept(most_varied, answers, seed)[0]] for seed in (0, 0, 1)]
    counts = Counter(taken[0])
    assert taken[0] == taken[1] != taken[2] and set(counts) == {"a0", "a1", "a2"}
    assert min(counts.values()) >= 8


def battle(name, verdicts, texts, scores):
    return {"id": f"{name}/0", "prompt_id": name, "prompt": f"prompt {name}",
            "text": f"answer {name}", "texts": texts, "scores": scores,
            "verdicts": verdicts}


ONE_BEATS_0_BEATS_2 = [[0, -1, 1], [1, 0, 1], [-1, -1, 0]]


def test_judge_pairs_keep_their_own_numbers_when_others_are_dropped():
    """Limit 10. a: nothing parsed. b: 0 draws with 1. c: the best is too long. d: best and worst
    are the same text. Between them e and f give a pair each, of their own judgments, scores and
    ratings. Unparsed: all 2 of a, 1 of f.
    """
    verdicts, rubric = ONE_BEATS_0_BEATS_2, "one point"
    battles = [battle("a", [[0, 0], [0, 0]], ["a0", "a1"], [1, 2]),
               battle("e", verdicts, ["e0", "e1", "e2"], [3, 4, 5]),
               battle("b", [[0, 1], [1, 0]], ["b0", "b1"], [1, 2]),
               battle("c", verdicts, ["c0", "c1 is too long", "c2"], [1, 2, 3]),
               battle("d", verdicts, ["d0", "same", "same"], [1, 2, 3]),
               battle("f", [[0, 0], [1, 0]], ["f0", "f1"], [2.5, 3.5])]
    pairs, dropped = kept(judge_pairs, battles, rate(battles, (0.25, 0.75)), rubric, 10)
    assert dropped == {"verdict malformed or cut off": 3, "judge pair: all ratings equal": 2,
                       "judge pair: chosen judgment too long": 1,
                       "judge pair: the same judgment on both sides": 1}
    expected = zip(pairs, "ef", ("e1", "f1"), ("e2", "f0"), (4, 3.5), (5, 2.5), strict=True)
    for pair, name, chosen, rejected, chosen_score, rejected_score in expected:
        ratings = elo(battle_matrix(next(b for b in battles if b["prompt_id"] == name)["verdicts"],
                                    0.25, 0.75))
        assert pair == {"prompt": [{"role": "user",
                                    "content": judge_prompt(f"prompt {name}", f"answer {name}",
                                                            rubric)}],
                        "chosen": [{"role": "assistant", "content": chosen}],
                        "rejected": [{"role": "assistant", "content": rejected}],
                        "kind": "judge", "prompt_id": name, "chosen_score": chosen_score,
                        "rejected_score": rejected_score,
                        "chosen_rating": max(ratings), "rejected_rating": min(ratings)}


def test_position_weights_can_turn_a_judge_pair_round():
    """0 and 1 draw; 0 beat 2 shown first, 1 beat 2 shown second, and the other orders did not
    parse. With weights (0.9, 0.1) judgment 0 is the best, with (0.1, 0.9) judgment 1: the weights
    reach the ratings, and on the right side.
    """
    verdicts = [[0, 1, 1], [1, 0, 0], [0, -1, 0]]
    battles = [battle("a", verdicts, ["zero", "one", "two"], [1, 2, 3])]
    best = [kept(judge_pairs, battles, rate(battles, weights), "r", 0)[0][0]["chosen"][0]["content"]
            for weights in ((0.9, 0.1), (0.1, 0.9))]
    assert best == ["zero", "one"]


def test_battles_are_rated_by_the_weights():
    """What ratings.jsonl says is what the pure functions give, and the pair is the one that trains.
    """
    battles = [battle("a", ONE_BEATS_0_BEATS_2, ["zero", "one", "two"], [1, 2, 3]),
               battle("b", [[0, 1], [1, 0]], ["x", "y"], [1, 2])]
    ratings = rate(battles, (0.25, 0.75))
    B = battle_matrix(ONE_BEATS_0_BEATS_2, 0.25, 0.75)
    assert ratings[0] == {"id": "a/0", "battles": B.tolist(), "ratings": elo(B).tolist(),
                          "pair": (1, 2)}
    assert ratings[1]["pair"] is None



# ---- the warm start's examples

def ranked(prompt_id, *replies):
    """Judged replies to one prompt; each reply is (rank, score of its first judgment, of its
    second, ...).
    """
    return [judgments_of(f"{prompt_id}{i}", *scores, prompt_id=prompt_id) | {"rank": rank}
            for i, (rank, *scores) in enumerate(replies)]


def test_agreeing_judgments_by_hand():
    """Replies of rank 1, 0, 2. In the order 0 1 2 the five rounds of judgments say: 4 3 1 (agrees),
    3 3 3 (says nothing), 3 4 1 (puts the second best first), none 2 1 (does not parse), 3 3 1
    (agrees: a tie is no contradiction, and best is above worst). Rounds 0 and 4 stay.
    """
    examples, dropped = eft_examples(ranked("a", (1, 3, 3, 4, 2, 3), (0, 4, 3, 3, None, 3),
                                            (2, 1, 3, 1, 1, 1)), "the rubric", seed=0)
    assert dropped == {"EFT judgments malformed or cut off": 1,
                       "EFT judgments lost with one of their round": 2,
                       "EFT judgments that disagree with the ranks": 6}
    kept = sorted((e["completion"][0]["content"], e["score"]) for e in examples)
    assert kept == [("a0 judgment 0", 3), ("a0 judgment 4", 3), ("a1 judgment 0", 4),
                    ("a1 judgment 4", 3),
                    ("a2 judgment 0", 1), ("a2 judgment 4", 1)]
    for e in examples:
        reply = e["completion"][0]["content"].split()[0]
        assert e["prompt"] == [{"role": "user",
                                "content": judge_prompt("prompt a", f"answer {reply}",
                                                        "the rubric")}]
        assert e["completion"][0]["role"] == "assistant" and e["prompt_id"] == "a"


def test_replies_that_people_ranked_alike_may_be_scored_either_way():
    """Two replies of rank 0 and one of rank 1: 5 3 | 2 and 3 5 | 2 agree; 5 1 | 2 does not, as a
    best reply is below the worst.
    """
    examples, dropped = eft_examples(ranked("a", (0, 5, 3, 5), (1, 2, 2, 2), (0, 3, 5, 1)), "r",
                                     seed=0)
    assert {e["completion"][0]["content"][-1] for e in examples} == {"0", "1"}
    assert len(examples) == 6
    assert dropped == {"EFT judgments that disagree with the ranks": 3}


def test_no_score_is_more_than_twice_as_frequent_as_the_median():
    """Ten prompts score their best reply 5, the other 0, 1, 2, 3, 4, twice each: counts 10, 2, 2,
    2, 2, 2, median 2, cap 4. Six 5s go, nothing else; the same seed keeps the same, another seed
    others.
    """
    records = [record for p in range(10) for record in ranked(f"{p}", (0, 5), (1, p // 2))]
    runs = [eft_examples(records, "r", seed) for seed in (0, 0, 1)]
    assert Counter(e["score"] for e in runs[0][0]) == {5: 4, 0: 2, 1: 2, 2: 2, 3: 2, 4: 2}
    assert runs[0][1] == {"EFT judgments with a too frequent score": 6}
    fives = [{e["prompt_id"] for e in examples if e["score"] == 5} for examples, _ in runs]
    assert runs[0] == runs[1] and fives[0] != fives[2] and len(fives[0]) == 4


def test_no_agreeing_judgment_is_no_error():
    assert eft_examples([], "r", 0) == ([], {})


# ---- tags and arrows

# made, not written out, so that this line is no mention of its own
EQUATIONS = [f"[E{number}]" for number in range(1, 6)]


@pytest.mark.parametrize("tag", EQUATIONS)
def test_each_equation_stands_behind_the_line_that_computes_it(tag):
    """In a comment after code, in the file where its function lives: a mention in a docstring is
    not enough.
    """
    with open(ROOT / ("dpo.py" if "5" in tag else "metareward.py"), encoding="utf-8") as code:
        comments = [token for token in tokenize.generate_tokens(code.readline)
                    if token.type == tokenize.COMMENT and tag in token.string]
    assert any(token.line[:token.start[1]].strip() for token in comments)


@pytest.mark.parametrize("tag", EQUATIONS)
def test_each_equation_is_explained_in_the_readme(tag):
    assert tag in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("tag", EQUATIONS)
def test_each_equation_is_worked_by_hand_in_a_test(tag):
    """In the docstring of a test, not just anywhere in its file."""
    functions = [node for file in ROOT.glob("tests/test_*.py")
                 for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                 if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert [node.name for node in functions if tag in (ast.get_docstring(node) or "")]


MODULES = {"prompts": set(), "sampling": {"harness"}, "dpo": {"harness"},
           "eval": set(),
           "metareward": {"prompts", "dpo", "eval", "harness"}}
HARNESS = {"prompts", "sampling", "dpo", "eval", "harness"}  # what its files may import


def imports(file):
    """The top names of all that a file imports, late imports within functions included; "." for
    relative ones.
    """
    names, tree = set(), ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not (
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
        elif isinstance(node, ast.Name) and node.id in ("__import__", "importlib"):
            names.add("importlib")
    return names


def of_the_project(file):
    """Those names that are modules or folders of the project, and tricks that would hide such.

    What a file imports to be a command, and not for who imports it, is left aside.
    """
    folders = {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
    return imports(file) & (set(MODULES) | folders | {"harness", "tiny", ".", "importlib"})


def test_the_project_is_five_modules():
    assert {file.stem for file in ROOT.glob("*.py")} == set(MODULES)


@pytest.mark.parametrize("module, may_import", MODULES.items())
def test_the_arrows_of_the_contract(module, may_import):
    assert of_the_project(ROOT / f"{module}.py") <= may_import


@pytest.mark.parametrize("file", sorted((ROOT / "harness").rglob("*.py")),
                         ids=lambda file: str(file.relative_to(ROOT)))
def test_the_harness_does_not_know_the_method(file):
    assert of_the_project(file) <= HARNESS


def test_metareward_is_built_on_the_others():
    """Without this, a parser that finds no imports at all would pass."""
    assert of_the_project(ROOT / "metareward.py") == MODULES["metareward"]


@pytest.mark.parametrize("module, files", [
    ("sampling", {"chat", "plain_attention", "weights", "architecture", "cuda"}),
    ("dpo", {"adapters", "architecture", "cuda", "passes", "processes", "weights"})])
def test_the_sampler_and_the_step_can_be_taken_out(module, files):
    """They import a few files of the harness, and these none but each other."""
    taken, todo = set(), [module]
    while todo:
        tree = ast.parse((ROOT / f"{todo.pop()}.py").read_text(encoding="utf-8"))
        found = {node.module.replace(".", "/") for node in tree.body
                 if isinstance(node, ast.ImportFrom) and node.module.startswith("harness")}
        todo += found - taken
        taken |= found
    assert taken == {f"harness/engine/{name}" for name in files}
    for name in taken:
        assert of_the_project(ROOT / f"{name}.py") <= {"harness"}


def test_no_file_of_the_harness_knows_an_equation():
    """No equation's tag stands behind a line of its code."""
    for file in (ROOT / "harness").rglob("*.py"):
        with open(file, encoding="utf-8") as code:
            comments = [token.string for token in tokenize.generate_tokens(code.readline)
                        if token.type == tokenize.COMMENT]
        assert not any(tag in comment for tag in EQUATIONS for comment in comments), file


def test_prompts_needs_the_standard_library_only():
    assert imports(ROOT / "prompts.py") <= sys.stdlib_module_names


def test_the_recipe_of_the_tiny_world_knows_the_words_alone():
    for file in ROOT.glob("tiny/*.py"):
        assert of_the_project(file) <= {"prompts", "tiny"}


@pytest.mark.parametrize("name, most", [
    ("metareward", 650), ("sampling", 880), ("dpo", 620), ("eval", 370), ("prompts", 190)])
def test_a_module_stays_readable(name, most):
    """Lines of at most 100 columns, functions that need no scrolling, a file that is read in one
    sitting: what comes in must find its room by something that goes.
    """
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= most and max(map(len, text.splitlines())) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 50, node.name
