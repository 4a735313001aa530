"""How far are you? `python course/grade.py [TASK ...]` runs the checks of the exercises (all, or
some by their numbers) on your files, and says what to do next.

A table: the task, how many of its checks pass, the first thing that is wrong, and a hint, the
further the more of them pass. --solutions: the same of the solutions.
"""

import re
import subprocess
import sys
import tempfile
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "course" / "exercise.md").read_text()


def tasks():
    """{number: (title, name of its file)} from the page's table."""
    rows = re.findall(r"^\| (\d+) \| \[(.+?)\]\(.*?\) \| `(\w+)\.py`", PAGE, re.MULTILINE)
    return {int(number): (title, name) for number, title, name in rows}


def hints(number):
    """The hints of a task, from the first, which says least."""
    section = PAGE.split(f"\n## {number}. ")[1].split("\n## ")[0]
    found = re.findall(r"<summary>Hint \d</summary>\s*(.*?)\s*</details>", section, re.DOTALL)
    return [" ".join(hint.split()) for hint in found]


def results(name, *flags):
    """(how many checks pass, how many there are, what the first that fails says) of a task."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={file}",
             f"course/exercises/test_{name}.py", *flags],
            cwd=ROOT, capture_output=True, text=True,
        )
        if not file.exists():
            return 0, 1, done.stdout + done.stderr
        cases = list(ElementTree.parse(file).iter("testcase"))
    faults = [fault for case in cases for fault in case if fault.tag in ("failure", "error")]
    said = faults[0].get("message", "") if faults else ""
    return len(cases) - len(faults), len(cases), said


def plainly(said):
    """What a failed check says, without what pytest adds."""
    if "NotImplementedError" in said:
        return "not begun"
    noise = r"\s*$|\s*(assert|\+|where|At index|Full diff|Use -v|comparison|Obtained|Expected)"
    kept = [line for line in said.splitlines() if not re.match(noise, line)]
    lines = kept or said.splitlines()[:1]
    return "\n".join(lines[:4]).removeprefix("AssertionError: ")


def main():
    flags = [word for word in sys.argv[1:] if word.startswith("--")]
    known = tasks()
    wanted = [int(word) for word in sys.argv[1:] if word.isdigit()] or list(known)
    if unknown := set(wanted) - set(known):
        sys.exit(f"there is no task {min(unknown)}, only 1 to {max(known)}")
    finished = 0
    for number in wanted:
        title, name = known[number]
        passed, count, said = results(name, *flags)
        finished += passed == count
        print(f"{number:3}  {title:36} {passed:3} of {count:3}", flush=True)
        if passed == count:
            continue
        told = plainly(said)
        print(textwrap.indent(told, "       "))
        given = hints(number)
        if given:
            nth = min(len(given) - 1, 3 * passed // count)
            hint = f"hint {nth + 1}: {given[nth]}"
            print(textwrap.fill(hint, 96, initial_indent=" " * 7, subsequent_indent=" " * 7))
    print(f"{finished} of {len(wanted)} tasks are done")
    sys.exit(finished < len(wanted))


if __name__ == "__main__":
    main()
