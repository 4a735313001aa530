"""The figures of a model: one table of all, and their values as text.

A new figure is an entry of FIGURES, beside the function of eval.py that measures it: screen,
report and model card are made of it. `python -m harness.views.figures` prints the table for
docs/reading-the-figures.md; of what screens show, README and lecture have copies.
"""
from collections import namedtuple

# name: as it is shown. path: where it stands in a record of summary.json. form: how a value is
# written. meaning: what it is, in a sentence or two. shown: "glance", in the table on the screen
# when a run ends, and "line", in the line on each model as well. curve: the title of its plot, and
# the label of its line there; None: it has no plot.
Figure = namedtuple("Figure", "name path form meaning shown curve", defaults=("", None))

FEW = 20  # shares of fewer are shown as counts: of 20, a half may be anything from 0.28 to 0.72

FIGURES = [
    Figure("actor: true score", "actor.truth", ".2f",
           "the share of a prompt's `checks` that an answer meets, times the judge's highest "
           "score. Only where prompts carry checks",
           "glance line", ("score of the answers", "true")),
    Figure("actor: score by its own judgment", "actor.mean_score", ".2f",
           "what the model gives itself. It proves nothing: watch whether it stays near the true "
           "score",
           "glance", ("score of the answers", "by itself")),
    Figure("actor: score by --reward", "actor.reward", ".2f",
           "what `--reward` gives the answers, where it is no judge",
           "glance", ("score of the answers", "by the reward")),
    Figure("actor: characters per answer", "actor.mean_length", ".0f",
           "answers that grow while the true score does not are the commonest failure",
           "glance line", ("characters per answer", "")),
    Figure("actor: answers cut off", "actor.cut_off_rate", ".0%",
           "the share of the held-out answers that had not ended after `--max-answer-tokens`. In "
           "the other figures they count as far as they go; in training they are dropped. Above a "
           "tenth a line on the screen and in the report warns. In `summary.json` `actor.cut_off` "
           "of `actor.answers`",
           "glance"),
    Figure("judge: valid", "judge.valid_rate", ".0%",
           "judgments that were finished and end in a score on the scale; the others are dropped "
           "and counted"),
    Figure("judge: mean score", "judge.mean_score", ".2f",
           "over M_0's answers, for all models the same ones",
           "line", ("judge: mean score", "")),
    Figure("judge: ties", "judge.ties", ".0%",
           "of the pairs of M_0's answers to one prompt, those with the same mean score",
           "glance", ("judge: ties, and score with length", "ties")),
    Figure("judge: right about the truth", "judge.truth_agreement", ".1%",
           "of the pairs of answers that differ in truth, those that the judge's mean scores order "
           "as the truth does; a tie counts half",
           "glance line", ("how often the judge is right", "by the truth")),
    Figure("judge: agrees with people", "judge.human_agreement", ".1%",
           "pairs of replies that people ranked, which never train, ordered as people did; the "
           "judge's ties left out",
           "glance", ("how often the judge is right", "by people's ranks")),
    Figure("judge: agrees, ties as wrong", "judge.human_agreement_with_ties", ".1%",
           "the same with all pairs; a tie is right only where people tie too"),
    Figure("judge: Spearman with people", "judge.human_spearman", ".2f",
           "rank correlation of its scores and people's ranks, the mean over prompts"),
    Figure("judge: agreement of two halves of its judgments", "judge.halves_kendall", ".2f",
           "Kendall's tau-b, over all pairs of answers to one prompt, between the order by the "
           "first, third, ... judgment of each answer and that by the others: 1 where the judge "
           "orders the same whenever it is asked, 0 where it draws lots. Half the judgments are "
           "noisier than all, so it is lower than what all of them would reach, and it grows with "
           "`--judgments`"),
    Figure("judge: agreement with the previous judge", "judge.previous_judge_kendall", ".2f",
           "the same between its order of M_0's answers and the order of the judge one iteration "
           "before, by all judgments, so that it may be above the agreement of two halves. Low "
           "where the judge has changed its mind, where judgments are noisy, and where one of the "
           "two ties pairs that the other orders"),
    Figure("judge: score with length", "judge.length_correlation", ".2f",
           "rank correlation of score and characters over M_0's answers. Compare `truth with "
           "length`: in the tiny world good answers are longer",
           "", ("judge: ties, and score with length", "score with length")),
    Figure("truth with length", "judge.truth_length_correlation", ".2f",
           "the same of the true score",
           "", ("judge: ties, and score with length", "truth with length")),
    Figure("meta-judge: valid", "meta_judge.valid_rate", ".0%",
           "comparisons that name a winner. Where the judge no longer trains, 20 answers are "
           "compared for these figures alone",
           "glance"),
    Figure("meta-judge: sees different scores", "meta_judge.scores_differ_rate", ".0%",
           "of its verdicts, those on two judgments with different scores; two with the same score "
           "are often the same text"),
    Figure("meta-judge: prefers the first", "meta_judge.first_position_rate", ".0%",
           "50 % would be no position bias. Iteration t's meta-judge is M_{t-1}",
           "glance", ("meta-judge: biases", "prefers the first")),
    Figure("meta-judge: prefers the first of equals", "meta_judge.first_of_equals_rate", ".0%",
           "the same, of verdicts on two judgments with one score (the paper: 48 %, then 88 %)"),
    Figure("meta-judge: prefers the higher score", "meta_judge.higher_score_rate", ".0%",
           "of two judgments with different scores. Far from 50 % wherever the judge gives too "
           "much or too little, and it sees that",
           "", ("meta-judge: biases", "prefers the higher score")),
    Figure("meta-judge: same in both orders", "meta_judge.consistent_rate", ".0%",
           "pairs of judgments whose winner does not depend on which is shown first",
           "", ("meta-judge: biases", "same in both orders")),
    Figure("meta-judge: right about the truth", "meta_judge.truth_accuracy", ".0%",
           "comparisons won by the judgment whose score is nearer to the true one"),
    Figure("training: actor pairs", "pairs.actor", "d",
           "pairs of answers that trained the actor",
           "glance"),
    Figure("training: judge pairs", "pairs.judge", "d",
           "pairs of judgments that trained the judge: in the first two iterations only, as in the "
           "paper",
           "glance"),
    Figure("training: share of judge pairs", "pairs.judge_share", ".0%",
           "of all pairs; about a batch's share as well, since batches are drawn from both kinds "
           "at random"),
    Figure("training: score gap of actor pairs", "pairs.score_gap", ".2f",
           "how far apart the chosen and the rejected answer are in the judge's scores; where it "
           "shrinks, pairs say less and less. A larger `--rho` makes it smaller too, and so does "
           "an actor that is nearly always good"),
    Figure("held-out pairs: reward of what is chosen", "train.held_out_chosen_reward", "+.2f",
           "the mean over the pairs that do not train (of a tenth of the prompts, so they may be "
           "few; of both kinds, where there are both), at the best epoch: beta times the change of "
           "the log-probability, in nats. Below 0 what is chosen has become less likely than it "
           "was before the iteration, and what is rejected has merely lost more"),
    Figure("held-out pairs: reward of what is rejected", "train.held_out_rejected_reward", "+.2f",
           "the same of what is rejected"),
]
CURVES = {}  # {title of a plot: {label of a line: path of its figure}}
for name, path, *_, curve in FIGURES:
    if curve:
        CURVES.setdefault(curve[0], {})[curve[1]] = path


