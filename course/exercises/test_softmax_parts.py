"""Checks of exercise 12: two keys by hand, and one softmax over all keys."""

import numpy as np

from exercises.diagnosis import expect


def attention(scores, values):
    """(out, total) over all keys at once."""
    if not len(scores):
        return np.zeros(values.shape[1]), -np.inf
    highest = scores.max()
    weights = np.exp(scores - highest)
    return weights @ values / weights.sum(), highest + np.log(weights.sum())


def check(task, scores, values, cut, case):
    """Compare with one softmax over all, and name the usual mistakes."""
    (a, total_a), (b, total_b) = (
        attention(scores[:cut], values[:cut]),
        attention(scores[cut:], values[cut:]),
    )
    with np.errstate(all="ignore"):
        out, total = task.join(a, total_a, b, total_b)
        plain = np.exp([total_a, total_b])
        mistakes = [
            ((a + b) / 2, "the two sets have different weights: their totals say which"),
            (a + b, "each out already sums to one: weigh them before you add"),
            ((cut * a + (len(scores) - cut) * b) / max(1, len(scores)), "it is not the number "
             "of keys that counts, but exp(total)"),
            ((total_a * a + total_b * b) / (total_a + total_b), "totals are logarithms"),
            (plain @ np.stack([a, b]) / plain.sum(), "exp(total) overflows, or both are 0: take "
             "the differences of totals"),
        ]
    wanted, all_of_it = attention(scores, values)
    expect(out, wanted, case, mistakes)
    expect(total, all_of_it, f"the total of {case}",
           [(total_a + total_b, "the total is the logarithm of a sum, not a sum of logarithms"),
            (max(total_a, total_b), "the smaller set counts as well")])


def test_two_keys_by_hand(task):
    """Weights 3 and 1: three quarters of the first value, a quarter of the second; total log 4."""
    out, total = task.join(np.array([8.0, 0.0]), np.log(3), np.array([0.0, 4.0]), 0.0)
    expect(out, [6, 1], "weights 3 and 1",
           [([4, 2], "the two sets have different weights: their totals say which"),
            ([8, 4], "each out already sums to one: weigh them before you add")])
    expect(total, np.log(4), "the total of weights 3 and 1",
           [(np.log(3), "the total is the logarithm of a sum, not a sum of logarithms; or the "
             "smaller set is missing")])


def test_it_is_one_softmax(task):
    rng = np.random.default_rng(0)
    for size in (2, 3, 20):
        scores, values = rng.normal(0, 3, size), rng.normal(size=(size, 4))
        for cut in (1, size // 2):
            check(task, scores, values, cut, f"{cut} keys beside {size - cut}")


def test_scores_in_the_thousands(task):
    rng = np.random.default_rng(1)
    for offset in (3000.0, -3000.0):
        scores, values = offset + rng.normal(size=7), rng.normal(size=(7, 3))
        check(task, scores, values, 3, f"scores about {offset:g}")


def test_a_set_without_keys_changes_nothing(task):
    rng = np.random.default_rng(2)
    scores, values = rng.normal(size=4), rng.normal(size=(4, 3))
    check(task, scores, values, 0, "no keys beside 4")
    check(task, scores, values, 4, "4 keys beside none")
    with np.errstate(all="ignore"):
        out, total = task.join(np.zeros(3), -np.inf, np.zeros(3), -np.inf)
    expect(out, [0, 0, 0], "no keys at all")
    assert total == -np.inf, "no keys at all have the total -inf"


def test_in_any_order(task):
    """Three sets joined one by one are the same, whichever comes first."""
    rng = np.random.default_rng(3)
    scores, values = rng.normal(0, 5, 9), rng.normal(size=(9, 2))
    parts = [attention(scores[i : i + 3], values[i : i + 3]) for i in (0, 3, 6)]
    for order in ((0, 1, 2), (2, 0, 1)):
        first, second, third = (parts[i] for i in order)
        out, total = task.join(*task.join(*first, *second), *third)
        expect(out, attention(scores, values)[0], "three sets, one by one")
        expect(total, attention(scores, values)[1], "the total of three sets")
