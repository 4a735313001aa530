"""Measuring: win rates, agreement, the biases of judge and meta-judge, and the report of a run. `python eval.py report runs/x`

Numbers in, numbers out; the ground truth, where there is one, is data: a prompt record may carry "checks", regular expressions of which a
good answer matches many. Left out: leaderboards. A model's opinion of itself is not evidence, and no figure here pretends that it is.
"""
import argparse
import base64
import html
import io
import json
import math
import os
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

try:
    from matplotlib.figure import Figure
except ImportError:  # plots are an extra: the report has its tables without them
    Figure = None


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
    beside.write_text(text, encoding="utf-8", errors="replace")
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
    varied = np.ptp(ours) > 0 and np.ptp(theirs) > 0
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
    """Figures of a judge from answers it judged: the share of judgments that parse, the mean score, and among pairs of answers to the same
    prompt the share that it scores the same and, where the truth tells them apart, the share that it orders as the truth does (a tie
    counts one half, so that a judge who says the same of everything has 0.5)."""
    scores = [score for answer in answers for score in answer["scores"]]
    ties, right = [], []
    for a, b in same_prompt(answers):
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


# ---- the report

STYLE = """:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.2rem .5rem;text-align:right;border-bottom:1px solid #8884}
th{font-weight:600}td:first-child,th:first-child{text-align:left}img{max-width:100%;background:#fff;border-radius:.5rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#8881;padding:.6rem;border-radius:.4rem;margin:.3rem 0}
details{margin:.6rem 0}summary{cursor:pointer}.good{border-left:4px solid #2a2}.bad{border-left:4px solid #c33}small{opacity:.75}"""

FIGURES = [  # name, where in a record of summary.json, how shown
    ("actor: true score", "actor.truth", ".2f"), ("actor: score by its own judgment", "actor.mean_score", ".2f"),
    ("actor: characters per answer", "actor.mean_length", ".0f"), ("judge: valid", "judge.valid_rate", ".0%"),
    ("judge: mean score", "judge.mean_score", ".2f"), ("judge: ties", "judge.ties", ".0%"),
    ("judge: right about the truth", "judge.truth_agreement", ".1%"), ("meta-judge: valid", "meta_judge.valid_rate", ".0%"),
    ("meta-judge: prefers the first", "meta_judge.first_position_rate", ".0%"),
    ("meta-judge: prefers the higher score", "meta_judge.higher_score_rate", ".0%"),
    ("meta-judge: same in both orders", "meta_judge.consistent_rate", ".0%"),
    ("meta-judge: right about the truth", "meta_judge.truth_accuracy", ".0%"),
    ("training: actor pairs", "pairs.actor", "d"), ("training: judge pairs", "pairs.judge", "d"),
]


def look_up(record, path):
    for key in path.split("."):
        record = (record or {}).get(key)
    return record


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


def count_table(records, pick, head):
    names = list(dict.fromkeys(name for record in records for name in pick(record)))
    rows = [[name, *(pick(record).get(name, 0) for record in records)] for name in names]
    return html_table([head, *(f"iter {record['iteration']}" for record in records)], rows)


CURVES = {
    "actor's score": {"true": "actor.truth", "by itself": "actor.mean_score"},
    "characters per answer": {"": "actor.mean_length"},
    "judge right about the truth": {"": "judge.truth_agreement"},
    "meta-judge's biases": {"prefers the first": "meta_judge.first_position_rate", "prefers the higher score": "meta_judge.higher_score_rate"},
}


def curves(records):
    """The curves to look at first, as a PNG inside the page."""
    if Figure is None:
        return "<p>Plots: pip install matplotlib, then python eval.py report on this folder.</p>"
    figure = Figure(figsize=(8.5, 6), layout="constrained")  # two by two, so that a phone shows them too
    for axis, (title, paths) in zip(figure.subplots(2, 2).flat, CURVES.items()):
        for label, path in paths.items():
            points = [(r["iteration"], look_up(r, path)) for r in records if look_up(r, path) is not None]
            if points:
                axis.plot(*zip(*points), marker="o", label=label or None)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([r["iteration"] for r in records])
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return f'<img alt="curves by iteration" src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">'


