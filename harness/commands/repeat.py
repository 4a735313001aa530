"""`eval.py repeat RUN`: do a run's comparisons come out the same when they are made again?"""
import random
from itertools import permutations
from pathlib import Path

import numpy as np

import prompts as words
from eval import comparisons, mean
from harness.commands.models import load_alone, own_settings, rubric_of, sample_each
from harness.files import iterations, read_jsonl
from harness.lines import VERDICTS, winner_of


def command(args):
    """`eval.py repeat RUN`: a line for each iteration whose judgments were compared."""
    run = Path(args.run)
    there = sorted(t for t, folder in iterations(run).items()
                   if (folder / "battles.jsonl").is_file())
    settings = own_settings(run / "iter0")
    if not there or not settings:
        raise ValueError(f"{run} has no iteration with battles.jsonl, or no config.json: it is no "
                         "run's folder, or the run has compared no judgments")
    for t in args.iterations or there:
        if t not in there:
            raise ValueError(f"{run} has no battles.jsonl of iteration {t}, "
                             f"only of {' '.join(map(str, there))}")
    for t in args.iterations or there:
        rng = random.Random(f"{args.seed}/{t}")
        battles = read_jsonl(run / f"iter{t}" / "battles.jsonl")
        battles = rng.sample(battles, min(args.answers, len(battles)))
        orders = [rng.sample(range(len(battle["texts"])), len(battle["texts"]))
                  for battle in battles]
        judge = run / f"iter{t - 1}"  # M_{t-1}, which compared them
        verdicts = compare_again(judge, battles, orders, f"iteration {t}: comparisons, repeated",
                                 [args.seed, "repeat", t], settings, args.bits)
        repeats = [{"order": order, "verdicts": again} for order, again in zip(orders, verdicts)]
        figures = measure_repeats(battles, repeats)
        total, (before, now) = figures["comparisons"], figures["unparsed"]
        print(f"iteration {t}: another winner in {percent(figures['winner_changed'])} of the "
              f"comparisons, another best or worst judgment for "
              f"{percent(figures['pair_changed'])} of {len(battles)} answers; without a winner "
              f"before {before}, now {now} of {total} comparisons")


def percent(value):
    return "-" if value is None else f"{value:.1%}"


def compare_again(model, battles, orders, label, seed, settings, bits=None):
    """Have a model compare the judgments of some answers, shuffled, in both orders.

    Only what was compared is compared again. battles: records of battles.jsonl. orders: for each,
    how its N judgments are shuffled. settings: of the run. Returns for each the verdicts (N, N): 1,
    -1 or 0 as in battles.jsonl, and entry [m][n] that of the judgments order[m], shown first, and
    order[n].
    """
    rubric = rubric_of(model)
    verdicts = [[[0] * len(order) for _ in order] for order in orders]
    asked, places = [], []
    for i, (battle, order) in enumerate(zip(battles, orders)):
        texts = [battle["texts"][j] for j in order]
        made = {(said["first"], said["second"]) for said in battle["said"]}
        for m, n in permutations(range(len(texts)), 2):
            if (order[m], order[n]) not in made:
                continue
            asked.append(words.meta_judge_prompt(battle["prompt"], battle["text"], texts[m],
                                                 texts[n], rubric))
            places.append((i, m, n))
    model, tokenizer = load_alone(model, bits)
    said = sample_each(model, tokenizer, asked, label, settings["max_verdict_tokens"], seed=seed,
                       temperature=settings["temperature"], top_p=settings["top_p"])
    for (i, m, n), verdict in zip(places, said):
        verdicts[i][m][n] = VERDICTS[winner_of(verdict)]
    return verdicts


def measure_repeats(battles, repeats):
    """How far comparisons come out the same when they are made again.

    battles: records with "texts" of N judgments and "verdicts" (N, N). repeats: for each of them
    the "verdicts" of the same judgments shuffled, and the "order": repeated judgment m is judgment
    order[m]. Returns the share of the comparisons that parsed both times whose winner changed, the
    share of the answers whose best or worst judgment did (by plain counts of wins, so that no fit
    hides a change), and of how many comparisons how many did not parse, both times.
    """
    winners, ends, total, unparsed = [], [], 0, [0, 0]
    for battle, remade in zip(battles, repeats, strict=True):
        before, order = np.array(battle["verdicts"]), remade["order"]
        again = np.zeros_like(before)
        again[np.ix_(order, order)] = remade["verdicts"]  # each judgment at its old place
        parsed_twice = (before != 0) & (again != 0)
        winners += (before != again)[parsed_twice].astype(float).tolist()
        ends.append(float(best_and_worst(battle["texts"], before)
                          != best_and_worst(battle["texts"], again)))
        count = comparisons(battle)
        total += count
        unparsed[0] += count - np.count_nonzero(before)
        unparsed[1] += count - np.count_nonzero(again)
    return {"winner_changed": mean(winners), "pair_changed": mean(ends),
            "comparisons": total, "unparsed": unparsed}


def best_and_worst(texts, verdicts):
    """The judgments that won most and fewest comparisons; of equals the shorter, the longer."""
    won = (verdicts == 1).sum(1) + (verdicts == -1).sum(0)  # shown first, and shown second
    best = max(range(len(texts)), key=lambda i: (won[i], -len(texts[i])))
    worst = min(range(len(texts)), key=lambda i: (won[i], -len(texts[i])))
    return texts[best], texts[worst]
