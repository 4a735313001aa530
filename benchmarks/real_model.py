"""Does a real pretrained model improve by its own answers? `python benchmarks/real_model.py --model M`

M is a model folder or a hub name. The prompts are made like those of data/verifiable.jsonl, whose
answers a program can check, with three demands that short answers can meet, and a fourth: twelve
words or more, without which one word would soon be the answer to everything. Compared are runs whose reward is the truth (`--reward checks`) and a control:
the same run, but that every answer's score is a random number, so that its pairs say nothing. The
control must not rise. Measured is the share of demands met on held-out prompts that share no task
with the training's, four answers each; intervals are 95 %, by bootstrap over these prompts.
Resumable: what is there is not run again.
"""
import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import make  # noqa: E402
from eval import bootstrap, by_prompt, read_jsonl  # noqa: E402
from harness.files import write_jsonl  # noqa: E402
from harness.folder import Run  # noqa: E402

KINDS = ("at most", "question", "first", "no comma", "word")  # of demands, see data/make.py
SETTINGS = {  # of the runs
    "bits": 16, "prompts-per-iter": 48, "responses": 8, "max-answer-tokens": 64, "epochs": 3,
    "batch-size": 8, "lr": 2e-4, "rho": 0, "max-response-chars": 0,
}
HELD_OUT = 48  # prompts


def prompts(tasks, rng):
    """Prompts with three demands of KINDS and a least length."""
    floor = {"id": "number_words", "relation": "at least", "num_words": 12}
    return [{"prompt": record["prompt"] + " Write 12 words or more.",
             "checks": [*record["checks"], floor]}
            for record in make.prompts(tasks, rng, KINDS)]


def random_reward(run, t, answers, name, label):
    """Stands in for Run.reward: a number that depends on nothing but the answer's place."""
    seed = run.settings.seed
    records = [answer | {"scores": [score], "score": score} for answer in answers
               for score in [random.Random(f"{seed}/{t}/{answer['id']}").random()]]
    run.save(t, name, records)
    return records


def run(args, seed, kind):
    """The held-out prompts' shares of demands met, (models, prompts), of a run."""
    out = args.out / f"{kind}-{seed}"
    flags = {"model": args.model, "out": out, "seed": seed, "iters": args.iters,
             "reward": "checks", "prompts": args.out / "prompts.jsonl",
             "eval-prompts": args.out / "held_out.jsonl", **SETTINGS}
    command = [sys.executable, __file__, "--work", kind]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    with open(f"{out}.log", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log)
    if done.returncode not in (0, 3):
        raise SystemExit(f"the run ended: see {out}.log")
    shares = []
    for t in range(args.iters + 1):
        groups = by_prompt(read_jsonl(out / f"iter{t}" / "eval.jsonl"))
        shares.append([np.mean([answer["truth"] for answer in group]) / 5
                       for group in groups.values()])
    minutes = sum(sum(record["seconds"].values())
                  for record in json.loads((out / "summary.json").read_text())) / 60
    print(f"{kind:8} seed {seed}  " + " ".join(f"{np.mean(share):.3f}" for share in shares)
          + f"   {minutes:.1f} min", flush=True)
    return np.array(shares)


def table(results, iters):
    """A Markdown table: the share of demands met by each model, and the last one's gain."""
    yield "| reward | seed | " + " | ".join(f"M_{t}" for t in range(iters + 1)) + " | gain |"
    yield "|" + "---|" * (iters + 4)
    for (kind, seed), shares in results.items():
        cells = [interval(share) for share in shares]
        yield f"| {kind} | {seed} | " + " | ".join([*cells, interval(shares[-1] - shares[0])]) + " |"


def interval(values):
    low, high = bootstrap(np.mean, values)
    return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"


def plot(results, file):
    """The share of demands met by iteration, a line for each run."""
    look = {"svg.fonttype": "none", "svg.hashsalt": "real model", "font.size": 11,
            "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(7, 3.6), layout="constrained", facecolor="white")
        axis = figure.subplots()
        for (kind, _), shares in results.items():
            color = "#2f74c0" if kind == "checks" else "#d1662a"
            axis.plot(shares.mean(axis=1), color=color, marker="o")
            axis.annotate(kind, (len(shares) - 1, shares[-1].mean()), (8, 0),
                          textcoords="offset points", va="center", color=color)
        axis.set(ylabel="share of demands met, held-out prompts")
        axis.set_xticks(range(len(shares)), [f"$M_{t}$" for t in range(len(shares))])
        figure.savefig(file, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder or a hub name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each")
    parser.add_argument("--iters", type=int, default=4, help="iterations")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="where the runs go")
    parser.add_argument("--plot", type=Path, help="an SVG of all runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random("real model")
    write_jsonl(args.out / "prompts.jsonl", prompts(make.TASKS, rng))
    write_jsonl(args.out / "held_out.jsonl", prompts(make.HELD_OUT, rng)[:HELD_OUT])
    results = {(kind, seed): run(args, seed, kind)
               for seed in args.seeds for kind in ("checks", "control")}
    print("\n".join(table(results, args.iters)))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:  # be one of the runs
        import metareward
        if sys.argv[2] == "control":
            Run.reward = random_reward
        metareward.main(sys.argv[3:])
    else:
        main()
