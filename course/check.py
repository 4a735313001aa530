"""Holds the lecture to the code: `python course/check.py course/lecture.md`, once the two runs at
its top are made.

    ```python dpo.py dpo_loss     an excerpt: its lines stand in that function (or class, or at
                                  the top of the module) one after the other;
                                  a line "..." leaves some out
    ```pycon                      a worked example, run as a doctest; all share their names
    ```console                    a command after "$ ", run in the repository's root, and lines
                                  that it prints in this order; "..." as above
"""

import ast
import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fences(page):
    """(line number, the words after the backticks, the text) of each fenced block."""
    for block in re.finditer(r"^```(.+)\n((?:.*\n)*?)```$", page, re.MULTILINE):
        yield page[: block.start()].count("\n") + 1, block[1].split(), block[2]


def source(file, name):
    """The text of a module, or of a function or class in it, "Class.method" included."""
    text = (ROOT / file).read_text()
    node = ast.parse(text)
    for part in name.split(".") if name else []:
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]) if name else text


def in_order(expected, lines):
    """The first expected line that does not stand in `lines` where it should, right after the one
    before or, after "...", later; None: all do.
    """
    place, skip = 0, True
    for line in expected:
        if line.strip() == "...":
            skip = True
            continue
        here = lines.index(line, place) if line in lines[place:] else None
        if here is None or (not skip and here != place):
            return line
        place, skip = here + 1, False
    return None


def excerpt_faults(page):
    """Excerpts that are not in the code: a line on each."""
    for number, (language, *where), text in fences(page):
        if language == "python" and where:
            code = textwrap.dedent(
                source(where[0], where[1] if len(where) > 1 else "")
            ).splitlines()
            missing = in_order(text.splitlines(), code)
            if missing is not None:
                yield f"line {number}: {' '.join(where)} has no line, at this place: {missing}"


def example_faults(page):
    """Worked examples that come out otherwise: what doctest says."""
    examples = "\n".join(text for _, (language, *_), text in fences(page) if language == "pycon")
    test = doctest.DocTestParser().get_doctest(examples, {}, "examples", None, 0)
    said = io.StringIO()
    if (
        test.examples
        and doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
        .run(test, out=said.write)
        .failed
    ):
        yield said.getvalue()


def output_faults(page):
    """Commands that print something else."""
    for number, (language, *_), text in fences(page):
        if language == "console":
            command, *expected = text.splitlines()
            program = command.removeprefix("$ ").replace("python ", f"{sys.executable} ", 1)
            done = subprocess.run(
                program,
                shell=True,
                cwd=ROOT,
                capture_output=True,
                text=True,
                env={**os.environ, "TQDM_DISABLE": "1"},
            )
            missing = in_order(
                [line.rstrip() for line in expected],
                [line.rstrip() for line in (done.stdout + done.stderr).splitlines()],
            )
            print(
                f"line {number}: {command}: {'as it stands' if missing is None else 'differs'}",
                file=sys.stderr,
            )
            if missing is not None:
                yield f"line {number}: {command} does not print, at this place: {missing}"


def main():
    page = Path(sys.argv[1]).read_text()
    sys.path.insert(0, str(ROOT))
    with contextlib.chdir(ROOT):
        faults = [*excerpt_faults(page), *example_faults(page), *output_faults(page)]
    print("\n".join(faults) or "everything is as it stands there")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
