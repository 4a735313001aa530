"""Files of prompts and of ranked replies, in the shapes in which people have them.

JSON lines, a JSON list, CSV with a header, or a prompt a line; any of them gzipped.
"""
import csv
import gzip
import io
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

from harness.checks import check_check

PROMPTS = ("prompt", "instruction", "question", "messages", "conversations", "turns")
MATERIAL = ("input", "context")  # stands after an instruction
REPLIES = ("replies", "completions", "responses")
TEXTS = ("text", "response", "completion", "content", "answer")
SCORES = ("score", "overall_score", "rating")
USER, ASSISTANT = ("user", "human", "prompter"), ("assistant", "gpt", "model")
BINARY = {  # how files begin, what they are, what reads them
    b"PAR1": ("a parquet file", "read_parquet"), b"ARRO": ("an arrow file", "read_feather"),
}


class LeftOut(Exception):
    """A record that is whole, and of no use here: the reason, in the plural."""


# ---- from bytes to raw records

def read_text(file, flag):
    """The text of a file, unpacked if it is gzipped. ValueError that names flag and file."""
    try:
        content = Path(file).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return decoded(content)
    except IsADirectoryError:
        why = "a folder: name a file in it"
    except (gzip.BadGzipFile, EOFError, zlib.error):
        why = "a damaged gzip file"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
    raise ValueError(f"{flag} {file}: {why}")


