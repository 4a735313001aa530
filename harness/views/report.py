"""The report of a run: one self-contained page, and the tables of figures on the screen.

A sentence, three plots and the answers to one prompt come first, all else behind headings that
unfold. It shows what summary.json and the iterations' folders hold, and computes nothing of the
method. A file that is missing or damaged costs its part of the page, and a note says so.
"""
import html
import math
from collections import defaultdict
from pathlib import Path

from harness.files import each_line, iterations, read_json, read_jsonl, write_whole
from harness.settings import method_of
from harness.views.drawing import cells, details, html_table, notice, plot, plots, pre, shell

FIGURES = [  # name, where in a record of summary.json, how shown
    ("actor: true score", "actor.truth", ".2f"),
    ("actor: score by its own judgment", "actor.mean_score", ".2f"),
    ("actor: score by --reward", "actor.reward", ".2f"),
    ("actor: characters per answer", "actor.mean_length", ".0f"),
    ("actor: answers cut off", "actor.cut_off_rate", ".0%"),
    ("judge: valid", "judge.valid_rate", ".0%"),
    ("judge: mean score", "judge.mean_score", ".2f"),
    ("judge: ties", "judge.ties", ".0%"),
    ("judge: right about the truth", "judge.truth_agreement", ".1%"),
    ("judge: agrees with people", "judge.human_agreement", ".1%"),
    ("judge: agrees, ties as wrong", "judge.human_agreement_with_ties", ".1%"),
    ("judge: Spearman with people", "judge.human_spearman", ".2f"),
    ("judge: agreement of two halves of its judgments", "judge.halves_kendall", ".2f"),
    ("judge: agreement with the previous judge", "judge.previous_judge_kendall", ".2f"),
    ("judge: score with length", "judge.length_correlation", ".2f"),
    ("truth with length", "judge.truth_length_correlation", ".2f"),
    ("meta-judge: valid", "meta_judge.valid_rate", ".0%"),
    ("meta-judge: sees different scores", "meta_judge.scores_differ_rate", ".0%"),
    ("meta-judge: prefers the first", "meta_judge.first_position_rate", ".0%"),
    ("meta-judge: prefers the first of equals", "meta_judge.first_of_equals_rate", ".0%"),
    ("meta-judge: prefers the higher score", "meta_judge.higher_score_rate", ".0%"),
    ("meta-judge: same in both orders", "meta_judge.consistent_rate", ".0%"),
    ("meta-judge: right about the truth", "meta_judge.truth_accuracy", ".0%"),
    ("training: actor pairs", "pairs.actor", "d"),
    ("training: judge pairs", "pairs.judge", "d"),
    ("training: share of judge pairs", "pairs.judge_share", ".0%"),
    ("training: score gap of actor pairs", "pairs.score_gap", ".2f"),
    ("held-out pairs: reward of what is chosen", "train.held_out_chosen_reward", "+.2f"),
    ("held-out pairs: reward of what is rejected", "train.held_out_rejected_reward", "+.2f"),
]
AT_A_GLANCE = [  # of FIGURES, those that the screen shows when a run ends
    "actor: true score", "actor: score by its own judgment", "actor: score by --reward",
    "actor: characters per answer", "actor: answers cut off",
    "judge: right about the truth", "judge: agrees with people", "judge: ties",
    "meta-judge: valid", "meta-judge: prefers the first",
    "training: actor pairs", "training: judge pairs",
]
IN_A_LINE = [  # of FIGURES, those that the screen shows of each model as it is made
    "actor: true score", "actor: characters per answer", "judge: mean score",
    "judge: right about the truth",
]
CURVES = {  # title of a plot: its lines by their labels, and where their figures stand
    "score of the answers": {"true": "actor.truth", "by itself": "actor.mean_score",
                             "by the reward": "actor.reward"},
    "characters per answer": {"": "actor.mean_length"},
    "how often the judge is right": {"by the truth": "judge.truth_agreement",
                                     "by people's ranks": "judge.human_agreement"},
    "judge: mean score": {"": "judge.mean_score"},
    "judge: ties, and score with length": {"ties": "judge.ties",
                                           "score with length": "judge.length_correlation",
                                           "truth with length": "judge.truth_length_correlation"},
    "meta-judge: biases": {"prefers the first": "meta_judge.first_position_rate",
                           "prefers the higher score": "meta_judge.higher_score_rate",
                           "same in both orders": "meta_judge.consistent_rate"},
}
JUDGES = ["how often the judge is right", "meta-judge: biases",
          "judge: ties, and score with length"]  # of CURVES, the first that there is opens the page
