"""Draws what runs look like while one watches them: a column for each run.

    python benchmarks/shapes.py "it works=runs/tiny" "it games its judge=runs/alone" --out FILE.svg

The files are those of finished runs. docs/watching.md has a picture of three, and says how each was
made.
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.files import read_json, read_jsonl
from harness.views.drawing import COLORS
from harness.views.figures import look_up

BLUE, ORANGE = COLORS[:2]
GREY = "#8a8a8a"


def draw_scores(axis, records, max_score):
    for label, path, color in (("true", "actor.truth", BLUE),
                               ("by itself", "actor.mean_score", ORANGE)):
        values = [look_up(record, path) for record in records]
        if None not in values:
            axis.plot([value / max_score for value in values], "o-", color=color, label=label)
    axis.set(ylim=(0, 1.05), ylabel="score, of the highest", xticks=range(len(records)))


def draw_lengths(axis, records):
    lengths = [look_up(record, "actor.mean_length") for record in records]
    axis.plot(lengths, "o-", color=BLUE)
    axis.set_ylim(0, 1.1 * max(lengths))
    axis.set(ylabel="characters per answer", xlabel="model M_t", xticks=range(len(records)))


def draw_training(axis, run, iterations, names, ylabel):
    """names: {a figure of train.jsonl: its color}; circles are the same on held-out pairs."""
    number = 0
    for t in range(1, iterations + 1):
        steps = {name: [] for name in names}
        for line in read_jsonl(run / f"iter{t}" / "train.jsonl"):
            if "step" in line:
                number += 1
            for name, color in names.items():
                if name in line:
                    steps[name].append((number, line[name]))
                elif f"held_out_{name}" in line:
                    axis.plot(number, line[f"held_out_{name}"], "o", mfc="none", color=color)
        for name, color in names.items():
            axis.plot(*zip(*steps[name]), color=color, lw=1)
        axis.axvline(number + 0.5, color=GREY, lw=0.5)
    axis.set(ylabel=ylabel, xlabel="steps, all iterations")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", metavar="TITLE=RUN")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    look = {"svg.fonttype": "none", "svg.hashsalt": "shapes", "font.size": 9,
            "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with plt.rc_context(look):
        figure, axes = plt.subplots(4, len(args.runs), figsize=(3.4 * len(args.runs), 9.5),
                                    squeeze=False, constrained_layout=True)
        for column, named in zip(axes.T, args.runs):
            title, _, run = named.partition("=")
            run = Path(run)
            records = read_json(run / "summary.json", list)
            settings = read_json(run / "config.json", dict)["settings"]
            last = records[-1]["iteration"]
            column[0].set_title(title)
            draw_scores(column[0], records, settings["max_score"])
            draw_lengths(column[1], records)
            draw_training(column[2], run, last, {"loss": BLUE}, "DPO: loss")
            column[2].axhline(math.log(2), color=GREY, ls="--", lw=0.8)
            draw_training(column[3], run, last, {"chosen_reward": BLUE, "rejected_reward": ORANGE},
                          "rewards: chosen, rejected")
            column[3].axhline(0, color=GREY, lw=0.5)
            if column[0] is not axes[0, 0]:
                for axis in column:
                    axis.set_ylabel("")
        axes[0, 0].legend(loc="lower right")
        figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
