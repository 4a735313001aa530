"""Measuring: win rates, agreement with people, the biases of judge and meta-judge; comparing models, exporting answers, the report of a run.

    python eval.py report runs/x                                  # (re)draw the report of a run
    python eval.py compare A B --judge MODEL                      # which of two models, or files of answers, does a judge prefer?
    python eval.py export runs/x --format alpaca --questions FILE # answers in the files that the official tools read

Numbers in, numbers out; the ground truth, where there is one, is data: a prompt record may carry "checks", regular expressions of which a
good answer matches many. Left out: leaderboards. A model's opinion of itself is not evidence, and no figure here pretends that it is.
"""
import argparse
import base64
import gc
import hashlib
import html
import io
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from prompts import compare_prompt, parse_winner, read_prompts, read_text
from sampling import load, load_tokenizer, read_record, sample

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:  # plots are an extra: the report has its tables without them
    Figure = None

HERE = Path(os.path.relpath(Path(__file__).parent))


# ---- files of a run

def each_line(file, notes=None):
    """The records of a JSONL file, one after the other; none if there is no such file. A torn last line (the process died in it) is left out.

    Raises ValueError that names the line if any other is no JSON record. notes: a list that is told instead, also of a file that is missing or
    torn.
    """
    notes, strict = ([], True) if notes is None else (notes, False)
    try:
        lines = open(file, "rb")
    except FileNotFoundError:
        notes.append(f"{file} is missing")
        return
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                notes.append(f"{file}, line {number}: torn, left out")
                return
            try:
                record, why = json.loads(line), "no record"
            except (ValueError, RecursionError):
                record, why = None, "not JSON"
            if isinstance(record, dict):
                yield record
            elif strict:
                raise ValueError(f"{file}, line {number}: {why}: put the file back from a copy, or take the line out")
            else:
                notes.append(f"{file}, line {number}: {why}, left out")


def read_jsonl(file, notes=None):
    """A list of what `each_line` gives."""
    return list(each_line(file, notes))


def iterations(run):
    """{t: the folder of iteration t} of a run."""
    return {int(folder.name[4:]): folder for folder in run.glob("iter*") if re.fullmatch("iter[0-9]+", folder.name)}


def write_whole(file, text):
    """Write a file beside its place and rename it, so that it is never half there."""
    beside = Path(f"{file}.part")
    with open(beside, "w", encoding="utf-8", errors="replace") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())  # the name may outlive a power cut that the content does not
    os.replace(beside, file)


def write_jsonl(file, records):
    """Write records as a JSONL file that is never half there; stages that sample append their lines themselves."""
    write_whole(file, "".join(json.dumps(record) + "\n" for record in records))


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


def measure_repeats(battles, repeats):
    """How far comparisons come out the same when they are made again. battles: records with "texts", "verdicts" and "pair", the (chosen,
    rejected) judgments or None; repeats: the same answers with their judgments shuffled, and "order", where each stood before. Of the
    comparisons that parsed both times, the share whose winner changed; of the answers, the share whose pair became another."""
    def pair(battle):
        return battle["pair"] and [battle["texts"][i] for i in battle["pair"]]

    winners = []
    for battle, again in zip(battles, repeats, strict=True):
        before, now, order = battle["verdicts"], again["verdicts"], again["order"]
        for m, n in permutations(range(len(order)), 2):
            if now[m][n] and before[order[m]][order[n]]:
                winners.append(float(now[m][n] != before[order[m]][order[n]]))
    pairs = [float(pair(battle) != pair(again)) for battle, again in zip(battles, repeats)]
    return {"repeat_winner_changed": mean(winners), "repeat_pair_changed": mean(pairs)}


STOPPED = {"position": 0.68, "higher": 0.98, "mean": 4.7 / 5}  # where the paper's second iteration stood, after which its judge trains no more


