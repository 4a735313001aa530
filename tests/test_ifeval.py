"""`eval.py ifeval`, the command: its shares by the official checkers, what it keeps and refuses.

The verifiers themselves are tested in test_checks.py.
"""
import json
import re
import shutil

import pytest
from conftest import TINY, flip, with_lora
from if_verifiable.common import get_loose_transformations
from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

from harness.commands.ifeval import shares_table
from harness.commands.main import main as run_command
from harness.commands.models import benchmark_tokens
from harness.files import read_jsonl
from harness.loading import load
from harness.training import save_adapter

ASKED = {  # of the tiny model; some are met, some are not, and some only by the loose reading
    "punctuation:no_comma": {},
    "length_constraints:number_words": {"relation": "at least", "num_words": 30},
    "keywords:existence": {"keywords": ["keep"]},
    "startend:end_checker": {"end_phrase": "clean."},
    "keywords:forbidden_words": {"forbidden_words": ["reason", "example"]},
    "startend:quotation": {},
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Twenty-four questions with two instructions each, in IFEval's form."""
    tasks = [json.loads(line)["prompt"] for line in (TINY / "prompts.jsonl").open()][:24]
    names = list(ASKED)
    file = tmp_path_factory.mktemp("ifeval") / "input_data.jsonl"
    with file.open("w") as out:
        for key, prompt in enumerate(tasks):
            ids = [names[key % 6], names[(key + 1 + key // 6) % 6]]
            out.write(json.dumps({"key": key, "prompt": prompt, "instruction_id_list": ids,
                                  "kwargs": [ASKED[name] for name in ids]}) + "\n")
    return file


def official(questions, answers):
    """The four shares by the official checkers, in the order of the table."""
    met = {reading: [] for reading in ("strict", "loose")}
    for line in questions.open():
        question = json.loads(line)
        text = answers[question["prompt"]]
        for reading in met:
            row = []
            for name, arguments in zip(question["instruction_id_list"], question["kwargs"]):
                checker = INSTRUCTION_DICT[name](name)
                checker.build_description(**arguments)
                texts = [text] if reading == "strict" else get_loose_transformations(text)
                row.append(any(bool(one.strip()) and checker.check_following(one) for one in texts))
            met[reading].append(row)
    shares = []
    for rows in met.values():
        whole = [all(row) for row in rows]
        every = [one for row in rows for one in row]
        shares += [sum(whole) / len(whole), sum(every) / len(every)]
    return shares


def ask(questions, out, *flags):
    run_command(["ifeval", str(TINY), "--questions", str(questions), "--out", str(out),
                 "--max-new-tokens", "60", *flags])


def test_the_shares_are_those_of_the_official_checkers(questions, tmp_path, capsys):
    ask(questions, tmp_path)
    table = capsys.readouterr().out
    answers = {record["prompt"]: record["response"]
               for record in read_jsonl(tmp_path / "tiny.jsonl")}
    expected = official(questions, answers)
    assert 0 < expected[0] < expected[1] < 1, "all or none would say little"
    for name, share in zip(["prompt-level, strict", "instruction-level, strict",
                            "prompt-level, loose", "instruction-level, loose"], expected):
        row = next(line for line in table.splitlines() if line.startswith(name))
        assert f"{share:.1%} [" in row, (name, row)
    assert "24 prompts with 48 instructions checked; 95 % intervals" in table
    assert "75.4%" not in table, "the figures of Llama-3-8B say nothing of another model"


def test_what_no_question_can_be_checked_for_has_no_share():
    """Where each prompt has an instruction that cannot be checked, none is known to be followed
    whole, and the mean of the four measures nothing.
    """
    asked = [{"prompt": f"{i}", "checks": [{"id": "punctuation:no_comma"}],
              "missing": [("language:response_language", "needs a package")]} for i in range(12)]
    answers = {"x": {f"{i}": {"response": "a, b" if i < 3 else "a b"} for i in range(12)}}
    rows = {line[:25].strip(): line[25:].split() for line in shares_table(asked, answers)}
    assert rows["prompt-level, strict"] == rows["mean of the four"] == ["-"]
    assert rows["instruction-level, strict"][0] == "75.0%"


def test_llama_s_published_figures_stand_below_its_own(questions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("harness.commands.ifeval.base_name",
                        lambda model: "meta-llama/Meta-Llama-3-8B-Instruct")
    ask(questions, tmp_path)
    assert "75.4%" in capsys.readouterr().out


def test_answers_may_be_as_long_as_ifeval_expects(tmp_path):
    """1,280 tokens, or half of a smaller context: not the limit under which a run trained."""
    assert benchmark_tokens(str(TINY), 1280) == 512
    config = json.loads((TINY / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert benchmark_tokens(str(tmp_path), 1280) == 1280


def test_what_is_kept_is_not_asked_again(questions, tmp_path, capsys, monkeypatch):
    """And a torn last line is."""
    ask(questions, tmp_path)
    first, file = capsys.readouterr().out, tmp_path / "tiny.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-20])
    ask(questions, tmp_path)
    assert capsys.readouterr().out == first and file.read_text() == whole
    monkeypatch.setattr("harness.commands.ifeval.load_alone", None)
    ask(questions, tmp_path)
    assert capsys.readouterr().out == first


def test_a_run_s_models_stand_side_by_side_with_their_difference(questions, tmp_path, capsys):
    """The second adapter makes another model, with other answers and other shares."""
    for t, fresh in enumerate((True, False)):
        model = with_lora(load(str(TINY))[0], fresh=fresh)
        save_adapter(model, tmp_path / "x" / f"iter{t}" / "adapter")
    run_command(["ifeval", str(tmp_path / "x"), "--questions", str(questions), "--out",
                 str(tmp_path / "answers"), "--max-new-tokens", "60"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["x-iter0", "x-iter1"] and "x-iter1 - x-iter0" in head
    first, second = (read_jsonl(file) for file in sorted((tmp_path / "answers").iterdir()))
    assert [one["response"] for one in first] != [one["response"] for one in second]
    differences = []
    for row in rows[:4]:
        one, other, difference = map(float, re.findall(r"([-+]?\d+\.\d)% \[", row))
        differences.append(difference)
        assert abs(other - one - difference) < 0.11
    assert any(differences)
    cut = next(row for row in rows if row.startswith("answers cut off")).split()
    assert cut[3:] == [str(sum(not one["finished"] for one in said)) for said in (first, second)]


@pytest.mark.parametrize("line, says", [
    ('{"prompt": "a"}', 'question 1: needs "instruction_id_list"'),
    ('{"prompt": "a", "instruction_id_list": ["none:such"], "kwargs": [{}]}', "is no verifier"),
    ('{"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []}',
     "one for each instruction"),
    ("{", "line 1: not JSON"),
])
def test_files_of_another_form_are_refused(tmp_path, capsys, line, says):
    file = tmp_path / "questions.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(SystemExit) as stop:
        ask(file, tmp_path / "out")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and says in error


def test_answers_made_otherwise_are_not_mixed(questions, tmp_path, capsys):
    ask(questions, tmp_path)
    with pytest.raises(SystemExit):
        run_command(["ifeval", str(TINY), "--questions", str(questions), "--out", str(tmp_path),
                     "--max-new-tokens", "61"])
    assert "made with another max_new_tokens" in capsys.readouterr().err


def test_answers_of_another_model_of_the_same_name_are_not_taken(questions, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(TINY, tmp_path / place / "mine", ignore=shutil.ignore_patterns("judge"))
    flip(tmp_path / "b" / "mine" / "model.safetensors")
    arguments = ["--questions", str(questions), "--limit", "1", "--max-new-tokens", "5", "--out",
                 str(tmp_path / "answers")]
    run_command(["ifeval", str(tmp_path / "a" / "mine"), *arguments])
    with pytest.raises(SystemExit):
        run_command(["ifeval", str(tmp_path / "b" / "mine"), *arguments])
