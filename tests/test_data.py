"""data/: prompts whose answers a program can check, and the script that makes them."""
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data import make
from harness.checks import check_check, meets
from harness.files import read_jsonl

DATA = Path(make.__file__).parent
FILES = {name: read_jsonl(DATA / f"{name}.jsonl")
         for name in ("verifiable", "verifiable_eval", "eval", "seeds")}
TRIED = {  # kind of demand: texts that meet it, texts that just miss it, given its own numbers
    "at most": lambda d: ([words(d)[0], "one"], [words(d)[1]]),
    "at least": lambda d: ([words(d)[0]], [words(d)[1], "one"]),
    "word": lambda d: ([quoted(d), f"It is {quoted(d).upper()}."], [quoted(d) + "ish", "none"]),
    "avoid": lambda d: (["Nobody is here."], ["Are you there?", f"It is {quoted(d, 1)}."]),
    "no comma": lambda d: (["One; two."], ["One, two."]),
    "first": lambda d: ([f"{quoted(d)} this.", f"**{quoted(d).upper()}**"], [f"A {quoted(d)}"]),
    "question": lambda d: (["Why?", "So. Why? \n"], ["Why? So.", "Why"]),
    "ending": lambda d: (["So. That is all.", "that is all.\n"], ["That is all. Bye.", "all."]),
    "postscript": lambda d: (["So.\nP.S. More."], ["So. PS more."]),
    "quotes": lambda d: (['"So."', ' "So."\n'], ['"So', "'So'"]),
    "bullets": lambda d: (["\n".join(["* a"] * n(d)), "So:\n" + "\n".join(["- a"] * n(d))],
                          ["\n".join(["* a"] * (n(d) + 1)), "* a"]),
    "paragraphs": lambda d: (["a\n***\nb"], ["a\n\nb", "a\n***\nb\n***\nc"]),
    "highlights": lambda d: (["*a* and *b c*"], ["*a*", "a * b * c"]),
    "lower": lambda d: (["so it is, 3 times."], ["So it is."]),
    "capitals": lambda d: (["SO IT IS, 3 TIMES."], ["SO IT Is."]),
    "digits": lambda d: (["2 of 10", "from 3 to 4"], ["10 of them", "two of ten"]),
    "title": lambda d: (["<<A walk>>\nIt rains."], ["<<>>", "<A walk>"]),
    "blanks": lambda d: (["Dear [name], meet [other]."], ["Dear [name]", "(a) (b)"]),
}


def n(demand):
    return demand.check["num_bullets"]


def words(demand):
    """Texts of as many words as are just enough, and just not."""
    limit = demand.check["num_words"]
    inside = limit - 1 if demand.kind == "at most" else limit
    outside = limit if demand.kind == "at most" else limit - 1
    return "word " * inside, "word " * outside


def quoted(demand, which=0):
    return re.findall('"(.*?)"', demand.phrases[0])[which]


@pytest.mark.parametrize("seed", range(3))
def test_each_demand_is_told_from_what_just_misses_it(seed):
    demands = make.demands(random.Random(seed))
    assert [demand.kind for demand in demands] == list(TRIED)
    for demand in demands:
        check_check(demand.check)
        good, bad = TRIED[demand.kind](demand)
        assert all(meets(demand.check, text) for text in good), demand
        assert not any(meets(demand.check, text) for text in bad), demand


def met(demands):
    """A text that meets demands which go together, made step by step."""
    kinds = {demand.kind: demand for demand in demands}
    text = "we wait"
    if "word" in kinds:
        text += " " + quoted(kinds["word"])
    if "digits" in kinds:
        text += " 2 or 3 times"
    if "blanks" in kinds:
        text += " [a] [b]"
    if "at least" in kinds:
        text += " more" * 60
    if "highlights" in kinds:
        text += " *a* *b*"
    if "bullets" in kinds:
        text = "\n".join([f"* {text}", *["* so"] * (n(kinds["bullets"]) - 1)])
    if "paragraphs" in kinds:
        text = f"{text}\n***\nso"
    if "title" in kinds:
        text = f"<<so>>\n{text}"
    if "first" in kinds:
        text = f"{quoted(kinds['first'])} {text}"
    text += {"question": "?", "ending": " That is all.", "postscript": "\nP.S. so"}.get(
        next((kind for kind in kinds if kind in ("question", "ending", "postscript")), ""), "")
    if "quotes" in kinds:
        text = f'"{text}"'
    if "capitals" in kinds:
        text = text.upper()
    return text


def test_no_prompt_contradicts_itself():
    """Every set of three demands that may stand together has a text that meets all of them."""
    rng = random.Random(0)
    tried = set()
    for _ in range(5_000):
        chosen = rng.sample(make.demands(rng), 3)
        kinds = frozenset(demand.kind for demand in chosen)
        if make.together(chosen) and kinds not in tried:
            tried.add(kinds)
            text = met(chosen)
            assert all(meets(demand.check, text) for demand in chosen), (sorted(kinds), text)
    assert len(tried) > 250


def test_there_are_enough_and_none_twice():
    training, held_out = FILES["verifiable"], FILES["verifiable_eval"]
    assert len(training) >= 300 and len(held_out) >= 100
    prompts = [record["prompt"] for records in FILES.values() for record in records
               if records is not FILES["eval"] or "checks" not in record]
    assert len(prompts) == len(set(prompts))
    assert max(len(record["prompt"].split()) for record in training + held_out) <= 60
    assert {len(record["checks"]) for record in training + held_out} == {3}


def test_training_and_held_out_prompts_share_no_task():
    tasks = [{record["prompt"].partition(".")[0] for record in FILES[name]}
             for name in ("verifiable", "verifiable_eval")]
    assert len(tasks[0]) >= 55 and len(tasks[1]) >= 25 and not tasks[0] & tasks[1]


def test_half_of_the_default_held_out_prompts_can_be_checked():
    verifiable = [record for record in FILES["eval"] if "checks" in record]
    assert len(verifiable) == 48 and len(FILES["eval"]) == 96
    assert all(record in FILES["verifiable_eval"] for record in verifiable)


def test_the_script_makes_these_very_files(tmp_path):
    shutil.copy(DATA / "make.py", tmp_path)
    (tmp_path / "eval.jsonl").write_text("".join(
        json.dumps(record) + "\n" for record in FILES["eval"] if "checks" not in record))
    subprocess.run([sys.executable, tmp_path / "make.py"], check=True)
    for name in ("verifiable", "verifiable_eval", "eval"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes()
