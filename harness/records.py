"""Files of prompts and of ranked replies, in the shapes in which people have them.

JSON lines, a JSON list, CSV with a header, or a prompt a line; any of them gzipped.
"""
import csv
import functools
import gzip
import io
import json
import math
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

from harness.checks import check_check

PROMPTS = ("prompt", "instruction", "question", "messages", "conversations", "conversation",
           "turns")
MATERIAL = ("input", "context", "contexts", "passage", "passages", "document", "documents",
            "background")  # what a prompt is about: stands after it
REPLIES = ("replies", "completions", "responses", "answers")
TEXTS = ("text", "response", "completion", "content", "answer")
SCORES = ("score", "overall_score", "rating", "helpfulness")
USER = ("user", "human", "prompter")
BINARY = {  # how files begin, what they are, what makes JSON lines of them
    b"PAR1": ("a parquet file", "pandas.read_parquet(FILE)"),
    b"ARRO": ("an arrow file", "pandas.read_feather(FILE)"),
    b"\xff\xff\xff\xff": ("an arrow file", "datasets.Dataset.from_file(FILE)"),
}
SYSTEM = ("system", "system_prompt")
OURS = {  # fields of our own files, and of IFEval's questions: nobody need be told of them
    "prompt", "replies", "text", "ids", "truth", "rank", "finished",
    "tokens", "judgments", "scores", "score", "sampled_tokens", "too_long", "unscored",
    "previous_score", "kind", "chosen_score", "rejected_score", "chosen_rating", "rejected_rating",
    "instruction_id_list", "kwargs"}
NEVER_TOLD = {"id", "prompt_id", "question_id", "key", "checks", *SYSTEM}  # in any file
# What no reader sees: most of Unicode's default ignorable code points.
INVISIBLE = re.compile("[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
                       "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
                       "\U000e0000-\U000e0fff]")
NOT_JSON = object()  # None is JSON
MOST_NAMED = 12  # fields in a line
csv.field_size_limit(2**30)


class LeftOut(Exception):
    """A valid record that cannot be used here. The message, a plural, follows a count."""


