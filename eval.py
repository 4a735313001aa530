"""Measuring: win rates, agreement with people, the biases of judge and meta-judge; comparing models, exporting answers, the report of a run.

    python eval.py report runs/x                                  # (re)draw the report of a run
    python eval.py compare A B --judge MODEL                      # which of two models, or files of answers, does a judge prefer?
    python eval.py export runs/x --format alpaca --questions FILE # answers in the files that the official tools read

Numbers in, numbers out; the ground truth, where there is one, is data: a prompt record may carry "checks", regular expressions of which a
good answer matches many. Left out: leaderboards. A model's opinion of itself is not evidence, and no figure here pretends that it is.
"""
import math
import random
import re
import sys
from collections import Counter, defaultdict
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from harness.export import export
from harness.files import iterations, read_jsonl, write_jsonl
from harness.inputs import read_prompts, read_text
from harness.models import answer_tokens, drawn, load_alone, own_settings
from harness.report import report
from harness.settings import HERE, Parser
from prompts import RUBRIC, compare_prompt, meta_judge_prompt, parse_winner
from sampling import load_tokenizer

# ---- figures

def numbers(name, values, low=-math.inf, high=math.inf):
    try:
        values = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or values.min() < low or values.max() > high:
        raise ValueError(f"{name} must be a non-empty list of numbers" + ("" if low == -math.inf else f" in [{low:g}, {high:g}]"))
    return values


def win_rate(preferences):
    """Mean and standard error of preferences in [0, 1], 1 = ours wins, 0.5 = a tie. The error of a single one is NaN."""
    values = numbers("preferences", preferences, 0, 1)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def length_controlled_win_rate(preferences, our_lengths, their_lengths):
    """The win rate that equal lengths would give, in 0..1 (after Dubois et al. 2024, arXiv 2404.04475, with length as its only term).

    Fits P(win) = sigmoid(a tanh(d / std(d)) + c), d = theirs - ours in characters, by maximum likelihood, and returns sigmoid(c).
    Equal differences everywhere leave a and c inseparable: then it is the plain win rate. Where the preferences are perfectly separable
    the maximum is at infinity, and where the fit stops, after at most 100 Newton steps, is a number in 0..1 that says little.
    """
    wins = numbers("preferences", preferences, 0, 1)
    ours, theirs = numbers("our_lengths", our_lengths, 0), numbers("their_lengths", their_lengths, 0)
    if not len(wins) == len(ours) == len(theirs):
        raise ValueError("preferences, our_lengths and their_lengths must have the same length")
    difference = theirs - ours
    if len(wins) < 2 or difference.std(ddof=1) == 0:
        return float(wins.mean())
    x = np.stack([np.tanh(difference / difference.std(ddof=1)), np.ones(len(wins))], axis=1)
    weights = np.zeros(2)
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

    columns: lists of the same length. groups: which rows belong together, such as the answers to one prompt: these are drawn as one.
    """
    columns = [np.asarray(column) for column in columns]
    rows = defaultdict(list)
    for row, group in enumerate(range(len(columns[0])) if groups is None else groups):
        rows[group].append(row)
    rows, rng = [np.array(group) for group in rows.values()], np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        drawn = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        values.append(statistic(*(column[drawn] for column in columns)))
    return tuple(float(edge) for edge in np.percentile(values, [2.5, 97.5]))


def ranks(values):
    """Ranks from 1, ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a, b):
    """Rank correlation of two arrays, ties sharing their mean rank, or None where one of them does not vary."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else None


def agreement(ours, theirs):
    """How far two lists of scores order the same items alike.

    Returns "with_ties": share of all pairs of items ordered alike, a tie being an order of its own; "without_ties": share of the pairs
    that neither ties; "spearman"; "kendall" (tau-b). None where nothing is left to compare.
    """
    ours, theirs = numbers("ours", ours), numbers("theirs", theirs)
    if len(ours) != len(theirs):
        raise ValueError("ours and theirs must have the same length")
    upper = np.triu_indices(len(ours), 1)
    a, b = (np.sign(x[:, None] - x[None])[upper] for x in (ours, theirs))
    untied = (a != 0) & (b != 0)
    spread = math.sqrt(np.count_nonzero(a) * np.count_nonzero(b))
    return {
        "with_ties": float((a == b).mean()) if len(a) else None,
        "without_ties": float((a == b)[untied].mean()) if untied.any() else None,
        "spearman": spearman(ours, theirs),
        "kendall": float((a * b).sum() / spread) if spread else None,
    }


# ---- measuring the three roles

def truth(checks, text):
    """The true score of an answer: how many of the regular expressions it matches."""
    return sum(re.search(check, text) is not None for check in checks)


def mean(values):
    """The mean of those that are not None, or None: what was not measured has no number."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def measure_actor(answers):
    """Figures of an actor from its judged answers (records with "text", "finished", "score" and perhaps "truth")."""
    finished = [answer for answer in answers if answer["finished"]]
    figures = {"mean_score": mean(answer["score"] for answer in finished), "mean_length": mean(len(answer["text"]) for answer in finished),
               "cut_off": len(answers) - len(finished)}
    return figures | ({"truth": mean(answer.get("truth") for answer in finished)} if any("truth" in answer for answer in answers) else {})