def drifts(record, max_score):
    """Warnings, a line each, where a record of summary.json has drifted as far as the paper's when it stopped training the judge."""
    first, higher, score = (look_up(record, path) for path in ("meta_judge.first_position_rate", "meta_judge.higher_score_rate", "judge.mean_score"))
    meta_judge, lines = f"iteration {record['iteration']}: the meta-judge prefers the", []
    differ, trains = look_up(record, "meta_judge.scores_differ_rate"), look_up(record, "pairs.judge")
    about = (f"; {differ:.0%} of these are about judgments with different scores" if differ is not None else "") + (
        "; no judge trains on them" if trains == 0 else "")
    if first is not None and max(first, 1 - first) >= STOPPED["position"]:
        lines.append(f"{meta_judge} {'first' if first > 0.5 else 'second'} judgment in {max(first, 1 - first):.0%} of its verdicts "
                     f"(the paper stopped training the judge at {STOPPED['position']:.0%}{about})")
    if higher is not None and higher >= STOPPED["higher"]:
        lines.append(f"{meta_judge} higher score in {higher:.0%} of its verdicts (the paper: {STOPPED['higher']:.0%})")
    if score is not None and score > STOPPED["mean"] * max_score:
        lines.append(f"M_{record['iteration']}: the judge's mean score is {score:.2f} of {max_score} "
                     f"(the paper's had passed {STOPPED['mean'] * max_score:g})")
    return lines


def look_up(record, path):
    for key in path.split("."):
        record = (record or {}).get(key)
    return record


# ---- comparing models

def drawn(model, tokenizer, prompts, label, max_new_tokens, **settings):
    """One sample for each prompt, with a bar, and a line about prompts that are too long: theirs have no tokens."""
    tokens, start = 0, time.perf_counter()

    def ended(i, number, sample):
        nonlocal tokens
        tokens += len(sample.tokens)
        bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
        bar.update()

    with tqdm(total=len(prompts), desc=label, unit="sample") as bar:
        samples = [one for (one,) in sample(model, tokenizer, prompts, max_new_tokens=max_new_tokens, on_end=ended, skip_too_long=True, **settings)]
    if too_long := sum(not one.tokens for one in samples):
        about = f"the model's context has no room for them and a reply of {max_new_tokens} tokens"
        print(f"{label}: {too_long} prompts are too long, {about}; they got none", file=sys.stderr)
    return samples


def load_alone(model, bits=None):
    """Load a model in the place of the one before, which nobody may hold any more."""
    gc.collect()
    torch.cuda.empty_cache()
    return load(model, bits=bits)


def own_settings(model):
    """The settings of the run that an iteration's folder belongs to, or those that a model folder's preset.json names; {} for other models."""
    for file, name in ((Path(model).parent / "config.json", "settings"), (Path(model) / "preset.json", None)):
        if file.is_file():
            content = read_record(file)
            settings = content.get(name) if name else {**content, "eval_prompts": file.parent / content.get("eval_prompts", "none")}
            if isinstance(settings, dict):
                return settings
    return {}


def answer_tokens(model, args):
    return args.max_new_tokens or own_settings(model).get("max_answer_tokens", 1024)


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


# ---- answers for the official tools

NEEDS = {"alpaca": "instruction", "mt-bench": "question_id and turns", "arena-hard": "question_id and turns, or uid and prompt"}


def read_questions(file, form):
    """The questions of an official file: (the texts of its turns, the record itself), one after the other."""
    text = read_text(file, "--questions")
    try:
        records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        raise ValueError(f"--questions {file}: neither a JSON list nor JSON lines") from None
    questions = []
    for number, record in enumerate(records, 1):
        try:
            if form == "alpaca":
                turns = [record["instruction"]]
            elif form == "arena-hard":
                turns = [record["prompt"]] if "uid" in record else [turn["content"] for turn in record["turns"]]
            else:
                turns = record["turns"]
            if form != "alpaca" and "uid" not in record:
                record["question_id"]
        except (KeyError, TypeError):
            turns = None
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"--questions {file}: question {number} is none of {form}: it needs {NEEDS[form]}")
        questions.append((turns, record))
    if not questions:
        raise ValueError(f"--questions {file}: no questions in it")
    return questions


def style_counts(text):
    """What Arena-Hard's style control reads: Markdown headers, list items and bold passages outside code blocks."""
    text = re.sub(r"```[^`]*```", "", text)
    return {"header_count": {f"h{n}": len(re.findall(rf"(?m)^#{{{n}}}\s", text)) for n in range(1, 7)},
            "list_count": {"ordered": len(re.findall(r"(?m)^[ \t]*\d+\.\s", text)), "unordered": len(re.findall(r"(?m)^[ \t]*[-*+]\s", text))},
            "bold_count": {"**": len(re.findall(r"\*\*[^*\n]+\*\*", text)), "__": len(re.findall(r"__[^_\n]+__", text))}}


