"""A run's iterations for other tools: answers in their files, or whole models (merge.py).

AlpacaEval, Arena-Hard and MT-Bench judge such files by their own judges, which are not ours; IFEval
by its own program.
"""
import hashlib
import json
import re
import time
from collections import Counter, namedtuple
from pathlib import Path

from harness.commands.merge import export_model
from harness.commands.models import benchmark_tokens, load_alone, made_by, sample_each
from harness.files import iterations, write_jsonl, write_whole
from harness.records import each_record

# needs: what a question has, in words. turns(record): what a user says in turn; KeyError or
# TypeError if the record has another form. line(name, record, answers): the line, or entry, of the
# tool's file; answers are the Samples of the turns. place: where the tool looks for that file.
# tokens: how long an answer may be, as the tool's own scripts have it.
Format = namedtuple("Format", "needs turns line place tokens")


def read_questions(file, form):
    """The questions of a tool's file: a list of (the texts of its turns, its record)."""
    def read(record):
        try:
            turns = FORMATS[form].turns(record)
        except (KeyError, TypeError):
            turns = None
        if not (isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)):
            raise ValueError(f"no question of {form}, which needs {FORMATS[form].needs}")
        return turns, record

    questions = [question for _, question in each_record(file, "--questions", read, Counter())]
    if not questions:
        raise ValueError(f"--questions {file}: no questions in it")
    return questions


# ---- AlpacaEval, IFEval, MT-Bench, Arena-Hard

def alpaca_turns(record):
    return ["\n\n".join(filter(None, [record["instruction"], record.get("input")]))]


def alpaca_line(name, record, answers):
    return {"instruction": record["instruction"], "output": answers[0].text, "generator": name,
            "dataset": record.get("dataset", "alpaca_eval")}


def ifeval_turns(record):
    return [record["prompt"]]


def ifeval_line(name, record, answers):
    return {"prompt": record["prompt"], "response": answers[0].text}


def bench_turns(record):
    record["question_id"]  # must be there as well
    return record["turns"]


def bench_line(name, record, answers):
    return as_choice(name, record, [answer.text for answer in answers])


def arena_turns(record):
    if "uid" in record:  # its files since 2025
        return [record["prompt"]]
    record["question_id"]  # must be there as well
    return [turn["content"] for turn in record["turns"]]


def arena_line(name, record, answers):
    if "uid" not in record:
        return as_choice(name, record, [{"content": answer.text, "token_len": len(answer.tokens)}
                                        for answer in answers])
    text = answers[0].text
    messages = [{"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": {"answer": text}}]
    metadata = {"token_len": len(answers[0].tokens), **style_counts(text)}
    return {"uid": record["uid"], "ans_id": answer_id(name, record["uid"]), "model": name,
            "tstamp": time.time(), "messages": messages, "metadata": metadata}


def as_choice(name, record, turns):
    """A line as FastChat's tools have it."""
    number = record["question_id"]
    return {"question_id": number, "answer_id": answer_id(name, number), "model_id": name,
            "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}


def answer_id(name, number):
    return hashlib.sha256(f"{name}/{number}".encode()).hexdigest()[:22]


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


FORMATS = {  # a new one: here, and its name in flags.py. alpaca: as most models of its leaderboard
    # have it, ifeval: as lm-evaluation-harness
    "alpaca": Format("instruction", alpaca_turns, alpaca_line, "{name}/model_outputs.json", 2048),
    "arena-hard": Format("question_id and turns, or uid and prompt", arena_turns, arena_line,
                         "model_answer/{name}.jsonl", 4096),
    "mt-bench": Format("question_id and turns", bench_turns, bench_line,
                       "model_answer/{name}.jsonl", 1024),
    "ifeval": Format("prompt", ifeval_turns, ifeval_line, "{name}.jsonl", 1280),
}


# ---- the command

def answer_turns(model, tokenizer, questions, label, seed, parts, **settings):
    """A list of Samples for each question: the answers to its turns, each after those before.

    parts: for each turn the file that keeps its answers meanwhile. settings: as `sample_each` takes
    them.
    """
    answers = [[] for _ in questions]
    for turn, part in enumerate(parts):
        asked = [i for i, (turns, _) in enumerate(questions) if len(turns) > turn]
        chats = []
        for i in asked:
            turns, _ = questions[i]
            chat = [one for text, answer in zip(turns, answers[i]) for one in (text, answer.text)]
            chats.append([*chat, turns[turn]])
        samples = sample_each(model, tokenizer, chats, f"{label}, turn {turn + 1}",
                              part=part, seed=[seed, "export", turn], **settings)
        for i, answer in zip(asked, samples):
            answers[i].append(answer)
    return answers


def command(args):
    """`eval.py export RUN --format ...`: one file, or one model, per iteration."""
    run, whole = Path(args.run), args.format == "model"
    if not whole and not args.questions:
        raise ValueError(f"--format {args.format} needs --questions, the tool's question file")
    questions = None if whole else read_questions(args.questions, args.format)
    there = sorted(t for t, folder in iterations(run).items() if (folder / "adapter").exists())
    if not there:
        raise ValueError(f"{run} has no iteration with an adapter: it is no run's folder, or the "
                         "run has not finished iteration 0")
    missing = sorted(set(args.iterations or there) - set(there))
    if missing:
        raise ValueError(f"{run} has no adapter of iteration {missing[0]}, "
                         f"only of {' '.join(map(str, there))}")
    out, parts = Path(args.out or run / "export" / args.format), []
    for t in args.iterations or (there[-1:] if whole else there):
        name, folder = f"{run.resolve().name}-iter{t}", run / f"iter{t}"
        if whole:
            print(export_model(folder, out / name, args.bits))
            continue
        form = FORMATS[args.format]
        longest = args.max_new_tokens or benchmark_tokens(folder, form.tokens)
        model, tokenizer = load_alone(folder, args.bits)
        file = out / form.place.format(name=name)
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = [Path(f"{file}.turn{turn + 1}.part")
                for turn in range(max(len(turns) for turns, _ in questions))]
        answers = answer_turns(model, tokenizer, questions, f"{name}: answers", args.seed,
                               kept, made=made_by(folder, args.bits),
                               max_new_tokens=longest, temperature=args.temperature,
                               top_p=args.top_p)
        del model  # or the next one would stand beside it
        lines = [form.line(name, record, said) for (_, record), said in zip(questions, answers)]
        if file.suffix == ".json":
            write_whole(file, json.dumps(lines, indent=1) + "\n")
        else:
            write_jsonl(file, lines)
        parts += kept
        flat = [answer for said in answers for answer in said]
        none = sum(not answer.tokens for answer in flat)
        cut = sum(not answer.finished for answer in flat) - none
        print(f"{file}: {len(lines)} questions, {cut} answers cut off after {longest} tokens, "
              f"{none} empty since there was no room for them")
    for part in parts:  # all is written
        part.unlink()
