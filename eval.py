"""Measuring: win rates, agreement with people, biases of judge and meta-judge, two models compared.

    python eval.py report runs/x                # (re)draw the report of a run, or of several
    python eval.py show runs/x [PROMPT_ID]      # one prompt's journey through an iteration
    python eval.py compare A B --judge MODEL    # which model's, or file's, answers a judge prefers
    python eval.py repeat runs/x                # do comparisons come out the same when made again?
    python eval.py ifeval runs/x --questions input_data.jsonl    # instructions followed, no judge
    python eval.py judge runs/x --pairs FILE    # how often it prefers the right one of pairs
    python eval.py export runs/x --format alpaca --questions FILE    # files of official tools

Here are functions of numbers and records, which need numpy alone; the commands are in harness/
(commands/, and what shows a run in views/). The ground truth, where there is one, is data: a prompt
record may carry "checks" (harness/checks.py) of which a good answer meets many. Left out:
leaderboards. A model's opinion of itself is not evidence, and no figure here pretends that it is.
"""
import functools
import math
from collections import Counter, defaultdict
from itertools import combinations, permutations

import numpy as np

FEWEST = 10  # different prompts that an interval rests on


# ---- figures of lists of numbers

def numbers(name, values, low=-math.inf, high=math.inf):
    """The values as an array (n,). Raises ValueError that names them unless all are in range."""
    try:
        values = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        values = np.empty(0)
    good = values.ndim == 1 and len(values) > 0 and np.isfinite(values).all()
    if not good or values.min() < low or values.max() > high:
        where = "" if low == -math.inf else f" in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a non-empty list of numbers{where}")
    return values


