"""benchmarks/real_model.py: its prompts and their truth, what it teaches, and what it counts."""
import random
import re

import numpy as np
import pytest

from benchmarks.ablations import plot
from benchmarks.real_model import (
    DEMANDS,
    FLAGS,
    OTHER_PLACES,
    PLACES,
    asked,
    comparison,
    figures,
    ideal_meta_judge,
    judgment,
    lessons,
    lines_right,
    prompts,
    repeated,
    written,
)
from harness.checks import meets
from harness.files import write_jsonl, write_whole
from harness.inputs import given_examples, read_prompts
from prompts import parse_score, parse_winner
from sampling import Sample

RECORDS = prompts(PLACES, 60, random.Random(0))
GERMAN = "Der alte Leuchtturm hat 12 Fenster und eine schwere Tür."
ENGLISH = "The old lighthouse has a heavy door and some windows."
RECORD = {"prompt": "Describe a lighthouse ...", "prompt_id": "0", "checks": [
    {"id": "response_language", "language": "de"},
    r"(?s)\A(?=\W*(?:\w+\W+){3}\w).*(?<!\d)12(?!\d)"]}


def test_prompts_ask_for_what_their_checks_tell():
    assert len({record["prompt"] for record in RECORDS}) == 60
    for record in RECORDS:
        language, number = asked(record)
        assert language in record["prompt"] and number in record["prompt"].split(
            "number ")[1] and len(record["checks"]) == DEMANDS
    places = [set(text.replace("\n", "|").split("|")) for text in (PLACES, OTHER_PLACES)]
    assert not places[0] & places[1]


@pytest.mark.parametrize("text, there, met", [
    (GERMAN, ("German", "12"), [True, True]),
    (ENGLISH, ("English", "none"), [False, False]),
    (GERMAN.replace("12", "112"), ("German", "112"), [True, False]),
    (ENGLISH + " 7 of 12.", ("English", "12"), [False, True]),
    ("Unterschiedliche Sehenswürdigkeiten 12", ("German", "12"), [True, False])])
def test_the_truth(text, there, met):
    assert asked(RECORD) == ("German", "12")
    assert written(RECORD, text) == there
    assert [meets(check, text) for check in RECORD["checks"]] == met


def test_a_judgment_says_what_was_asked_and_what_is_there():
    said = judgment(RECORD, ENGLISH, 0, random.Random(0))
    assert said == "Asked: German, 12\nWritten: English, none\nScore: 0"
    assert parse_score(judgment(RECORD, GERMAN, 0, random.Random(0)), DEMANDS) == DEMANDS
    assert lines_right(RECORD, ENGLISH, said) == [True, True, True]
    assert lines_right(RECORD, GERMAN, said) == [True, False, False]
    assert lines_right(RECORD, GERMAN, "It is good.\nScore: 2") == [False] * 3


def test_a_hurried_reader_sees_what_he_was_asked_for():
    """Of two things that are missing, each is seen as there as often as he is lenient."""
    rng = random.Random(1)
    scores = [parse_score(judgment(RECORD, ENGLISH, 0.4, rng), DEMANDS) for _ in range(1000)]
    assert abs(np.mean(scores) - 0.8) < 0.06
    assert judgment(RECORD, GERMAN, 0.4, rng).endswith("Score: 2")


def test_one_judgment_of_a_comparison_is_right_and_the_other_is_not():
    for seed in range(50):
        two = comparison(RECORD, ENGLISH, random.Random(seed))
        right, wrong = two["judgments"]
        assert two["better"] == 0
        # Each order's reason says what is there, and then what either judgment says of it.
        one, other = (said.splitlines()[1] for said in two["judgments"])
        assert two["reason"] == [f"Written: English, none\nA: {a}\nB: {b}"
                                 for a, b in ((one, other), (other, one))]
        assert all(lines_right(RECORD, ENGLISH, right))
        assert sorted(lines_right(RECORD, ENGLISH, wrong)) == [False, True, True]


