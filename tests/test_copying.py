"""course/copying.md: each piece is taken out of the project as its table says, into an empty
folder, and the document's snippet beside it prints, in a process of its own, what stands there.
"""
import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import TINY

ROOT = TINY.parent
PAGE = (ROOT / "course" / "copying.md").read_text()
PIECES = {re.sub(r" \[.*", "", name): (take, needs) for name, take, needs in
          re.findall(r"^\| (.+?) \| (`.+?) \| (.+?) \|", PAGE, re.MULTILINE)}
SNIPPETS = {name: (code, output) for name, code, output in
            re.findall(r"^### ([^\n]+)\n\n```python\n(.*?)```\n\n```\n(.*?)```$", PAGE,
                       re.MULTILINE | re.DOTALL)}


def definition(file, name):
    """The text of a function, or of an assignment at the top, in a file of the project."""
    text = (ROOT / file).read_text()
    return next(ast.get_source_segment(text, node) for node in ast.parse(text).body
                if name in (getattr(node, "name", None),
                            *(target.id for target in getattr(node, "targets", [])
                              if isinstance(target, ast.Name))))


def take(folder, what, needs):
    """Copy the files that a row of the table names, or write its imports and names to taken.py."""
    if re.fullmatch(r"(`[\w/]+\.py`(, )?)+", what):
        for file in re.findall(r"[\w/]+\.py", what):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
        return
    parts = re.findall(r"`((?:import|from) .+?)`", needs)
    for names, file in re.findall(r"((?:`\w+`(?:, )?)+) of `(\w+\.py)`", what):
        parts += [definition(file, name) for name in re.findall(r"\w+", names)]
    (folder / "taken.py").write_text("\n\n".join(parts) + "\n")


def test_there_is_a_snippet_for_each_piece():
    assert len(PIECES) == 8 and PIECES.keys() == SNIPPETS.keys()


@pytest.mark.parametrize("name", PIECES)
def test_the_piece_runs_alone(name, tmp_path):
    code, output = SNIPPETS[name]
    take(tmp_path, *PIECES[name])
    (tmp_path / "mine.py").write_text(code.replace('"tiny"', repr(str(TINY))))
    apart = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=apart | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout) == (0, output), done.stderr
