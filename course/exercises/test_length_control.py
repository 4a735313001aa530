"""Checks of exercise 4: seven answers by hand, and the definition tried on every pair of random
answers.
"""

import math

import numpy as np
import pytest

from exercises.diagnosis import expect

NAN = math.nan
SCORES = [5.0, 4.6, 3.0, 1.0, 1.4, 2.0, NAN]
LENGTHS = [900, 300, 100, 200, 700, 950, 10]


def usual_mistakes(scores, lengths, rho):
    """Pairs that other readings of [E1] give: (pair, what was mistaken)."""
    known = [i for i in range(len(scores)) if not math.isnan(scores[i])]
    high, low = max(scores[i] for i in known), min(scores[i] for i in known)

    def chosen(share, length=min):
        top = [i for i in known if scores[i] >= (1 - share) * high + share * low - 1e-9]
        return length(top, key=lambda i: lengths[i])

    def rejected(share, length=max):
        bottom = [i for i in known if scores[i] <= (1 - share) * low + share * high + 1e-9]
        return length(bottom, key=lambda i: lengths[i])

    best = max(known, key=lambda i: scores[i]), min(known, key=lambda i: scores[i])
    return [
        ((chosen(rho, max), rejected(rho)), "of the top tier the shortest is chosen"),
        ((chosen(rho), rejected(rho, min)), "of the bottom tier the longest is rejected"),
        ((chosen(rho, max), rejected(rho, min)), "shortest and longest are exchanged"),
        ((chosen(1 - rho), rejected(1 - rho)), "rho and 1 - rho are exchanged: rho 0 is the best "
         "against the worst"),
        ((rejected(rho), chosen(rho)), "chosen and rejected are exchanged"),
        (best, "rho makes tiers: not only the very best and the very worst are in them"),
        (None, "there is a pair here"),
    ]


@pytest.mark.parametrize(
    "rho, pair",
    [
        (0.0, (0, 3)),  # the best and the worst
        (
            0.125,
            (1, 4),
        ),  # tiers [4.5, 5] and [1, 1.5]: the shorter of 0 and 1, the longer of 3 and 4
        (0.25, (1, 5)),  # tiers [4, 5] and [1, 2], whose upper edge is answer 5
        (0.5, (2, 5)),  # tiers [3, 5] and [1, 3]: answer 2 is in both
        (1.0, (2, 5)),  # the shortest and the longest of all that have a score
    ],
)
def test_seven_answers_by_hand(task, rho, pair):
    expect(
        task.actor_pair(SCORES, LENGTHS, rho),
        pair,
        f"actor_pair({SCORES}, {LENGTHS}, {rho})",
        usual_mistakes(SCORES, LENGTHS, rho),
    )


@pytest.mark.parametrize(
    "scores, lengths, rho",
    [
        ([NAN, 3.0, NAN], [1, 2, 3], 0.0),  # one score
        ([NAN, NAN], [1, 2], 0.3),  # no score
        ([4.0, 4.0, 4.0], [1, 2, 3], 0.3),  # all equal
        ([0.1 + 0.2, 0.3], [1, 2], 0.0),  # equal but for the last bit
        # answer 1 is the shortest of the top tier and the longest of the bottom tier
        ([5.0, 3.0, 1.0], [900, 500, 100], 0.5),
    ],
)
def test_when_there_is_no_pair(task, scores, lengths, rho):
    got = task.actor_pair(scores, lengths, rho)
    expect(got, None, f"actor_pair({scores}, {lengths}, {rho})",
           [((0, 1), "0.1 + 0.2 and 0.3 differ in their last bit only")])


def test_of_equal_lengths_the_score_decides(task):
    for scores, pair in (([1.0, 5.0], (1, 0)), ([2.0, 3.0, NAN, 4.0], (3, 0))):
        rho, lengths = 1.0 if len(scores) == 2 else 0.5, [50] * len(scores)
        got = task.actor_pair(scores, lengths, rho)
        expect(got, pair, f"actor_pair({scores}, {lengths}, {rho})",
               [(got, "of equal lengths the better score is chosen, the worse rejected")])


@pytest.mark.parametrize(
    "scores, lengths, rho, pair, side",
    [
        # 0.6 x 1.1 + 0.4 x 0.1 is 0.7, and comes out a bit higher
        ([1.1, 0.7, 0.1], [900, 100, 200], 0.4, (1, 2), "top"),
        # 0.6 x 0.7 + 0.4 x 1.2 is 0.9, and comes out a bit lower
        ([1.2, 0.9, 0.7], [100, 900, 200], 0.4, (0, 1), "bottom"),
    ],
)
def test_an_answer_on_the_edge_is_in_the_tier(task, scores, lengths, rho, pair, side):
    expect(task.actor_pair(scores, lengths, rho), pair, f"actor_pair({scores}, {lengths}, {rho})",
           [((0, 2), f"answer 1 lies on the {side} tier's edge, which rounding moves by a bit: "
             "it needs a tolerance")])


def is_pair(scores, lengths, rho, chosen, rejected):
    """Whether both are in their tiers and no other answer in the tier would be preferred, by the
    text of [E1].
    """
    known = [s for s in scores if not math.isnan(s)]
    high, low = max(known), min(known)

    def top(i):
        return (1 - rho) * high + rho * low - 1e-9 <= scores[i] <= high

    def bottom(i):
        return low <= scores[i] <= (1 - rho) * low + rho * high + 1e-9

    def better(i, j):  # for the chosen side
        return lengths[i] < lengths[j] or lengths[i] == lengths[j] and scores[i] > scores[j]

    def worse(i, j):  # for the rejected side
        return lengths[i] > lengths[j] or lengths[i] == lengths[j] and scores[i] < scores[j]

    everyone = range(len(scores))
    return (
        top(chosen)
        and bottom(rejected)
        and not any(top(i) and better(i, chosen) for i in everyone)
        and not any(bottom(i) and worse(i, rejected) for i in everyone)
    )


def test_random_answers_against_the_definition(task):
    """300 prompts, scores in steps of 1/7 so that tiers have edges with answers on them, and few
    lengths so that some are equal.
    """
    rng, none = np.random.default_rng(0), 0
    for _ in range(300):
        size = rng.integers(2, 8)
        scores = [NAN if rng.random() < 0.1 else round(7 * x) / 7 for x in rng.uniform(0, 5, size)]
        lengths, rho = rng.integers(1, 6, size).tolist(), rng.choice([0, 0.2, 0.32, 0.4, 1.0])
        known = {s for s in scores if not math.isnan(s)}
        pair = task.actor_pair(scores, lengths, rho)
        pairs = [
            (c, r)
            for c in range(size)
            for r in range(size)
            if len(known) > 1 and is_pair(scores, lengths, rho, c, r)
        ]
        if pair is None:
            assert all((scores[c], lengths[c]) == (scores[r], lengths[r]) for c, r in pairs), (
                f"actor_pair({scores}, {lengths}, {rho}) gives None, and could give {pairs[0]}"
            )
            none += 1
        else:
            assert pair in pairs and pair[0] != pair[1], (
                f"actor_pair({scores}, {lengths}, {rho}) gives {pair}, and should give "
                f"{' or '.join(map(str, pairs)) or None}"
            )
    assert none > 5