SHARES = JUDGES[:2]  # CURVES of nothing but shares
TRAINING = {  # the same of train.jsonl
    "DPO: loss": {"training": "loss", "held out": "held_out_loss"},
    "DPO: rewards (nats times beta)": {
        "chosen": "chosen_reward", "rejected": "rejected_reward",
        "chosen, held out": "held_out_chosen_reward",
        "rejected, held out": "held_out_rejected_reward"},
    "DPO: share of pairs in order": {"training": "accuracy", "held out": "held_out_accuracy"},
}
# Where the paper's second iteration stood, after which it trained the judge no more.
STOPPED = {"position": 0.68, "higher": 0.98, "mean": 4.7 / 5}
AS_FAR = "They are measured as far as they go: raise --max-answer-tokens"
MANY = 0.1  # share of the held-out answers above which a warning says so
SHOWN = 6  # prompts of each iteration whose samples the page shows


# ---- figures as text, for the screen and for the page

def look_up(record, path):
    """The value at a path such as "judge.ties" in a record of summary.json, or None."""
    for key in path.split("."):
        record = (record or {}).get(key)
    return record


def figure_rows(records, only=None, counts=False):
    """A row of strings per figure that was measured: its name, then a value for each record.

    only: the names of those FIGURES that are wanted. counts: say beside a mean over how many.
    """
    rows = []
    for name, path, form in FIGURES:
        values = [look_up(record, path) for record in records]
        if all(value is None for value in values) or only and name not in only:
            continue
        texts = ["-" if value is None else format(value, form) for value in values]
        of = [look_up(record, f"{path}_count") if counts else None for record in records]
        rows.append([name, *(text if count is None else f"{text} ({count:,})"
                             for text, count in zip(texts, of))])
    return rows


def untrained(records):
    """The iterations that found no pairs to train on."""
    return [record["iteration"] for record in records
            if record["iteration"] > 0 and not record.get("train", True)]


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
    model had when the paper stopped training the judge.

    A meta-judge's biases matter only where a judge trains on its verdicts, and the one for a place
    only where most of these are about judgments with different scores.
    """
    trains = look_up(record, "pairs.judge")
    meta_judge = (trains and record.get("meta_judge")) or {}
    name, lines = f"iteration {record['iteration']}: the meta-judge prefers the", []
    first, differ = meta_judge.get("first_position_rate"), meta_judge.get("scores_differ_rate", 1)
    if first is not None and differ >= 0.5 and max(first, 1 - first) >= STOPPED["position"]:
        place = "first" if first > 0.5 else "second"
        lines.append(f"{name} {place} judgment in {max(first, 1 - first):.0%} of its verdicts "
                     f"(the paper stopped training the judge at {STOPPED['position']:.0%})")
    higher = meta_judge.get("higher_score_rate")
    if higher is not None and higher >= STOPPED["higher"]:
        lines.append(f"{name} higher score in {higher:.0%} of its verdicts "
                     f"(the paper: {STOPPED['higher']:.0%})")
    score, limit = look_up(record, "judge.mean_score"), STOPPED["mean"] * max_score
    if score is not None and score > limit:
        lines.append(f"M_{record['iteration']}: the judge's mean score is {score:.2f} of "
                     f"{max_score} (the paper's had passed {limit:g})")
    return lines


def cut_short(record):
    """A warning, in a list, where many of a model's held-out answers were cut off."""
    actor = record["actor"]
    if (actor.get("cut_off_rate") or 0) <= MANY:
        return []
    return [f"M_{record['iteration']}: {actor['cut_off']} of {actor['answers']} held-out answers "
            f"were cut off. {AS_FAR}"]


def unscored(record):
    """A warning, in a list, where many of them got no score."""
    actor = record["actor"]
    scored = actor.get("reward_count", actor.get("mean_score_count"))
    if scored is None or actor["answers"] - scored <= MANY * actor["answers"]:
        return []
    return [f"M_{record['iteration']}: {actor['answers'] - scored} of {actor['answers']} held-out "
            "answers have no score, and the mean is over the others: it may be that of the short "
            "ones"]


