"""Checks of exercise 11: four tokens by hand, every stretch of the uniform line, and this project's
own draw.
"""

import numpy as np
import pytest
import torch

from exercises.diagnosis import expect

PROBS = np.array([0.1, 0.5, 0.15, 0.25])


def drawn(probs, uniform, keep, by_rank=False, stretch=True, side="right"):
    """What is drawn from a set of tokens, in a way that may be mistaken."""
    order = np.argsort(-probs, kind="stable") if by_rank else np.arange(len(probs))
    line = np.where(keep, probs, 0)[order].cumsum()
    place = np.searchsorted(line, uniform * (line[-1] if stretch else 1), side=side)
    return int(order[min(place, len(probs) - 1)])


@pytest.mark.parametrize(
    "uniform, top_p, token",
    [
        (0.6, 1.0, 2),
        (0.0, 1.0, 0),
        (0.1, 1.0, 1),  # a border: the later token
        (0.99, 1.0, 3),
        (0.0, 0.6, 1),  # the nucleus is 1 and 3, of length 0.75
        (0.66, 0.6, 1),
        (0.67, 0.6, 3),
        (0.99, 0.75, 3),  # 0.5 + 0.25 is 0.75, so 2 is not in it
        (0.99, 0.3, 1),  # one token is enough
    ],
)
def test_four_tokens_by_hand(task, uniform, top_p, token):
    got = task.sample_top_p(PROBS, uniform, top_p)
    ranked = np.sort(PROBS)[::-1]
    inside = ranked[ranked.cumsum() <= top_p + 1e-12]
    too_small = PROBS >= (inside[-1] if len(inside) else 1)
    right = PROBS >= ranked[np.argmax(ranked.cumsum() >= top_p - 1e-12)]
    expect(
        got,
        token,
        f"sample_top_p({PROBS.tolist()}, {uniform}, {top_p})",
        [
            (drawn(PROBS, uniform, right, stretch=False), "stretch the uniform number to the "
             "length of the nucleus, or what is cut off is drawn too"),
            (drawn(PROBS, uniform, right, by_rank=True), "the tokens lie in the order of their "
             "ids, not of their probabilities"),
            (drawn(PROBS, uniform, too_small), "the token with which the sum reaches top_p "
             "belongs to the nucleus"),
            (drawn(PROBS, uniform, PROBS > 0), "top_p cuts nothing off here"),
            (drawn(PROBS, uniform, right, side="left"), "at a border it is the later token"),
            (drawn(PROBS, uniform, PROBS >= ranked[np.argmax(ranked.cumsum() > top_p)]), "the "
             "sum has to reach top_p, not to pass it"),
        ],
    )


def test_equally_likely_tokens_are_in_it_together(task):
    """Of four tokens of 1/4 the nucleus of 0.5 is all four: no order among equals decides."""
    probs = np.full(4, 0.25)
    got = [task.sample_top_p(probs, u, 0.5) for u in (0.1, 0.3, 0.6, 0.9)]
    expect(got, [0, 1, 2, 3], "four equal tokens, top_p 0.5",
           [([0, 0, 1, 1], "tokens as likely as the last one belong to the nucleus too"),
            ([2, 2, 3, 3], "tokens as likely as the last one belong to the nucleus too")])


def test_the_last_bit_does_not_decide(task):
    """0.4 + 0.3 + 0.2 is 0.9, and comes out as 0.8999999999999999: the last token is not needed."""
    probs = np.array([0.1, 0.2, 0.3, 0.4])
    expect(task.sample_top_p(probs, 0.05, 0.9), 1, f"sample_top_p({probs.tolist()}, 0.05, 0.9)",
           [(0, "0.4 + 0.3 + 0.2 falls short of 0.9 by a last bit only: compare with a tolerance "
             "of 1e-12")])


def test_each_token_has_its_share_of_the_uniform_numbers(task):
    """Over 10,000 numbers spread evenly each token of the nucleus comes up by its share."""
    rng, grid = np.random.default_rng(0), (np.arange(10_000) + 0.5) / 10_000
    probs = rng.dirichlet(np.full(6, 0.7))
    ranked = np.sort(probs)[::-1]
    nucleus = probs >= ranked[np.argmax(ranked.cumsum() >= 0.8)]
    counts = np.bincount([task.sample_top_p(probs, u, 0.8) for u in grid], minlength=6) / 10_000
    expect(counts, np.where(nucleus, probs, 0) / probs[nucleus].sum(),
           f"the shares of tokens with {probs.round(3).tolist()}, top_p 0.8", tolerance=2e-4)


def test_it_draws_what_the_project_draws(task):
    from sampling import draw

    rng = np.random.default_rng(1)
    for _ in range(100):
        probs = rng.dirichlet(np.full(20, 0.3))
        uniform, top_p = rng.random(), rng.uniform(0.05, 1)
        logits = torch.tensor(np.log(probs + 1e-300))[None]
        theirs = draw(logits, torch.tensor([uniform]), 1.0, top_p).item()
        exact = (logits.float().softmax(-1)[0].numpy()).astype(float)
        expect(task.sample_top_p(exact / exact.sum(), uniform, top_p), theirs,
               f"sample_top_p({probs.round(3).tolist()}, {uniform}, {top_p})")
