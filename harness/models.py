"""Finished models speak once more: their answers, and what they say of answers and judgments.

The commands of eval.py share this.
"""
import gc
import random
import re
import sys
import time
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import torch
from tqdm import tqdm

import prompts as words
from harness.files import iterations, read_json, read_jsonl, sha256
from harness.loading import adapter_of, base_of, fingerprint, load, load_tokenizer
from harness.records import read_prompts, read_text
from harness.settings import HERE, flag, read_preset
from sampling import sample

BLIND = 0.95  # share of verdicts for one place from which on a judge tells nothing


def drawn(model, tokenizer, prompts, label, max_new_tokens, keep=None, **settings):
    """One sample for each prompt, with a bar. settings: as `sample` takes them.

    keep(i, sample), if given, is called as each ends, with the number of its prompt.
    A line on stderr counts the prompts that are too long: their samples have no tokens.
    """
    tokens, start = 0, time.perf_counter()

    def ended(i, number, sample):
        nonlocal tokens
        tokens += len(sample.tokens)
        if keep:
            keep(i, sample)
        rate = tokens / (time.perf_counter() - start)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        bar.update()

    with tqdm(total=len(prompts), desc=label, unit="sample") as bar:
        answers = sample(model, tokenizer, prompts, max_new_tokens=max_new_tokens, on_end=ended,
                         skip_too_long=True, **settings)
    samples = [one for (one,) in answers]
    too_long = sum(not one.tokens for one in samples)
    if too_long:
        print(f"{label}: {too_long} prompts are too long, the model's context has no room for them "
              f"and a reply of {max_new_tokens} tokens; they got none", file=sys.stderr)
    return samples


def load_alone(model, bits=None):
    """Load a model in the place of the one before, which nobody may hold any more."""
    check_base(model)
    gc.collect()
    torch.cuda.empty_cache()
    return load(model, bits=bits)


def models_of(sources):
    """{name: model}. A run's folder stands for its iterations, in order.

    Raises OSError or ValueError if there is no such model, before any of them speaks.
    """
    models = {}
    for source in sources:
        folders = [folder for _, folder in sorted(iterations(source).items())
                   if (folder / "adapter").exists()]
        for model in folders or [source]:
            name = name_of(model)
            if name in models:
                raise ValueError(f"two models are called {name}: measure them one by one")
            models[name] = str(model)
    for model in models.values():
        if not adapter_of(model):
            load_tokenizer(model)
    return models


def name_of(model):
    """What a model is called on the screen and as a file: "x-iter4" for runs/x/iter4."""
    folder = Path(model).resolve()
    in_a_run = re.fullmatch("iter[0-9]+", folder.name)
    return f"{folder.parent.name}-{folder.name}" if in_a_run else folder.name


def own_settings(model):
    """The settings of the run that a folder iterT belongs to, else a model folder's preset.

    {} for other models.
    """
    return config_of(model).get("settings") or read_preset(model)


def config_of(model):
    """The config.json of the run that an iteration, or its adapter, belongs to; {} if it has none.
    """
    place = Path(model).resolve()
    file = (place.parent if place.name == "adapter" else place).parent / "config.json"
    content = read_json(file) if file.is_file() else None
    settings = content.get("settings") if isinstance(content, dict) else None
    return content if isinstance(settings, dict) else {}


def file_of(model, name):
    """A file that a model's run, or its preset, has read, such as its "rubric"; None: none.

    A path may be meant as it is seen from any folder above the run: it may have been moved. Raises
    ValueError if the file is gone, or is not what the run has read.
    """
    path = own_settings(model).get(name)
    if not path:
        return None
    places = [Path(above, path) for above in ("", *Path(model).resolve().parents, HERE)]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"{model}: {flag(name)} {path}, which its run has read, is gone: put it "
                         "back")
    known = config_of(model).get("files", {}).get(flag(name))
    if known and sha256(file) != known:
        raise ValueError(f"{model}: {flag(name)} {file} has another content than its run has read: "
                         "put it back from a copy")
    return file


def rubric_of(model):
    """The rubric of a run, given one of its iterations, or of a preset."""
    file = file_of(model, "rubric")
    return read_text(file, "--rubric").strip() if file else words.RUBRIC


def check_base(model):
    """Raise ValueError if the base of a run's iteration is not the one that the run had."""
    known = config_of(model).get("files", {}).get("--model")
    if known and adapter_of(model) and fingerprint(model) != known:
        raise ValueError(f"{model}: its base {base_of(adapter_of(model))} has another content than "
                         "its run had: put it back from a copy")


def answer_tokens(model):
    """How long a model's answers may be, in tokens: as long as in its run."""
    return own_settings(model).get("max_answer_tokens", 1024)


def answers_of(source, name, prompts, args):
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
    samples = drawn(model, tokenizer, prompts, f"{name}: answers",
                    args.max_new_tokens or answer_tokens(source), temperature=args.temperature,
                    top_p=args.top_p, seed=[args.seed, "compare"])
    for prompt, answer in zip(prompts, samples):
        if answer.tokens:
            answers[prompt].append((answer.text, answer.finished))
    return answers


def judge_both_orders(model, tokenizer, pairs, max_new_tokens):
    """Have a model compare pairs (prompt, answer a, answer b) in both orders, greedily.

    Returns records with "winners": "a", "b" or None, first of the order a, b, then of b, a.
    """
    asked = []
    for prompt, a, b in pairs:
        asked += [words.compare_prompt(prompt, a, b), words.compare_prompt(prompt, b, a)]
    said = drawn(model, tokenizer, asked, "comparisons", max_new_tokens, temperature=0)
    records = []
    for (prompt, a, b), ab, ba in zip(pairs, said[::2], said[1::2]):
        winners = [{"A": "a", "B": "b"}.get(winner_of(ab, "Answer")),
                   {"A": "b", "B": "a"}.get(winner_of(ba, "Answer"))]
        records.append({"prompt": prompt, "a": a, "b": b, "winners": winners,
                        "said": [ab.text, ba.text]})
    return records


def winner_of(sample, what):
    """"A", "B" or None: a verdict that was cut off has no winner."""
    return words.parse_winner(sample.text, what) if sample.finished else None


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
    said = drawn(model, tokenizer, asked, label, settings["max_verdict_tokens"], seed=seed,
                 temperature=settings["temperature"], top_p=settings["top_p"])
    for (i, m, n), verdict in zip(places, said):
        winner = winner_of(verdict, "Judgment")
        verdicts[i][m][n] = {"A": 1, "B": -1, None: 0}[winner]
    return verdicts


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
    judge, *places = (Path(place).resolve() for place in (args.judge, args.a, args.b))
    if judge in places or judge in [place.parent for place in places]:
        lines.append("The judge is one of the two: models prefer their own answers.")
    lines.append("These figures are this judge's opinion on these prompts. They are not "
                 "AlpacaEval's nor any other leaderboard's, whose judges and prompts are others.")
    return "\n".join(lines)


def repeat(args, measure):
    """`eval.py repeat RUN`: a line for each iteration whose judgments were compared.

    measure: eval.measure_repeats.
    """
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
        figures = measure(battles, repeats)
        total, (before, now) = figures["comparisons"], figures["unparsed"]
        print(f"iteration {t}: another winner in {percent(figures['winner_changed'])} of the "
              f"comparisons, another best or worst judgment for "
              f"{percent(figures['pair_changed'])} of {len(battles)} answers; without a winner "
              f"before {before}, now {now} of {total} comparisons")


def percent(value):
    return "-" if value is None else f"{value:.1%}"
