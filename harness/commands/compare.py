"""`eval.py compare A B --judge MODEL`: which of two models' answers a judge prefers."""
import itertools
import os
from collections import defaultdict
from pathlib import Path

import prompts as words
from eval import measure_comparisons
from harness.commands.models import answer_tokens, file_of, load_alone, made_by, sample_each
from harness.files import write_jsonl
from harness.lines import winner_of
from harness.loading import adapter_of, load_tokenizer
from harness.records import read_prompts
from harness.settings import HERE

STEADY = 0.6  # share of pairs with one winner in both orders below which it tells little
BLIND = 0.95  # share of verdicts for one place from which on a judge tells nothing


def command(args):
    """`eval.py compare A B --judge MODEL`."""
    sources = {"A": args.a, "B": args.b}
    files = itertools.chain(filter(os.path.isfile, sources.values()), filter(None, (
        file_of(source, "eval_prompts") for source in sources.values())))
    file = args.prompts or next(files, HERE / "data" / "eval.jsonl")
    asked = read_prompts(file)
    prompts = list(dict.fromkeys(record["prompt"] for record in asked))
    if not adapter_of(args.judge):
        load_tokenizer(args.judge)  # fails if there is no such model, before the others answer
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    a, b = (answers_from(source, name, prompts, args) for name, source in sources.items())
    matched = [(prompt, one, other) for prompt in (prompts if args.prompts else a)
               for one, other in zip(a.get(prompt, ()), b.get(prompt, ()))]
    if not matched:
        raise ValueError("A and B have no answers to the same prompts: compare such")
    pairs = [(prompt, one, other) for prompt, (one, _), (other, _) in matched]
    records = judge_both_orders(*load_alone(args.judge, args.bits), pairs,
                                args.max_verdict_tokens, part_of(args, "verdicts"),
                                made_by(args.judge, args.bits) if args.out else None)
    if args.out:
        write_jsonl(args.out, records)
        for name in (*sources, "verdicts"):
            part_of(args, name).unlink(missing_ok=True)
    figures = measure_comparisons(records)
    alone = sum(map(len, [*a.values(), *b.values()])) - 2 * len(matched)
    cut = [sum(not ended for _, (_, ended), _ in matched),
           sum(not ended for _, _, (_, ended) in matched)]
    print(f"A = {args.a}, B = {args.b}, judge {args.judge}: {figures['compared']} pairs of answers "
          f"to {len({prompt for prompt, *_ in matched})} prompts of {file}, in both orders\n"
          f"left out: {figures['unparsed']} pairs without two verdicts, {alone} answers without a "
          f"counterpart; cut off, and compared as they are: {cut[0]} of A, {cut[1]} of B")
    if not figures["compared"]:
        raise ValueError(f"no verdict of {args.judge} named a winner: choose a stronger judge, or "
                         "raise --max-verdict-tokens")
    print(comparison_table(figures, args))


def part_of(args, name):
    """Where replies are kept beside --out until all is done; None without --out."""
    return Path(f"{args.out}.{name}.part") if args.out else None


def answers_from(source, name, prompts, args):
    """{prompt: its answers (text, whether it ended)}, by a model or from a file.

    source: a model, or JSONL with "prompt" and "text" such as a run's eval.jsonl. name: what the
    screen and errors call it.
    """
    answers = defaultdict(list)
    if Path(source).is_file():
        for number, record in enumerate(read_prompts(source, name), 1):
            if not isinstance(record.get("text"), str):
                raise ValueError(f"{name} {source}: record {number} needs \"text\", the answer")
            answers[record["prompt"]].append((record["text"], record.get("finished") is not False))
        return answers
    if Path(source).suffix in (".jsonl", ".json", ".txt"):
        raise ValueError(f"{name} {source}: there is no such file")
    model, tokenizer = load_alone(source, args.bits)
    made = made_by(source, args.bits) if args.out else None
    samples = sample_each(model, tokenizer, prompts, f"{name}: answers",
                          args.max_new_tokens or answer_tokens(source), part_of(args, name), made,
                          temperature=args.temperature, top_p=args.top_p,
                          seed=[args.seed, "compare"])
    for prompt, answer in zip(prompts, samples):
        if answer.tokens:
            answers[prompt].append((answer.text, answer.finished))
    return answers


def judge_both_orders(model, tokenizer, pairs, max_new_tokens, part=None, made=None):
    """Have a model compare pairs (prompt, answer a, answer b) in both orders, greedily.

    part, made: as `sample_each` takes them. Returns records with "winners": "a", "b" or None, first
    of the order a, b, then of b, a.
    """
    asked = []
    for prompt, a, b in pairs:
        asked += [words.compare_prompt(prompt, a, b), words.compare_prompt(prompt, b, a)]
    said = sample_each(model, tokenizer, asked, "comparisons", max_new_tokens, part, made,
                       temperature=0)
    records = []
    for (prompt, a, b), ab, ba in zip(pairs, said[::2], said[1::2]):
        winners = [{"A": "a", "B": "b"}.get(winner_of(ab, "Answer")),
                   {"A": "b", "B": "a"}.get(winner_of(ba, "Answer"))]
        records.append({"prompt": prompt, "a": a, "b": b, "winners": winners,
                        "said": [ab.text, ba.text]})
    return records


def comparison_table(figures, args):
    """The lines of `eval.py compare`, whose arguments args are, and what they are worth.

    figures: what eval.measure_comparisons gives.
    """
    lines = []
    for name, value, interval in [
            ("A wins", "win_rate", "win_rate_interval"),
            ("A wins, length-controlled", "length_controlled_win_rate",
             "length_controlled_interval"),
            ("judge prefers the first", "first_position_rate", "first_position_interval")]:
        about = "too few prompts, or too much alike, for an interval"
        if figures[interval] and figures[interval][0] < figures[interval][1]:
            low, high = figures[interval]
            about = f"95 % interval {low:.1%} to {high:.1%}"
        lines.append(f"{name:38}{figures[value]:>7.1%}   {about}")
    ours, theirs = figures["mean_lengths"]
    lines += [f"{'judge says the same in both orders':38}{figures['consistent_rate']:>7.1%}",
              f"{'characters per answer: A, B':38}{ours:>7.0f} {theirs:.0f}"]
    first = figures["first_position_rate"]
    if max(first, 1 - first) >= BLIND:
        place = "first" if first > 0.5 else "second"
        lines.append(f"This judge cannot tell: it prefers the {place} answer, whatever it is. Its "
                     "win rate says nothing; choose another judge.")
    elif figures["consistent_rate"] < STEADY:
        lines.append(f"This judge says the same in both orders in {figures['consistent_rate']:.0%} "
                     "alone: its win rate says little; choose another judge.")
    judge, *places = (Path(place).resolve() for place in (args.judge, args.a, args.b))
    if judge in places or judge in [place.parent for place in places]:
        lines.append("The judge is one of the two: models prefer their own answers.")
    lines.append("These figures are this judge's opinion on these prompts. They are not "
                 "AlpacaEval's nor any other leaderboard's, whose judges and prompts are others.")
    return "\n".join(lines)
