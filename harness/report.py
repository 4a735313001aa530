"""The report of a run: one self-contained page, drawn from whatever the run has left so far."""
import base64
import html
import io
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from harness.files import each_line, iterations, read_jsonl, write_whole

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:  # plots are an extra: the report has its tables without them
    Figure = None

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
}
SHOWN = 6  # prompts of each iteration in the browser of samples
# What the screen shows, for people; everything else is in the report and in summary.json.
AT_A_GLANCE = ("actor: true score", "actor: score by its own judgment", "actor: characters per answer",
               "judge: right about the truth", "judge: agrees with people", "judge: ties",
               "meta-judge: valid", "meta-judge: prefers the first",
               "training: actor pairs", "training: judge pairs")
IN_ONE_LINE = ("actor: true score", "actor: characters per answer", "judge: mean score", "judge: right about the truth")


def table(records):
    """The run at a glance, one column per model, for the screen."""
    dropped = [sum(record["pairs"]["dropped"].values()) for record in records]
    rows = [["", *(f"M_{record['iteration']}" for record in records)],
            *(row for row in figure_rows(records) if row[0] in AT_A_GLANCE),
            ["dropped, for reasons in the report", *map(str, dropped)]]
    return "\n".join(f"{name:38}" + "".join(f"{value:>8}" for value in values) for name, *values in rows)


def glance(record):
    """One model in one line, for the screen."""
    rows = [row for row in figure_rows([record]) if row[0] in IN_ONE_LINE]
    return f"M_{record['iteration']}: " + ", ".join(f"{name} {value}" for name, value in rows)


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


def attempt(title, draw, notes):
    """What draw() gives, or None if it trips over a file, which notes are told."""
    try:
        return draw()
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        notes.append(f"{title}: cannot be drawn, a file is not as a run leaves it ({type(error).__name__}: {error})")


def records_of(run, folders, notes):
    """The records of summary.json; notes are told of the iterations that it lacks."""
    records = [record for record in read_whole(run / "summary.json", list, notes) if isinstance(record, dict)]
    records = [record for record in records if isinstance(record.get("iteration"), int)]
    known = {record["iteration"] for record in records}
    started = {t for t in folders.keys() - known if known or (folders[t] / "figures.json").is_file()}
    notes += [f"iteration {t} is not in summary.json: it is under way, or was broken off" for t in sorted(started)]
    return records


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
          "correlation over M_0's held-out answers. docs/reading-the-figures.md explains every figure.</small></p>")


def plots(images):
    return f'<div class="plots">{"".join(images)}</div>' if any(images) else ""


def notice(title, lines):
    return f'<div class="note"><b>{title}</b><br>{"<br>".join(map(html.escape, lines))}</div>' if lines else ""


# ---- drift

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