def measure_judge(answers):
    """Figures of a judge from answers it judged: the share of judgments that parse, the mean score, how often each score was given, Spearman's
    correlation of score and length; among pairs of answers to the same prompt the share that it scores the same and, where the truth tells
    them apart, the share that it orders as the truth does (a tie counts one half, so that a judge who says the same of everything has 0.5)."""
    scores = [score for answer in answers for score in answer["scores"]]
    scored = [answer for answer in answers if answer["score"] is not None]
    ties, right = [], []
    for a, b in same_prompt(scored):
        order = np.sign(a["score"] - b["score"])
        ties.append(float(order == 0))
        if a.get("truth") != b.get("truth"):
            right.append(0.5 + 0.5 * order * np.sign(a["truth"] - b["truth"]))
    counts = Counter(score for score in scores if score is not None)
    figures = {"valid_rate": mean(float(score is not None) for score in scores), "mean_score": mean(scores), "ties": mean(ties),
               "histogram": {f"{score:g}": counts[score] for score in sorted(counts)}, "length_correlation": length_correlation(scored, "score")}
    if any("truth" in answer for answer in answers):
        figures |= {"truth_agreement": mean(right), "truth_length_correlation": length_correlation(scored, "truth")}
    return figures


def length_correlation(answers, number):
    """Spearman's correlation of a number with the characters of the answers that have it, or None."""
    pairs = [(answer[number], len(answer["text"])) for answer in answers if number in answer]
    return spearman(*zip(*pairs)) if pairs else None


def measure_people(answers):
    """How far a judge orders replies as people did (records with "score", and "rank" within their prompt, 0 the best): of the pairs of replies
    to one prompt, the share ordered alike, with a judge's tie as an order that people do not have, and without its ties; and Spearman's
    correlation, the mean over prompts, those left out to whose replies it gives all the same score. None where nothing is left."""
    scored = [answer for answer in answers if answer["score"] is not None]
    alike, untied = [], []
    for a, b in same_prompt(scored):
        mine, theirs = np.sign(a["score"] - b["score"]), np.sign(b["rank"] - a["rank"])
        alike.append(float(mine == theirs))
        if mine and theirs:
            untied.append(float(mine == theirs))
    correlations = [spearman([a["score"] for a in group], [-a["rank"] for a in group]) for group in by_prompt(scored).values()]
    return {"human_agreement": mean(untied), "human_agreement_with_ties": mean(alike), "human_spearman": mean(correlations)}


def by_prompt(answers):
    groups = defaultdict(list)
    for answer in answers:
        groups[answer["prompt_id"]].append(answer)
    return groups


def same_prompt(answers):
    return [pair for group in by_prompt(answers).values() for pair in combinations(group, 2)]


def measure_meta_judge(battles):
    """Biases of a meta-judge from its comparisons. battles: records with "verdicts" (N, N), entry [m][n] with m shown first, "scores" of
    the N judgments and perhaps "truth" of the answer. Rates are over the comparisons that parsed; see the README for each name."""
    total, first, consistent, higher, right, differ = 0, [], [], [], [], []
    for battle in battles:
        r, scores = battle["verdicts"], battle["scores"]
        for m, n in permutations(range(len(scores)), 2):
            total += 1
            if r[m][n] == 0:
                continue
            first.append(float(r[m][n] == 1))
            differ.append(float(scores[m] != scores[n]))
            winner, loser = (m, n) if r[m][n] == 1 else (n, m)
            if scores[m] != scores[n]:
                higher.append(float(scores[winner] > scores[loser]))
            if m < n and r[n][m] != 0:
                consistent.append(float(r[m][n] == -r[n][m]))
            if "truth" in battle:
                gap = abs(scores[loser] - battle["truth"]) - abs(scores[winner] - battle["truth"])
                right += [float(gap > 0)] if gap else []
    figures = {"first_position_rate": mean(first), "higher_score_rate": mean(higher), "consistent_rate": mean(consistent),
               "valid_rate": len(first) / total if total else None, "scores_differ_rate": mean(differ)}
    return figures | ({"truth_accuracy": mean(right)} if any("truth" in battle for battle in battles) else {})