def pre(text, kind=""):
    return f'<pre class="{kind}">{html.escape(text)}</pre>'


def samples(folder, kind, count=3):
    """A few of an iteration's pairs, to be read."""
    pairs = [pair for pair in read_jsonl(folder / "pairs.jsonl") if pair["kind"] == kind][:count]
    number = "score" if kind == "actor" else "rating"
    def title(pair):
        return pair["prompt"][0]["content"] if kind == "actor" else f"Judgments of an answer to prompt {pair['prompt_id']}"

    return "".join(
        f"<details><summary>{html.escape(title(pair))}</summary>{pre(pair['prompt'][0]['content'])}"
        f"chosen, {number} {pair[f'chosen_{number}']:.2f}{pre(pair['chosen'][0]['content'], 'good')}"
        f"rejected, {number} {pair[f'rejected_{number}']:.2f}{pre(pair['rejected'][0]['content'], 'bad')}</details>" for pair in pairs)


def verdict_samples(folder, count=2):
    """Who beat whom among the judgments of an answer, and two of the verdicts in full."""
    page = []
    for battle in read_jsonl(folder / "battles.jsonl")[:count]:
        numbered = [f"{i}: {text}" for i, text in enumerate(battle["texts"])]
        rows = [[m, *("" if m == n else {1: "first", -1: "second", 0: "?"}[verdict] for n, verdict in enumerate(row))]
                for m, row in enumerate(battle["verdicts"])]
        grid = html_table(["first \\ second", *range(len(numbered))], rows)
        said = "".join(f"{s['first']} shown first, {s['second']} second{pre(s['text'])}" for s in battle["said"][:2])
        page.append(f"<details><summary>{html.escape(battle['prompt'][:90])}</summary>{pre(battle['text'])}{pre(chr(10).join(numbered))}"
                    f"Who won:{grid}{said}</details>")
    return "".join(page)


def report(run):
    """Write runs/x/report.html, one self-contained page, from whatever the run has left so far. Raises ValueError if that is nothing."""
    run = Path(run)
    if not (run / "summary.json").is_file():
        raise ValueError(f"{run} has no summary.json: it is no run's folder, or the run has not finished iteration 0")
    records = json.loads((run / "summary.json").read_text())
    settings = json.loads((run / "config.json").read_text())["settings"]
    parts = [f"<h1>Meta-Rewarding: {html.escape(str(settings['model']))}</h1>",
             f"<p>{len(records) - 1} iterations, seed {settings['seed']}. M_0 is the seed model "
             "after its warm start; actor and judge are measured on prompts that never train, the judge always on M_0's answers.</p>",
             curves(records), html_table(["", *(f"M_{record['iteration']}" for record in records)], figure_rows(records)),
             "<p><small>True score: how many of a prompt's checks an answer matches. Own score: what the model gives itself; it proves nothing. "
             "Right about the truth: the judge, the share of pairs of answers it orders as the truth does; the meta-judge, the share of "
             "comparisons it gives to the judgment whose score is nearer to the truth. Prefers the first: 50 % would be no bias.</small></p>",
             "<h2>Dropped</h2>", count_table(records, lambda r: r["pairs"]["dropped"], "reason"),
             "<h2>Seconds</h2>", count_table(records, lambda r: r["seconds"], "stage")]
    for record in records[1:]:
        folder = run / f"iter{record['iteration']}"
        for title, block in (("Answers", samples(folder, "actor")), ("Judgments", samples(folder, "judge")), ("Verdicts", verdict_samples(folder))):
            parts.append(f"<h2>{title}, iteration {record['iteration']}</h2>{block}" if block else "")
    write_whole(run / "report.html", "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
                f"<title>Meta-Rewarding run</title><style>{STYLE}</style>{''.join(parts)}</html>\n")


def main():
    parser = argparse.ArgumentParser(description="Look at a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("report", help="(re)draw the report of a run")
    command.add_argument("run", help="the run's folder")
    args = parser.parse_args()
    try:
        report(args.run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.run}/report.html")


if __name__ == "__main__":
    main()
