"""Solution 7: which of six meta-judges prefers a place, which place, and how strongly?

Two judgments meet twice. Where the first place wins both times, the probability was sigmoid(x + d)
sigmoid(-x + d), x being the difference of their qualities; where the second place does, sigmoid(-x
- d) sigmoid(x - d). The ratio of the two is exp(2 d) for any x. So half the logarithm of how often
the one and the other happened estimates d, and no quality has to be known. Pairs whose winner is
the same in both orders say nothing about d. The standard error is that of a log-odds, halved.
"""

import math
from itertools import combinations


def position_advantage(battles):
    """(d, its standard error) in nats, estimated from one meta-judge's records."""
    first = second = 0.5  # half of one, so that the logarithm exists
    for battle in battles:
        r = battle["verdicts"]
        for m, n in combinations(range(len(r)), 2):
            first += r[m][n] == r[n][m] == 1
            second += r[m][n] == r[n][m] == -1
    return math.log(first / second) / 2, math.sqrt(1 / first + 1 / second) / 2


def biased(meta_judges):
    """{name: d} of those whose advantage is more than three standard errors from zero."""
    estimates = {name: position_advantage(battles) for name, battles in meta_judges.items()}
    return {name: d for name, (d, error) in estimates.items() if abs(d) > 3 * error}
