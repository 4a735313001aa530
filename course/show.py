"""Prints what a run wrote, small enough for a slide: `python course/show.py runs/tiny/iter1
judgment`

The lecture's outputs come from here. WHAT: judgment (an answer and what was judged of it), answers
(of one prompt, with scores and the pair of them), battle (verdicts, battles and ratings of one
answer's judgments), training (the first step and the epochs of DPO), padding (of the tiny world:
sentences per held-out answer that earn nothing, of each model of the run).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness.files import iterations, read_jsonl  # noqa: E402
from tiny.world import PADDING  # noqa: E402


def judgment(folder, number):
    record = read_jsonl(folder / "judgments.jsonl")[number]
    print(f"Question: {record['prompt']}\nAnswer: {record['text']}\n\nIts judgments:")
    for judged in record["judgments"]:
        print(" / ".join(judged["text"].splitlines()))
    print(f"\nmean score {record['score']:.2f}, true score {record['truth']:g}")


def answers(folder, number):
    records = read_jsonl(folder / "judgments.jsonl")
    pair = [pair for pair in read_jsonl(folder / "pairs.jsonl") if pair["kind"] == "actor"][number]
    print(f"Question: {pair['prompt'][0]['content']}\n score  true  characters")
    for record in records:
        if record["prompt_id"] == pair["prompt_id"]:
            role = [
                role
                for role in ("chosen", "rejected")
                if pair[role][0]["content"] == record["text"]
            ]
            score = "-" if record["score"] is None else f"{record['score']:.2f}"
            print(
                f"{score:>6}{record['truth']:6g}{len(record['text']):12}  {' '.join(role)}".rstrip()
            )


def battle(folder, number):
    record, rating = (
        read_jsonl(folder / f"{name}.jsonl")[number] for name in ("battles", "ratings")
    )
    print(f"Answer: {record['text']}  (true score {record['truth']:g})\n")
    print("verdicts r: row shown first, column second")
    for row in record["verdicts"]:
        print("".join(f"{v:+3d}" if v else "  ." for v in row))
    print("battles B")
    for row in rating["battles"]:
        print("".join(f"{v:6.2f}" if v else "     ." for v in row))
    print("scores and ratings")
    print(
        "".join(f"{score:8.0f}" for score in record["scores"])
        + "\n"
        + "".join(f"{e:8.2f}" for e in rating["ratings"])
    )
    if not rating["pair"]:
        return print("no pair")
    chosen, rejected = rating["pair"]
    for name, place in (("chosen", chosen), ("rejected", rejected)):
        print(
            f"\n{name}, judgment {place}, counted from 0: "
            + " / ".join(record["texts"][place].splitlines())
        )
    said = next(
        (
            said["text"]
            for said in record["said"]
            if (said["first"], said["second"]) == (chosen, rejected)
        ),
        "(these two were not compared in this order)",
    )
    print(f"\nthe meta-judge of these two, as A and B:\n{said}")


def training(folder, number):
    print("           loss  margin  chosen reward  rejected reward")
    for line in read_jsonl(folder / "train.jsonl"):
        held_out = "held_out_loss" in line
        if held_out or line["step"] == 1:
            before = "held_out_" if held_out else ""
            values = [
                line[before + name]
                for name in ("loss", "margin", "chosen_reward", "rejected_reward")
            ]
            name = f"epoch {line['epoch']}" if held_out else "step 1"
            loss, margin, chosen, rejected = values
            print(f"{name:8}{loss:7.3f}{margin:8.3f}{chosen:15.3f}{rejected:17.3f}")


def padding(folder, number):
    sentences = [sentence for style in PADDING.values() for sentence in style]
    for t, place in sorted(iterations(folder.parent).items()):
        texts = [record["text"] for record in read_jsonl(place / "eval.jsonl")]
        count = sum(text.count(sentence) for text in texts for sentence in sentences)
        print(f"M_{t} {count / len(texts):.2f}")


def main():
    parts = {
        "judgment": judgment,
        "answers": answers,
        "battle": battle,
        "training": training,
        "padding": padding,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "iteration", type=Path, help="an iteration of a run, such as runs/tiny/iter1"
    )
    parser.add_argument("what", choices=parts)
    parser.add_argument("number", type=int, nargs="?", default=0, help="which one, counted from 0")
    args = parser.parse_args()
    try:
        parts[args.what](args.iteration, args.number)
    except (IndexError, KeyError):  # the warm start has no DPO
        print(
            f"error: {args.iteration} has no {args.what} {args.number}; is it an iteration of a "
            f"run, 1 or later?",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
