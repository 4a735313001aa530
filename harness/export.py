"""Answers of a run's iterations in the files that the official tools of other benchmarks read."""
import hashlib
import json
import re
import time
from pathlib import Path

from harness.files import iterations, write_jsonl, write_whole
from harness.inputs import read_text
from harness.models import answer_tokens, drawn, load_alone

NEEDS = {"alpaca": "instruction", "mt-bench": "question_id and turns", "arena-hard": "question_id and turns, or uid and prompt"}


def read_questions(file, form):
    """The questions of an official file: (the texts of its turns, the record itself), one after the other."""
    text = read_text(file, "--questions")
    try:
        records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        raise ValueError(f"--questions {file}: neither a JSON list nor JSON lines") from None
    questions = []
    for number, record in enumerate(records, 1):
        try:
            if form == "alpaca":
                turns = [record["instruction"]]
            elif form == "arena-hard":
                turns = [record["prompt"]] if "uid" in record else [turn["content"] for turn in record["turns"]]
            else:
                turns = record["turns"]
            if form != "alpaca" and "uid" not in record:
                record["question_id"]
        except (KeyError, TypeError):
            turns = None
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"--questions {file}: question {number} is none of {form}: it needs {NEEDS[form]}")
        questions.append((turns, record))
    if not questions:
        raise ValueError(f"--questions {file}: no questions in it")
    return questions


def style_counts(text):
    """What Arena-Hard's style control reads: Markdown headers, list items and bold passages outside code blocks."""
    text = re.sub(r"```[^`]*```", "", text)
    return {"header_count": {f"h{n}": len(re.findall(rf"(?m)^#{{{n}}}\s", text)) for n in range(1, 7)},
            "list_count": {"ordered": len(re.findall(r"(?m)^[ \t]*\d+\.\s", text)), "unordered": len(re.findall(r"(?m)^[ \t]*[-*+]\s", text))},
            "bold_count": {"**": len(re.findall(r"\*\*[^*\n]+\*\*", text)), "__": len(re.findall(r"__[^_\n]+__", text))}}


def official(form, name, record, answers):
    """One line, or entry, of an official tool's file. answers: the Samples of the question's turns."""
    texts = [answer.text for answer in answers]
    number = record.get("uid", record.get("question_id"))
    answer_id = hashlib.sha256(f"{name}/{number}".encode()).hexdigest()[:22]
    if form == "alpaca":
        return {"instruction": record["instruction"], "output": texts[0], "generator": name, "dataset": record.get("dataset", "alpaca_eval")}
    if form == "arena-hard" and "uid" in record:
        return {"uid": number, "ans_id": answer_id, "model": name, "tstamp": time.time(),
                "messages": [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": {"answer": texts[0]}}],
                "metadata": {"token_len": len(answers[0].tokens), **style_counts(texts[0])}}
    turns = texts if form == "mt-bench" else [{"content": text, "token_len": len(answer.tokens)} for text, answer in zip(texts, answers)]
    return {"question_id": number, "answer_id": answer_id, "model_id": name, "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}


def export(args):
    """`eval.py export RUN --format ... --questions FILE`: one file per iteration."""
    run, questions = Path(args.run), read_questions(args.questions, args.format)
    there = sorted(t for t, folder in iterations(run).items() if (folder / "adapter").exists())
    if not there:
        raise ValueError(f"{run} has no iteration with an adapter: it is no run's folder, or the run has not finished iteration 0")
    missing = sorted(set(args.iterations or there) - set(there))
    if missing:
        raise ValueError(f"{run} has no adapter of iteration {missing[0]}, only of {' '.join(map(str, there))}")
    out = Path(args.out or run / "export" / args.format)
    for t in args.iterations or there:
        name = f"{run.resolve().name}-iter{t}"
        file = out / name / "model_outputs.json" if args.format == "alpaca" else out / "model_answer" / f"{name}.jsonl"
        model, tokenizer = load_alone(run / f"iter{t}", args.bits)
        said, longest = [[] for _ in questions], answer_tokens(run / f"iter{t}", args)
        for turn in range(max(len(turns) for turns, _ in questions)):
            asked = [i for i, (turns, _) in enumerate(questions) if len(turns) > turn]
            chats = [[text for k in range(turn) for text in (questions[i][0][k], said[i][k].text)] + [questions[i][0][turn]] for i in asked]
            samples = drawn(model, tokenizer, chats, f"{name}: answers" + (f", turn {turn + 1}" if args.format == "mt-bench" else ""),
                            max_new_tokens=longest, temperature=args.temperature, top_p=args.top_p, seed=[args.seed, "export", turn])
            for i, answer in zip(asked, samples):
                said[i].append(answer)
        del model
        lines = [official(args.format, name, record, answers) for (_, record), answers in zip(questions, said)]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(lines, indent=1) + "\n") if args.format == "alpaca" else write_jsonl(file, lines)
        unfinished = [answer for answers in said for answer in answers if not answer.finished]
        none = sum(not answer.tokens for answer in unfinished)
        print(f"{file}: {len(lines)} questions, {len(unfinished) - none} answers cut off after {longest} tokens, "
              f"{none} empty since there was no room for them")
