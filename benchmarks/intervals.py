"""How many prompts make a figure mean something: widths of 95 % intervals, computed from a run.

    python benchmarks/intervals.py runs/tiny        # or runs/x --compared FILE of eval.py compare --out

Prompts, and answers to each, are drawn from the run's held-out ones with replacement, figures are
computed with eval.py's functions, and the middle 95 % of 400 such draws is the width: what another
set of so many prompts would have given. Halved it is the +- of a figure.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import by_prompt, measure_actor, measure_comparisons, measure_judge
from harness.files import iterations, read_jsonl

DRAWS = 400
PROMPTS, ANSWERS = (10, 20, 60, 200, 800), (1, 4)


def drawn(groups, prompts, answers, rng):
    """Records of so many prompts, under numbers of their own, and of so many answers to each."""
    records = []
    for number in range(prompts):
        group = groups[rng.integers(len(groups))]
        some = rng.integers(len(group), size=answers)
        records += [{**group[i], "prompt_id": str(number), "prompt": str(number)} for i in some]
    return records


def width(measure, groups, prompts, answers, rng):
    """The middle 95 % of a figure over draws, in the figure's own unit; None if it is not there."""
    values = [measure(drawn(groups, prompts, answers, rng)) for _ in range(DRAWS)]
    values = [value for value in values if value is not None]
    return np.ptp(np.percentile(values, [2.5, 97.5])) if len(values) > DRAWS / 2 else None


def table(rows, head):
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--iteration", type=int, help="whose answers (default: the last)")
    parser.add_argument("--compared", help="what eval.py compare has written with --out")
    args = parser.parse_args()
    last = args.iteration if args.iteration is not None else max(iterations(args.run))
    answers = read_jsonl(Path(args.run) / f"iter{last}" / "eval.jsonl")
    groups = [group for group in by_prompt(answers).values() if "truth" in group[0]]
    measures = {"true score": lambda records: measure_actor(records)["truth"],
                "judge: right about the truth":
                    lambda records: measure_judge(records)["truth_agreement"]}
    sources = {name: (measure, groups) for name, measure in measures.items()}
    if args.compared:
        verdicts = {}
        for record in read_jsonl(args.compared):
            verdicts.setdefault(record["prompt"], []).append(record)
        sources["win rate"] = (lambda records: measure_comparisons(records).get("win_rate"),
                               list(verdicts.values()))
    rng, rows = np.random.default_rng(0), []
    for prompts in PROMPTS:
        for count in ANSWERS:
            row = [f"{prompts}", f"{count}"]
            for name, (measure, pool) in sources.items():
                found = width(measure, pool, prompts, count, rng)
                form = ".2f" if name == "true score" else ".0%"
                row.append("-" if found is None else format(found, form))
            rows.append(row)
    table(rows, ["prompts", "answers to each", *sources])


if __name__ == "__main__":
    main()
