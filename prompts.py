"""The words of Meta-Rewarding: the rubric, the prompt templates, the parsers that read the replies, and the files prompts come from.

Everything a model is asked and everything that is read out of its replies stands here, in our own wording; standard library only.
Left out: the chat template (that belongs to a tokenizer, see sampling.py) and any notion of what a good answer is beyond the rubric.

Templates are filled in one pass, so braces, template words and control tokens inside a question, an answer or a judgment stay plain
text. Parsers read the last line only, which the model wrote last: what an answer or a judgment quotes further up cannot steer them.
"""
import gzip
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

RUBRIC = """Give points step by step; each point comes on top of those before it, 5 in all:
- 1 point if the answer has something to do with the question, even if it is incomplete or wanders off.
- 1 more point if it covers a good part of what was asked, but not yet all of it.
- 1 more point if it settles the main parts of the question in a useful way, whoever may have written it.
- 1 more point if it speaks to the user as a helpful assistant would: to the point, complete, in a good order, with little left to improve.
- 1 more point if it could hardly be better: made for this very question, expert, easy to read, and without a superfluous word."""

JUDGE = """Score an answer to a user's question by the rubric. Give your reasons first, and end with the line "Score: n".

Rubric:
{rubric}

Question:
{question}

Answer:
{response}

Give your reasons, then the line "Score: n"."""

META_JUDGE = """Two judgments scored the same answer to a user's question by the rubric. Decide which one applies the rubric more \
correctly; neither its length nor its place is a merit. Give your reasons first, and end with the line "Winner: Judgment A" or \
"Winner: Judgment B".

Rubric:
{rubric}

Question:
{question}

Answer:
{response}

Judgment A:
{judgment_a}

Judgment B:
{judgment_b}

Give your reasons, then the winner."""

COMPARE = """Which of two answers to a user's question is better? Prefer the one that does more of what was asked, correctly and in a way that the \
user can act on; neither its length nor its place is a merit. Give your reasons first, and end with the line "Winner: Answer A" or "Winner: \
Answer B".

Question:
{question}

Answer A:
{answer_a}

Answer B:
{answer_b}

Give your reasons, then the winner."""

NEW_TASK = """Here are some tasks that people gave to an assistant:

{tasks}

Write one more task that somebody might give. It should differ from all of these in subject and in kind, and it must be possible to \
do it in writing, with nothing else at hand. Begin with "Task:" and write nothing after the task."""

MARKUP = r"[\s*_`\"']*"  # what models put around the words of their last line
END = rf"{MARKUP}(?:\.{MARKUP})?"  # never two MARKUPs in a row, which take quadratic time on a long run of stars


def fill(template, **texts):
    """Put `texts` where the template says {name}, all at once: what is put in is never looked at again."""
    return re.sub(r"\{(\w+)\}", lambda match: texts[match[1]], template)


def judge_prompt(question, response, rubric=RUBRIC):
    """The user turn that asks for a judgment of `response`: reasons, then "Score: n" (method, step 2)."""
    return fill(JUDGE, rubric=rubric, question=question, response=response)


def meta_judge_prompt(question, response, judgment_a, judgment_b, rubric=RUBRIC):
    """The user turn that asks which judgment is better: reasons, then "Winner: Judgment A" or "B" (method, step 5).

    The judgments come last, so that all comparisons of one answer share everything before them.
    """
    return fill(META_JUDGE, rubric=rubric, question=question, response=response, judgment_a=judgment_a, judgment_b=judgment_b)


def compare_prompt(question, answer_a, answer_b):
    """The user turn that asks which answer is better: reasons, then "Winner: Answer A" or "B". No part of the method: `eval.py compare`."""
    return fill(COMPARE, question=question, answer_a=answer_a, answer_b=answer_b)


def new_task_prompt(tasks):
    """The user turn that asks for one more task like `tasks` (a list of texts; the paper shows 8)."""
    return fill(NEW_TASK, tasks="\n\n".join(f"Task: {task}" for task in tasks))


def last_line(text):
    lines = text.rstrip().splitlines()
    return lines[-1] if lines else ""


