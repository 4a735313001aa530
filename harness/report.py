"""The report of a run: one self-contained page, and the tables of figures on the screen.

It shows what summary.json and the iterations' folders hold, and computes nothing of the method. A
file that is missing or damaged costs the part of the page that it belongs to, and a note says so.
"""
import base64
import html
import io
import math
from collections import defaultdict
from pathlib import Path

from harness.files import each_line, iterations, read_json, read_jsonl, write_whole

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:  # plots are an extra: the report has its tables without them
    Figure = None

FIGURES = [  # name, where in a record of summary.json, how shown
    ("actor: true score", "actor.truth", ".2f"),
    ("actor: score by its own judgment", "actor.mean_score", ".2f"),
    ("actor: score by --reward", "actor.reward", ".2f"),
    ("actor: characters per answer", "actor.mean_length", ".0f"),
    ("judge: valid", "judge.valid_rate", ".0%"),
    ("judge: mean score", "judge.mean_score", ".2f"),
    ("judge: ties", "judge.ties", ".0%"),
    ("judge: right about the truth", "judge.truth_agreement", ".1%"),
    ("judge: agrees with people", "judge.human_agreement", ".1%"),
    ("judge: agrees, ties as wrong", "judge.human_agreement_with_ties", ".1%"),
    ("judge: Spearman with people", "judge.human_spearman", ".2f"),
    ("judge: score with length", "judge.length_correlation", ".2f"),
    ("truth with length", "judge.truth_length_correlation", ".2f"),
    ("meta-judge: valid", "meta_judge.valid_rate", ".0%"),
    ("meta-judge: sees different scores", "meta_judge.scores_differ_rate", ".0%"),
    ("meta-judge: prefers the first", "meta_judge.first_position_rate", ".0%"),
    ("meta-judge: prefers the higher score", "meta_judge.higher_score_rate", ".0%"),
    ("meta-judge: same in both orders", "meta_judge.consistent_rate", ".0%"),
    ("meta-judge: right about the truth", "meta_judge.truth_accuracy", ".0%"),
    ("training: actor pairs", "pairs.actor", "d"),
    ("training: judge pairs", "pairs.judge", "d"),
]
AT_A_GLANCE = [  # of FIGURES, those that the screen shows when a run ends
    "actor: true score", "actor: score by its own judgment", "actor: score by --reward",
    "actor: characters per answer",
    "judge: right about the truth", "judge: agrees with people", "judge: ties",
    "meta-judge: valid", "meta-judge: prefers the first",
    "training: actor pairs", "training: judge pairs",
]
IN_A_LINE = [  # of FIGURES, those that the screen shows of each model as it is made
    "actor: true score", "actor: characters per answer", "judge: mean score",
    "judge: right about the truth",
]
CURVES = {  # title of a plot: its lines by their labels, and where their figures stand
    "actor's score": {"true": "actor.truth", "by itself": "actor.mean_score",
                      "by --reward": "actor.reward"},
    "actor: characters per answer": {"": "actor.mean_length"},
    "judge: how often right": {"by the truth": "judge.truth_agreement",
                               "by people's ranks": "judge.human_agreement"},
    "judge: mean score": {"": "judge.mean_score"},
    "judge: ties, and score with length": {"ties": "judge.ties",
                                           "score with length": "judge.length_correlation",
                                           "truth with length": "judge.truth_length_correlation"},
    "meta-judge: biases": {"prefers the first": "meta_judge.first_position_rate",
                           "prefers the higher score": "meta_judge.higher_score_rate",
                           "same in both orders": "meta_judge.consistent_rate"},
}
TRAINING = {  # the same of train.jsonl
    "DPO: loss": {"training": "loss", "held out": "held_out_loss"},
    "DPO: rewards (nats times beta)": {"chosen": "chosen_reward", "rejected": "rejected_reward"},
    "DPO: share of pairs in order": {"training": "accuracy", "held out": "held_out_accuracy"},
}
# Where the paper's second iteration stood, after which it trained the judge no more.
STOPPED = {"position": 0.68, "higher": 0.98, "mean": 4.7 / 5}
SHOWN = 6  # prompts of each iteration whose samples the page shows


# ---- figures as text, for the screen and for the page

def look_up(record, path):
    """The value at a path such as "judge.ties" in a record of summary.json, or None."""
    for key in path.split("."):
        record = (record or {}).get(key)
    return record


