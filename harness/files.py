"""JSON and JSON lines, read and written: no file is half written, and a damaged one is named."""
import hashlib
import json
import os
import re
from pathlib import Path


def read_json(file, kind=None, notes=None):
    """The content of a JSON file. kind: dict or list, if it must be one.

                        missing                damaged, or of another kind
    file                FileNotFoundError      ValueError that names it
    file, kind          an empty one           ValueError that names it
    file, kind, notes   an empty one, noted    an empty one, noted
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if kind is None:
            raise
        if notes is not None:
            notes.append(f"{file} is missing")
        return kind()
    except OSError as error:
        if notes is None:
            raise
        why = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        why = "not JSON; put it back from a copy"
    else:
        if kind is None or isinstance(content, kind):
            return content
        why = f"no JSON {'list' if kind is list else 'record'}; put it back from a copy"
    if notes is None:
        raise ValueError(f"{file}: {why}")
    notes.append(f"{file}: {why}")
    return kind()


def each_line(file, notes=None):
    """The records of a JSONL file, one after the other; none if there is no such file.

    A last line without its newline is left out: the process died while it wrote that line. Any
    other line that is no JSON record raises ValueError with its number. If a list `notes` is given,
    it is told instead, and is told of a missing file and a torn line as well.
    """
    strict, notes = notes is None, [] if notes is None else notes
    try:
        lines = open(file, "rb")
    except FileNotFoundError:
        notes.append(f"{file} is missing")
        return
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                notes.append(f"{file}, line {number}: torn, left out")
                return
            try:
                record, why = json.loads(line), "no record"
            except (ValueError, RecursionError):
                record, why = None, "not JSON"
            if isinstance(record, dict):
                yield record
            elif strict:
                raise ValueError(f"{file}, line {number}: {why}: "
                                 "put the file back from a copy, or take the line out")
            else:
                notes.append(f"{file}, line {number}: {why}, left out")


def read_jsonl(file, notes=None):
    """The records of a JSONL file as a list; `each_line` says what of damaged lines."""
    return list(each_line(file, notes))


def write_whole(file, content):
    """Write text or bytes beside the file's place and rename: it is never half there."""
    temporary = Path(f"{file}.part")
    if isinstance(content, str):
        content = content.encode("utf-8", errors="replace")
    with open(temporary, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())  # or after a power cut the name might be there and the content not
    os.replace(temporary, file)


def write_jsonl(file, records):
    """Write records as a JSONL file that is never half there."""
    write_whole(file, "".join(json.dumps(record) + "\n" for record in records))


def iterations(run):
    """{t: the folder of iteration t} of a run."""
    return {int(folder.name[4:]): folder for folder in Path(run).glob("iter*")
            if re.fullmatch("iter[0-9]+", folder.name)}


def sha256(file):
    """The SHA-256 of a file of any size, in hexadecimal digits."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def digest(data):
    """A few hexadecimal digits that tell data (whatever JSON can hold) from other data."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:8]
