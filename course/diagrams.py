"""The lecture's diagrams, drawn from a run's own files: `python course/diagrams.py runs/tiny`

loop.svg      an iteration, with how much of everything passes through it
targets.svg   which place predicts which token, of two prompt and two answer tokens
tiers.svg     one prompt's answers of iteration 2 by score and length, with both tiers [E1]
battles.svg   verdicts, battles [E3] and ratings [E4] of one answer's judgments
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness.files import read_jsonl

HERE = Path(__file__).parent
BLUE, ORANGE, GREY = "#2f74c0", "#d1662a", "#7a7a7a"
RHO = 0.32  # of the second iteration, for the tiers
SHOWN = 3, 1  # the pair of answers of iteration 2, and the battles of iteration 1, that the lecture
# prints
LOOK = {"svg.fonttype": "none", "svg.hashsalt": "diagrams", "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip


def canvas(width, height, whole=True):
    """A figure and its axis; whole: without axes, from 0 to the width and height."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axis = figure.subplots()
    if whole:
        axis.set(xlim=(0, width), ylim=(0, height))
        axis.axis("off")
    return figure, axis


def save(figure, name):
    figure.savefig(HERE / name, metadata={"Date": None})
    print(HERE / name)


def box(axis, x, y, text, color=GREY):
    frame = {"boxstyle": "round,pad=0.5", "facecolor": color + "22", "edgecolor": color}
    axis.text(x, y, text, ha="center", va="center", linespacing=1.4, bbox=frame)


def arrow(axis, start, end, text="", color=GREY, bend=0.0, place=(0, 0.16)):
    axis.annotate("", end, start, arrowprops={
        "arrowstyle": "-|>", "color": color, "connectionstyle": f"arc3,rad={bend}"})  # fmt: skip
    axis.text((start[0] + end[0]) / 2 + place[0], (start[1] + end[1]) / 2 + place[1], text,
              ha="center", va="center", fontsize=9, color=color)  # fmt: skip


def loop(run):
    """An iteration, and iteration 1's counts."""
    folder = run / "iter1"
    answers, battles, pairs = (
        read_jsonl(folder / f"{name}.jsonl") for name in ("judgments", "battles", "pairs")
    )
    kinds = [sum(pair["kind"] == kind for pair in pairs) for kind in ("actor", "judge")]
    figure, axis = canvas(10, 3.9)
    box(axis, 0.9, 2.6, "prompts")
    box(axis, 3.1, 2.6, "answers\n(actor)", BLUE)
    box(axis, 5.6, 2.6, "scores\n(judge)", BLUE)
    box(axis, 5.6, 0.7, "comparisons\n(meta-judge)", ORANGE)
    box(axis, 8.0, 0.7, "ratings\n[E2] [E3] [E4]", ORANGE)
    box(axis, 9.2, 2.6, "DPO\n[E5]")
    arrow(axis, (1.5, 2.6), (2.5, 2.6), f"{len(read_jsonl(folder / 'prompts.jsonl'))}")
    judged = sum(len(answer["judgments"]) for answer in answers)
    arrow(axis, (3.7, 2.6), (5.0, 2.6), f"{len(answers)}, judged\n{judged:,} times",
          place=(0, 0.3))  # fmt: skip
    arrow(axis, (6.2, 2.6), (8.7, 2.6), f"{kinds[0]} pairs of answers [E1]", BLUE)
    compared = sum(len(battle["said"]) for battle in battles)
    arrow(axis, (5.6, 2.15), (5.6, 1.15), f"{len(battles)}, whose\nscores vary most",
          place=(0.85, 0))  # fmt: skip
    arrow(axis, (6.5, 0.7), (7.1, 0.7), f"{compared:,}")
    arrow(axis, (8.5, 1.15), (9.1, 2.15), f"{kinds[1]} pairs\nof judgments", ORANGE,
          place=(-0.75, 0.15))  # fmt: skip
    arrow(axis, (9.0, 3.05), (3.1, 3.1), "the next model does all of it", bend=0.08,
          place=(0, 0.42))  # fmt: skip
    save(figure, "loop.svg")