def official(form, name, record, answers):
    """One line, or entry, of an official tool's file. answers: the Samples of the question's turns."""
    texts = [answer.text for answer in answers]
    number = record.get("uid", record.get("question_id"))
    answer_id = hashlib.sha256(f"{name}/{number}".encode()).hexdigest()[:22]
    if form == "alpaca":
        return {"instruction": record["instruction"], "output": texts[0], "generator": name, "dataset": record.get("dataset", "alpaca_eval")}
    if form == "arena-hard" and "uid" in record:
        return {"uid": number, "ans_id": answer_id, "model": name, "tstamp": time.time(),
                "messages": [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": {"answer": texts[0]}}],
                "metadata": {"token_len": len(answers[0].tokens), **style_counts(texts[0])}}
    turns = texts if form == "mt-bench" else [{"content": text, "token_len": len(answer.tokens)} for text, answer in zip(texts, answers)]
    return {"question_id": number, "answer_id": answer_id, "model_id": name, "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}


def export(args):
    """`eval.py export RUN --format ... --questions FILE`: one file per iteration."""
    run, questions = Path(args.run), read_questions(args.questions, args.format)
    there = sorted(t for t, folder in iterations(run).items() if (folder / "adapter").exists())
    if not there:
        raise ValueError(f"{run} has no iteration with an adapter: it is no run's folder, or the run has not finished iteration 0")
    missing = sorted(set(args.iterations or there) - set(there))
    if missing:
        raise ValueError(f"{run} has no adapter of iteration {missing[0]}, only of {' '.join(map(str, there))}")
    out = Path(args.out or run / "export" / args.format)
    for t in args.iterations or there:
        name = f"{run.resolve().name}-iter{t}"
        file = out / name / "model_outputs.json" if args.format == "alpaca" else out / "model_answer" / f"{name}.jsonl"
        model, tokenizer = load_alone(run / f"iter{t}", args.bits)
        said, longest = [[] for _ in questions], answer_tokens(run / f"iter{t}", args)
        for turn in range(max(len(turns) for turns, _ in questions)):
            asked = [i for i, (turns, _) in enumerate(questions) if len(turns) > turn]
            chats = [[text for k in range(turn) for text in (questions[i][0][k], said[i][k].text)] + [questions[i][0][turn]] for i in asked]
            samples = drawn(model, tokenizer, chats, f"{name}: answers" + (f", turn {turn + 1}" if args.format == "mt-bench" else ""),
                            max_new_tokens=longest, temperature=args.temperature, top_p=args.top_p, seed=[args.seed, "export", turn])
            for i, answer in zip(asked, samples):
                said[i].append(answer)
        del model
        lines = [official(args.format, name, record, answers) for (_, record), answers in zip(questions, said)]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(lines, indent=1) + "\n") if args.format == "alpaca" else write_jsonl(file, lines)
        unfinished = [answer for answers in said for answer in answers if not answer.finished]
        none = sum(not answer.tokens for answer in unfinished)
        print(f"{file}: {len(lines)} questions, {len(unfinished) - none} answers cut off after {longest} tokens, "
              f"{none} empty since there was no room for them")


# ---- the report

INK = "#7a7a7a"  # of plots, whose background is the page's, light or dark: a grey that can be read on both
COLORS = ["#3f87d9", "#e07b2e", "#3f9e57", "#cf4f78", "#8c6fd1", "#8a8a3a"]
STYLE = """:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:auto;padding:1rem}
h1{margin-bottom:0}h2{margin-top:2.5rem;border-top:1px solid #8886;padding-top:1rem}
nav a{margin-right:1rem;white-space:nowrap}small{opacity:.75}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.2rem .5rem;text-align:right;border-bottom:1px solid #8884;white-space:nowrap}
th{font-weight:600}td:first-child,th:first-child{text-align:left;white-space:normal}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}img{width:100%;max-width:34rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#8881;padding:.6rem;border-radius:.4rem;margin:.3rem 0}
details{margin:.4rem 0;padding-left:.6rem;border-left:2px solid #8884}summary{cursor:pointer}
.good{border-left:4px solid #2a2}.bad{border-left:4px solid #c33}
.note{border-left:4px solid #d90;padding:.2rem .8rem;background:#d901;margin:1rem 0}
@media(max-width:40rem){td,th{padding:.2rem .25rem;font-size:.8rem}}
.h1{background:#3f87d922}.h2{background:#3f87d955}.h3{background:#3f87d988}.h4{background:#3f87d9bb}"""

FIGURES = [  # name, where in a record of summary.json, how shown
    ("actor: true score", "actor.truth", ".2f"), ("actor: score by its own judgment", "actor.mean_score", ".2f"),
    ("actor: characters per answer", "actor.mean_length", ".0f"), ("judge: valid", "judge.valid_rate", ".0%"),
    ("judge: mean score", "judge.mean_score", ".2f"), ("judge: ties", "judge.ties", ".0%"),
    ("judge: right about the truth", "judge.truth_agreement", ".1%"), ("judge: agrees with people", "judge.human_agreement", ".1%"),
    ("judge: agrees, ties as wrong", "judge.human_agreement_with_ties", ".1%"), ("judge: Spearman with people", "judge.human_spearman", ".2f"),
    ("judge: score with length", "judge.length_correlation", ".2f"), ("truth with length", "judge.truth_length_correlation", ".2f"),
    ("meta-judge: valid", "meta_judge.valid_rate", ".0%"),
    ("meta-judge: sees different scores", "meta_judge.scores_differ_rate", ".0%"),
    ("meta-judge: prefers the first", "meta_judge.first_position_rate", ".0%"),
    ("meta-judge: prefers the higher score", "meta_judge.higher_score_rate", ".0%"),
    ("meta-judge: same in both orders", "meta_judge.consistent_rate", ".0%"),
    ("meta-judge: winner changes, repeated", "meta_judge.repeat_winner_changed", ".0%"),
    ("meta-judge: pair changes, repeated", "meta_judge.repeat_pair_changed", ".0%"),
    ("meta-judge: right about the truth", "meta_judge.truth_accuracy", ".0%"),
    ("training: actor pairs", "pairs.actor", "d"), ("training: judge pairs", "pairs.judge", "d"),
]
CURVES = {
    "actor's score": {"true": "actor.truth", "by itself": "actor.mean_score"},
    "actor: characters per answer": {"": "actor.mean_length"},
    "judge: how often right": {"by the truth": "judge.truth_agreement", "by people's ranks": "judge.human_agreement"},
    "judge: mean score": {"": "judge.mean_score"},
    "judge: ties, and score with length": {"ties": "judge.ties", "score with length": "judge.length_correlation",
                                           "truth with length": "judge.truth_length_correlation"},
    "meta-judge: biases": {"prefers the first": "meta_judge.first_position_rate", "prefers the higher score": "meta_judge.higher_score_rate",
                           "same in both orders": "meta_judge.consistent_rate"},
    "meta-judge: when repeated": {"winner changes": "meta_judge.repeat_winner_changed", "pair changes": "meta_judge.repeat_pair_changed"},
}
SHOWN = 6  # prompts of each iteration in the browser of samples


def cells(tag, values):
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values) + "</tr>"


