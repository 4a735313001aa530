"""How far are you? `python course/grade.py [TASK ...]` runs the checks of the exercises (all, or
some by their numbers) on your files, and says what to do next.

A table: the task, how many of its checks pass, and the first thing that is wrong. --hint N: the Nth
of three hints as well. --solutions: the same of the solutions.
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
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
                   f"--junitxml={file}", f"course/exercises/test_{name}.py", *flags]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not file.exists():
            return 0, 1, done.stdout + done.stderr
        cases = list(ElementTree.parse(file).iter("testcase"))
    faults = [fault for case in cases for fault in case if fault.tag in ("failure", "error")]
    said = (faults[0].text or faults[0].get("message", "")) if faults else ""
    return len(cases) - len(faults), len(cases), plainly(said, name)


def plainly(said, name):
    """What a failed check says, and where in the task's file, without what pytest adds."""
    own = re.findall(rf"^(\S*{name}\.py:\d+): in (\w+)\n +(.+)", said, re.MULTILINE)
    own = [place for place in own if f"test_{name}" not in place[0]]
    if "NotImplementedError" in said:
        return f"not begun: {own[-1][1]}" if own else "not begun"
    lines = [line.removeprefix("E").strip() for line in said.splitlines() if re.match("E ", line)]
    noise = r"$|assert |\+|where|At index|Full diff|Use -v|comparison|Obtained|Expected|\[\+"
    kept = [line for line in lines if not re.match(noise, line)] or lines
    told = "\n".join(kept[:4]).removeprefix("AssertionError: ")
    if own and "AssertionError" not in said:
        told += f"\n{own[-1][0]}: {own[-1][2]}"
    return told


def main():
    words = sys.argv[1:]
    nth = 0
    if "--hint" in words:
        place = words.index("--hint")
        nth = int((words[place + 1 :] or "1")[0])
        del words[place : place + 2]
    flags = [word for word in words if word.startswith("--")]
    known = tasks()
    wanted = [int(word) for word in words if word.isdigit()] or list(known)
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
        print(textwrap.indent(said, "       "))
        for hint in hints(number)[nth - 1 : nth] if nth else ():
            text = f"hint {nth}: {hint}"
            print(textwrap.fill(text, 96, initial_indent=" " * 7, subsequent_indent=" " * 7))
    print(f"{finished} of {len(wanted)} tasks are done")
    sys.exit(finished < len(wanted))


if __name__ == "__main__":
    main()