def targets():
    """Places over targets: the shift by one."""
    tokens = ["How", "?", "Wrap", "it", "<end>"]
    figure, axis = canvas(8.5, 2.3)
    for y, told in ((0.1, "the text, by position"), (1.9, "what is predicted there")):
        axis.text(0.1, y, told, va="center")
    for place, token in enumerate(tokens):
        x, predicts = 2.6 + 1.3 * place, tokens[place + 1 : place + 2]
        box(axis, x, 0.5, token, BLUE if place >= 2 else GREY)
        axis.text(x, 0.1, place, ha="center", va="center")
        if predicts:
            color = BLUE if place >= 1 else GREY  # the prompt's own tokens are not predicted
            axis.text(x, 1.9, f"log p({predicts[0]})" if place >= 1 else "not counted",
                      ha="center", va="center", color=color)  # fmt: skip
            arrow(axis, (x, 0.8), (x, 1.7), "", color)
    save(figure, "targets.svg")


def tiers(run):
    """One prompt's answers: the shortest of the top tier over the longest of the bottom tier."""
    folder = run / "iter2"
    pair = [p for p in read_jsonl(folder / "pairs.jsonl") if p["kind"] == "actor"][SHOWN[0]]
    group = [a for a in read_jsonl(folder / "judgments.jsonl")
             if a["prompt_id"] == pair["prompt_id"] and a["score"] is not None]  # fmt: skip
    scores, lengths = [a["score"] for a in group], [len(a["text"]) for a in group]
    high, low = max(scores), min(scores)
    texts = [a["text"] for a in group]
    chosen, rejected = (texts.index(pair[side][0]["content"]) for side in ("chosen", "rejected"))
    figure, axis = canvas(6, 3.2, whole=False)
    axis.axhspan((1 - RHO) * high + RHO * low, high, color=BLUE, alpha=0.12, linewidth=0)
    axis.axhspan(low, (1 - RHO) * low + RHO * high, color=ORANGE, alpha=0.12, linewidth=0)
    axis.scatter(lengths, scores, color=GREY)
    for i, color, text in ((chosen, BLUE, "chosen"), (rejected, ORANGE, "rejected")):
        axis.scatter(lengths[i], scores[i], color=color, s=90, zorder=3)
        axis.annotate(text, (lengths[i], scores[i]), (8, 8), textcoords="offset points",
                      color=color)  # fmt: skip
    axis.set(xlabel="characters", ylabel="mean score",
             title=f"top and bottom tier, rho {RHO}")  # fmt: skip
    save(figure, "tiers.svg")


def battles(run):
    """Three matrices of one answer's judgments: r, B and e."""
    battle, rating = (
        read_jsonl(run / "iter1" / f"{name}.jsonl")[SHOWN[1]] for name in ("battles", "ratings")
    )
    N = len(battle["verdicts"])
    figure = Figure(figsize=(8, 3), layout="constrained", facecolor="white")
    columns = ((battle["verdicts"], "verdicts r, row shown first", "PuOr_r", 1),
               (rating["battles"], "battles B [E3]", "Blues", 1),
               ([[e] for e in rating["ratings"]], "ratings e [E4]", "PuOr_r", 8))  # fmt: skip
    axes = figure.subplots(1, 3, width_ratios=[N, N, 2])
    for axis, (matrix, title, colors, most) in zip(axes, columns):
        low = 0 if colors == "Blues" else -most
        axis.imshow(matrix, cmap=colors, vmin=low, vmax=most, aspect="auto", alpha=0.45)
        for m, row in enumerate(matrix):
            for n, value in enumerate(row):
                if m != n or len(row) == 1:
                    axis.text(n, m, f"{value:.2g}", ha="center", va="center", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_yticks(range(N))
        axis.set_xticks(range(len(matrix[0])) if len(matrix[0]) > 1 else [])
    save(figure, "battles.svg")


def main():
    run = Path(sys.argv[1])
    with matplotlib.rc_context(LOOK):
        loop(run)
        targets()
        tiers(run)
        battles(run)


if __name__ == "__main__":
    main()