def parse_score(judgment, max_score=5):
    """The score in 0..max_score on the last line of a judgment, or None if it is malformed or out of range."""
    number = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"
    pattern = rf"{MARKUP}Score{MARKUP}:{MARKUP}{number}(?:\s*(?:/|out of)\s*([0-9]{{1,9}}))?(?:\s*points?)?{END}"
    match = re.fullmatch(pattern, last_line(judgment), re.IGNORECASE)
    if match is None or (match[2] is not None and float(match[2]) != max_score):
        return None
    score = float(match[1])
    return score if score <= max_score else None


def parse_winner(verdict, of="Judgment"):
    """"A" or "B" from the last line of a meta-judgment, or None if it names no winner or more than one. of: what was compared."""
    match = re.fullmatch(rf"{MARKUP}Winner{MARKUP}:{MARKUP}(?:{of}\s+)?([AB]){END}", last_line(verdict), re.IGNORECASE)
    return match[1].upper() if match else None


def parse_task(reply):
    """The new task in the reply to `new_task_prompt`, or None if there is none, or more than one."""
    parts = re.split(r"^[ \t]*Task:", reply, flags=re.MULTILINE)
    return parts[1].strip() or None if len(parts) == 2 and not parts[0].strip() else None


# ---- files of prompts

def read_text(file, flag):
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {file}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def read_prompts(file, flag="--prompts", needs_replies=False):
    """Records of a prompt file: JSONL with "prompt" (and "checks", "replies"), or, in a file of any other kind, one prompt a line.

    Each gets a "prompt_id", its number. Raises ValueError that names the file and the line.
    """
    records = []
    for number, line in enumerate(read_text(file, flag).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line) if str(file).endswith((".jsonl", ".json")) else {"prompt": line.strip()}
            check_record(record, needs_replies)
        except (ValueError, RecursionError, OverflowError) as error:  # of brackets in brackets in brackets, and of huge numbers
            says = "not JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else error
            raise ValueError(f"{flag} {file}, line {number}: {says}") from None
        records.append({**record, "prompt_id": f"{len(records)}"})
    if not records:
        raise ValueError(f"{flag} {file}: no prompts in it")
    return records


def check_record(record, needs_replies):
    """Raise ValueError unless this is a prompt record that can be used."""
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise ValueError("needs \"prompt\", a text")
    if not isinstance(record.get("checks", []), list):
        raise ValueError("needs \"checks\", if any, as a list")
    for check in record.get("checks", []):
        try:
            re.compile(check)
        except (re.error, TypeError, OverflowError, RecursionError):
            raise ValueError(f"{check!r} in \"checks\" is no regular expression") from None
    replies = record.get("replies")
    if needs_replies and not (isinstance(replies, list) and len(replies) > 1 and all(
            isinstance(r, dict) and isinstance(r.get("text"), str) and isinstance(r.get("rank"), (int, float)) and math.isfinite(r["rank"])
            for r in replies)):
        raise ValueError("needs \"replies\", two or more of {\"text\", \"rank\"}, rank 0 the best")


def oasst_replies(file):
    """Ranked replies to the first turns of oasst1's English trees (its "ready trees" file)."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            prompt = json.loads(line)["prompt"]
            replies = [{"text": r["text"], "rank": r["rank"]} for r in prompt["replies"] if r.get("rank") is not None]
            if prompt["lang"] == "en" and len(replies) > 1:
                yield {"prompt": prompt["text"], "replies": replies}


class Unlike:
    """Recognises near-duplicates: texts that share at least 70 % of their words (Jaccard; cheaper than the ROUGE-L of Self-Instruct)."""

    def __init__(self, texts=()):
        self.sizes, self.holders = [], defaultdict(list)
        for text in texts:
            self.add(text)

    def add(self, text):
        """Add a text unless it is too like one that was added before; says whether it was added."""
        mine = set(re.findall(r"\w+", text.lower()))
        shared = Counter(i for word in mine for i in self.holders[word])
        if not mine or any(count >= 0.7 * (len(mine) + self.sizes[i] - count) for i, count in shared.items()):
            return False
        for word in mine:
            self.holders[word].append(len(self.sizes))
        self.sizes.append(len(mine))
        return True