def figure_rows(records, only=None):
    """A row of strings per figure that was measured: its name, then a value for each record.

    only: the names of those FIGURES that are wanted.
    """
    rows = []
    for name, path, form in FIGURES:
        values = [look_up(record, path) for record in records]
        if all(value is None for value in values) or only and name not in only:
            continue
        rows.append([name, *("-" if value is None else format(value, form) for value in values)])
    return rows


def models(records):
    return [f"M_{record['iteration']}" for record in records]


def table(records):
    """The run at a glance, one column per model, for the screen. The report has all figures."""
    dropped = [sum(look_up(record, "pairs.dropped").values()) for record in records]
    rows = [["", *models(records)], *figure_rows(records, AT_A_GLANCE),
            ["dropped (the report says why)", *(f"{count:,}" for count in dropped)]]
    lines = [f"{name:38}" + "".join(f"{value:>8}" for value in values) for name, *values in rows]
    return "\n".join(lines)


def glance(record):
    """A line about one model for the screen."""
    rows = figure_rows([record], IN_A_LINE)
    return f"M_{record['iteration']}: " + ", ".join(f"{name} {value}" for name, value in rows)


def drifts(record, max_score):
    """Warnings, a line each, where a record of summary.json has drifted as far as the paper's
    model had when the paper stopped training the judge."""
    meta_judge = f"iteration {record['iteration']}: the meta-judge prefers the"
    lines = []
    first = look_up(record, "meta_judge.first_position_rate")
    if first is not None and max(first, 1 - first) >= STOPPED["position"]:
        place = "first" if first > 0.5 else "second"
        lines.append(f"{meta_judge} {place} judgment in {max(first, 1 - first):.0%} of its "
                     f"verdicts (the paper stopped training the judge at "
                     f"{STOPPED['position']:.0%}{about_the_bias(record)})")
    higher = look_up(record, "meta_judge.higher_score_rate")
    if higher is not None and higher >= STOPPED["higher"]:
        lines.append(f"{meta_judge} higher score in {higher:.0%} of its verdicts "
                     f"(the paper: {STOPPED['higher']:.0%})")
    score, limit = look_up(record, "judge.mean_score"), STOPPED["mean"] * max_score
    if score is not None and score > limit:
        lines.append(f"M_{record['iteration']}: the judge's mean score is {score:.2f} of "
                     f"{max_score} (the paper's had passed {limit:g})")
    return lines


def about_the_bias(record):
    """What a bias for a place rests on, and whether it matters."""
    about, differ = "", look_up(record, "meta_judge.scores_differ_rate")
    if differ is not None:
        about += f"; {differ:.0%} of these are about judgments with different scores"
    if look_up(record, "pairs.judge") == 0:
        about += "; no judge trains on them"
    return about


# ---- building blocks of the page, which escape every text

STYLE = """:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:auto;padding:1rem}
h1{margin-bottom:0}h2{margin-top:2.5rem;border-top:1px solid #8886;padding-top:1rem}
nav a{margin-right:1rem;white-space:nowrap}small{opacity:.75}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.2rem .5rem;text-align:right;border-bottom:1px solid #8884;white-space:nowrap}
th{font-weight:600}td:first-child,th:first-child{text-align:left;white-space:normal}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}
img{width:100%;max-width:34rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#8881;padding:.6rem;border-radius:.4rem;
margin:.3rem 0}
details{margin:.4rem 0;padding-left:.6rem;border-left:2px solid #8884}summary{cursor:pointer}
.good{border-left:4px solid #2a2}.bad{border-left:4px solid #c33}
.note{border-left:4px solid #d90;padding:.2rem .8rem;background:#d901;margin:1rem 0}
@media(max-width:40rem){td,th{padding:.2rem .25rem;font-size:.8rem}}
.h1{background:#3f87d922}.h2{background:#3f87d955}.h3{background:#3f87d988}.h4{background:#3f87d9bb}
"""


def pre(text, kind=""):
    return f'<pre class="{kind}">{html.escape(text)}</pre>'


def details(title, body):
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def notice(title, lines):
    if not lines:
        return ""
    return f'<div class="note"><b>{title}</b><br>{"<br>".join(map(html.escape, lines))}</div>'


def cells(tag, values):
    shown = (f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)
    return f"<tr>{''.join(shown)}</tr>"


def html_table(head, rows):
    return f"<table>{cells('th', head)}{''.join(cells('td', row) for row in rows)}</table>"


