"""`eval.py judge`: how often a judge prefers the right one of pairs that others have labelled.

Two ways are measured: the mean of some scores for each answer, as in the method, and comparisons in
both orders. A tie, and two orders that disagree, count one half.
"""
import functools
import itertools
import math
import random
import sys
from collections import Counter, namedtuple

import numpy as np

import prompts as words
from eval import grouped_interval
from harness.commands.compare import judge_both_orders
from harness.commands.models import load_alone, models_of, own_settings, rubric_of, sample_each
from harness.engine.chat import Chat
from harness.lines import as_reply, score_of
from harness.records import LeftOut, answer_of, each_record, first_of, prompt_of, without

Pair = namedtuple("Pair", "prompt right wrong subset")
LABELS = {"A>B": ("response_A", "response_B"), "B>A": ("response_B", "response_A")}


# ---- the pairs

def read_pairs(file):
    """A list of Pairs, from JSON lines or a list as RewardBench or JudgeBench have them.

    RewardBench: "prompt", "chosen", "rejected" (texts or lists of texts), "subset". JudgeBench:
    "question", "response_A", "response_B", "label" ("A>B" or "B>A"), "source".
    """
    left_out = Counter()
    read = functools.partial(pairs_of, left_out=left_out)
    pairs = list(itertools.chain(*(of_record for _, of_record in
                                   each_record(file, "--pairs", read, left_out))))
    if not pairs:
        raise ValueError(f"--pairs {file}: no pairs in it" + without(left_out))
    if left_out:
        print(f"--pairs {file}: {len(pairs):,} pairs{without(left_out)}", file=sys.stderr)
    return pairs


def pairs_of(raw, left_out):
    """The Pairs of a record. Raises LeftOut, and ValueError for a record of another shape.

    What a prompt lacks of its record is counted in left_out; without its system turn, which a label
    may depend on, it is no pair.
    """
    try:
        prompt, _, parts = prompt_of(raw, answered=True)
        if parts.pop("system turns", 0):
            raise LeftOut("pairs with a system turn")
        sides = LABELS[raw["label"]] if "label" in raw else ("chosen", "rejected")
        right, wrong = map(texts_of, (raw[side] for side in sides))
        subset = str(first_of(raw, ("subset", "source")) or "other")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("needs \"prompt\", \"chosen\" and \"rejected\", or \"question\", "
                         "\"response_A\", \"response_B\" and \"label\", A>B or B>A") from None
    left_out.update(+parts)
    return [Pair(prompt, one, other, subset) for one in right for other in wrong]


def texts_of(value):
    """The answers on one side of a record: a text, a conversation that ends in one, or texts."""
    several = isinstance(value, list) and all(isinstance(text, str) for text in value)
    answers = value if several else [answer_of(value)]
    if not answers or None in answers:
        raise ValueError
    return answers


# ---- a judge

def by_scores(model, tokenizer, pairs, name, source, args):
    """For each pair 1 if the right answer's mean score is higher, 1/2 for a tie; NaN: no score."""
    settings = own_settings(source)
    rubric, most = rubric_of(source), settings.get("max_score", 5)
    answers = list(dict.fromkeys((pair.prompt, text) for pair in pairs
                                 for text in (pair.right, pair.wrong)))
    asked = [words.judge_prompt(*answer, rubric)
             for answer in answers for _ in range(args.judgments)]
    said = sample_each(model, tokenizer, asked, f"{name}: judgments",
                       settings.get("max_judgment_tokens", 512), seed=[args.seed, "judge"],
                       temperature=settings.get("temperature", 0.8),
                       top_p=settings.get("top_p", 0.95))
    chat = Chat(tokenizer)
    scores = [score_of(as_reply(chat, one), most) for one in said]
    means = {}
    for i, answer in enumerate(answers):
        of_answer = scores[i * args.judgments: (i + 1) * args.judgments]
        known = [score for score in of_answer if score is not None]
        means[answer] = np.mean(known) if known else math.nan
    gaps = [means[pair.prompt, pair.right] - means[pair.prompt, pair.wrong] for pair in pairs]
    return np.array([0.5 + 0.5 * np.sign(round(gap, 9)) for gap in gaps])  # sums are not exact


def by_comparison(model, tokenizer, pairs, source):
    """For each pair the share of both orders in which the right answer wins; NaN: no verdict."""
    records = judge_both_orders(model, tokenizer,
                                [(pair.prompt, pair.right, pair.wrong) for pair in pairs],
                                own_settings(source).get("max_verdict_tokens", 512))
    return np.array([math.nan if None in record["winners"] else record["winners"].count("a") / 2
                     for record in records])


# ---- the table

def known_share(values, groups):
    """The mean of what is known, with its interval if there are enough prompts for one."""
    known = ~np.isnan(values)
    if not known.any():
        return "-"
    groups = [group for group, there in zip(groups, known) if there]
    bounds = grouped_interval(np.mean, values[known], groups=groups)
    told = f"{values[known].mean():.1%}"
    return f"{told} [{bounds[0]:.1%}, {bounds[1]:.1%}]" if bounds else told


def pairs_table(pairs, results):
    """The table's lines. results: {name: {way: (pairs,)}}."""
    subsets = sorted({pair.subset for pair in pairs})
    rows, prompts = [], [pair.prompt for pair in pairs]
    for way in next(iter(results.values())):
        for subset in ["", *(subsets if len(subsets) > 1 else [])]:
            chosen = np.array([subset in ("", pair.subset) for pair in pairs])
            groups = [prompt for prompt, there in zip(prompts, chosen) if there]
            label = f"  {subset} ({chosen.sum()})" if subset else f"right {way}"
            rows.append([label, *(known_share(of[way][chosen], groups) for of in results.values())])
        for state, where in (("undecided", lambda values: values == 0.5), ("unread", np.isnan)):
            rows.append([f"{state} {way}", *(str(where(of[way]).sum()) for of in results.values())])
    rows.insert(0, ["", *results])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip()
            for row in rows]


def command(args):
    """`eval.py judge RUN_OR_MODEL... --pairs FILE`."""
    pairs, models, results = read_pairs(args.pairs), models_of(args.models), {}
    if args.limit and args.limit < len(pairs):  # of a file that is sorted the first are no sample
        pairs = random.Random(args.seed).sample(pairs, args.limit)
    for name, source in models.items():
        model, tokenizer = load_alone(source, args.bits)
        results[name] = {
            f"by the mean of {args.judgments} scores":
            by_scores(model, tokenizer, pairs, name, source, args),
            "by comparison in both orders": by_comparison(model, tokenizer, pairs, source)}
        del model  # or the next one would stand beside it
    print("\n".join(pairs_table(pairs, results)))
    for name, by in results.items():
        for what, values in by.items():
            if np.isnan(values).all():
                print(f"{name} {what}: no pair could be read, so this model does not judge in that "
                      "way")
    print(f"{len(pairs)} pairs of {len({pair.prompt for pair in pairs})} prompts. Undecided (equal "
          "scores, orders that disagree) counts one half, unread pairs are left out. In brackets: "
          "95 % intervals, of ten prompts or more.")