def folded(text):
    """What two texts have in common that look the same: blanks, forms of a character (NFKC) and
    what is invisible do not count.
    """
    return " ".join(unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).split())


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
        raise ValueError(f"{kind}: make JSON lines of it, as by {reader}.to_json("
                         "\"prompts.jsonl\", orient=\"records\", lines=True)")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("UTF-16 text: make UTF-8 of it, as by iconv -f UTF-16 -t UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content[:error.start].count(b"\n")
        raise ValueError(f"line {line}: not UTF-8 text; make such of it, as by iconv -f LATIN1 -t "
                         "UTF-8, if that is what it is") from None


def raw_records(file, text):
    """Yield (place, record) of each record. Raises ValueError that names the place."""
    kind = Path(str(file).removesuffix(".gz")).suffix.lower()
    first = next((line for line in text.split("\n") if line.strip()), "")
    if kind in (".csv", ".tsv"):
        comma = ";" if first.count(";") > first.count(",") else ","  # as a spreadsheet may write
        yield from csv_records(text, "\t" if kind == ".tsv" else comma)
    elif kind in (".json", ".jsonl") or kind != ".txt" and isinstance(loaded(first), dict):
        whole = loaded(text) if kind == ".json" or first.startswith("[") else None
        if isinstance(whole, (dict, list)):
            whole = whole if isinstance(whole, list) else [whole]
            yield from ((f"record {i}", {"prompt": one} if isinstance(one, str) else one)
                        for i, one in enumerate(whole, 1))
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                record = loaded(line)
                if record is NOT_JSON:
                    raise ValueError(f"line {number}: not JSON")
                yield f"line {number}", {"prompt": record} if isinstance(record, str) else record
    else:
        yield from ((f"line {number}", {"prompt": line.strip()})
                    for number, line in enumerate(text.split("\n"), 1) if line.strip())


def loaded(text):
    """What a JSON text holds, or NOT_JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # brackets in brackets without end
        return NOT_JSON


def csv_records(text, delimiter):
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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
                # A cell may hold a list, of messages for example.
                lists = [loaded(cell) if cell.startswith("[") else None for cell in row]
                cells = [whole if isinstance(whole, list) else cell
                         for cell, whole in zip(row, lists)]
                yield f"line {rows.line_num}", dict(zip(header, cells))
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: no CSV ({error})") from None


# ---- what a record says

def turns_of(value):
    """A conversation as a list of (role, text), from messages, texts, or a dialogue in one text.

    A turn without a role is the user's; what is no turn has the role "other". None: it is none.
    """
    if isinstance(value, str):
        pieces = re.split(r"\n\n(Human|Assistant): ?", value)
        if pieces[0].strip() or len(pieces) == 1:
            return [("user", value)]
        return [(role.lower(), text) for role, text in zip(pieces[1::2], pieces[2::2])
                if text.strip()]
    if not isinstance(value, list) or not all(isinstance(turn, (str, dict)) for turn in value):
        return None
    turns = []
    for turn in value:
        turn = {"content": turn} if isinstance(turn, str) else turn
        role, text = first_of(turn, ("role", "from")), first_of(turn, ("content", "value"))
        if isinstance(text, list) and all(isinstance(part, dict) and isinstance(
                part.get("text"), str) for part in text):  # parts, all of them texts
            text = "".join(part["text"] for part in text)
        turns.append((role or "user", text) if isinstance(text, str) else ("other", ""))
    return turns


def first_of(raw, names):
    """The value of the first of these fields that has one, or None."""
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def material_of(value):
    """The text of a field that a prompt is about: a text, or a list of such. None: it is neither.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return None
    return "\n\n".join(text for text in texts if text.strip())


def has_content(value):
    return bool(value.strip() if isinstance(value, str) else value)


def prompt_of(raw, answered=False):
    """(A record's prompt, the fields it is from, how much of what kind is left out).

    answered: whether there are replies, which must not be to a later turn. Raises LeftOut or
    ValueError.
    """
    field = next((name for name in (*PROMPTS, "chosen") if raw.get(name) is not None), None)
    turns = turns_of(raw.get(field))
    if turns is None:
        found = "; there is " + ", ".join(f'"{name}"' for name in raw) if raw else ""
        raise ValueError("needs \"prompt\", a text (or \"instruction\", \"question\" or "
                         f"\"messages\"){found}")
    users = [i for i, (role, _) in enumerate(turns) if role in USER]
    if not users:
        raise LeftOut("records without a user's turn")
    if answered and len(users) > 1:
        raise LeftOut("conversations of several turns")
    text, fields = turns[users[0]][1], [field]
    if not text.strip():
        raise LeftOut("empty prompts")
    system = (sum(role == "system" for role, _ in turns)
              + any(bool(raw.get(name)) for name in SYSTEM))
    later = turns[users[0] + (2 if field == "chosen" else 1):]
    left_out = Counter({"system turns": system, "later turns": len(later)})
    for name in MATERIAL:
        material = material_of(raw.get(name, ""))
        told = isinstance(raw[field], str)  # and not in messages, which have what they need
        if material is None and has_content(raw[name]) or material and not told:
            left_out[f"`{name}` fields"] += 1
        elif material:
            fields.append(name)
            if f"\n{material}\n" not in f"\n{text}\n":  # the prompt has it already
                text = f"{text}\n\n{material}"
    return text, fields, left_out


def answer_of(value):
    """The answer in a text, a dialogue or messages that end in it. None if it is none of these."""
    turns = turns_of(value)
    if not turns:
        return None
    if sum(role in USER for role, _ in turns) > 1:
        raise LeftOut("conversations of several turns")
    role, text = turns[-1]
    if role in USER and (role, text) != ("user", value):  # a dialogue that ends in a question
        raise LeftOut("dialogues without an answer")
    return text


def number_of(raw, names):
    """The first of these fields that is there, as a number; None if it is none."""
    value = first_of(raw, names)
    try:
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def reply_of(raw):
    """A reply with its "text" and its "rank", 0 the best; None if it is none."""
    if not isinstance(raw, dict):
        return None
    text = first_of(raw, TEXTS)
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
        if not raw[field] and field != "replies":
            raise LeftOut("records without replies")
        return [reply_of(reply) for reply in raw[field]], [field]
    sides = ("chosen", "rejected")
    if all(raw.get(name) is not None for name in sides):
        texts = [answer_of(raw[name]) for name in sides]
        return (None if None in texts else
                [{"text": text, "rank": rank} for rank, text in enumerate(texts)]), [*sides]
    return [reply_of(raw)], [name for name in (*TEXTS, *SCORES, "rank") if name in raw][:2]


def brings_lesson(reply):
    """Whether a reply brings something for the warm start to train on."""
    return any(reply.get(name) for name in ("judgment", "comparisons", "demonstration"))


def check_lessons(reply):
    """ValueError if what a reply brings for the warm start is not what it should be."""
    comparisons = reply.get("comparisons", [])
    if not (isinstance(reply.get("judgment", ""), str) and isinstance(comparisons, list)
            and all(map(is_comparison, comparisons))
            and reply.get("demonstration", False) in (True, False)):
        raise ValueError("a reply's \"judgment\" must be a text, its \"comparisons\" a list of "
                         "{\"judgments\": two texts, \"better\": 0 or 1}, with a \"reason\" of one "
                         "text or two if any, its \"demonstration\" true or false")


def is_comparison(comparison):
    """Whether this has two judgments, and says which is better, the first (0) or the second (1).

    It may have a "reason", a text or two.
    """
    if not isinstance(comparison, dict) or comparison.get("better") not in (0, 1):
        return False
    reason = comparison.get("reason", "")
    return are_two(comparison.get("judgments")) and (isinstance(reason, str) or are_two(reason))


def are_two(texts):
    return (isinstance(texts, list) and len(texts) == 2
            and all(isinstance(text, str) for text in texts))


def as_record(raw, needs_replies):
    """(A record with "prompt" and perhaps "replies", the fields of these, what is left out, and
    which other fields have content).
    """
    if not isinstance(raw, dict):
        raise ValueError("needs \"prompt\", a text")
    prompt, fields, left_out = prompt_of(raw, answered=needs_replies)
    record = {name: value for name, value in raw.items() if name not in fields}
    record["prompt"], known = prompt, NEVER_TOLD | (OURS if "prompt" in raw else set())
    if not isinstance(record.get("checks", []), list):
        raise ValueError("needs \"checks\", if any, as a list")
    for check in record.get("checks", []):
        try:
            check_check(check)
        except ValueError as error:
            raise ValueError(f"\"checks\": {error}") from None
    if needs_replies:
        replies, more = replies_of(raw)
        if not replies or None in replies or (
                len(replies) == 1 and more == ["replies"] and not brings_lesson(replies[0])):
            raise ValueError("needs \"replies\", two or more of {\"text\", \"rank\"}, rank 0 the "
                             "best (or one that brings a judgment)")
        for reply in replies:
            check_lessons(reply)
        record["replies"], fields = replies, [*dict.fromkeys([*fields, *more])]
        if more != ["replies"]:  # a record that is a reply itself
            known = {*known, *TEXTS, *SCORES}
    unread = [name for name in raw if name not in known.union(fields)
              and has_content(raw[name]) and f"`{name}` fields" not in left_out]
    return record, fields, left_out, unread


# ---- a whole file

def each_record(file, flag, read, left_out):
    """Yield (its place, read(record)) for each record of a file.

    read raises LeftOut for a record that cannot be used here, which is counted in left_out, and
    ValueError for one that is wrong, which is raised with the names of file and place.
    """
    text = read_text(file, flag)
    try:
        for place, raw in raw_records(file, text):
            try:
                record = read(raw)
            except LeftOut as error:
                left_out[str(error)] += 1
                continue
            except (ValueError, OverflowError) as error:  # OverflowError: a rank of 400 digits
                raise ValueError(f"{place}: {error}") from None
            yield place, record
    except ValueError as error:
        raise ValueError(f"{flag} {file}, {error}") from None


def read_prompts(file, flag="--prompts", needs_replies=False):
    """Records of a prompt file, each with a "prompt", a text, and a "prompt_id", its number.

    needs_replies: each with "replies" as well, two or more of {"text", "rank"}, 0 the best;
    further records of prompt "7" are "7.1", "7.2"; and "places", where in the file each reply is.
    What was understood of a file in another shape than that, and what was left out, is said in a
    line on stderr. Raises ValueError that names file and line.
    """
    records, understood, left_out, unread = [], Counter(), Counter(), {}
    read = functools.partial(as_record, needs_replies=needs_replies)
    for place, (record, fields, parts, others) in each_record(file, flag, read, left_out):
        if needs_replies:
            record["places"] = [place] * len(record["replies"])
        records.append(record)
        left_out += parts
        unread |= dict.fromkeys(others)
        understood[" + ".join(f"`{name}`" for name in fields)] += 1
    if needs_replies:
        records = with_several_replies(records, left_out)
    if not records:
        raise ValueError(f"{flag} {file}: no prompts in it" + without(left_out))
    say(f"{flag} {file}", understood, left_out, [*unread])
    numbers, seen = [f"{i}" for i in range(len(records))], {}
    for i, record in enumerate(records if needs_replies else ()):
        first, count = seen.get(folded(record["prompt"]), (i, 0))
        seen[folded(record["prompt"])] = first, count + 1
        numbers[i] = f"{first}.{count}" if count else f"{i}"
    return [{**record, "prompt_id": number} for record, number in zip(records, numbers)]


def with_several_replies(records, left_out):
    """Put single replies of the same prompt together.

    Prompts with one reply are left out, unless it brings a lesson: it has no rank among others.
    """
    together = {}
    for i, record in enumerate(records):
        single = len(record["replies"]) == 1
        whole = together.setdefault(folded(record["prompt"]) if single else i, record)
        if whole is not record:
            whole["replies"] += record["replies"]
            whole["places"] += record["places"]
    several = [record for record in together.values()
               if len(record["replies"]) > 1 or brings_lesson(record["replies"][0])]
    left_out += Counter({"prompts with one reply": len(together) - len(several)})
    return several


def say(place, understood, left_out, unread):
    """Tell what was understood, unless it is our own shape and nothing is left out.

    unread: the fields that are not read.
    """
    ours = set(understood) <= {"`prompt`", "`prompt` + `replies`"}
    if left_out or unread or not ours:
        parts = ", ".join(f"{count:,} records from {fields}" for fields, count in
                          understood.items())
        names = ", ".join(f"`{name}`" for name in unread[:MOST_NAMED])
        more = f" and {len(unread) - MOST_NAMED} more" if len(unread) > MOST_NAMED else ""
        tell(f"{place}: {parts}{without(left_out)}" + f"; not read: {names}{more}" * bool(unread))


def tell(line):
    if os.environ.get("RANK", "0") == "0":  # torchrun's first process
        print(line, file=sys.stderr)


def without(left_out):
    """What was left out, in words."""
    told = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
    return f"; left out: {told}" if told else ""