def count_table(records, path, head):
    """A table of counts by name, such as the dropped by reason, one column per iteration."""
    counts = [look_up(record, path) or {} for record in records]
    names = list(dict.fromkeys(name for count in counts for name in count))
    rows = [[name, *(f"{count[name]:,}" if name in count else "-" for count in counts)]
            for name in names]
    return html_table([head, *(f"iter {record['iteration']}" for record in records)],
                      rows) if rows else ""


# ---- plots

INK = "#7a7a7a"  # a grey that can be read on a light page and on a dark one
COLORS = ["#3f87d9", "#e07b2e", "#3f9e57", "#cf4f78", "#8c6fd1", "#8a8a3a"]
LOOK = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "axes.titlesize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "legend.fontsize": 8, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
        "xtick.color": INK, "ytick.color": INK}


def plot(title, lines, ticks=None, xlabel="", borders=()):
    """Lines {label: points (x, y)} as an image inside the page; "" without any, or matplotlib.

    ticks: {x: its name}. borders: where to draw a dotted vertical line.
    """
    lines = {label: points for label, points in lines.items() if points}
    if Figure is None or not lines:
        return ""
    with matplotlib.rc_context(LOOK | {"axes.prop_cycle": matplotlib.cycler(color=COLORS)}):
        figure = Figure(figsize=(4.6, 3), layout="constrained")
        axis = figure.subplots()
        for label, points in lines.items():
            axis.plot(*zip(*points), label=label or None, linewidth=1.2, markersize=4,
                      marker="o" if len(points) < 60 else None)
        for border in borders:
            axis.axvline(border, color=INK, linewidth=0.5, linestyle=":")
        if ticks:
            axis.set_xticks(list(ticks), list(ticks.values()))
        if any(lines):
            axis.legend()
        axis.set_xlabel(xlabel)
        axis.set_title(title)
        image = io.BytesIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    content = base64.b64encode(image.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{content}">'


def plots(images):
    return f'<div class="plots">{"".join(images)}</div>' if any(images) else ""


def curves(records):
    """Figures by model, one plot for what belongs together."""
    def points(path):
        values = [(record["iteration"], look_up(record, path)) for record in records]
        return [(t, value) for t, value in values if value is not None]

    ticks = {record["iteration"]: f"M_{record['iteration']}" for record in records}
    return [plot(title, {label: points(path) for label, path in paths.items()}, ticks)
            for title, paths in CURVES.items()]


def histogram(records):
    """How the judges of all models spread their scores over the same answers."""
    lines = {}
    for record in records:
        counts = look_up(record, "judge.histogram") or {}
        total = sum(counts.values())
        lines[f"M_{record['iteration']}"] = [(float(score), count / total)
                                             for score, count in counts.items()]
    return plot("judge: share of each score", lines, xlabel="score")


def training_curves(steps):
    """Loss and rewards of DPO over all iterations. steps: {iteration: lines of train.jsonl}."""
    def points(name):
        found, number = [], 0
        for lines in steps.values():
            for line in lines:
                number += "step" in line
                if name in line:
                    found.append((number, line[name]))
            found.append((number, math.nan))  # a gap between iterations
        return found if len(found) > len(steps) else []

    borders, number = [], 0
    for lines in steps.values():
        number += sum("step" in line for line in lines)
        borders.append(number + 0.5)
    return [plot(title, {label: points(name) for label, name in names.items()},
                 xlabel="steps, all iterations", borders=borders[:-1])
            for title, names in TRAINING.items()]


# ---- samples

def battle_table(battles):
    """A battle matrix [E3], shaded from 0 to 1."""
    rows = []
    for i, row in enumerate(battles):
        shown = [f"<td>{i}</td>"]
        for j, value in enumerate(row):
            shade = min(4, math.ceil(4 * value))
            shown.append(f'<td class="h{shade}">{value:.2g}</td>' if i != j else "<td></td>")
        rows.append(f"<tr>{''.join(shown)}</tr>")
    return f"<table>{cells('th', ['', *range(len(battles))])}{''.join(rows)}</table>"


def verdict_table(verdicts, said):
    """Who won each comparison that was made."""
    names, made = {1: "first", -1: "second", 0: "?"}, {(s["first"], s["second"]) for s in said}
    rows = [[m, *(names[verdict] if (m, n) in made else "" for n, verdict in enumerate(row))]
            for m, row in enumerate(verdicts)]
    return html_table(["first \\ second", *range(len(verdicts))], rows)


def compared(battle, rating):
    """One answer's judgments, how they fared against each other, and their ratings."""
    texts, ratings, scores = battle["texts"], rating["ratings"], battle["scores"]
    order = sorted(range(len(texts)), key=lambda i: -ratings[i])
    rows = [[f"judgment {i}", f"{ratings[i]:+.2f}", f"{scores[i]:g}", len(texts[i])] for i in order]
    body = html_table(["", "rating", "its score", "characters"], rows)
    body += ("<p>Battles won by the row against the column [E3]; a win in one order only counts by "
             f"its place's weight:</p>{battle_table(rating['battles'])}<p>Who won, with the row "
             "shown first and the column second (?: no winner named):</p>"
             f"{verdict_table(battle['verdicts'], battle['said'])}")
    kind = {order[0]: "good", order[-1]: "bad"}
    place = {order[0]: ", rated highest", order[-1]: ", rated lowest"}
    for i in order:
        body += f"judgment {i}{place.get(i, '')}{pre(texts[i], kind.get(i, ''))}"
    for said in battle["said"][:2]:
        body += html.escape(f"{said['first']} shown first, {said['second']} second")
        body += pre(said["text"])
    return body


def example(folder, notes):
    """One answer whose judgments were compared, with everything that follows from it."""
    for rating in each_line(folder / "ratings.jsonl", notes):
        for battle in each_line(folder / "battles.jsonl", notes):
            if battle["id"] == rating["id"]:
                text = f"{pre(battle['prompt'])}The answer{pre(battle['text'])}"
                return text + compared(battle, rating)
        return ""
    return ""


def samples(folder, notes):
    """Some prompts of an iteration: both sides of their pairs, and how these came about."""
    pairs = defaultdict(dict)  # prompt_id -> {"actor": pair, "judge": pair}
    for pair in each_line(folder / "pairs.jsonl", notes):
        if pair["prompt_id"] in pairs or len(pairs) < SHOWN:
            pairs[pair["prompt_id"]][pair["kind"]] = pair
    judged = {(record["prompt_id"], record["text"]): record
              for record in each_line(folder / "judgments.jsonl", notes)
              if record["prompt_id"] in pairs}
    battles, ratings = {}, {}
    if any("judge" in both for both in pairs.values()):
        battles = {battle["prompt_id"]: battle
                   for battle in each_line(folder / "battles.jsonl", notes)
                   if battle["prompt_id"] in pairs}
        shown = {battle["id"] for battle in battles.values()}
        ratings = {rating["id"]: rating for rating in each_line(folder / "ratings.jsonl", notes)
                   if rating["id"] in shown}
    page = ""
    for prompt_id, both in pairs.items():
        title, body = f"prompt {prompt_id}", ""
        if "actor" in both:
            title = both["actor"]["prompt"][0]["content"]
            body += actor_sample(both["actor"], judged)
        if "judge" in both:
            battle = battles.get(prompt_id)
            body += judge_sample(both["judge"], battle, battle and ratings.get(battle["id"]))
        page += details(title, body)
    return page


def actor_sample(pair, judged):
    """The chosen and the rejected answer, their scores, and some of their judgments."""
    body = ""
    for side, kind in (("chosen", "good"), ("rejected", "bad")):
        text = pair[side][0]["content"]
        record = judged.get((pair["prompt_id"], text), {})
        truth = f", true score {record['truth']:g}" if "truth" in record else ""
        said = "".join(pre(judgment["text"]) for judgment in record.get("judgments", [])[:3])
        body += f"{side}, score {pair[f'{side}_score']:.2f}{truth}{pre(text, kind)}"
        if said:
            body += details("its first judgments", said)
    return body


def judge_sample(pair, battle, rating):
    """The chosen and the rejected judgment, and all that they were compared with."""
    body = ""
    for side, kind in (("chosen", "good"), ("rejected", "bad")):
        text = pre(pair[side][0]["content"], kind)
        body += f"{side} judgment, rating {pair[f'{side}_rating']:.2f}{text}"
    if rating:
        everything = pre(battle["text"]) + compared(battle, rating)
        body += details("all judgments of that answer, and the verdicts", everything)
    return body


# ---- the page

LEGEND = """<p><small>True score: the share of a prompt's checks that an answer meets, times the
judge's highest score. Own score: what the model gives itself; it proves nothing. Right about the
truth: the judge, the share of pairs of answers it orders as the truth does; the meta-judge, the
share of comparisons it gives to the judgment whose score is nearer to the truth. Prefers the first:
50 % would be no bias. With length: Spearman's correlation over M_0's held-out answers.
docs/reading-the-figures.md explains every figure.</small></p>"""
ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError)


