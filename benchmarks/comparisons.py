"""How few comparisons find the pair of judgments that all N(N-1) find?

    python benchmarks/comparisons.py                     # simulated judges, a minute
    python benchmarks/comparisons.py --runs runs/a ...   # verdicts of runs that made all of them

Judgments of known quality (normal, times a slope) are compared by judges that prefer a place, name
no winner in some comparisons, or go in circles (half of what says who wins is a random number for
each two judgments, and no quality). Told is the true distance between the chosen and the rejected
judgment as a share of what all comparisons give: chosen by `next_comparisons`, or at random. Of a
run's verdicts the truth is not known, and the ratings by all comparisons stand for it. 95 %
intervals over the answers.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness.files import read_jsonl
from metareward import (
    battle_matrix,
    elo,
    judge_pair,
    next_comparisons,
    position_weights,
    wins_by_place,
)

# name: (slope, what the first place is worth in log-odds, share without a winner, circles)
JUDGES = {"keen": (4, 0, 0, 0), "dull": (2, 0, 0, 0), "keen, prefers a place": (4, 1.5, 0, 0),
          "dull, prefers a place": (2, 1.5, 0, 0), "dull, often no winner": (2, 0, 0.2, 0),
          "keen, goes in circles": (4, 0, 0, 0.5)}


def simulated(quality, slope, bias, silent, circles, rng):
    """What a meta-judge says of one answer's judgments: (N, N) of 1, -1 and 0."""
    N = len(quality)
    taste = np.triu(rng.normal(size=(N, N)) * np.sqrt(2), 1)
    differ = (1 - circles) * (quality[:, None] - quality) + circles * (taste - taste.T)
    first = rng.random((N, N)) < 1 / (1 + np.exp(-(slope * differ + bias)))
    return np.where(first, 1, -1) * (rng.random((N, N)) >= silent) * (1 - np.eye(N, dtype=int))


def chosen_by_us(verdicts, budget, seed):
    """What is known of verdicts when `budget` comparisons are made; how many rounds they took."""
    known, done, rounds = np.zeros_like(verdicts), np.zeros(verdicts.shape, bool), 0
    while pairs := next_comparisons(known, done, budget, seed):
        m, n = np.array(pairs).T
        known[m, n], done[m, n], rounds = verdicts[m, n], True, rounds + 1
    return known, rounds


def at_random(verdicts, budget, seed):
    """The same with pairs at random, each in both orders."""
    m, n = np.triu_indices(len(verdicts), 1)
    some = np.random.default_rng(seed).permutation(len(m))[: budget // 2]
    known = np.zeros_like(verdicts)
    for a, b in ((m[some], n[some]), (n[some], m[some])):
        known[a, b] = verdicts[a, b]
    return known, 1


def rated(answers, **settings):
    """The ratings of each answer's judgments by its verdicts, weighed as in an iteration."""
    weights = position_weights(*wins_by_place([{"verdicts": r.tolist()} for r in answers]))
    return [elo(battle_matrix(r, *weights), **settings) for r in answers]


def distances(answers, quality):
    """The true distance between the chosen and the rejected judgment of each answer."""
    result = []
    for ratings, q in zip(rated(answers), quality):
        pair = judge_pair(ratings, np.arange(len(q)))
        result.append(q[pair[0]] - q[pair[1]] if pair else 0)
    return np.array(result)


def table(name, answers, quality, budgets):
    whole = distances(answers, quality)
    for budget in budgets:
        cells = []
        for way in (chosen_by_us, at_random):
            known, rounds = zip(*(way(r, budget, i) for i, r in enumerate(answers)))
            got = distances(known, quality)
            off = 1.96 * np.std(got - whole * got.mean() / whole.mean()) / np.sqrt(len(got))
            cells.append(f"{got.mean() / whole.mean():6.1%} +- {off / whole.mean():.1%}")
            cells.append(f"{max(rounds):2}")
        print(f"{name:24}{budget:5}   {cells[0]} in {cells[1]} rounds   at random {cells[2]}",
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[22, 30, 44],
                        help="comparisons of an answer")
    parser.add_argument("--answers", type=int, default=400, help="simulated answers of each judge")
    parser.add_argument("--judgments", type=int, default=11, help="of each answer (N)")
    parser.add_argument("--runs", type=Path, nargs="+", help="folders of runs")
    args = parser.parse_args()
    for run in args.runs or ():
        for file in sorted(run.glob("iter*/battles.jsonl")):
            answers = [np.array(record["verdicts"]) for record in read_jsonl(file)]
            answers = [r for r in answers if len(r) > 2 and r.any()]
            if len(answers) < 30:  # where no judge trains, a few are compared for the figures alone
                continue
            table(f"{run.name}, {file.parent.name}", answers, rated(answers, ridge=0.05),
                  args.budgets)
    for name, judge in JUDGES.items() if not args.runs else ():
        rng = np.random.default_rng(0)
        quality = rng.normal(size=(args.answers, args.judgments))
        table(name, [simulated(q, *judge, rng) for q in quality], quality, args.budgets)


if __name__ == "__main__":
    main()
