"""course/: what the lecture quotes stands in the code, its examples come out as written, the
exercises' checks tell starters from solutions, the notebooks run, and the README's map of the code
counts right.
"""
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import TINY
from nbclient import NotebookClient

ROOT = TINY.parent
sys.path.insert(0, str(ROOT / "course"))
import check  # noqa: E402

LECTURE = (ROOT / "course" / "lecture.md").read_text()


def test_excerpts_stand_in_the_code():
    assert list(check.excerpt_faults(LECTURE)) == []
    assert len([1 for _, (language, *where), _ in check.fences(LECTURE) if language == "python"
                and where]) >= 10


def test_an_excerpt_that_is_not_in_the_code_is_found():
    """A changed word, two lines that do not follow each other, the lines in another order."""
    good = ("```python dpo.py dpo_loss\n    chosen_rewards = beta * (policy_chosen - "
            "ref_chosen)\n...\n"
            "    return losses, chosen_rewards.detach(), rejected_rewards.detach()\n```\n")
    assert list(check.excerpt_faults(good)) == []
    lines = good.splitlines(keepends=True)
    for bad in (good.replace("beta *", "beta +"), good.replace("...\n", ""),
                "".join([lines[0], lines[3], lines[2], lines[1], lines[4]])):
        assert len(list(check.excerpt_faults(bad))) == 1


def test_worked_examples_come_out_as_written():
    assert list(check.example_faults(LECTURE)) == []
    assert list(check.example_faults("```pycon\n>>> 1 + 1\n3\n```\n")) != []


def test_every_equation_stands_beside_the_lines_that_compute_it():
    excerpts = "".join(text for _, (language, *where), text in check.fences(LECTURE)
                       if language == "python" and where)
    for tag in ("[E1]", "[E2]", "[E3]", "[E4]", "[E5]"):
        assert f"# {tag}" in excerpts and LECTURE.count(tag) > excerpts.count(tag), tag


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"),
                 *(ROOT / "course").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def exercises(*flags):
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                           "course/exercises", *flags], cwd=ROOT,
                          capture_output=True, text=True)


def test_the_solutions_pass_their_checks():
    done = exercises("--solutions")
    assert done.returncode == 0 and re.search(r"\d\d passed", done.stdout), done.stdout


def test_every_check_fails_on_its_starter():
    """Not one passes by itself, and none fails for want of a file."""
    done = exercises()
    assert done.returncode == 1 and re.search(r"^\d+ failed(, \d+ warnings?)? in",
                                              done.stdout.splitlines()[-1]), done.stdout


def test_grades_name_what_passes_what_is_wrong_and_a_hint():
    def grade(*words):
        return subprocess.run([sys.executable, "course/grade.py", *words], cwd=ROOT,
                              capture_output=True, text=True)

    done = grade("2", "--solutions")
    assert done.returncode == 0 and "1 of 1 tasks are done" in done.stdout, done.stdout
    begun = grade("2", "--hint", "3")
    assert begun.returncode == 1 and "0 of   5" in begun.stdout, begun.stdout
    assert "not begun: dpo_loss" in begun.stdout and "hint 3: `softplus(x)`" in begun.stdout
    assert "there is no task 99" in grade("99").stderr


def run_notebook(name, **changes):
    """How many pictures a notebook of the course draws, with texts of its cells changed."""
    notebook = nbformat.read(ROOT / "course" / name, as_version=4)
    for was, now in changes.values():
        assert sum(cell.source.count(was) for cell in notebook.cells) == 1, was
        for cell in notebook.cells:
            cell.source = cell.source.replace(was, now)
    NotebookClient(notebook, timeout=900, kernel_name="python3",
                   resources={"metadata": {"path": str(ROOT / "course")}}).execute()
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells
               for output in cell.get("outputs", []))


def test_the_notebook_runs_from_top_to_bottom():
    """On one thread, with a shorter warm start, five judgments instead of seven and half the
    epochs, for time.
    """
    assert run_notebook("walkthrough.ipynb",
                        threads=("torch.set_num_threads(2)", "torch.set_num_threads(1)"),
                        settings=('"iters": 1}', '"iters": 1, "eft_epochs": 1, "judgments": 5, '
                                                 '"epochs": 2}')) >= 6


def test_the_playground_runs():
    assert run_notebook("play.ipynb", iterations=("iterations=2", "iterations=1")) == 1


def test_the_real_model_s_notebook_runs_with_the_tiny_one(tmp_path):
    assert run_notebook("real_model.ipynb",
                        model=('"Qwen/Qwen2.5-Coder-0.5B-Instruct"', repr(str(TINY))),
                        out=('OUT = "runs/real-notebook"', f"OUT = {str(tmp_path)!r}"),
                        sizes=("RESPONSES = 48, 1, 32, 24, 6", "RESPONSES = 6, 1, 4, 3, 3"),
                        threads=("import metareward\n",
                                 "import metareward; torch.set_num_threads(1)\n")) == 1


def test_notebooks_fetch_the_project_where_it_is_not(tmp_path, monkeypatch):
    """By the same first cell: it does nothing here, asks for an address elsewhere, and with one
    clones and installs, which a second time (the session was restarted) does not clone again.
    """
    cells = {next(cell.source for cell in nbformat.read(file, as_version=4).cells
                  if cell.cell_type == "code") for file in (ROOT / "course").glob("*.ipynb")}
    cell, = cells
    calls = []

    def run(command, check):
        calls.append(command)
        if command[0] == "git":
            Path(command[-1]).mkdir()

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(ROOT / "course")
    exec(cell, {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="address"):
        exec(cell, {})
    assert calls == []
    known = cell.replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/it"')
    for _ in range(2):
        monkeypatch.chdir(tmp_path)
        exec(known, {})
        assert Path.cwd() == tmp_path / "metareward"
    assert [command[0] for command in calls] == ["git", sys.executable, sys.executable]
    assert "https://example.org/it" in calls[0] and "requirements.txt" in calls[1]


def test_the_map_of_the_code_counts_right():
    """README's table of files in reading order: each module of the top level is in it, once, with
    its number of lines.
    """
    rows = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(),
                           re.MULTILINE))
    assert rows == {path.name: str(len(path.read_text().splitlines()))
                    for path in ROOT.glob("*.py")}
