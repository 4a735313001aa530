"""IFEval (Zhou et al. 2023, arXiv 2311.07911): how many verifiable instructions are followed."""
import re
from pathlib import Path

import numpy as np

from harness.checks import VERIFIERS, bare, check_check, meets, meets_loosely
from harness.files import iterations, read_jsonl, write_jsonl
from harness.models import answer_tokens, drawn, load_alone

LEVELS = ("prompts, strict", "instructions, strict", "prompts, loose", "instructions, loose")
PUBLISHED = """\
Published for Llama-3-8B-Instruct (prompts, strict): 70.6 %, after Self-Rewarding 74.1 %, after
Meta-Rewarding 75.4 % (an independent replication: SPaR, arXiv 2412.11605, table 1)."""


def ifeval(args, bootstrap):
    """`eval.py ifeval`: answers IFEval's questions greedily, and prints four shares for each model.

    bootstrap: eval.bootstrap. Intervals are over prompts; of several models the last is compared
    with the first, prompt by prompt.
    """
    questions = read_questions(args.questions)[:args.limit]
    unusable = unusable_verifiers(questions)
    for question in questions:
        question["checks"] = [check for check in question["checks"]
                              if bare(check["id"]) not in unusable]
    checked = [question for question in questions if question["checks"]]
    columns = {}
    for model in models_of(args.models):
        answers = answers_to(model, questions, args)
        columns[model] = followed(checked, answers)
        cut = sum(not answer["finished"] for answer in answers.values())
        print(f"{model}: {len(answers)} answers, {cut} of them cut off or without room in the "
              "model's context")
    count = sum(len(question["checks"]) for question in checked)
    print(f"{len(checked)} prompts, {count} instructions"
          + "".join(f"; without {name}: {why}" for name, why in unusable.items()))
    print(table(columns, bootstrap))
    print(PUBLISHED)


def read_questions(file):
    """Records of "prompt" and "checks" from IFEval's file. ValueError for any other file."""
    questions = []
    for number, record in enumerate(read_jsonl(file), 1):
        names, settings = record.get("instruction_id_list"), record.get("kwargs")
        whole = isinstance(names, list) and isinstance(settings, list)
        if not whole or len(names) != len(settings) or not isinstance(record.get("prompt"), str):
            raise ValueError(f"--questions {file}, line {number}: needs \"prompt\", "
                             "\"instruction_id_list\" and \"kwargs\", as IFEval's input_data.jsonl")
        checks = []
        for name, arguments in zip(names, settings):
            given = {key: value for key, value in arguments.items() if value is not None}
            checks.append({"id": name, **given})
            check_check(checks[-1])
        questions.append({"prompt": record["prompt"], "checks": checks})
    if not questions:
        raise ValueError(f"--questions {file}: there is no such file, or nothing in it")
    return questions


def unusable_verifiers(questions):
    """{verifier: what it lacks} of those whose package, or its data, is not there."""
    samples = {bare(check["id"]): check for question in questions for check in question["checks"]}
    unusable = {}
    for name, check in samples.items():
        try:
            meets(check, "One sentence.")
        except (ValueError, LookupError) as error:
            lacks = re.search(r"pip install \w+|nltk\.download\('\w+'\)", str(error))
            unusable[name] = lacks[0] if lacks else str(error).strip().splitlines()[0]
    assert unusable.keys() <= VERIFIERS.keys()
    return unusable


def models_of(names):
    """The models that are meant: of a run's folder all its iterations, in order."""
    models = []
    for name in names:
        folders = iterations(name) if Path(name).is_dir() else {}
        models += [str(folders[t]) for t in sorted(folders)] or [name]
    return models


def answers_to(model, questions, args):
    """{prompt: {"response", "finished"}}: from --out where they are there, else by the model."""
    file = Path(args.out) / f"{model.strip('/').replace('/', '-')}.jsonl" if args.out else None
    known = {}
    if file:
        known = {record["prompt"]: record for record in read_jsonl(file)}
    missing = [question["prompt"] for question in questions if question["prompt"] not in known]
    if missing:
        network, tokenizer = load_alone(model, args.bits)
        samples = drawn(network, tokenizer, missing, f"{model}: answers",
                        args.max_new_tokens or answer_tokens(model), temperature=0)
        for prompt, sample in zip(missing, samples):
            known[prompt] = {"prompt": prompt, "response": sample.text,
                             "finished": sample.finished}
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(file, known.values())
    return {question["prompt"]: known[question["prompt"]] for question in questions}


def followed(questions, answers):
    """For each prompt how many of its instructions were followed: an array (prompts, 3).

    Its columns are how many it has, followed strictly, followed loosely.
    """
    rows = []
    for question in questions:
        text, checks = answers[question["prompt"]]["response"], question["checks"]
        rows.append([len(checks), sum(meets(check, text) for check in checks),
                     sum(meets_loosely(check, text) for check in checks)])
    return np.array(rows)


def shares(rows):
    """The four shares of LEVELS, and their mean, from the rows of `followed`."""
    count, strict, loose = rows.T
    four = [np.mean(strict == count), strict.sum() / count.sum(),
            np.mean(loose == count), loose.sum() / count.sum()]
    return np.array([*four, np.mean(four)])


def table(columns, bootstrap):
    """The shares of each model in percent, with 95 % intervals."""
    rows = [[name] for name in (*LEVELS, "mean of the four")]
    arrays = list(columns.values())
    if len(arrays) > 1:
        columns = columns | {"last - first": None}
    for column in columns.values():
        for i, row in enumerate(rows):
            if column is None:
                value = shares(arrays[-1])[i] - shares(arrays[0])[i]
                low, high = bootstrap(lambda a, b: shares(b)[i] - shares(a)[i], arrays[0],
                                      arrays[-1])
                row.append(f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
            else:
                low, high = bootstrap(lambda rows: shares(rows)[i], column)
                row.append(f"{100 * shares(column)[i]:.1f} ({100 * low:.1f} to {100 * high:.1f})")
    heads = ["", *(name if len(name) < 24 else f"...{name[-20:]}" for name in columns)]
    return "\n".join(f"{first:22}" + "".join(f"{cell:>26}" for cell in cells)
                     for first, *cells in [heads, *rows])
