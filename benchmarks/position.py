"""How well three ways of rating judgments survive a meta-judge that prefers a place:

    python benchmarks/position.py      # a minute

Judgments of known quality (normal, of standard deviation --spread) are compared in both orders by a
judge that says "the first" with the probability sigmoid(difference + bias), and one time in twenty
nothing that parses. From the verdicts on --answers answers, as in an iteration: how often the
judgment with the highest rating is the truly best and the lowest the truly worst, and how far apart
the chosen and the rejected one truly are, against the best possible. Plain counting has weights
1/2; the paper's come from all verdicts [E2]; the fit is `elo_with_advantage`. 95 % intervals over
the answers.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).parent.parent))
from metareward import battle_matrix, elo, judge_pair, position_weights


def elo_with_advantage(verdicts, ridge=1e-6):
    """Ratings (N,), mean zero, and what being shown first is worth, from one fit, not weights.

    P(m, shown first, beats n) = sigmoid(e_m - e_n + d): Bradley-Terry with an order effect
    (Davidson and Beaver 1977), natural-log scale. verdicts (N, N) of 1, -1 and 0, as
    `battle_matrix` reads them; together the comparisons weigh N (N - 1) / 2, and the ridge, on d as
    well, is that of `elo`. Positive d: the first place helps. Returns (ratings, d).
    """
    r = np.asarray(verdicts)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or not np.isin(r, (-1, 0, 1)).all():
        raise ValueError("verdicts must be a square matrix of -1, 0 and 1")
    N = len(r)
    first, second = np.nonzero(r * (1 - np.eye(N)))
    sides = np.eye(N)[first] - np.eye(N)[second]                    # (comparisons, N)
    x = np.concatenate([sides, np.ones((len(first), 1))], axis=1)   # (comparisons, N + 1)
    y = np.where(r[first, second] == 1, 1.0, -1.0)
    scale = N * (N - 1) / 2 / max(1, len(y))

    def loss(theta):
        right = y * (x @ theta)
        slope = -scale * x.T @ (y * expit(-right)) + ridge * theta
        return scale * np.logaddexp(0, -right).sum() + ridge / 2 * (theta @ theta), slope

    def curvature(theta):
        lost = expit(-y * (x @ theta))
        return scale * x.T @ (x * (lost * (1 - lost))[:, None]) + ridge * np.eye(N + 1)

    fit = minimize(loss, np.zeros(N + 1), jac=True, hess=curvature, method="trust-exact",
                   options={"gtol": 1e-12, "maxiter": 1000})
    return fit.x[:-1] - fit.x[:-1].mean(), float(fit.x[-1])


def verdicts(quality, bias, rng):
    """What a meta-judge says of one answer's judgments: (N, N) of 1, -1 and 0."""
    N = len(quality)
    p_first = 1 / (1 + np.exp(-(quality[:, None] - quality + bias)))
    first = rng.random((N, N)) < p_first
    parsed = rng.random((N, N)) > 0.05
    return np.where(first, 1, -1) * parsed * (1 - np.eye(N, dtype=int))


def outcome(quality, ratings):
    """What the ratings choose, against the truth.

    Whether the chosen judgment is the best, whether the rejected one is the worst, and their true
    distance as a share of the largest.
    """
    pair = judge_pair(ratings, np.arange(len(ratings)))  # equal ratings: the first and the last
    if pair is None:
        return 0.0, 0.0, 0.0
    chosen, rejected = pair
    distance = (quality[chosen] - quality[rejected]) / np.ptp(quality)
    return float(chosen == quality.argmax()), float(rejected == quality.argmin()), distance


def main():
    parser = argparse.ArgumentParser(
        description="How well three ways of rating judgments survive a meta-judge that prefers a "
                    "place.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000,
                        help="simulated answers for each bias")
    parser.add_argument("--judgments", type=int, default=11, help="of each answer (N)")
    parser.add_argument("--spread", type=float, default=1.0,
                        help="standard deviation of the judgments' quality, in log-odds")
    parser.add_argument("--biases", type=float, nargs="+", default=[0, 0.5, 1, 2, 4],
                        help="of the first place, in log-odds")
    args = parser.parse_args()
    print(f"{'bias':>5}{'first wins':>12}  {'rated by':18}"
          f"{'best found':>18}{'worst found':>18}{'distance':>18}")
    for bias in args.biases:
        rng = np.random.default_rng(0)
        qualities = rng.normal(0, args.spread, (args.answers, args.judgments))
        said = [verdicts(quality, bias, rng) for quality in qualities]
        first, second = (sum(int((r == sign).sum()) for r in said) for sign in (1, -1))
        weights = position_weights(first, second)
        ways = {"plain counting": lambda r: elo(battle_matrix(r, 0.5, 0.5)),
                "the paper's weights": lambda r: elo(battle_matrix(r, *weights)),
                "the fit": lambda r: elo_with_advantage(r)[0]}
        for name, rate in ways.items():
            figures = np.array([outcome(quality, rate(r)) for quality, r in zip(qualities, said)])
            errors = 1.96 * figures.std(0, ddof=1) / np.sqrt(len(figures))
            shown = [f"{m:.1%} +- {e:.1%}" for m, e in zip(figures.mean(0), errors)]
            print(f"{bias:5.1f}{first / (first + second):12.0%}  {name:20}"
                  + "".join(f"{text:>17} " for text in shown), flush=True)


if __name__ == "__main__":
    main()