def html_table(head, rows):
    return "<table>" + cells("th", head) + "".join(cells("td", row) for row in rows) + "</table>"


def figure_rows(records):
    """The run at a glance: a row of strings per figure that was measured, its name first, then one column per model."""
    rows = []
    for name, path, form in FIGURES:
        values = [look_up(record, path) for record in records]
        if any(value is not None for value in values):
            rows.append([name, *("-" if value is None else format(value, form) for value in values)])
    return rows


def count_table(records, path, head):
    counts = [look_up(record, path) or {} for record in records]
    names = list(dict.fromkeys(name for count in counts for name in count))
    rows = [[name, *(f"{count[name]:,}" if name in count else "-" for count in counts)] for name in names]
    return html_table([head, *(f"iter {record['iteration']}" for record in records)], rows) if rows else ""


def plot(title, draw):
    """What draw(axis) draws, as an image inside the page; "" without matplotlib."""
    if Figure is None:
        return ""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False,
                "axes.spines.right": False, "legend.frameon": False, "axes.prop_cycle": matplotlib.cycler(color=COLORS),
                **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK)}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6, 3), layout="constrained")
        axis = figure.subplots()
        draw(axis)
        axis.set_title(title)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
        image = io.BytesIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{base64.b64encode(image.getvalue()).decode()}">'