def decoded(content):
    """Text from bytes. ValueError says what to convert them with."""
    kind, reader = BINARY.get(content[:4], (None, None))
    if kind:
        raise ValueError(f"{kind}: make JSON lines of it, as by pandas' {reader}(FILE)"
                         ".to_json(\"prompts.jsonl\", orient=\"records\", lines=True)")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("UTF-16 text: make UTF-8 of it, as by iconv -f UTF-16 -t UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None


def raw_records(file, text):
    """Yield (place, record) of each record. Raises ValueError that names the place."""
    kind = Path(str(file).removesuffix(".gz")).suffix.lower()
    if kind == ".csv":
        yield from csv_records(text)
    elif kind in (".json", ".jsonl"):
        whole = text.lstrip().startswith("[") and loaded(text)
        if isinstance(whole, list):
            yield from ((f"record {i}", record) for i, record in enumerate(whole, 1))
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                record = loaded(line)
                if record is ValueError:
                    raise ValueError(f"line {number}: not JSON")
                yield f"line {number}", record
    else:
        yield from ((f"line {number}", {"prompt": line.strip()})
                    for number, line in enumerate(text.split("\n"), 1) if line.strip())


def loaded(text):
    """What a JSON text holds; the class ValueError if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # brackets in brackets without end
        return ValueError


def csv_records(text):
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        if text.strip() and not set(PROMPTS) & set(header):
            raise ValueError("line 1: a CSV file needs a header with a column \"prompt\", "
                             "\"instruction\" or \"question\"")
        for row in rows:
            if any(cell.strip() for cell in row):
                if len(row) != len(header):
                    raise ValueError(f"line {rows.line_num}: {len(row)} cells under "
                                     f"{len(header)} columns")
                yield f"line {rows.line_num}", dict(zip(header, row))
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: no CSV ({error})") from None


# ---- what a record says

def turns_of(value):
    """A conversation as a list of (role, text), from messages, texts, or a dialogue in one text.

    None if it is none.
    """
    if isinstance(value, str):
        pieces = re.split(r"\n\n(Human|Assistant): ?", value)
        if pieces[0].strip() or len(pieces) == 1:
            return [("user", value)]
        return [(role.lower(), text) for role, text in zip(pieces[1::2], pieces[2::2])
                if text.strip()]
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(turn, str) for turn in value):  # the user's
        return [("user", text) for text in value]
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            return None
        role = turn.get("role", turn.get("from"))
        text = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            return None
        turns.append((role, text))
    return turns


def prompt_of(raw, left_out):
    """(A record's prompt, the fields it is from). What is not used of them is counted."""
    field = next((name for name in PROMPTS if name in raw), None)
    if field is None and "chosen" in raw:
        field = "chosen"
    turns = turns_of(raw.get(field))
    users = [i for i, (role, _) in enumerate(turns or ()) if role in USER]
    if not users or not turns[users[0]][1].strip():
        raise ValueError("needs \"prompt\", a text")
    left_out["system turns"] += sum(role == "system" for role, _ in turns)
    later = turns[users[0] + 1:] if field != "chosen" else turns[users[0] + 2:]
    left_out["later turns"] += len(later)
    text, fields = turns[users[0]][1], [field]
    for name in MATERIAL if field == "instruction" else ():
        if isinstance(raw.get(name), str) and raw[name].strip():
            text, fields = f"{text}\n\n{raw[name]}", [*fields, name]
    return text, fields


def number_of(raw, names):
    """The first of these fields that is there, as a number; None if it is none."""
    value = next((raw[name] for name in names if name in raw), None)
    try:
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def reply_of(raw):
    """A reply with its "text" and its "rank", 0 the best; None if it is none."""
    if not isinstance(raw, dict):
        return None
    text = next((raw[name] for name in TEXTS if name in raw), None)
    rank, score = number_of(raw, ["rank"]), number_of(raw, SCORES)
    if not isinstance(text, str) or rank is None and score is None:
        return None
    used = (*TEXTS, *SCORES)
    return {**{name: value for name, value in raw.items() if name not in used},
            "text": text, "rank": -score if rank is None else rank}


def replies_of(raw):
    """(A record's ranked replies, the fields they are from). A record may be a single reply."""
    field = next((name for name in REPLIES if isinstance(raw.get(name), list)), None)
    if field:
        return [reply_of(reply) for reply in raw[field]], [field]
    if "chosen" in raw and "rejected" in raw:
        replies = []
        for rank, name in enumerate(("chosen", "rejected")):
            turns = turns_of(raw[name])
            if turns is None:
                return None, []
            if sum(role in USER for role, _ in turns) > 1:
                raise LeftOut("dialogues of several turns")
            replies.append({"text": turns[-1][1], "rank": rank})
        return replies, ["chosen", "rejected"]
    return [reply_of(raw)], [name for name in (*TEXTS, *SCORES, "rank") if name in raw][:2]


def is_reply(reply):
    """Whether this is a reply whose judgments and comparisons, if any, are what they should be."""
    if reply is None or not isinstance(reply.get("judgment", ""), str):
        return False
    comparisons = reply.get("comparisons", [])
    return isinstance(comparisons, list) and all(map(is_comparison, comparisons))


def is_comparison(comparison):
    """Whether this has two judgments, and says which is better, the first (0) or the second (1)."""
    if not isinstance(comparison, dict) or comparison.get("better") not in (0, 1):
        return False
    judgments = comparison.get("judgments")
    return (isinstance(judgments, list) and len(judgments) == 2
            and all(isinstance(judgment, str) for judgment in judgments))


def read_record(raw, needs_replies, left_out):
    """(A record with "prompt" and perhaps "checks" and "replies", the fields these are from)."""
    if not isinstance(raw, dict):
        raise ValueError("needs \"prompt\", a text")
    prompt, fields = prompt_of(raw, left_out)
    record = {name: value for name, value in raw.items() if name not in fields}
    record["prompt"] = prompt
    if not isinstance(record.get("checks", []), list):
        raise ValueError("needs \"checks\", if any, as a list")
    for check in record.get("checks", []):
        try:
            check_check(check)
        except ValueError as error:
            raise ValueError(f"\"checks\": {error}") from None
    if needs_replies:
        replies, more = replies_of(raw)
        enough = replies and (len(replies) > 1 or more != ["replies"])
        if not enough or not all(map(is_reply, replies)):
            raise ValueError("needs \"replies\", two or more of {\"text\", \"rank\"}, rank 0 the "
                             "best")
        record["replies"], fields = replies, [*fields, *more]
    return record, fields


# ---- a whole file

def read_prompts(file, flag="--prompts", needs_replies=False):
    """Records of a prompt file, each with a "prompt", a text, and a "prompt_id", its number.

    needs_replies: each with "replies" as well, two or more of {"text", "rank"}, 0 the best. What
    was understood of a file in another shape than that, and what was left out, is said in a line on
    stderr. Raises ValueError that names file and line.
    """
    records, understood, left_out = [], Counter(), Counter()
    text = read_text(file, flag)
    try:
        for place, raw in raw_records(file, text):
            try:
                record, fields = read_record(raw, needs_replies, left_out)
            except LeftOut as error:
                left_out[str(error)] += 1
                continue
            except (ValueError, OverflowError) as error:  # OverflowError: a rank of 400 digits
                raise ValueError(f"{place}: {error}") from None
            records.append(record)
            understood[" + ".join(f"`{name}`" for name in fields)] += 1
    except ValueError as error:
        raise ValueError(f"{flag} {file}, {error}") from None
    if needs_replies:
        records = with_several_replies(records, left_out)
    if not records:
        raise ValueError(f"{flag} {file}: no prompts in it")
    say(f"{flag} {file}", understood, +left_out)
    return [{**record, "prompt_id": f"{i}"} for i, record in enumerate(records)]


def with_several_replies(records, left_out):
    """Put single replies of the same prompt together; prompts with one reply are left out."""
    together = {}
    for i, record in enumerate(records):
        single = len(record["replies"]) == 1
        whole = together.setdefault(record["prompt"] if single else i, record)
        if whole is not record:
            whole["replies"] += record["replies"]
    several = [record for record in together.values() if len(record["replies"]) > 1]
    left_out["prompts with one reply"] += len(together) - len(several)
    return several


def say(place, understood, left_out):
    """Tell what was understood, unless it is our own shape and nothing is left out."""
    ours = set(understood) <= {"`prompt`", "`prompt` + `replies`"}
    if (left_out or not ours) and os.environ.get("RANK", "0") == "0":  # torchrun's first process
        parts = ", ".join(f"{count:,} records from {fields}" for fields, count in
                          understood.items())
        without = ", ".join(f"{count:,} {what}" for what, count in left_out.items())
        print(f"{place}: {parts}" + (f"; left out: {without}" if without else ""), file=sys.stderr)
