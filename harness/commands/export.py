"""A run's iterations for other tools: answers in their files, or whole models (merge.py).

AlpacaEval, Arena-Hard and MT-Bench judge such files by their own judges, which are not ours; IFEval
by its own program.
"""
import hashlib
import json
import re
import time
from pathlib import Path

from harness.commands.merge import export_model
from harness.commands.models import answer_tokens, load_alone, made_by, sample_each
from harness.files import iterations, write_jsonl, write_whole
from harness.records import read_text

NEEDS = {  # what a question has in each tool's file
    "alpaca": "instruction",
    "mt-bench": "question_id and turns",
    "arena-hard": "question_id and turns, or uid and prompt",
    "ifeval": "prompt",
}


def read_questions(file, form):
    """The questions of an official file: a list of (the texts of its turns, its record)."""
    text = read_text(file, "--questions")
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        raise ValueError(f"--questions {file}: neither a JSON list nor JSON lines") from None
    if not records:
        raise ValueError(f"--questions {file}: no questions in it")
    questions = []
    for number, record in enumerate(records, 1):
        try:
            turns = user_turns(record, form)
        except (KeyError, TypeError):
            turns = None
        good = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
        if not good:
            raise ValueError(f"--questions {file}: question {number} is none of {form}: it needs "
                             f"{NEEDS[form]}")
        questions.append((turns, record))
    return questions


def user_turns(record, form):
    """What a user says in turn. Raises KeyError or TypeError if the record is of another form."""
    if form == "alpaca":
        return ["\n\n".join(filter(None, [record["instruction"], record.get("input")]))]
    if form == "ifeval" or form == "arena-hard" and "uid" in record:  # its files since 2025
        return [record["prompt"]]
    record["question_id"]  # must be there as well
    if form == "arena-hard":
        return [turn["content"] for turn in record["turns"]]
    return record["turns"]


def style_counts(text):
    """What Arena-Hard's style control reads: Markdown headers, list items and bold passages.

    Code blocks do not count.
    """
    text = re.sub(r"```[^`]*```", "", text)

    def count(pattern):
        return len(re.findall(pattern, text, re.MULTILINE))

    return {"header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
            "list_count": {"ordered": count(r"^[ \t]*\d+\.\s"),
                           "unordered": count(r"^[ \t]*[-*+]\s")},
            "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")}}


def official(form, name, record, answers):
    """One line, or entry, of a tool's file. answers: the Samples of the question's turns."""
    texts = [answer.text for answer in answers]
    if form == "alpaca":
        return {"instruction": record["instruction"], "output": texts[0], "generator": name,
                "dataset": record.get("dataset", "alpaca_eval")}
    if form == "ifeval":
        return {"prompt": record["prompt"], "response": texts[0]}
    number = record.get("uid", record.get("question_id"))
    answer_id = hashlib.sha256(f"{name}/{number}".encode()).hexdigest()[:22]
    if form == "arena-hard" and "uid" in record:
        messages = [{"role": "user", "content": record["prompt"]},
                    {"role": "assistant", "content": {"answer": texts[0]}}]
        metadata = {"token_len": len(answers[0].tokens), **style_counts(texts[0])}
        return {"uid": number, "ans_id": answer_id, "model": name, "tstamp": time.time(),
                "messages": messages, "metadata": metadata}
    turns = texts
    if form == "arena-hard":
        turns = [{"content": answer.text, "token_len": len(answer.tokens)} for answer in answers]
    return {"question_id": number, "answer_id": answer_id, "model_id": name,
            "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}


def answer_turns(model, tokenizer, questions, label, seed, parts, **settings):
    """A list of Samples for each question: the answers to its turns, each after those before.

    parts: the file of a turn, as `sample_each` takes it. settings: as that takes them.
    """
    answers = [[] for _ in questions]
    for turn in range(max(len(turns) for turns, _ in questions)):
        asked = [i for i, (turns, _) in enumerate(questions) if len(turns) > turn]
        chats = []
        for i in asked:
            turns, _ = questions[i]
            chat = []
            for text, answer in zip(turns, answers[i]):
                chat += [text, answer.text]
            chats.append([*chat, turns[turn]])
        samples = sample_each(model, tokenizer, chats, f"{label}, turn {turn + 1}",
                              part=Path(f"{parts}{turn + 1}.part"), seed=[seed, "export", turn],
                              **settings)
        for i, answer in zip(asked, samples):
            answers[i].append(answer)
    return answers


def command(args):
    """`eval.py export RUN --format ...`: one file, or one model, per iteration."""
    run, whole = Path(args.run), args.format == "model"
    if not whole and not args.questions:
        raise ValueError(f"--format {args.format} needs --questions, its official question file")
    questions = None if whole else read_questions(args.questions, args.format)
    there = sorted(t for t, folder in iterations(run).items() if (folder / "adapter").exists())
    if not there:
        raise ValueError(f"{run} has no iteration with an adapter: it is no run's folder, or the "
                         "run has not finished iteration 0")
    missing = sorted(set(args.iterations or there) - set(there))
    if missing:
        raise ValueError(f"{run} has no adapter of iteration {missing[0]}, "
                         f"only of {' '.join(map(str, there))}")
    out = Path(args.out or run / "export" / args.format)
    for t in args.iterations or (there[-1:] if whole else there):
        name, folder = f"{run.resolve().name}-iter{t}", run / f"iter{t}"
        if whole:
            print(export_model(folder, out / name, args.bits))
            continue
        longest = args.max_new_tokens or answer_tokens(folder)
        model, tokenizer = load_alone(folder, args.bits)
        file = place_of(out, args.format, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        answers = answer_turns(model, tokenizer, questions, f"{name}: answers", args.seed,
                               f"{file}.turn", made=made_by(folder, args.bits),
                               max_new_tokens=longest, temperature=args.temperature,
                               top_p=args.top_p)
        del model  # or the next one would stand beside it
        lines = [official(args.format, name, record, said)
                 for (_, record), said in zip(questions, answers)]
        if args.format == "alpaca":
            write_whole(file, json.dumps(lines, indent=1) + "\n")
        else:
            write_jsonl(file, lines)
        for part in file.parent.glob(f"{file.name}.turn*.part"):
            part.unlink()
        flat = [answer for said in answers for answer in said]
        none = sum(not answer.tokens for answer in flat)
        cut = sum(not answer.finished for answer in flat) - none
        print(f"{file}: {len(lines)} questions, {cut} answers cut off after {longest} tokens, "
              f"{none} empty since there was no room for them")


def place_of(out, form, name):
    """The place in the folder `out` where a tool looks for the answers of a model called `name`."""
    places = {"alpaca": out / name / "model_outputs.json", "ifeval": out / f"{name}.jsonl"}
    return places.get(form, out / "model_answer" / f"{name}.jsonl")