def attempt(title, draw, notes):
    """What draw() gives, or None if it trips over a file, which notes are told."""
    try:
        return draw()
    except ODD as error:
        notes.append(f"{title}: cannot be drawn, a file is not as a run leaves it "
                     f"({type(error).__name__}: {error})")


def read_whole(file, kind, notes):
    """The content of a JSON file; an empty `kind` if it is missing or broken, as notes are told."""
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        notes.append(f"{file} is missing" if missing else f"{file} cannot be read ({error})")
        return kind()
    if not isinstance(content, kind):
        notes.append(f"{file} holds no {'list' if kind is list else 'record'}")
        return kind()
    return content


def records_of(run, folders, notes):
    """The records of summary.json; notes are told of iterations that it lacks."""
    records = [record for record in read_whole(run / "summary.json", list, notes)
               if isinstance(record, dict) and isinstance(record.get("iteration"), int)]
    for t in sorted(folders.keys() - {record["iteration"] for record in records}):
        notes.append(f"iteration {t} is not in summary.json: it is under way, or was broken off; "
                     "the run's command, given again, goes on with it")
    return records


def report(run):
    """Write runs/x/report.html, one self-contained page, from whatever the run has left so far.

    Returns notes, a line on each thing that is missing or damaged; they are on the page as well.
    Raises ValueError if there is no run at all.
    """
    run, notes = Path(run), []
    folders = iterations(run)
    if not (run / "summary.json").is_file() and not folders:
        raise ValueError(f"{run} has no summary.json and no iterations: it is no run's folder, or "
                         "the run has not finished iteration 0")
    settings = read_whole(run / "config.json", dict, notes).get("settings")
    settings = settings if isinstance(settings, dict) else {}
    records = records_of(run, folders, notes)
    sections = {}
    for title, draw in contents(run, records, notes):
        body = attempt(title, draw, notes)
        if body:
            sections[title] = body
    warned = attempt("Drift", lambda: warnings(records, settings.get("max_score") or 5), notes)
    notes = list(dict.fromkeys(notes))
    write_whole(run / "report.html", page(settings, records, sections, notes, warned))
    return notes


