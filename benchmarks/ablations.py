"""What each part of the method does, by ground truth in the tiny world: `OMP_NUM_THREADS=1 python
benchmarks/ablations.py --jobs 2`

Runs the main command as a user would, once per seed and variant, and reads figures off the run's
files: the actor's true score, padding sentences (those that match none of the prompt's checks) per
answer, characters, and of the judge, on M_0's answers, how often it is right and how often it ties.
Intervals are 95 % t-intervals over the seeds; a difference is taken seed by seed against the first
variant. A run that is already there is not run again; one of another model or other settings is
refused, as its log says.
"""
import argparse
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from harness.files import read_jsonl

VARIANTS = {
    "Meta-Rewarding": [],
    "no meta-judge": ["--no-meta-judge"],
    "rho 0": ["--rho", "0"],
    "no position weights": ["--no-position-weights"],
    "judge trained in all four": ["--judge-iters", "4"],
    "K 3": ["--responses", "3"],
    "K 5": ["--responses", "5"],
    "K 11": ["--responses", "11"],
    "N 1, no meta-judge": ["--judgments", "1", "--no-meta-judge"],
    "N 3": ["--judgments", "3"],
    "N 5": ["--judgments", "5"],
    "N 11": ["--judgments", "11"],
    "16 comparisons of 42": ["--comparisons", "16"],
}
FORMS = {"truth": ".2f", "padding": ".2f", "characters": ".0f", "judge": ".1f", "ties": ".1f"}


def padding(folder, checks):
    """Sentences per held-out answer that earn nothing."""
    counts = [sum(not any(re.search(check, sentence) for check in checks[record["prompt_id"]])
                  for sentence in re.split(r"(?<=[.!?])\s+", record["text"]))
              for record in read_jsonl(folder / "eval.jsonl")]
    return float(np.mean(counts))


def run(out, variant, seed, model):
    """The figures of one run, each a list over M_0, M_1, ...: run it first, or what is left of it.
    """
    with open(f"{out}.log", "w") as log:
        subprocess.run([sys.executable, ROOT / "metareward.py", "--out", out, "--seed", str(seed),
                        "--model", model, *VARIANTS[variant]],
                       check=True, stdout=log, stderr=log)
    records = json.loads((out / "summary.json").read_text())
    settings = json.loads((out / "config.json").read_text())["settings"]
    prompts = read_jsonl(Path(settings["eval_prompts"]))
    checks = {str(i): prompt["checks"] for i, prompt in enumerate(prompts)}
    figures = {"truth": [r["actor"]["truth"] for r in records],
               "padding": [padding(out / f"iter{t}", checks) for t in range(len(records))],
               "characters": [r["actor"]["mean_length"] for r in records],
               "judge": [100 * r["judge"]["truth_agreement"] for r in records],
               "ties": [100 * r["judge"]["ties"] for r in records]}
    shown = [f"{name} " + " ".join(format(x, form) for x in figures[name])
             for name, form in FORMS.items()]
    print(f"{variant:26} seed {seed}  " + "   ".join(shown), file=sys.stderr, flush=True)
    return figures


def interval(values, form):
    """Mean and half the 95 % t-interval."""
    from scipy import stats  # here, since others take no more than `plot` from this file
    half = np.nan
    if len(values) > 1:
        t = stats.t.ppf(0.975, len(values) - 1)
        half = t * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{format(np.mean(values), form)} +- {format(half, form)}"


def table(results):
    """results: {variant: a list of figures, one per seed}. A Markdown table of M_4, the characters
    of M_2 as well.
    """
    first = next(iter(results.values()))
    yield ("| variant | true score, M_0 to M_4 | of M_4 | difference | padding | characters: M_2 "
           "| M_4 | judge right, % | judge's ties, % |")
    yield "|" + "---|" * 9
    for variant, seeds in results.items():
        last = {name: [figures[name][-1] for figures in seeds] for name in FORMS}
        difference = np.subtract(last["truth"], [figures["truth"][-1] for figures in first])
        path = " ".join(f"{truth:.2f}" for truth in np.mean([figures["truth"] for figures in seeds],
                                                            axis=0))
        # a judge is measured by the mean of N judgments: with another N that is another measure
        same_votes = not variant.startswith("N ")
        cells = [path, interval(last["truth"], ".2f"),
                 interval(difference, "+.2f").replace("+- +", "+- ") if seeds is not first else "",
                 interval(last["padding"], ".2f"),
                 interval([figures["characters"][2] for figures in seeds], ".0f"),
                 interval(last["characters"], ".0f"), *(interval(last[name], ".1f") if same_votes
                                                        else "" for name in ("judge", "ties"))]
        yield f"| {variant} | " + " | ".join(cells) + " |"