def curves(records):
    """Figures by model, one plot for what belongs together."""
    plots = []
    for title, paths in CURVES.items():
        lines = {label: [(r["iteration"], look_up(r, path)) for r in records if look_up(r, path) is not None] for label, path in paths.items()}

        def draw(axis):
            for label, points in lines.items():
                if points:
                    axis.plot(*zip(*points), marker="o", label=label or None)
            axis.set_xticks([r["iteration"] for r in records], [f"M_{r['iteration']}" for r in records])

        plots += [plot(title, draw)] if any(lines.values()) else []
    return plots


def histograms(records):
    """How the judges of all models spread their scores over the same answers."""
    counts = {r["iteration"]: look_up(r, "judge.histogram") for r in records if look_up(r, "judge.histogram")}

    def draw(axis):
        for t, count in counts.items():
            axis.plot([float(score) for score in count], [n / sum(count.values()) for n in count.values()], marker="o", label=f"M_{t}")
        axis.set_xlabel("score")

    return [plot("judge: share of each score", draw)] if counts else []


def training_curves(steps):
    """Loss and rewards of DPO over the steps of all iterations. steps: {iteration: lines of train.jsonl}."""
    ends = np.cumsum([sum("step" in line for line in lines) for lines in steps.values()])

    def draw(names):
        def draw_names(axis):
            for name, label in names.items():
                points, number = [], 0
                for lines in steps.values():
                    for line in lines:
                        number += "step" in line
                        if name in line:
                            points.append((number, line[name]))
                    points.append((number, math.nan))  # a gap between iterations
                if len(points) > len(steps):
                    axis.plot(*zip(*points), label=label, linewidth=1, marker="o" if name.startswith("held_out") else None, markersize=3)
            for end in ends[:-1]:
                axis.axvline(end + 0.5, color=INK, linewidth=0.5, linestyle=":")
            axis.set_xlabel("steps, all iterations")
        return draw_names

    plots = [("DPO: loss", {"loss": "training", "held_out_loss": "held out"}),
             ("DPO: rewards (nats times beta)", {"chosen_reward": "chosen", "rejected_reward": "rejected"}),
             ("DPO: share of pairs in order", {"accuracy": "training", "held_out_accuracy": "held out"})]
    return [plot(title, draw(names)) for title, names in plots] if any(steps.values()) else []


def pre(text, kind=""):
    return f'<pre class="{kind}">{html.escape(text)}</pre>'


def details(title, body):
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def battle_table(battles):
    """A battle matrix [E3], shaded from 0 to 1."""
    shade = [[min(4, math.ceil(4 * value)) for value in row] for row in battles]
    body = "".join(f"<tr><td>{i}</td>" + "".join(f'<td class="h{shade[i][j]}">{value:.2g}</td>' if i != j else "<td></td>"
                                                 for j, value in enumerate(row)) + "</tr>" for i, row in enumerate(battles))
    return "<table>" + cells("th", ["", *range(len(battles))]) + body + "</table>"


def rated(battle, rating):
    """One answer's judgments, how they fared against each other, and their ratings."""
    order = sorted(range(len(battle["texts"])), key=lambda i: -rating["ratings"][i])
    rows = [[f"judgment {i}", f"{rating['ratings'][i]:+.2f}", f"{battle['scores'][i]:g}", len(battle["texts"][i])] for i in order]
    body = html_table(["", "rating", "its score", "characters"], rows)
    if rating.get("battles"):
        body += "<p>Battles won by the row against the column [E3]; a win in one order only counts by its place's weight:</p>"
        body += battle_table(rating["battles"])
    verdicts = [[m, *("" if m == n else {1: "first", -1: "second", 0: "?"}[v] for n, v in enumerate(row))]
                for m, row in enumerate(battle["verdicts"])]
    body += "<p>Who won, with the row shown first and the column second (?: no winner named):</p>" + html_table(
        ["first \\ second", *range(len(verdicts))], verdicts)
    kind, said = {order[0]: "good", order[-1]: "bad"}, {order[0]: ", rated highest", order[-1]: ", rated lowest"}
    body += "".join(f"judgment {i}{said.get(i, '')}{pre(battle['texts'][i], kind.get(i, ''))}" for i in order)
    return body + "".join(html.escape(f"{said['first']} shown first, {said['second']} second") + pre(said["text"]) for said in battle["said"][:2])