def contents(run, records, notes):
    """The sections of the page: (title, what draws it), one after the other."""
    trained = {record["iteration"]: run / f"iter{record['iteration']}"
               for record in records if record["iteration"] > 0}
    steps = {record["iteration"]: trained[record["iteration"]] / "train.jsonl"
             for record in records if record["iteration"] > 0 and record.get("train")}
    battled = [record["iteration"] for record in records if record.get("meta_judge")]
    yield "At a glance", lambda: html_table(["", *models(records)], figure_rows(records)) + LEGEND
    yield "Curves", lambda: plots([*curves(records), histogram(records)])
    yield "Training", lambda: plots(training_curves(
        {t: read_jsonl(file, notes) for t, file in steps.items()}))
    for t in battled[:1]:
        yield (f"Ratings of one answer's judgments, iteration {t}",
               lambda: example(run / f"iter{t}", notes))
    yield "Dropped", lambda: count_table(records, "pairs.dropped", "reason")
    yield "Seconds by stage", lambda: count_table(records, "seconds", "stage")
    yield "Tokens by stage", lambda: count_table(records, "tokens", "stage")
    for t, folder in trained.items():
        yield f"Samples of iteration {t}", lambda: samples(folder, notes)


def warnings(records, max_score):
    return [line for record in records for line in drifts(record, max_score)]


def page(settings, records, sections, notes, warned):
    """The whole page. sections: {title: its HTML}."""
    model = html.escape(str(settings.get("model", "unknown model")))
    seed = html.escape(str(settings.get("seed", "unknown")))
    trained = sum(record["iteration"] > 0 for record in records)
    links = parts = ""
    for number, (title, body) in enumerate(sections.items()):
        links += f'<a href="#s{number}">{html.escape(title)}</a> '
        parts += f'<h2 id="s{number}">{html.escape(title)}</h2>{body}'
    no_plots = "<p>Plots: pip install matplotlib, then python eval.py report on this folder.</p>"
    return f"""<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content='width=device-width'><title>Meta-Rewarding: {model}</title>
<style>{STYLE}</style><h1>Meta-Rewarding: {model}</h1>
<p>{trained} iterations, seed {seed}. M_0 is the seed model after its warm start; actor and judge
are measured on prompts that never train, the judge always on M_0's answers.</p>
<nav>{links}</nav>{notice("Missing from this page", notes)}{notice("Drift", warned)}
{"" if Figure else no_plots}{parts}</html>
"""