def mean(values):
    """The mean of those that are not None, or None: what was not measured has no number."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def counted(name, values):
    """{name: the mean of those values that are not None, and name_count: how many these are}."""
    known = [value for value in values if value is not None]
    return {name: mean(known), f"{name}_count": len(known)}


def win_rate(preferences):
    """Mean and standard error of preferences in [0, 1]; the error of a single one is NaN.

    1: ours wins, 0.5: a tie.
    """
    values = numbers("preferences", preferences, 0, 1)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def length_controlled_win_rate(preferences, our_lengths, their_lengths):
    """The win rate that equal lengths would give, in 0..1.

    After Dubois et al. 2024 (arXiv 2404.04475), with length as the only term: fits P(win) =
    sigmoid(a tanh(d / std(d)) + c), d = theirs - ours in characters, by maximum likelihood, and
    returns sigmoid(c). Equal differences everywhere leave a and c inseparable: then it is the plain
    win rate. Where the preferences are perfectly separable the maximum is at infinity, and where
    the fit stops, after at most 100 Newton steps, is a number in 0..1 that says little.
    """
    wins = numbers("preferences", preferences, 0, 1)
    ours = numbers("our_lengths", our_lengths, 0)
    theirs = numbers("their_lengths", their_lengths, 0)
    if not len(wins) == len(ours) == len(theirs):
        raise ValueError("preferences, our_lengths and their_lengths must have the same length")
    difference = theirs - ours
    if len(wins) < 2 or difference.std(ddof=1) == 0:
        return float(wins.mean())
    bias = np.tanh(difference / difference.std(ddof=1))
    x = np.stack([bias, np.ones(len(wins))], axis=1)  # (n, 2)
    weights = np.zeros(2)  # a and c
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        hessian = x.T @ (x * (p * (1 - p))[:, None])
        step = np.linalg.lstsq(hessian, x.T @ (wins - p), rcond=None)[0]
        step *= min(1, 4 / max(np.abs(step).max(), 1e-300))
        weights += step
        if np.abs(step).max() < 1e-12:
            break
    return float(1 / (1 + np.exp(-np.clip(weights[1], -700, 700))))


def bootstrap(statistic, *columns, groups=None, resamples=2000, seed=0):
    """95 % interval of statistic(*columns) by the percentile bootstrap (Efron 1979), (low, high).

    columns: lists of the same length. groups: which rows belong together, such as the answers to
    one prompt; these are drawn as one.
    """
    columns = [np.asarray(column) for column in columns]
    members = defaultdict(list)
    for row, group in enumerate(range(len(columns[0])) if groups is None else groups):
        members[group].append(row)
    members = [np.array(rows) for rows in members.values()]
    rng, values = np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn_groups = rng.integers(0, len(members), len(members))
        rows = np.concatenate([members[i] for i in drawn_groups])
        values.append(statistic(*(column[rows] for column in columns)))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def grouped_interval(statistic, *columns, groups, resamples=2000):
    """95 % interval (low, high) by drawing groups of rows; None of fewer than 10 groups."""
    enough = len(set(groups)) >= FEWEST
    return bootstrap(statistic, *columns, groups=groups, resamples=resamples) if enough else None


def mean_by_prompt(name, rows):
    """Mean of rows (prompt_id, value), such as {"truth": 2.6, "truth_count": 120,
    "truth_interval": (2.3, 2.9)}; the interval only of 10 prompts or more.
    """
    rows = [row for row in rows if row[1] is not None]
    groups, values = [group for group, _ in rows], [value for _, value in rows]
    interval = grouped_interval(np.mean, values, groups=groups, resamples=400)
    return counted(name, values) | ({f"{name}_interval": interval} if interval else {})


def ranks(values):
    """Ranks from 1, ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a, b):
    """Rank correlation of two lists, ties sharing their mean rank; None where one is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def agreement(ours, theirs):
    """How far two lists of scores order the same items alike.

    Returns "with_ties": the share of all pairs of items ordered alike, a tie being an order of its
    own; "without_ties": the share of the pairs that neither ties; "spearman"; "kendall" (tau-b).
    None where nothing is left to compare.
    """
    ours, theirs = numbers("ours", ours), numbers("theirs", theirs)
    if len(ours) != len(theirs):
        raise ValueError("ours and theirs must have the same length")
    pairs = np.triu_indices(len(ours), 1)
    a = np.sign(ours[:, None] - ours)[pairs]
    b = np.sign(theirs[:, None] - theirs)[pairs]
    untied = (a != 0) & (b != 0)
    return {
        "with_ties": float((a == b).mean()) if len(a) else None,
        "without_ties": float((a == b)[untied].mean()) if untied.any() else None,
        "spearman": spearman(ours, theirs),
        "kendall": tau_b(a, b),
    }


def tau_b(a, b):
    """Kendall's tau-b of two orders of the same pairs, each -1, 0 (a tie) or 1; None if one ties
    all.
    """
    spread = math.sqrt(np.count_nonzero(a) * np.count_nonzero(b))
    return float(np.dot(a, b) / spread) if spread else None


# ---- the three roles

def order(a, b):
    """1 if a is larger, -1 if b is, 0 for a tie; sums in another order differ in the last digits.
    """
    return 0.0 if abs(a - b) < 1e-9 else float(np.sign(a - b))


def by_prompt(answers):
    """{prompt_id: the answers to it}."""
    groups = defaultdict(list)
    for answer in answers:
        groups[answer["prompt_id"]].append(answer)
    return groups


def same_prompt(answers):
    """Every two answers to the same prompt."""
    return [pair for group in by_prompt(answers).values() for pair in combinations(group, 2)]


def measure_actor(answers, scores="mean_score"):
    """Figures of an actor from its judged answers.

    answers: records with "prompt_id", "text", "finished", "score" and perhaps "truth". scores: what
    to call the mean of their scores. Means are over all answers that have the number, cut off or
    not, as a user would have got them: answers that end early would look better than they are among
    those that end at all. "..._count" says how many these are. Lengths are in characters; of 10
    prompts or more each mean has a 95 % interval, by bootstrap over prompts.
    """
    columns = {scores: [answer["score"] for answer in answers],
               "mean_length": [len(answer["text"]) for answer in answers]}
    if any("truth" in answer for answer in answers):
        columns["truth"] = [answer.get("truth") for answer in answers]
    cut_off = [not answer["finished"] for answer in answers]
    figures = {"answers": len(answers), "cut_off": sum(cut_off), "cut_off_rate": mean(cut_off)}
    for name, values in columns.items():
        figures |= mean_by_prompt(name, zip([a["prompt_id"] for a in answers], values))
    return figures


def kendall(name, answers, *scores):
    """{name: Kendall's tau-b of two scores of the same answers, name_count: over how many pairs}.

    Pairs are of answers to one prompt. scores: two functions of an answer. An answer of which one
    is None is left out.
    """
    both = [answer for answer in answers if None not in [score(answer) for score in scores]]
    orders = [[order(score(a), score(b)) for score in scores] for a, b in same_prompt(both)]
    return {name: tau_b(*np.transpose(orders)) if orders else None, f"{name}_count": len(orders)}


def measure_judge(answers):
    """Figures of a judge from answers that it judged (records with "scores", "score", "text").

    Of the judgments: the share that parse, their mean score, how often each score was given. Of the
    pairs of answers to one prompt: the share that it scores the same, and, where the truth tells
    them apart, the share that it orders as the truth does, with its interval; a tie counts one
    half, so that a judge who says the same of everything has 0.5. Kendall's tau of its orders by
    two halves of an answer's judgments, and, where answers have a "previous_score", of its order
    and the previous judge's. Of the answers: Spearman's correlation of score and length. What is a
    mean over a part of these has a "..._count", which says over how many.
    """
    scores = [score for answer in answers for score in answer["scores"]]
    scored = [answer for answer in answers if answer["score"] is not None]
    ties, right = [], []
    for a, b in same_prompt(scored):
        mine = order(a["score"], b["score"])
        ties.append(float(mine == 0))
        if a.get("truth") != b.get("truth"):
            theirs = order(a["truth"], b["truth"])
            right.append((a["prompt_id"], 0.5 + 0.5 * mine * theirs))
    counts = Counter(score for score in scores if score is not None)
    figures = {**counted("valid_rate", [float(score is not None) for score in scores]),
               **counted("mean_score", scores), **counted("ties", ties),
               "histogram": {f"{score:g}": counts[score] for score in sorted(counts)},
               **kendall("halves_kendall", scored, lambda answer: mean(answer["scores"][0::2]),
                         lambda answer: mean(answer["scores"][1::2])),
               **kendall("previous_judge_kendall", scored, lambda answer: answer["score"],
                         lambda answer: answer.get("previous_score")),
               **length_correlation("length_correlation", scored, "score")}
    if any("truth" in answer for answer in answers):
        figures |= mean_by_prompt("truth_agreement", right)
        figures |= length_correlation("truth_length_correlation", scored, "truth")
    return figures


def length_correlation(name, answers, number):
    """{name: Spearman's correlation of a number with the characters of the answers that have it,
    name_count: how many these are}.
    """
    rows = [(answer[number], len(answer["text"])) for answer in answers if number in answer]
    return {name: spearman(*zip(*rows)) if rows else None, f"{name}_count": len(rows)}


def measure_people(answers):
    """How far a judge orders replies as people did.

    answers: records with "score", and "rank" within their prompt, 0 the best. Of the pairs of
    replies to one prompt, the share ordered alike: without those that the judge or people tie, and
    with all, where a tie is right only if both tie. And Spearman's correlation, the mean over the
    prompts where scores differ. None where nothing is left.
    """
    scored = [answer for answer in answers if answer["score"] is not None]
    alike, untied = [], []
    for a, b in same_prompt(scored):
        mine, theirs = order(a["score"], b["score"]), order(b["rank"], a["rank"])
        alike.append(float(mine == theirs))
        if mine and theirs:
            untied.append((a["prompt_id"], float(mine == theirs)))
    correlations = [spearman([a["score"] for a in group], [-a["rank"] for a in group])
                    for group in by_prompt(scored).values()]
    return {**mean_by_prompt("human_agreement", untied),
            **counted("human_agreement_with_ties", alike),
            **counted("human_spearman", correlations)}


def measure_meta_judge(battles):
    """Biases of a meta-judge from its comparisons.

    battles: records with "verdicts" (N, N), entry [m][n] with m shown first, "scores" of the N
    judgments, and perhaps "said", a list of the comparisons that were made, if not all of them, and
    "truth" of the answer. Rates are over the comparisons that parsed; "first_of_equals_rate" over
    those of judgments with one score, "truth_accuracy" over those of which one's is nearer to the
    truth, "..._count" of them.
    """
    total, first, equals, consistent, higher, right = 0, [], [], [], [], []
    for battle in battles:
        verdicts, scores = battle["verdicts"], battle["scores"]
        total += comparisons(battle)
        for m, n in permutations(range(len(scores)), 2):
            verdict, turned = verdicts[m][n], verdicts[n][m]
            if verdict == 0:
                continue
            first.append(float(verdict == 1))
            winner, loser = (m, n) if verdict == 1 else (n, m)
            if scores[m] != scores[n]:
                higher.append(float(scores[winner] > scores[loser]))
            else:
                equals.append(first[-1])
            if m < n and turned != 0:
                consistent.append(float(verdict == -turned))
            if "truth" in battle:
                winner_off = abs(scores[winner] - battle["truth"])
                loser_off = abs(scores[loser] - battle["truth"])
                if winner_off != loser_off:
                    right.append(float(winner_off < loser_off))
    rates = {"first_position_rate": first, "first_of_equals_rate": equals,
             "higher_score_rate": higher, "consistent_rate": consistent,
             "scores_differ_rate": [1] * len(higher) + [0] * len(equals),
             "valid_rate": [1] * len(first) + [0] * (total - len(first))}
    if any("truth" in battle for battle in battles):
        rates["truth_accuracy"] = right
    return {key: value for name, values in rates.items()
            for key, value in counted(name, values).items()}


def comparisons(battle):
    """How many comparisons of an answer's judgments were made: all, if the record has no list."""
    N = len(battle["verdicts"])
    return len(battle["said"]) if "said" in battle else N * (N - 1)


# ---- two models compared

def measure_comparisons(records):
    """Figures of answers a against answers b.

    records: "prompt", "a", "b" and "winners" of both orders (a first, b first). A pair counts 1 if
    a won both, 0 if b did, 1/2 if the orders disagree; one that did not parse in both orders is
    left out and counted. Intervals: 95 %, bootstrap over prompts; None for fewer than 10 prompts.
    """
    both = [record for record in records if None not in record["winners"]]
    figures = {"compared": len(both), "unparsed": len(records) - len(both)}
    if not both:
        return figures
    wins = [record["winners"].count("a") / 2 for record in both]
    first = [mean([record["winners"][0] == "a", record["winners"][1] == "b"]) for record in both]
    same = [float(record["winners"][0] == record["winners"][1]) for record in both]
    lengths = [[len(record[side]) for record in both] for side in ("a", "b")]
    interval = functools.partial(grouped_interval, groups=[record["prompt"] for record in both])
    rate, error = win_rate(wins)
    return figures | {
        "win_rate": rate, "standard_error": error, "win_rate_interval": interval(np.mean, wins),
        "length_controlled_win_rate": length_controlled_win_rate(wins, *lengths),
        "length_controlled_interval": interval(length_controlled_win_rate, wins, *lengths),
        "first_position_rate": mean(first), "first_position_interval": interval(np.mean, first),
        "consistent_rate": mean(same), "mean_lengths": [mean(side) for side in lengths]}


if __name__ == "__main__":
    from harness.commands.flags import eval_parser
    from harness.startup import begin

    begin(eval_parser().parse_args)  # before the imports, which take seconds
    from harness.commands.main import main

    main()