def example(folder, notes):
    """One answer whose judgments were compared, with everything that follows from it."""
    rating = next(each_line(folder / "ratings.jsonl", notes), None)
    battle = rating and next((b for b in each_line(folder / "battles.jsonl", notes) if b["id"] == rating["id"]), None)
    return pre(battle["prompt"]) + "The answer" + pre(battle["text"]) + rated(battle, rating) if battle else ""


def samples(folder, notes):
    """Some prompts of an iteration: the chosen and the rejected answer with their judgments, and the judgments that were compared."""
    groups = defaultdict(dict)
    for pair in each_line(folder / "pairs.jsonl", notes):
        if pair["prompt_id"] in groups or len(groups) < SHOWN:
            groups[pair["prompt_id"]][pair["kind"]] = pair
    judged = [record for record in each_line(folder / "judgments.jsonl", notes) if record["prompt_id"] in groups]
    battles, ratings = {}, {}
    if any("judge" in pairs for pairs in groups.values()):
        battles = {battle["prompt_id"]: battle for battle in each_line(folder / "battles.jsonl", notes) if battle["prompt_id"] in groups}
        shown = {battle["id"] for battle in battles.values()}
        ratings = {rating["id"]: rating for rating in each_line(folder / "ratings.jsonl", notes) if rating["id"] in shown}
    page = []
    for prompt_id, pairs in groups.items():
        body, title = "", f"prompt {prompt_id}"
        for side, kind in (("chosen", "good"), ("rejected", "bad")) if "actor" in pairs else ():
            pair = pairs["actor"]
            text, title = pair[side][0]["content"], pair["prompt"][0]["content"]
            record = next((r for r in judged if r["prompt_id"] == prompt_id and r["text"] == text), {})
            true = f", true score {record['truth']:g}" if "truth" in record else ""
            said = "".join(pre(judgment["text"]) for judgment in record.get("judgments", [])[:3])
            body += f"{side}, score {pair[f'{side}_score']:.2f}{true}{pre(text, kind)}" + details("its first judgments", said)
        if "judge" in pairs:
            pair, battle = pairs["judge"], battles.get(prompt_id)
            for side, kind in (("chosen", "good"), ("rejected", "bad")):
                body += f"{side} judgment, rating {pair[f'{side}_rating']:.2f}{pre(pair[side][0]['content'], kind)}"
            if battle and battle["id"] in ratings:
                body += details("all judgments of that answer, and the verdicts", pre(battle["text"]) + rated(battle, ratings[battle["id"]]))
        page.append(details(title, body))
    return "".join(page)