# ---- the run in a sentence

def in_a_sentence(records, settings):
    """What came of a run, from its first model to its last, in plain words."""
    if not records:
        return "No model of this run is measured yet."
    done, asked = records[-1]["iteration"], settings["iters"]
    of = f" of {asked}" if asked > done else ""
    plural = "" if (asked if of else done) == 1 else "s"
    if done and len(untrained(records)) == done:
        return (f"After {done}{of} iteration{plural} the model is what it was before: there were "
                "no pairs to train on. What was dropped stands below.")
    top = settings["max_score"]
    actor = [("actor.truth", 100 / top, "{:.0f} %", "answers meet {} of the demands on them"),
             ("actor.reward", 1, "{:.2f}", "the mean reward of an answer is {}"),
             ("actor.mean_score", 1, "{:.1f}", f"the model gives its own answers {{}} of {top}",
              " (which proves nothing)")]
    judge = [("judge.truth_agreement", 100, "{:.0f} %", "the judge is right {} of the time"),
             ("judge.human_agreement", 100, "{:.0f} %", "the judge agrees with people {} of the "
                                                        "time")]
    parts = [next(filter(None, (said(records, *figure) for figure in figures)), "")
             for figures in (actor, judge)]
    cut_off = (look_up(record, "actor.cut_off_rate") for record in (records[0], records[-1]))
    unfinished = said(records, "actor.cut_off_rate", 100, "{:.0f} %", "{} of them are cut off")
    parts = "; ".join(filter(None, [*parts, length_said(records), any(cut_off) and unfinished]))
    text = f"After {done}{of} iteration{plural} {parts or 'nothing could be measured'}."
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def said(records, path, scale, form, words, about=""):
    """One figure of the last model in words, and what the first one's was; "" if not measured."""
    was, now = (value if value is None else form.format(value * scale)
                for value in (look_up(records[0], path), look_up(records[-1], path)))
    if now is None:
        return ""
    instead = ", as before" if was == now else f" instead of {was}"
    first, last = (look_up(record, f"{path}_interval") for record in (records[0], records[-1]))
    if was != now and first and last and first[0] <= last[1] and last[0] <= first[1]:
        instead += ", which may be chance"
    elif was != now and look_up(records[-1], f"{path}_count") and not (first and last):
        instead += ", of too few prompts to be sure"
    return words.format(now) + instead * (was is not None and len(records) > 1) + about


def length_said(records):
    before, after = (look_up(record, "actor.mean_length") for record in (records[0], records[-1]))
    if not after:
        return ""
    if not before or len(records) == 1:
        return f"answers are {after:.0f} characters long"
    change = round(100 * (after / before - 1))
    longer = f"{abs(change)} % {'longer' if change > 0 else 'shorter'}"
    return f"answers are {longer if change else 'as long as before'}"


# ---- the parts of the page

def count_table(records, path, head):
    """A table of counts by name, such as the dropped by reason, one column per iteration."""
    counts = [look_up(record, path) or {} for record in records]
    names = list(dict.fromkeys(name for count in counts for name in count))
    rows = [[name, *(f"{count[name]:,}" if name in count else "-" for count in counts)]
            for name in names]
    return html_table([head, *(f"iter {record['iteration']}" for record in records)],
                      rows) if rows else ""


def points(records, path):
    """A figure of those models that have it: (iteration, value, low, high), with NaN for no band.
    """
    return [(record["iteration"], look_up(record, path),
             *(look_up(record, f"{path}_interval") or (math.nan, math.nan)))
            for record in records if look_up(record, path) is not None]


def first_plots(records):
    """The titles of the plots that open the page: actor, judge (or what there is), length."""
    judge = [title for title in JUDGES
             if any(points(records, path) for path in CURVES[title].values())]
    return ["score of the answers", *judge[:1], "characters per answer"]


def curves(records, titles):
    """Figures by model, one plot for what belongs together."""
    ticks = {record["iteration"]: f"M_{record['iteration']}" for record in records}
    images = []
    for title in titles:
        lines = {}
        for label, path in CURVES[title].items():
            line = points(records, path)
            if line not in lines.values():  # with --reward checks, the reward is the truth
                lines[label] = line
        images.append(plot(title, lines, ticks, percent=title in SHARES))
    return images


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