def by_iteration(results):
    """Every figure of M_0, M_1, ..., and its difference to the first variant's, a line each."""
    first = next(iter(results.values()))
    for variant, seeds in results.items():
        for name, form in FORMS.items():
            values = np.array([figures[name] for figures in seeds])  # (seeds, models)
            yield f"{variant}: {name} " + ", ".join(interval(column, form) for column in values.T)
            if seeds is not first:
                changes = values - [figures[name] for figures in first]
                told = ", ".join(interval(column, form) for column in changes.T)
                yield f"{variant}: {name}, difference {told}"

COLORS = ("#2f74c0", "#d1662a", "#3f9e57", "#7a4fb5", "#7f7f7f", "#b39b1f", "#c2527f")


def plot(panels, file, most=None):
    """Draw lines by iteration: {what is upright: {name: (seeds, models)}}, a panel each.

    Thin for each seed, thick for their mean. most: the end of the upright axes, which then begin
    at 0.
    """
    look = {"svg.fonttype": "none", "svg.hashsalt": "improvement", "font.size": 11,
            "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(7 if len(panels) == 1 else 5.2 * len(panels), 3.6),
                        layout="constrained", facecolor="white")
        for axis, (ylabel, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                         panels.items()):
            colors = COLORS[:len(lines)]
            for (name, values), color in zip(lines.items(), colors, strict=True):
                mean, models = values.mean(axis=0), range(values.shape[1])
                axis.plot(models, values.T, color=color, alpha=0.35, linewidth=1)
                axis.plot(models, mean, color=color, marker="o", linewidth=2.5)
            axis.set(ylabel=ylabel)
            if most is not None:
                axis.set_ylim(0, most)
            axis.set_xticks(models, [f"$M_{t}$" for t in models])
            low, high = axis.get_ylim()
            named = sorted((values[:, -1].mean(), name, color)
                           for (name, values), color in zip(lines.items(), colors))
            places = apart([end for end, _, _ in named], 0.14 * (high - low), high)
            for (end, name, color), place in zip(named, places):
                axis.annotate(f"{name}\n{end:.2f}", (models[-1], place), (8, 0),
                              textcoords="offset points", va="center", color=color)
        figure.savefig(file, metadata={"Date": None})


def apart(ends, gap, top):
    """Places for names beside these ends, which rise: a gap apart, and none above the top."""
    places = list(ends)
    for i in range(1, len(ends)):
        places[i] = max(places[i], places[i - 1] + gap)
    return [min(place, top - gap * above) for above, place in
            zip(reversed(range(len(ends))), places)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4],
                        help="one run each")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS),
                        help="which to run")
    parser.add_argument("--model", default=str(ROOT / "tiny"),
                        help="a model folder whose prompts have checks")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"),
                        help="where the runs go")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--plot", type=Path, help="an SVG of the true scores by iteration")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {variant: [pool.submit(run, args.out
                                         / f"{variant.replace(' ', '-').replace(',', '')}-{seed}",
                                         variant, seed, args.model)
                             for seed in args.seeds] for variant in args.variants}
        results = {variant: [future.result() for future in runs]
                   for variant, runs in futures.items()}
    if args.plot:
        lines = {variant: np.array([figures["truth"] for figures in seeds])
                 for variant, seeds in results.items()}
        plot({"true score of the answers, of 5": lines}, args.plot, most=5.2)
    print("\n".join([*table(results), "", "By iteration, M_0 to M_4:", *by_iteration(results)]))


if __name__ == "__main__":
    main()