def read_whole(file, kind, notes):
    """The content of a JSON file, an empty `kind` if it is missing or broken, which notes are told."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{file} " + ("is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"))
        return kind()
    if not isinstance(content, kind):
        notes.append(f"{file} holds no {'list' if kind is list else 'record'}")
        return kind()
    return content


def rebuilt(folder, t, notes):
    """What summary.json would say of iteration t, from the files in its folder."""
    own, reference, people = (read_jsonl(file, notes if file.exists() else [])
                              for file in map(folder.joinpath, ("eval.jsonl", "eval_judge.jsonl", "eval_ranked.jsonl")))
    judge = measure_judge([answer for answer in reference or own if answer["finished"]]) | (measure_people(people) if people else {})
    return {"iteration": t, "actor": measure_actor(own), "judge": judge, **read_whole(folder / "figures.json", dict, notes),
            "seconds": read_whole(folder / "seconds.json", dict, notes)}


def attempt(title, draw, notes):
    """What draw() gives, or None if it trips over a file, which notes are told."""
    try:
        return draw()
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        notes.append(f"{title}: cannot be drawn, a file is not as a run leaves it ({type(error).__name__}: {error})")


def records_of(run, folders, notes):
    """The records of summary.json, and after them what can be said of the iterations that it lacks."""
    records = [record for record in read_whole(run / "summary.json", list, notes) if isinstance(record, dict)]
    records = [record for record in records if isinstance(record.get("iteration"), int)]
    known, found = {record["iteration"] for record in records}, []
    for t in sorted(folders.keys() - known):
        if (folders[t] / "figures.json").is_file():
            record = attempt(f"Iteration {t}", lambda: rebuilt(folders[t], t, notes), notes)
            found += [record] if record else []
        elif known:
            notes.append(f"iteration {t} is not in summary.json: it is under way, or was broken off")
    if found:
        shown = " ".join(f"{record['iteration']}" for record in found)
        notes.append(f"not in summary.json, and shown by what their folders hold: iterations {shown}")
    return records + found


def report(run):
    """Write runs/x/report.html, one self-contained page, from whatever the run has left so far.

    Returns notes, a line on each thing that is missing or broken; they are on the page as well. Raises ValueError if there is no run at all.
    """
    run, notes = Path(run), []
    folders = iterations(run)
    if not (run / "summary.json").is_file() and not folders:
        raise ValueError(f"{run} has no summary.json and no iterations: it is no run's folder, or the run has not finished iteration 0")
    settings = read_whole(run / "config.json", dict, notes).get("settings")
    settings = settings if isinstance(settings, dict) else {}
    records = records_of(run, folders, notes)
    parts, links = [], []

    def section(title, draw):
        body = attempt(title, draw, notes)
        if body:
            links.append(f'<a href="#s{len(links)}">{html.escape(title)}</a>')
            parts.append(f'<h2 id="s{len(links) - 1}">{html.escape(title)}</h2>{body}')

    trained = [record["iteration"] for record in records if record["iteration"]]
    section("At a glance", lambda: html_table(["", *(f"M_{record['iteration']}" for record in records)], figure_rows(records)) + LEGEND)
    section("Curves", lambda: plots(curves(records) + histograms(records)))
    section("Training", lambda: plots(training_curves({r["iteration"]: read_jsonl(run / f"iter{r['iteration']}" / "train.jsonl", notes)
                                                       for r in records if r["iteration"] and r.get("train")})))
    compared = [record["iteration"] for record in records if record.get("meta_judge")]
    if compared:
        section(f"Ratings of one answer's judgments, iteration {compared[0]}", lambda: example(run / f"iter{compared[0]}", notes))
    section("Dropped", lambda: count_table(records, "pairs.dropped", "reason"))
    section("Seconds by stage", lambda: count_table(records, "seconds", "stage"))
    section("Tokens by stage", lambda: count_table(records, "tokens", "stage"))
    for t in trained:
        section(f"Samples of iteration {t}", lambda: samples(run / f"iter{t}", notes))
    warned = attempt("Drift", lambda: [line for record in records for line in drifts(record, settings.get("max_score") or 5)], notes)
    notes[:] = dict.fromkeys(notes)
    model = html.escape(str(settings.get("model", "unknown model")))
    seed = html.escape(str(settings.get("seed", "unknown")))
    head = (f"<h1>Meta-Rewarding: {model}</h1><p>{len(trained)} iterations, seed {seed}. M_0 is the seed model after its warm start; "
            "actor and judge are measured on prompts that never train, the judge always on M_0's answers.</p>"
            f"<nav>{' '.join(links)}</nav>" + notice("Missing from this page", notes) + notice("Drift", warned)
            + ("" if Figure else "<p>Plots: pip install matplotlib, then python eval.py report on this folder.</p>"))
    write_whole(run / "report.html", "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
                f"<title>Meta-Rewarding: {model}</title><style>{STYLE}</style>{head}{''.join(parts)}</html>\n")
    return notes


LEGEND = ("<p><small>True score: how many of a prompt's checks an answer matches. Own score: what the model gives itself; it proves nothing. "
          "Right about the truth: the judge, the share of pairs of answers it orders as the truth does; the meta-judge, the share of comparisons "
          "it gives to the judgment whose score is nearer to the truth. Prefers the first: 50 % would be no bias. With length: Spearman's "
          "correlation over M_0's held-out answers. README explains every figure.</small></p>")


def plots(images):
    return f'<div class="plots">{"".join(images)}</div>' if any(images) else ""


def notice(title, lines):
    return f'<div class="note"><b>{title}</b><br>{"<br>".join(map(html.escape, lines))}</div>' if lines else ""


# ---- the command

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; --help shows what there is")


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
            {"compare": compare, "export": export}[args.command](args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