# ---- comparing models

def answers_of(source, name, prompts, args):
    """{prompt: its answers (text, whether it ended)} by a model, or from a JSONL file of "prompt" and "text" such as a run's eval.jsonl."""
    answers = defaultdict(list)
    if Path(source).is_file():
        for number, record in enumerate(read_prompts(source, name), 1):
            if not isinstance(record.get("text"), str):
                raise ValueError(f"{name} {source}: record {number} needs \"text\", the answer")
            answers[record["prompt"]].append((record["text"], record.get("finished") is not False))
        return answers
    if Path(source).suffix in (".jsonl", ".json", ".txt"):
        raise ValueError(f"{name} {source}: there is no such file")
    model, tokenizer = load_alone(source, args.bits)
    for prompt, answer in zip(prompts, drawn(model, tokenizer, prompts, f"{name}: answers", max_new_tokens=answer_tokens(source, args),
                                             temperature=args.temperature, top_p=args.top_p, seed=[args.seed, "compare"])):
        if answer.tokens:
            answers[prompt].append((answer.text, answer.finished))
    return answers


def judge_both_orders(judge, pairs, bits=None, max_new_tokens=512):
    """Have a model compare pairs (prompt, answer a, answer b) in both orders, greedily: records with "winners", "a", "b" or None for each order."""
    model, tokenizer = load_alone(judge, bits)
    asked = [compare_prompt(prompt, *answers) for prompt, a, b in pairs for answers in ((a, b), (b, a))]
    said = drawn(model, tokenizer, asked, "comparisons", max_new_tokens=max_new_tokens, temperature=0)
    winners = [parse_winner(s.text, "Answer") if s.finished else None for s in said]
    return [{"prompt": prompt, "a": a, "b": b, "winners": [{"A": "a", "B": "b"}.get(winners[2 * i]), {"A": "b", "B": "a"}.get(winners[2 * i + 1])],
             "said": [said[2 * i].text, said[2 * i + 1].text]} for i, (prompt, a, b) in enumerate(pairs)]


def measure_comparisons(records):
    """Figures of answers a against answers b, from records with "prompt", "a", "b" and "winners" in both orders (a first, b first).

    A pair counts 1 if a won both, 0 if b did, 1/2 if the orders disagree; one that did not parse in both orders is left out and counted.
    first_position_rate and consistent_rate are over those that did. Intervals: 95 %, bootstrap over prompts.
    """
    both = [record for record in records if None not in record["winners"]]
    figures = {"compared": len(both), "unparsed": len(records) - len(both)}
    if not both:
        return figures
    wins = [sum(winner == "a" for winner in record["winners"]) / 2 for record in both]
    first = [((record["winners"][0] == "a") + (record["winners"][1] == "b")) / 2 for record in both]
    lengths = [[len(record[side]) for record in both] for side in "ab"]
    groups = [record["prompt"] for record in both]
    rate, error = win_rate(wins)
    return figures | {
        "win_rate": rate, "standard_error": error, "win_rate_interval": bootstrap(np.mean, wins, groups=groups),
        "length_controlled_win_rate": length_controlled_win_rate(wins, *lengths),
        "length_controlled_interval": bootstrap(length_controlled_win_rate, wins, *lengths, groups=groups),
        "first_position_rate": mean(first), "first_position_interval": bootstrap(np.mean, first, groups=groups),
        "consistent_rate": mean(float(len(set(record["winners"])) == 1) for record in both), "mean_lengths": [mean(side) for side in lengths]}