def look_up(record, path):
    """The value at a path such as "judge.ties" in a record of summary.json, or None."""
    for key in path.split("."):
        record = (record or {}).get(key)
    return record


def figure_rows(records, shown="", counts=False):
    """A row of strings per figure that was measured: its name, then a value for each record.

    shown: where they are shown, "glance" or "line"; "": all. counts: say beside a mean over how
    many. For example ["judge: ties", "5%", "24%"]. A share of a few is a count: "3/8".
    """
    rows = []
    for figure in FIGURES:
        values = [look_up(record, figure.path) for record in records]
        if all(value is None for value in values) or shown not in figure.shown:
            continue
        of = [look_up(record, f"{figure.path}_count") for record in records]
        rows.append([figure.name, *(as_text(figure, value, count, counts)
                                    for value, count in zip(values, of))])
    return rows


def as_text(figure, value, count, with_count):
    """A value as it is shown. count: over how many it is a mean, None if it is none."""
    if value is None:
        return "-"
    if count and count < FEW and figure.form.endswith("%"):
        return f"{value * count:.3g}/{count}"
    text = format(value, figure.form)
    return f"{text} ({count:,})" if with_count and count is not None else text


def models(records):
    return [f"M_{record['iteration']}" for record in records]


def untrained(records):
    """The iterations that found no pairs to train on."""
    return [record["iteration"] for record in records
            if record["iteration"] > 0 and not record.get("train", True)]


def table(records):
    """The run at a glance, one column per model, for the screen. The report has all figures."""
    dropped = [sum(look_up(record, "pairs.dropped").values()) for record in records]
    rows = [["", *models(records)], *figure_rows(records, "glance"),
            ["dropped (the report says why)", *(f"{count:,}" for count in dropped)]]
    lines = [f"{name:38}" + "".join(f"{value:>8}" for value in values) for name, *values in rows]
    return "\n".join(lines)


def line_on(record):
    """A line about one model for the screen."""
    rows = figure_rows([record], "line")
    return f"M_{record['iteration']}: " + ", ".join(f"{name} {value}" for name, value in rows)


def meanings():
    """The table of docs/reading-the-figures.md, in Markdown."""
    return "\n".join(["| figure | what it is |", "|---|---|",
                      *(f"| {figure.name} | {figure.meaning} |" for figure in FIGURES)])


if __name__ == "__main__":
    print(meanings())
