"""Is the mean over a judge's score distribution a better score than the digit that it draws?

    python benchmarks/expected_score.py runs/a runs/b ...    # runs whose prompts have checks

Of every held-out judgment of a run's M_0 and last model: the probability of each score from 0 to
the highest at the place where the judgment names one, given all that it says before (one forward
pass, nothing sampled), and the mean of the scores under them. Then how often the mean of n digits,
and of n such expectations, orders two answers to one prompt as the truth does, for n = 1, 3, ...,
and how often it ties. 95 % bootstrap intervals over all runs' prompts.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from eval import bootstrap, mean, same_prompt
from harness.files import read_jsonl
from harness.loading import load
from prompts import RUBRIC, judge_prompt
from sampling import Chat


@torch.no_grad()
def distribution(model, prompt, judgment, places, batch=64):
    """Probabilities of the tokens `places` after each of the token lists prompt + judgment."""
    rows = [(*p, *j) for p, j in zip(prompt, judgment, strict=True)]
    order, probs = sorted(set(rows), key=len), {}
    for start in range(0, len(order), batch):
        some = order[start:start + batch]
        longest = len(some[-1])
        ids = torch.tensor([row + (0,) * (longest - len(row)) for row in some])
        hidden = model.get_base_model().model(input_ids=ids.to(model.device)).last_hidden_state
        last = hidden[range(len(some)), [len(row) - 1 for row in some]]
        logits = model.get_output_embeddings()(last).float()[:, places]
        probs |= dict(zip(some, logits.softmax(1).tolist()))
    return [probs[row] for row in rows]


def expectations(model, chat, rubric, max_score, records):
    """Give judged answers "expected" beside their "scores"; the probabilities of the digits drawn.
    """
    scale = range(max_score + 1)
    places = [chat.text(f"Score: {n}")[-1] for n in scale]
    if len(set(places)) < len(places):
        raise ValueError("the tokenizer has no token of its own for each score")
    asked = []
    for record in records:
        record["expected"] = list(record["scores"])
        prompt = chat.prompt(judge_prompt(record["prompt"], record["text"], rubric))
        for j, judgment in enumerate(record["judgments"]):
            ids = chat.text(judgment["text"].rstrip())
            if judgment["score"] is not None and ids[-1] == places[int(judgment["score"])]:
                asked.append((record, j, prompt, ids[:-1]))  # else it ends in "Score: 3 of 5"
    probs = distribution(model, [a[2] for a in asked], [a[3] for a in asked], places)
    for (record, j, *_), p in zip(asked, probs, strict=True):
        record["expected"][j] = float(np.dot(scale, p))
    return [p[int(record["scores"][j])] for (record, j, *_), p in zip(asked, probs)]


def of_run(run, t):
    """The records of iterT/eval.jsonl, with "expected" beside the "scores" of each."""
    settings = json.loads((run / "config.json").read_text())["settings"]
    model, tokenizer = load(run / f"iter{t}", bits=settings["bits"])
    rubric = Path(settings["rubric"]).read_text().strip() if settings["rubric"] else RUBRIC
    records = read_jsonl(run / f"iter{t}" / "eval.jsonl")
    drawn = expectations(model, Chat(tokenizer), rubric, settings["max_score"], records)
    print(f"{run}, M_{t}: of {sum(len(r['scores']) for r in records)} judgments {len(drawn)} end "
          f"in a score; its probability is {np.mean(drawn):.4f} in the mean", flush=True)
    return records


def pairs_of(records, name, n):
    """For each two answers that the truth tells apart: is their order right, do they tie?"""
    found = {}
    for a, b in same_prompt(records):
        if a["truth"] == b["truth"] or not (a["finished"] and b["finished"]):
            continue
        x, y = (mean(one[name][:n]) for one in (a, b))
        if x is not None and y is not None:
            order = np.sign(x - y) * np.sign(a["truth"] - b["truth"])
            found[a["id"], b["id"]] = (0.5 + 0.5 * order, float(order == 0))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="runs with checks and a judge")
    args = parser.parse_args()
    told = {}
    for run in args.runs:
        for t in (0, len(json.loads((run / "summary.json").read_text())) - 1):
            told[run, t] = of_run(run, t)
    for first in (True, False):
        some = {key: records for key, records in told.items() if (key[1] == 0) == first}
        if not some:
            continue
        print(f"\n{'M_0' if first else 'later models'}: right about the truth, and ties\n"
              f"{'judgments':>10}{'digits':>24}{'expectation':>24}{'difference':>26}"
              f"{'ties':>8}{'ties':>8}")
        for n in (1, 3, 5, 7):
            rows = []
            for (run, t), records in some.items():
                drawn, expected = (pairs_of(records, name, n) for name in ("scores", "expected"))
                rows += [(*drawn[key], *expected[key], f"{run} {key[0].rpartition('/')[0]}")
                         for key in drawn.keys() & expected.keys()]
            right, tie, right_e, tie_e, groups = (list(column) for column in zip(*sorted(rows)))

            def interval(*columns):
                def statistic(*drawn):
                    return float(np.mean(drawn[-1]) - (np.mean(drawn[0]) if drawn[1:] else 0))
                low, high = bootstrap(statistic, *columns, groups=groups, resamples=500)
                return f"{100 * statistic(*columns):.2f} ({100 * low:.2f} to {100 * high:.2f})"
            print(f"{n:>10}{interval(right):>24}{interval(right_e):>24}"
                  f"{interval(right, right_e):>26}{np.mean(tie):>8.2%}{np.mean(tie_e):>8.2%}")


if __name__ == "__main__":
    main()