def compare(args):
    """`eval.py compare A B --judge MODEL`."""
    sources = {"A": args.a, "B": args.b}
    files = [source for source in sources.values() if Path(source).is_file()]
    files += [own_settings(source).get("eval_prompts", "none") for source in sources.values()]
    prompts_file = args.prompts or next((file for file in files if Path(file).is_file()), HERE / "data" / "eval.jsonl")
    prompts = list(dict.fromkeys(record["prompt"] for record in read_prompts(prompts_file)))
    load_tokenizer(args.judge)  # whether there is such a model, before the others answer
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    a, b = (answers_of(source, name, prompts, args) for name, source in sources.items())
    matched = [(prompt, *two) for prompt in (prompts if args.prompts else a) for two in zip(a.get(prompt, ()), b.get(prompt, ()))]
    if not matched:
        raise ValueError("A and B have no answers to the same prompts: compare such")
    records = judge_both_orders(args.judge, [(prompt, one, other) for prompt, (one, _), (other, _) in matched], args.bits, args.max_verdict_tokens)
    if args.out:
        write_jsonl(args.out, records)
    f, asked = measure_comparisons(records), len({prompt for prompt, *_ in matched})
    cut = [sum(not pair[side][1] for pair in matched) for side in (1, 2)]
    alone = sum(map(len, a.values())) + sum(map(len, b.values())) - 2 * len(matched)
    print(f"A = {args.a}, B = {args.b}, judge {args.judge}: {f['compared']} pairs of answers to {asked} prompts, in both orders\n"
          f"left out: {f['unparsed']} pairs without two verdicts, {alone} answers without a counterpart; "
          f"cut off, and compared as they are: {cut[0]} of A, {cut[1]} of B")
    if not f["compared"]:
        raise ValueError(f"no verdict of {args.judge} named a winner: choose a stronger judge, or raise --max-verdict-tokens")
    for name, value, (low, high) in [("A wins", f["win_rate"], f["win_rate_interval"]),
                                     ("A wins, length-controlled", f["length_controlled_win_rate"], f["length_controlled_interval"]),
                                     ("judge prefers the first", f["first_position_rate"], f["first_position_interval"])]:
        interval = f"95 % interval {low:.1%} to {high:.1%}" if low < high and asked > 9 else "too few prompts, or too much alike, for an interval"
        print(f"{name:38}{value:>7.1%}   {interval}")
    print(f"{'judge says the same in both orders':38}{f['consistent_rate']:>7.1%}\n"
          f"{'characters per answer: A, B':38}{f['mean_lengths'][0]:>7.0f} {f['mean_lengths'][1]:.0f}")
    judge = Path(args.judge).resolve()
    if any(judge in (Path(source).resolve(), Path(source).resolve().parent) for source in sources.values()):
        print("The judge is one of the two: models prefer their own answers.")
    print("These figures are this judge's opinion on these prompts. They are not AlpacaEval's nor any other leaderboard's, whose judges and prompts "
          "are others.")


# ---- comparisons once more

def repeat(args):
    """`eval.py repeat RUN`: do the winner and the pair stay when comparisons are made again?

    M_{t-1} compares the judgments of some of iteration t's answers once more, shuffled, so that no
    judgment wins a draw by its number again, and with fresh draws.
    """
    run = Path(args.run)
    settings = own_settings(run / "iter1")
    chosen = [t for t in args.iterations or sorted(iterations(run)) if t > 0]
    if not settings or not chosen:
        raise ValueError(f"{run} is no run's folder, or has no iteration that compared judgments")
    rubric = read_text(settings["rubric"], "--rubric").strip() if settings["rubric"] else RUBRIC
    print(f"{'iteration':>9}{'answers':>9}{'winner changes':>16}{'pair changes':>14}{'unread':>8}")
    for t in chosen:
        battles = read_jsonl(run / f"iter{t}" / "battles.jsonl")
        if not battles:
            print(f"{t:>9}{0:>9}   no comparisons")
            continue
        rng = random.Random(f"{args.seed}/{t}/repeat")
        some = rng.sample(battles, min(args.answers, len(battles)))
        orders = [rng.sample(range(len(b["texts"])), len(b["texts"])) for b in some]
        model, tokenizer = load_alone(run / f"iter{t - 1}", args.bits)
        asked = [meta_judge_prompt(b["prompt"], b["text"], b["texts"][order[m]], b["texts"][order[n]], rubric)
                 for b, order in zip(some, orders) for m, n in permutations(range(len(order)), 2)]
        said = iter(drawn(model, tokenizer, asked, f"iteration {t}: comparisons once more",
                          max_new_tokens=settings["max_verdict_tokens"], temperature=settings["temperature"],
                          top_p=settings["top_p"], seed=[args.seed, t, "repeat"]))
        del model
        repeats = [{"order": order, "verdicts": read_verdicts(len(order), said)} for order in orders]
        unread = sum(row.count(0) for again in repeats for row in again["verdicts"])
        unread -= sum(len(order) for order in orders)  # the diagonals
        winner, pair = measure_repeats(some, repeats)
        shown = ["-" if rate is None else f"{rate:.0%}" for rate in (winner, pair)]
        print(f"{t:>9}{len(some):>9}{shown[0]:>16}{shown[1]:>14}{unread:>8}")


def read_verdicts(N, said):
    """The next N (N - 1) Samples as verdicts, (N, N): 1 if the first won, -1 the second, 0 neither."""
    verdicts = [[0] * N for _ in range(N)]
    for m, n in permutations(range(N), 2):
        sample = next(said)
        winner = parse_winner(sample.text) if sample.finished else None
        verdicts[m][n] = {"A": 1, "B": -1, None: 0}[winner]
    return verdicts


