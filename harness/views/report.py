"""The report of a run: one self-contained page, and its warnings on the screen.

A sentence, three plots and the answers to one prompt come first, all else behind headings that
unfold. It shows what summary.json and the iterations' folders hold, and computes nothing of the
method. A file that is missing or damaged costs its part of the page, and a note says so.
"""
import html
import math
from pathlib import Path

from harness.files import each_line, iterations, read_json, read_jsonl, write_whole
from harness.settings import method_of
from harness.views.choice import choose
from harness.views.drawing import details, html_table, notice, plot, plots, pre, shell
from harness.views.figures import CURVES, FIGURES, figure_rows, look_up, models, untrained
from harness.views.story import Text, gather, in_page, story, tell_battle

JUDGES = ["how often the judge is right", "meta-judge: biases",
          "judge: ties, and score with length"]  # of CURVES, the first that there is opens the page
SHARES = JUDGES[:2]  # CURVES of nothing but shares
TRAINING = {  # title of a plot: its lines by their labels, in train.jsonl
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


# ---- warnings

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


def unread(record):
    """A warning, in a list, where many of the judgments of M_0's held-out answers say no score."""
    rate, count = (look_up(record, f"judge.valid_rate{end}") for end in ("", "_count"))
    if not count or rate >= 1 - MANY:
        return []
    return [f"M_{record['iteration']}: {count - round(rate * count)} of {count} judgments of "
            "held-out answers were cut off or end in no score: raise --max-judgment-tokens, or "
            "teach the judge the form"]


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
    def curve_of(name):
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
    return [plot(title, {label: curve_of(name) for label, name in names.items()},
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
    numbers = [(prompt, answers[begin].get(prompt, {}).get(key), after.get(key))
               for prompt, after in answers[end].items()]
    changes = sorted((after - (before if begin != end else 0), prompt)  # or the only model's number
                     for prompt, before, after in numbers if None not in (before, after))
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


def answer_column(model, answer, score):
    """One answer with its scores, as a column of the page."""
    about = [f"true score {answer['truth']:.3g}"] if "truth" in answer else []
    about += [f"no {score}" if answer["score"] is None else f"{score} {answer['score']:.3g}"]
    about += [f"{len(answer['text'])} characters", *["cut off"] * (not answer["finished"])]
    return f"<div><b>{model}</b> <small>{', '.join(about)}</small>{pre(answer['text'])}</div>"


def example(folder, notes):
    """One answer whose judgments were compared, with everything that follows from it."""
    rating = next(each_line(folder / "ratings.jsonl", notes), None)
    for battle in each_line(folder / "battles.jsonl", notes) if rating else ():
        if battle["id"] == rating["id"]:
            return in_page([Text("", battle["prompt"]), Text("The answer", battle["text"]),
                            *tell_battle(battle, rating)])
    return ""


def samples(folder, notes):
    """The stories of the first prompts that trained."""
    pairs, page = {}, ""
    for pair in each_line(folder / "pairs.jsonl", notes):
        if pair["prompt_id"] in pairs or len(pairs) < SHOWN:
            pairs.setdefault(pair["prompt_id"], []).append(pair)
    for prompt_id, told in gather(folder, pairs, notes).items():
        title = next((pair["prompt"][0]["content"] for pair in told["pairs"]
                      if pair["kind"] == "actor"), f"prompt {prompt_id}")
        page += details(title, in_page(story(**told)))
    return page


# ---- the page

CAPTION = """<p><small>M_0 is the model before the first iteration, M_t the one after iteration t;
answers and judge are measured on prompts that never train. Bands, where there are any: 95 %
intervals, by drawing the prompts anew.</small></p>"""
OPENING = SENTENCE, CHOICE, PLOTS, SCORED, DRIFT, ANSWERS = (
    "The sentence", "Which model to take", "Plots", "Without a score", "Drift",
    "One prompt, every model")
OTHERWISE = "Texts that encoding would cut otherwise than they were drawn"
ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError, ImportError)


def attempt(title, draw, notes):
    """What draw() gives, or None if it trips over a file, which notes are told."""
    try:
        return draw()
    except ODD as error:
        notes.append(f"{title}: cannot be drawn, a file is not as a run leaves it "
                     f"({type(error).__name__}: {error})")


def records_of(run, folders, notes):
    """The records of summary.json; notes are told of iterations that it lacks."""
    records = [record for record in read_json(run / "summary.json", list, notes)
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
    config = read_json(run / "config.json", dict, notes)
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
    top = settings.get("max_score") or 5
    opening = attempt("Plots", lambda: first_plots(records), notes) or []
    yield SENTENCE, lambda: html.escape(in_a_sentence(records, settings))
    yield CHOICE, lambda: html.escape(" ".join(choose(run, records, top)[1]))
    yield PLOTS, lambda: plots(curves(records, opening)) + cut_off_line(records) + CAPTION
    yield SCORED, lambda: notice(SCORED, [line for record in records
                                          for line in unread(record) + unscored(record)])
    yield DRIFT, lambda: notice(DRIFT, [line for record in records for line in drifts(record, top)])
    yield ANSWERS, lambda: one_prompt(run, records, notes)
    yield "All figures", lambda: all_figures(records)
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


def all_figures(records):
    """The table of all figures, with what each says."""
    rows = figure_rows(records, counts=True)
    meanings = {figure.name: figure.meaning.replace("`", "") for figure in FIGURES}
    said = "".join(f"<p><b>{html.escape(name)}</b>: {html.escape(meanings[name])}</p>"
                   for name, *_ in rows)
    return (html_table(["", *models(records)], rows)
            + "<p><small>In brackets: over how many.</small></p>"
            + details("What these figures say", said))


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
    top = {title: sections.pop(title, "") for title in OPENING}
    answers = f"<h2>{ANSWERS}</h2>{top[ANSWERS]}" if top[ANSWERS] else ""
    folds = "".join(f"<details><summary><h2>{html.escape(title)}</h2></summary>{body}</details>"
                    for title, body in sections.items())
    return shell(f"{method_of(settings)}: {model}, seed {seed}",
                 f'<p class="said">{top[SENTENCE]}</p><p>{top[CHOICE]}</p>{top[PLOTS]}'
                 f'{top[SCORED]}{top[DRIFT]}'
                 f'{notice("Missing from this page", notes)}{answers}{folds}')
