"""`eval.py judge`: labelled pairs in two shapes, and shares worked out by hand."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY

from harness.commands import compare
from harness.commands import judge as labelled
from harness.commands.judge import Pair, by_comparison, by_scores, pairs_table, read_pairs
from harness.commands.main import main as run_command
from harness.engine.chat import Chat
from harness.loading import load_tokenizer
from prompts import compare_prompt, judge_prompt
from sampling import Sample

REWARD_BENCH = [{"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "subset": "chat"},
                {"prompt": "How?", "chosen": ["So."], "rejected": ["x", "y"], "subset": "math"}]
JUDGE_BENCH = [{"question": "Why?", "response_A": "Because.", "response_B": "No.", "label": "A>B",
                "source": "s"},
               {"question": "Why?", "response_A": "No.", "response_B": "Because.", "label": "B>A",
                "source": "s"}]


def test_pairs_in_the_shapes_of_both_benchmarks(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(REWARD_BENCH))
    assert read_pairs(tmp_path / "list.json") == [
        Pair("Why?", "Because.", "No.", "chat"), Pair("How?", "So.", "x", "math"),
        Pair("How?", "So.", "y", "math")]
    talk = [{"prompt": [{"role": "user", "content": "Why?"}],
             "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
             "rejected": [{"role": "user", "content": "Why?"},
                          {"role": "assistant", "content": "No."}]}]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    assert read_pairs(tmp_path / "talk.json") == [Pair("Why?", "Because.", "No.", "other")]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(r) + "\n" for r in JUDGE_BENCH))
    assert read_pairs(tmp_path / "lines.jsonl") == [Pair("Why?", "Because.", "No.", "s")] * 2


@pytest.mark.parametrize("record", [
    {}, {"prompt": "Why?"}, {"prompt": "Why?", "chosen": "a", "rejected": 3}, 3,
    {"prompt": "Why?", "chosen": "a", "rejected": []}, {**JUDGE_BENCH[0], "label": "A=B"}])
def test_other_files_are_refused(tmp_path, record):
    (tmp_path / "p.jsonl").write_text(json.dumps(REWARD_BENCH[0]) + "\n" + json.dumps(record))
    with pytest.raises(ValueError, match=r"^--pairs .*p\.jsonl, line 2: needs \"prompt\""):
        read_pairs(tmp_path / "p.jsonl")


TOKENIZER = load_tokenizer(str(TINY))
PAIRS = [Pair(prompt, "good", "bad", subset) for prompt, subset in ("pa", "qb", "rb")]


def test_a_pair_is_right_by_its_mean_scores(monkeypatch):
    """3 and 4 against 3 and unread: 3.5 > 3. Equal means are a half; nothing read is no number."""
    said = {("p", "good"): ["3", "4"], ("p", "bad"): ["3", "?"], ("q", "good"): ["2", "4"],
            ("q", "bad"): ["3", "3"], ("r", "good"): ["1", "1"], ("r", "bad"): ["?", "?"]}

    def drawn(model, tokenizer, asked, *rest, **settings):
        scores = [score for of_answer in said.values() for score in of_answer]
        assert asked == [judge_prompt(*answer) for answer in said for _ in range(2)]
        return [Sample(f"Score: {score}", [1], True) for score in scores]

    monkeypatch.setattr(labelled, "sample_each", drawn)
    right = by_scores(None, TOKENIZER, PAIRS, "x", "x", SimpleNamespace(judgments=2, seed=0))
    assert right[:2].tolist() == [1, 0.5] and math.isnan(right[2])


def test_a_judgment_with_control_tokens_in_it_has_no_score(monkeypatch):
    """As in the method: what the text shows is not all that was drawn."""
    mark = min(Chat(TOKENIZER).marks)

    def drawn(model, tokenizer, asked, *rest, **settings):
        return [Sample("Score: 4", [mark, 7, 1] if i == 0 else [7, 1], True)
                for i in range(len(asked))]

    monkeypatch.setattr(labelled, "sample_each", drawn)
    right = by_scores(None, TOKENIZER, PAIRS, "x", "x", SimpleNamespace(judgments=1, seed=0))
    assert math.isnan(right[0]) and right[1:].tolist() == [0.5, 0.5]


def test_a_runs_own_rubric_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "run" / "iter1").mkdir(parents=True)
    (tmp_path / "rubric.txt").write_text("Give a point for brevity.\n")
    settings = {"rubric": "rubric.txt", "max_score": 1}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"settings": settings}))

    def drawn(model, tokenizer, asked, *rest, **settings):
        assert asked[0] == judge_prompt("p", "good", "Give a point for brevity.")
        return [Sample(f"Score: {score}", [1], True) for score in (1, 2, 1, 0, 1, 1)]

    monkeypatch.setattr(labelled, "sample_each", drawn)
    source = tmp_path / "run" / "iter1"
    right = by_scores(None, TOKENIZER, PAIRS, "x", source, SimpleNamespace(judgments=1, seed=0))
    assert math.isnan(right[0]) and right[1:].tolist() == [1, 0.5]  # 2 is out of this range


def test_a_pair_is_right_by_comparisons_in_both_orders(monkeypatch):
    """Shown first and then second: right twice; right once, which is a half; one unread."""
    def drawn(model, tokenizer, asked, *rest, **settings):
        assert asked == [compare_prompt(pair.prompt, *texts) for pair in PAIRS
                         for texts in (("good", "bad"), ("bad", "good"))]
        return [Sample(f"Winner: Answer {winner}", [1], True)
                for winner in ("A", "B", "A", "A", "B", "?")]

    monkeypatch.setattr(compare, "sample_each", drawn)
    right = by_comparison(None, None, PAIRS, "x")
    assert right[:2].tolist() == [1, 0.5] and math.isnan(right[2])


def test_the_table_by_subset_and_by_way():
    results = {"x": {"by scores": np.array([1, 0.5, math.nan])}}
    lines = [line.split() for line in pairs_table(PAIRS, results)]
    assert lines == [["x"], ["right", "by", "scores", "75.0%"], ["a", "(1)", "100.0%"],
                     ["b", "(2)", "50.0%"], ["undecided", "by", "scores", "1"],
                     ["unread", "by", "scores", "1"]]
    pairs = [Pair(f"{i}", "a", "b", "") for i in range(10)]
    row = pairs_table(pairs, {"x": {"w": np.ones(10)}})[1]
    assert row.split() == ["right", "w", "100.0%", "[100.0%,", "100.0%]"]


def test_the_command_says_what_it_measured(tmp_path, capsys):
    """The tiny world's seed was taught to score, and not to compare answers: none of that is read.
    """
    (tmp_path / "p.json").write_text(json.dumps([
        {"prompt": "How do I plant a tree?", "chosen": "Dig a hole. Water it well, because roots "
         "are thirsty.", "rejected": "Dig."}] * 2))
    run_command(["judge", str(TINY), "--pairs", str(tmp_path / "p.json"), "--judgments", "2"])
    said = capsys.readouterr().out
    assert "right by the mean of 2 scores" in said and "2 pairs of 1 prompts" in said
    assert said.split("unread by comparison in both orders")[1].split()[0] == "2"
    with pytest.raises(SystemExit):
        run_command(["judge", str(TINY), "--pairs", str(tmp_path / "p.json"), "--judgments", "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_a_pair_without_its_system_turn_is_none(tmp_path, capsys):
    """Its label may depend on that turn; what else a prompt lacks is told."""
    turns = [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": "Hi."}]
    sides = {"chosen": "Bonjour.", "rejected": "Hello."}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in (
        {"prompt": turns, **sides}, {"prompt": "Hi.", "system": "Answer in French.", **sides},
        {"prompt": "Hi.", "documents": {"a": "b"}, **sides})))
    pair, = read_pairs(file)
    assert pair.prompt == "Hi."
    assert "1 pairs; left out: 2 pairs with a system turn, 1 `documents` fields" in (
        capsys.readouterr().err)