def one_prompt(run, records, notes):
    """The answers of all models to one held-out prompt, the one whose change is the median."""
    answers = first_answers(run, records, notes)
    if not answers:
        return ""
    begin, end = [*answers][0], [*answers][-1]
    known = any("truth" in answer for answer in answers[end].values())
    score = "reward" if look_up(records[-1], "actor.reward") is not None else "own score"
    key, name = ("truth", "true score") if known else ("score", score)
    changes = [(change_of(key, answers[begin].get(prompt, {}), after, begin == end), prompt)
               for prompt, after in answers[end].items()]
    changes = sorted(pair for pair in changes if pair[0] is not None)
    if not changes:
        return ""
    change, chosen = changes[len(changes) // 2]
    how = f"changes by the median, {change:+.3g}, from {begin} to {end}"
    shown = [answer_column(model, firsts[chosen], score)
             for model, firsts in answers.items() if chosen in firsts]
    return (f"<p>{html.escape(answers[end][chosen]['prompt'])}</p>"
            f'<div class="answers">{"".join(shown)}</div><p><small>Not picked by hand: of '
            f"{len(changes)} held-out prompts the one where the {name} of the first answer "
            f"{how if begin != end else 'is the median'}. Shown are those first answers."
            "</small></p>")


def first_answers(run, records, notes):
    """{"M_0": {prompt_id: M_0's first answer to it}}, of the models whose answers are there."""
    answers = {}
    for record in records:
        for answer in each_line(run / f"iter{record['iteration']}" / "eval.jsonl", notes):
            firsts = answers.setdefault(f"M_{record['iteration']}", {})
            firsts.setdefault(answer["prompt_id"], answer)
    return answers


def change_of(key, before, after, alone):
    """By how much a number differs, or the number of the only model; None where one is missing."""
    if before.get(key) is None or after.get(key) is None:
        return None
    return after[key] - (0 if alone else before[key])


def answer_column(model, answer, score):
    """One answer with its scores, as a column of the page."""
    about = [f"true score {answer['truth']:.3g}"] if "truth" in answer else []
    about += [f"no {score}" if answer["score"] is None else f"{score} {answer['score']:.3g}"]
    about += [f"{len(answer['text'])} characters", *["cut off"] * (not answer["finished"])]
    return f"<div><b>{model}</b> <small>{', '.join(about)}</small>{pre(answer['text'])}</div>"


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

CAPTION = """<p><small>M_0 is the model before the first iteration, M_t the one after iteration t;
answers and judge are measured on prompts that never train. Bands, where there are any: 95 %
intervals, by drawing the prompts anew.</small></p>"""
LEGEND = """<p><small>In brackets: over how many. True score: the share of a prompt's checks that an
answer meets, times the judge's highest score. Own score: what the model gives itself; it proves
nothing. Right about the truth: the judge, the share of pairs of M_0's answers it orders as the
truth does; the meta-judge, the share of comparisons it gives to the judgment whose score is nearer
to the truth. Prefers the first: 50 % would be no bias. Agreement: Kendall's tau, 1 for the same
order, 0 for none in common, -1 for the reverse. With length: Spearman's correlation over M_0's
held-out answers. docs/reading-the-figures.md explains every figure.</small></p>"""
SENTENCE, PLOTS, SCORED = "The sentence", "Plots", "Without a score"
DRIFT, ANSWERS = "Drift", "One prompt, every model"
OTHERWISE = "Texts that encoding would cut otherwise than they were drawn"
ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError, ImportError)


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


def read_run(run, notes):
    """The config.json of a run, with whatever settings it has, and the records of summary.json.

    Raises ValueError if there is no run at all.
    """
    run, folders = Path(run), iterations(run)
    if not (run / "summary.json").is_file() and not folders:
        raise ValueError(f"{run} has no summary.json and no iterations: it is no run's folder, or "
                         "the run has not finished iteration 0")
    config = read_whole(run / "config.json", dict, notes)
    settings = config.get("settings")
    config = config | {"settings": settings if isinstance(settings, dict) else {}}
    return config, records_of(run, folders, notes)


