"""How many prompts make a figure mean something: widths of 95 % intervals, computed from a run.

    python benchmarks/intervals.py runs/tiny --compared FILE    # as eval.py compare --out writes it

Prompts, and answers to each, are drawn from the run's held-out ones with replacement. Half of the
middle 95 % of 400 such draws is the +- of a figure of so many: what another set of as many prompts
would have given.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import by_prompt, mean, order, same_prompt
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


def true_score(records):
    return mean(record["truth"] for record in records)


def truth_agreement(records):
    """As eval.measure_judge has it, without its interval."""
    return mean(0.5 + 0.5 * order(a["score"], b["score"]) * order(a["truth"], b["truth"])
                for a, b in same_prompt(records) if a["truth"] != b["truth"])


def win_rate(records):
    return mean(record["winners"].count("a") / 2 for record in records)


def plus_minus(measure, groups, prompts, answers, rng):
    """Half of the middle 95 % of a figure over draws; None where it is not there."""
    values = [measure(drawn(groups, prompts, answers, rng)) for _ in range(DRAWS)]
    if None in values:
        return None
    return np.ptp(np.percentile(values, [2.5, 97.5])) / 2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--iteration", type=int, help="whose answers (default: the last)")
    parser.add_argument("--compared", help="what eval.py compare has written with --out")
    args = parser.parse_args()
    last = args.iteration if args.iteration is not None else max(iterations(args.run))
    answers = [answer for answer in read_jsonl(Path(args.run) / f"iter{last}" / "eval.jsonl")
               if answer.get("truth") is not None and answer["score"] is not None]
    pool = list(by_prompt(answers).values())
    sources = {"true score": (true_score, pool, ".2f"),
               "judge: right about the truth": (truth_agreement, pool, ".1%")}
    for name, (measure, _, form) in sources.items():
        print(f"{name}, M_{last}: {measure(answers):{form}}")
    if args.compared:
        verdicts = [record for record in read_jsonl(args.compared) if None not in record["winners"]]
        print(f"A wins: {win_rate(verdicts):.1%}")
        pool = list(by_prompt([{**one, "prompt_id": one["prompt"]} for one in verdicts]).values())
        sources["A wins"] = win_rate, pool, ".1%"
    rng = np.random.default_rng(0)
    print("| " + " | ".join(["prompts", "answers to each", *sources]) + " |")
    print("|---" * (2 + len(sources)) + "|")
    for prompts in PROMPTS:
        for count in ANSWERS:
            found = [(plus_minus(measure, pool, prompts, count, rng), form)
                     for measure, pool, form in sources.values()]
            cells = ["-" if one is None else f"+- {one:{form}}" for one, form in found]
            print("| " + " | ".join([f"{prompts}", f"{count}", *cells]) + " |")


if __name__ == "__main__":
    main()