def test_what_is_taught(tmp_path):
    """Three judgments of each prompt's answers, a comparison in both orders, and an answer that
    has ended, in a file that --eft takes.
    """
    records = [{**record, "prompt_id": f"{i}"} for i, record in enumerate(RECORDS[:30])]
    answers = [[Sample(GERMAN, [1], True)] * 2 + [Sample(ENGLISH, [1], True)]
               + [Sample("To the end.", [1], i < 20)] for i in range(30)]
    write_jsonl(tmp_path / "taught.jsonl", lessons(records, answers, random.Random(0)))
    taught = read_prompts(tmp_path / "taught.jsonl", "--eft", needs_replies=True)
    said = [line["completion"][0]["content"] for line in given_examples(taught, "", DEMANDS)]
    assert said.count("To the end.") == 20
    assert sum(parse_score(text, DEMANDS) is not None for text in said) == 90
    verdicts = [text for text in said if parse_winner(text)]
    assert len(verdicts) == 60 and all(text.startswith("Written: English, ") for text in verdicts)
    assert sum(parse_winner(text) == "A" for text in verdicts) == 30


def test_the_ideal_meta_judge_goes_by_the_truth(tmp_path):
    class Saved:
        def save(self, t, name, records):
            assert (t, name, len(records)) == (1, "battles.jsonl", 1)
    record, = ideal_meta_judge(Saved(), 1, [{"scores": [2, 1, 0], "truth": 1}])
    assert record["verdicts"] == [[0, -1, 0], [1, 0, 1], [0, -1, 0]]


def test_figures_of_a_run(tmp_path):
    judged = {"prompt_id": "0", "text": ENGLISH, "judgments": [
        {"text": "Asked: German, 12\nWritten: English, 12\nScore: 1", "score": 1},
        {"text": "Score: 2", "score": 2}]}
    for t, text in enumerate((ENGLISH, GERMAN)):
        (tmp_path / f"iter{t}").mkdir()
        write_jsonl(tmp_path / f"iter{t}" / "eval.jsonl",
                    [{**judged, "text": text, "truth": 2 * t}])
    write_jsonl(tmp_path / "iter1" / "eval_judge.jsonl", [{**judged, "truth": 1}])
    judge = '{"truth_agreement": 0.75, "ties": 0.5, "valid_rate": 1}'
    rest = '"pairs": {"actor": 3, "judge": 1}'
    write_whole(tmp_path / "summary.json", f"""[
        {{"judge": {judge}, "meta_judge": null, {rest}}},
        {{"judge": {judge}, "meta_judge": {{"truth_accuracy": 0.8}}, {rest}}}]""")
    rows = figures(tmp_path, range(2), {"0": RECORD})
    assert rows["answers: language"] == [0, 1] and rows["answers: number"] == [0, 1]
    assert rows["judge: truth_agreement"] == [0.75, 0.75]
    assert rows["judge: names the language"] == [0.5, 0.5]
    assert rows["judge: names the number"] == [0, 0]
    assert rows["judge: scores that are the true one"] == [0, 0.5]
    assert np.isnan(rows["meta-judge: right"][0]) and rows["meta-judge: right"][1] == 0.8
    assert rows["actor pairs"] == [3, 3]


def test_the_plot_has_room_for_every_kind(tmp_path):
    plot({"share": {kind: np.array([[0.5, 0.6], [0.4, 0.6]]) for kind in FLAGS}},
         tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    places = sorted(float(re.search(rf'translate\([\d.]+ ([\d.]+)\)">{kind}<', drawn)[1])
                    for kind in FLAGS)
    assert min(np.diff(places)) > 20  # two lines of text


@pytest.mark.parametrize("text, share", [("", 0), ("a b c d", 0), ("12 12 12 12.", 0.75),
                                         ("One, one and two", 0.25)])
def test_repeated_words(text, share):
    assert repeated(text) == share