def report(run, file=None):
    """Write a run's page, self-contained, from whatever it has left so far, to its report.html.

    Returns notes, a line on each thing that is missing or damaged; they are on the page as well.
    Raises ValueError if there is no run at all.
    """
    run, notes = Path(run), []
    config, records = read_run(run, notes)
    settings, sections = config["settings"], {}
    for title, draw in contents(run, records, settings, notes):
        body = attempt(title, draw, notes)
        if body:
            sections[title] = body
    notes = list(dict.fromkeys(notes))
    write_whole(file or run / "report.html", page(settings, sections, notes))
    return notes


def contents(run, records, settings, notes):
    """The sections of the page: (title, what draws it), one after the other."""
    trained = {record["iteration"]: run / f"iter{record['iteration']}"
               for record in records if record["iteration"] > 0}
    steps = {record["iteration"]: trained[record["iteration"]] / "train.jsonl"
             for record in records if record["iteration"] > 0 and record.get("train")}
    battled = [record["iteration"] for record in records if record.get("meta_judge")]
    opening = attempt("Plots", lambda: first_plots(records), notes) or []
    yield SENTENCE, lambda: html.escape(in_a_sentence(records, settings))
    yield PLOTS, lambda: plots(curves(records, opening)) + cut_off_line(records) + CAPTION
    yield SCORED, lambda: notice(SCORED, [line for record in records for line in unscored(record)])
    yield DRIFT, lambda: notice(DRIFT, warnings(records, settings.get("max_score") or 5))
    yield ANSWERS, lambda: one_prompt(run, records, notes)
    yield "All figures", lambda: html_table(["", *models(records)],
                                            figure_rows(records, counts=True)) + LEGEND
    yield "More curves", lambda: plots([
        *curves(records, [title for title in CURVES if title not in opening]), histogram(records)])
    yield "Training", lambda: plots(training_curves(
        {t: read_jsonl(file, notes) for t, file in steps.items()}))
    for t in battled[:1]:
        yield (f"Ratings of one answer's judgments, iteration {t}",
               lambda: example(run / f"iter{t}", notes))
    yield "Dropped", lambda: count_table(records, "pairs.dropped", "reason")
    yield "Seconds by stage", lambda: count_table(records, "seconds", "stage")
    yield "Tokens by stage", lambda: count_table(records, "tokens", "stage")
    yield OTHERWISE, lambda: count_table(records, "encoded_otherwise", "stage")
    for t, folder in trained.items():
        yield f"Samples of iteration {t}", lambda: samples(folder, notes)


def warnings(records, max_score):
    return [line for record in records for line in drifts(record, max_score)]


def cut_off_line(records):
    """How many answers of each model were cut off, below the first plots; if many, with advice."""
    counts = [(record["iteration"], record["actor"]) for record in records
              if look_up(record, "actor.cut_off_rate") is not None]
    told = ", ".join(f"M_{t} {actor['cut_off']:,} of {actor['answers']:,}" for t, actor in counts)
    no_room = max((actor.get("too_long", 0) for _, actor in counts), default=0)
    told += f"; {no_room} more prompts leave no room for an answer" * bool(no_room)
    if any(map(cut_short, records)):
        return notice("Held-out answers cut off", [f"{told}. {AS_FAR}"])
    return f"<p><small>Held-out answers cut off: {told}.</small></p>" if told else ""


def page(settings, sections, notes):
    """The whole page. sections: {title: its HTML}; those that do not open it are folded."""
    model, seed = (settings.get(name, "unknown") for name in ("model", "seed"))
    top = {title: sections.pop(title, "") for title in (SENTENCE, PLOTS, SCORED, DRIFT, ANSWERS)}
    answers = f"<h2>{ANSWERS}</h2>{top[ANSWERS]}" if top[ANSWERS] else ""
    folds = "".join(f"<details><summary><h2>{html.escape(title)}</h2></summary>{body}</details>"
                    for title, body in sections.items())
    return shell(f"{method_of(settings)}: {model}, seed {seed}",
                 f'<p class="said">{top[SENTENCE]}</p>{top[PLOTS]}{top[SCORED]}{top[DRIFT]}'
                 f'{notice("Missing from this page", notes)}{answers}{folds}')
