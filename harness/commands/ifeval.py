"""`eval.py ifeval`: how often models do what IFEval's questions ask for, told by its verifiers.

Answers are greedy. Questions are the user's own copy of IFEval's input_data.jsonl, or any file of
that form; harness/checks.py says how each instruction is verified.
"""
import os
from collections import Counter
from pathlib import Path

import numpy as np

from eval import FEWEST, bootstrap
from harness.checks import Missing, check_check, loose, meets
from harness.commands.export import FORMATS
from harness.commands.models import benchmark_tokens, check_base, load_alone, made_by, models_of
from harness.loading import base_name
from harness.records import read_prompts
from harness.stage import read_kept, sample_items, tell_too_long

MEASURES = ["prompt-level, strict", "instruction-level, strict", "prompt-level, loose",
            "instruction-level, loose", "mean of the four"]
PUBLISHED = ("Published for Llama-3-8B-Instruct (arXiv 2412.11605, Table 1), prompt-level, strict: "
             "70.6%, after Self-Rewarding 74.1%, after Meta-Rewarding 75.4%.")


# ---- questions

def read_instructions(file, limit=None):
    """The questions of a file, or the first of them, as `question_of` gives them."""
    questions = []
    for number, record in enumerate(read_prompts(file, "--questions")[:limit], 1):
        try:
            questions.append(question_of(record))
        except ValueError as error:
            raise ValueError(f"--questions {file}: question {number}: {error}") from None
    if not any(question["checks"] for question in questions):
        _, why = questions[0]["missing"][0]
        raise ValueError(f"--questions {file}: none of the instructions can be checked: {why}")
    return questions


def question_of(record):
    """Its "prompt", "checks", and of instructions that cannot be checked "missing", (type, why)."""
    ids, arguments = record.get("instruction_id_list"), record.get("kwargs")
    lists = isinstance(ids, list) and isinstance(arguments, list) and len(ids) == len(arguments)
    if not lists or not ids or not all(isinstance(given, dict) for given in arguments):
        raise ValueError("needs \"instruction_id_list\" and \"kwargs\", one for each instruction")
    checks, missing = [], []
    for name, given in zip(ids, arguments):
        check = {key: value for key, value in given.items() if value is not None} | {"id": name}
        try:
            check_check(check)
            checks.append(check)
        except Missing as error:
            missing.append((name, str(error)))
    return {"prompt": record["prompt"], "checks": checks, "missing": missing}


# ---- answers

def answers_to(prompts, name, model, args):
    """{prompt: the model's record}. --out keeps them as they end, and what it has is not redone."""
    longest = args.max_new_tokens or benchmark_tokens(model, FORMATS["ifeval"].tokens)
    label = f"{name}: answers"
    made = {"max_new_tokens": longest}
    if args.out:
        check_base(model)
        made |= made_by(model, args.bits)

    def read(item, samples):
        (sample,), = samples
        return {"prompt": item["id"], "response": sample.text, "finished": sample.finished,
                "tokens": len(sample.tokens), **made}

    file = Path(args.out) / f"{name}.jsonl" if args.out else os.devnull
    known = read_kept(file, made, key="prompt") if args.out else {}
    left = [{"id": prompt} for prompt in dict.fromkeys(prompts) if prompt not in known]
    if left:
        sample_items(*load_alone(model, args.bits), left, lambda item: [item["id"]], read, 1,
                     label, file, known, max_new_tokens=longest, temperature=0)
        tell_too_long(label, [known[item["id"]] for item in left], longest)
    return known


# ---- figures

def count(questions, answers):
    """What was met, and of how many: an array (questions, 4 measures, 2)."""
    counts = []
    for question in questions:
        text, checks = answers[question["prompt"]]["response"], question["checks"]
        row, whole = [], not question["missing"]
        for reading in (meets, loose):
            met = [reading(check, text) for check in checks]
            row += [[whole and all(met), whole], [sum(met), len(met)]]
        counts.append(row)
    return np.array(counts, dtype=float)


def shares(counts):
    """The five measures, in 0..1."""
    met, total = counts.sum(0).T  # (4,) each
    four = np.divide(met, total, out=np.full(4, np.nan), where=total > 0)  # NaN: none was measured
    return np.append(four, four.mean())


def gain(first, last):
    return shares(last) - shares(first)


def column(statistic, columns, sign=""):
    """A column of the table: a statistic's five values, with intervals of enough questions."""
    texts = []
    for measure, value in enumerate(statistic(*columns)):
        text = "-" if np.isnan(value) else f"{value:{sign}.1%}"
        if len(columns[0]) >= FEWEST and text != "-":
            low, high = bootstrap(lambda *rows: statistic(*rows)[measure], *columns)
            if low <= high:  # else some draws had nothing to measure
                text += f" [{low:{sign}.1%}, {high:{sign}.1%}]"
        texts.append(text)
    return texts


def shares_table(questions, answers):
    """The table's lines. answers: {name: {prompt: record}}."""
    counts = {name: count(questions, known) for name, known in answers.items()}
    columns = []
    for name, known in answers.items():
        said = [known[question["prompt"]] for question in questions]
        no_room = sum(record.get("tokens") == 0 for record in said)
        cut = sum(record.get("finished") is False for record in said) - no_room
        columns.append([name, *column(shares, [counts[name]]), f"{cut}", f"{no_room}"])
    if len(counts) > 1:
        first, *_, last = counts
        columns.append([f"{last} - {first}",
                        *column(gain, [counts[first], counts[last]], "+"), "", ""])
    names = ["", *MEASURES, "answers cut off", "prompts too long"]
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join([f"{name:25}", *(f"{text:{width}}" for text, width in zip(row, widths))])
            .rstrip() for name, *row in zip(names, *columns)]


def left_out(questions):
    """A line for each reason why instructions could not be checked."""
    missing = [pair for question in questions for pair in question["missing"]]
    lines = []
    for why in dict.fromkeys(why for _, why in missing):
        types = Counter(name for name, reason in missing if reason == why)
        told = ", ".join(f"{number} {name}" for name, number in types.items())
        lines.append(f"left out: {told}, and the prompts with them at prompt level: {why}")
    return lines


def command(args):
    """`eval.py ifeval RUN_OR_MODEL... --questions FILE`."""
    questions, models = read_instructions(args.questions, args.limit), models_of(args.models)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    for line in left_out(questions):
        print(line, flush=True)
    prompts = [question["prompt"] for question in questions]
    answers = {name: answers_to(prompts, name, model, args) for name, model in models.items()}
    print("\n".join(shares_table(questions, answers)))
    about = ("95 % intervals by bootstrap over prompts" if len(questions) >= FEWEST
             else "too few for intervals")
    print(f"{len(questions)} prompts with {sum(len(one['checks']) for one in questions)} "
          f"instructions checked; {about}")
    if any("llama-3-8b" in base_name(model).lower() for model in models.values()):
        print(PUBLISHED)