def measure_repeats(battles, repeats):
    """(share of winners that changed, share of pairs that changed) when comparisons are repeated.

    battles: records with "texts" and "verdicts"; repeats: of the same answers, "verdicts" of their
    shuffled judgments, and "order", where each stood before. Winners: of the comparisons that
    parsed both times. A pair changed if another text won most comparisons, or another fewest (see
    `extremes`). None where nothing is left.
    """
    winners, pairs = [], []
    for battle, again in zip(battles, repeats, strict=True):
        before, now, order = battle["verdicts"], again["verdicts"], again["order"]
        for m, n in permutations(range(len(order)), 2):
            if now[m][n] and before[order[m]][order[n]]:
                winners.append(float(now[m][n] != before[order[m]][order[n]]))
        texts = [battle["texts"][i] for i in order]
        pairs.append(float(extremes(before, battle["texts"]) != extremes(now, texts)))
    return mean(winners), mean(pairs)


def extremes(verdicts, texts):
    """The texts of the judgments that won most and fewest of their comparisons.

    Of equals the shorter is the best and the longer the worst, then the alphabet decides, so that
    a judgment's place among the others does not.
    """
    wins = [sum(v == 1 for v in row) + sum(other[m] == -1 for other in verdicts)
            for m, row in enumerate(verdicts)]
    ranking = sorted((won, -len(text), text) for won, text in zip(wins, texts))
    return ranking[-1][2], ranking[0][2]


# ---- the command

def parse(argv=None):
    parser = Parser(description="Look at a run, or compare models.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    command = commands.add_parser("report", help="(re)draw the report of a run", allow_abbrev=False)
    command.add_argument("run", help="the run's folder")

    command = commands.add_parser("compare", help="which of two models' answers a judge prefers, in both orders", allow_abbrev=False)
    command.add_argument("a", metavar="A", help="a model (hub name, folder, runs/x/iter4), or JSONL of \"prompt\" and \"text\", such as "
                         "runs/x/iter4/eval.jsonl")
    command.add_argument("b", metavar="B", help="what to compare it with")
    command.add_argument("--judge", required=True, help="a model that took no part in making A or B")
    command.add_argument("--prompts", help="JSONL with \"prompt\", or one prompt a line (default: those of A's or B's file, else of their run, "
                         "else data/eval.jsonl)")
    command.add_argument("--out", help="a JSONL file for every pair with its verdicts")
    command.add_argument("--max-verdict-tokens", type=int, default=512, help="longest verdict, in tokens; verdicts are greedy (default: %(default)s)")

    export_command = commands.add_parser("export", help="answers of a run's iterations in the files that official tools read", allow_abbrev=False)
    export_command.add_argument("run", help="the run's folder")
    export_command.add_argument("--format", required=True, choices=["alpaca", "arena-hard", "mt-bench"], help="whose files")
    export_command.add_argument("--questions", required=True, help="the official question file")
    export_command.add_argument("--iterations", type=int, nargs="+", help="which (default: all)")
    export_command.add_argument("--out", help="a folder (default: RUN/export/FORMAT)")

    again = commands.add_parser("repeat", help="comparisons once more, shuffled: do winner and pair stay?", allow_abbrev=False)
    again.add_argument("run", help="the run's folder")
    again.add_argument("--iterations", type=int, nargs="+", help="which (default: all)")
    again.add_argument("--answers", type=int, default=20, help="of each iteration (default: %(default)s)")
    again.add_argument("--seed", type=int, default=0, help="of shuffling and draws (default: %(default)s)")
    again.add_argument("--bits", type=int, choices=[4, 16, 32], help="of the models (default: the run's own)")

    for command in (command, export_command):
        command.add_argument("--max-new-tokens", type=int, help="longest answer, in tokens (default: a run's own --max-answer-tokens, else 1024)")
        command.add_argument("--temperature", type=float, default=0.8, help="of the answers; 0 is greedy (default: %(default)s)")
        command.add_argument("--top-p", type=float, default=0.95, help="of the answers: the nucleus (default: %(default)s)")
        command.add_argument("--bits", type=int, choices=[4, 16, 32], help="of the models (default: a run's own, else 4 on CUDA, 32 elsewhere)")
        command.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    try:
        args = parse(argv)
        if args.command == "report":
            for note in report(args.run):
                print(f"note: {note}", file=sys.stderr)
            print(f"{args.run}/report.html")
        else:
            {"compare": compare, "export": export, "repeat": repeat}[args.command](args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
