"""Measuring: win rates, agreement, the biases of judge and meta-judge, and the report of a run. `python eval.py report runs/x`

Numbers in, numbers out; the ground truth, where there is one, is data: a prompt record may carry "checks", regular expressions of which a
good answer matches many. Left out: leaderboards. A model's opinion of itself is not evidence, and no figure here pretends that it is.
"""
import argparse
import html
import json
import math
import os
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np


# ---- files of a run

def read_jsonl(file):
    """The records of a JSONL file, [] if there is none. A torn last line (the process died in it) is left out.

    Raises ValueError that names the line if any other is not JSON.
    """
    try:
        lines = Path(file).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
    return records


def write_whole(file, text):
    """Write a file beside its place and rename it, so that it is never half there."""
    beside = Path(f"{file}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


# ---- figures

def numbers(name, values, low=-math.inf, high=math.inf):
    values = np.asarray(values, dtype=float)
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
    the maximum is at infinity; the fit stops after 100 Newton steps, at 0 or 1 for all practical purposes.
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


def ranks(values):
    """Ranks from 1, ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


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
    varied = len(ours) > 1 and ours.std() > 0 and theirs.std() > 0
    return {
        "with_ties": float((a == b).mean()) if len(a) else None,
        "without_ties": float((a == b)[untied].mean()) if untied.any() else None,
        "spearman": float(np.corrcoef(ranks(ours), ranks(theirs))[0, 1]) if varied else None,
        "kendall": float((a * b).sum() / spread) if spread else None,
    }


# ---- measuring the three roles

def truth(checks, text):
    """The true score of an answer: how many of the regular expressions it matches."""
    return sum(re.search(check, text) is not None for check in checks)


def mean(values):
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def measure_actor(answers):
    """Figures of an actor from its judged answers (records with "text", "finished", "score" and perhaps "truth")."""
    finished = [answer for answer in answers if answer["finished"]]
    figures = {"mean_score": mean(answer["score"] for answer in finished), "mean_length": mean(len(answer["text"]) for answer in finished),
               "cut_off": len(answers) - len(finished)}
    return figures | ({"truth": mean(answer["truth"] for answer in finished)} if any("truth" in answer for answer in answers) else {})


def measure_judge(answers):
    """Figures of a judge from answers it judged: the share of judgments that parse, the mean score, and among pairs of answers to the same
    prompt the share that it scores the same and, where the truth tells them apart, the share that it orders as the truth does (a tie
    counts one half, so that a judge who says the same of everything has 0.5)."""
    scores = [score for answer in answers for score in answer["scores"]]
    ties, right = [], []
    for a, b in combinations(answers, 2) if len(answers) < 2 else same_prompt(answers):
        if a["score"] is None or b["score"] is None:
            continue
        order = np.sign(a["score"] - b["score"])
        ties.append(float(order == 0))
        if a.get("truth") != b.get("truth"):
            right.append(0.5 + 0.5 * order * np.sign(a["truth"] - b["truth"]))
    figures = {"valid_rate": mean(float(score is not None) for score in scores), "mean_score": mean(scores), "ties": mean(ties)}
    return figures | ({"truth_agreement": mean(right)} if any("truth" in answer for answer in answers) else {})


def same_prompt(answers):
    groups = {}
    for answer in answers:
        groups.setdefault(answer["prompt_id"], []).append(answer)
    return [pair for group in groups.values() for pair in combinations(group, 2)]


def measure_meta_judge(battles):
    """Biases of a meta-judge from its comparisons. battles: records with "verdicts" (N, N), entry [m][n] with m shown first, "scores" of
    the N judgments and perhaps "truth" of the answer. Rates are over the comparisons that parsed; see the README for each name."""
    total, first, consistent, higher, right = 0, [], [], [], []
    for battle in battles:
        r, scores = battle["verdicts"], battle["scores"]
        for m, n in ((m, n) for m in range(len(scores)) for n in range(len(scores)) if m != n):
            total += 1
            if r[m][n] == 0:
                continue
            first.append(float(r[m][n] == 1))
            winner, loser = (m, n) if r[m][n] == 1 else (n, m)
            if scores[m] != scores[n]:
                higher.append(float(scores[winner] > scores[loser]))
            if m < n and r[n][m] != 0:
                consistent.append(float(r[m][n] == -r[n][m]))
            if "truth" in battle:
                gap = abs(scores[loser] - battle["truth"]) - abs(scores[winner] - battle["truth"])
                right += [float(gap > 0)] if gap else []
    figures = {"first_position_rate": mean(first), "higher_score_rate": mean(higher), "consistent_rate": mean(consistent),
               "valid_rate": len(first) / total if total else None}
    return figures | ({"truth_accuracy": mean(right)} if any("truth" in battle for battle in battles) else {})


def report(folder):
    pass
