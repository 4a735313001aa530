"""benchmarks/real_model.py: its prompts and their truth, what it teaches, and what it counts."""
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.ablations import plot
from benchmarks.real_model import (
    CARELESS,
    FLAGS,
    OTHER_PLACES,
    PLACES,
    asked,
    chance,
    comparison,
    figures,
    judgment,
    lessons,
    mistaken,
    over_seeds,
    prompts,
    repeated,
    right_verdicts,
    shortness,
    table,
    written,
)
from harness.checks import meets
from harness.files import write_jsonl, write_whole
from harness.inputs import given_examples, read_prompts
from metareward import battle_matrix, elo, judge_pair
from prompts import parse_score, parse_winner
from sampling import Sample

RECORDS = prompts(PLACES, 60, random.Random(0))
GERMAN = "Der alte Leuchtturm hat viele Fenster und eine schwere Tür."
ENGLISH = "The old lighthouse has a heavy door and some windows."


def test_prompts_ask_for_what_their_checks_tell():
    assert len({record["prompt"] for record in RECORDS}) == 60
    assert all(asked(record) in record["prompt"] for record in RECORDS)
    places = [set(text.replace("\n", "|").split("|")) for text in (PLACES, OTHER_PLACES)]
    assert not places[0] & places[1]


@pytest.mark.parametrize("text, there", [
    (GERMAN, "German"), (ENGLISH, "English"), ("La posada está junto al camino.", "Spanish"),
    ("12", "another"), ("Маяк стоит на берегу моря.", "another")])
def test_the_truth(text, there):
    assert written(text) == there
    for record in RECORDS[:20]:
        [check] = record["checks"]
        if there != "another":
            assert meets(check, text) == (asked(record) == there)


def test_a_judgment_says_what_was_asked_and_what_is_there():
    assert judgment("German", "English") == "Asked: German\nWritten: English\nScore: 0"
    assert parse_score(judgment("German", "German"), 1) == 1


def test_a_careless_reader_errs_in_both_directions():
    assert mistaken("German", "English") == mistaken("German", "Dutch") == "German"
    assert mistaken("German", "German") == "English"


def test_one_judgment_of_a_comparison_is_right_and_the_other_is_not():
    for wanted, there, score in (("German", "English", 0), ("German", "German", 1)):
        two = comparison(wanted, there)
        right, wrong = two["judgments"]
        assert two["better"] == 0 and right == judgment(wanted, there)
        assert parse_score(right, 1) == score and parse_score(wrong, 1) == 1 - score
        assert there in two["reason"]


def test_what_is_taught(tmp_path):
    """Of each prompt three judgments, two comparisons in both orders, and an answer that has ended,
    in the language asked for if there is one, in a file that --eft takes. Some of the judgments are
    wrong, no verdict is.
    """
    records = [{**record, "prompt_id": f"{i}"} for i, record in enumerate(RECORDS)]
    answers = [[Sample(GERMAN, [1], False), Sample(ENGLISH, [1], True),
                Sample(GERMAN, [1], True), Sample(ENGLISH, [1], True)]] * 60
    write_jsonl(tmp_path / "taught.jsonl", lessons(records, answers, random.Random(0)))
    taught = read_prompts(tmp_path / "taught.jsonl", "--eft", needs_replies=True)
    said = [line["completion"][0]["content"] for line in given_examples(taught, "", 1, Counter())]
    german = sum(asked(record) == "German" for record in RECORDS)
    assert (said.count(GERMAN), said.count(ENGLISH)) == (german, 60 - german)
    judged = [(-reply["rank"], -reply["rank"] != parse_score(reply["judgment"], 1))
              for record in taught for reply in record["replies"] if "judgment" in reply]
    assert len(judged) == 180
    for score, name in enumerate(("wrong", "right")):
        off = np.mean([wrong for of, wrong in judged if of == score]) - CARELESS[name]
        assert abs(off) < 0.15
    verdicts = [text for text in said if parse_winner(text)]
    assert len(verdicts) == 240 and sum(parse_winner(text) == "A" for text in verdicts) == 120
    assert {text.splitlines()[0] for text in verdicts} == {
        "The text is in German.", "The text is in English."}


def test_figures_of_a_run(tmp_path):
    judged = {"prompt_id": "0", "text": ENGLISH, "judgments": [
        {"text": "Asked: German\nWritten: English\nScore: 0", "score": 0},
        {"text": "Score: 1", "score": 1}]}
    for t, text in enumerate((ENGLISH, GERMAN)):
        (tmp_path / f"iter{t}").mkdir()
        write_jsonl(tmp_path / f"iter{t}" / "eval.jsonl", [{**judged, "text": text, "truth": t}])
    write_jsonl(tmp_path / "iter1" / "eval_judge.jsonl", [{**judged, "truth": 1}])
    judge = '{"truth_agreement": 0.75, "ties": 0.5, "valid_rate": 1}'
    rest = '"pairs": {"actor": 3, "judge": 1}'
    write_whole(tmp_path / "summary.json", f"""[
        {{"judge": {judge}, "meta_judge": null, {rest}}},
        {{"judge": {judge}, "meta_judge": {{"truth_accuracy": 0.8}}, {rest}}}]""")
    rows = figures(tmp_path, range(2))
    assert rows["judge: truth_agreement"] == [0.75, 0.75]
    assert rows["judge: names the language"] == [0.5, 0.5]
    assert rows["judge: right where it is 0"][0] == 0.5 and np.isnan(
        rows["judge: right where it is 1"][0])
    assert np.isnan(rows["meta-judge: right"][0]) and rows["meta-judge: right"][1] == 0.8
    assert rows["actor pairs"] == [3, 3]


def test_what_stands_in_for_judge_and_meta_judge():
    """Verdicts of the truth: the nearer score wins, equal ones have no winner."""
    run, saved = SimpleNamespace(settings=SimpleNamespace(seed=0)), []
    run.save = lambda t, name, records: saved.extend(records)
    [record] = right_verdicts(run, 1, [{"id": "0/1", "scores": [0, 1, 0], "truth": 1}])
    assert record["verdicts"] == [[0, -1, 0], [1, 0, 1], [0, -1, 0]] and saved == [record]
    assert len(record["said"]) == 4  # two judgments alike are not compared
    assert judge_pair(elo(battle_matrix(record["verdicts"], 1, 1)), [1, 1, 1])[0] == 1
    answers = [{"id": "0", "text": "a bc"}, {"id": "1", "text": "a"}]
    assert shortness(run, 1, answers, "") == [-4, -1]
    first, second = chance(run, 1, answers, "")
    assert first != second and [first, second] == chance(run, 1, answers, "")


def test_means_over_seeds_and_what_is_more_than_by_chance():
    results = {("judge", 0): [[0, 0], [1, 1]], ("judge", 1): [[0, 1], [1, 1]],
               ("control", 0): [[0, 0], [0, 1]], ("checks", 1): [[0, 1], [1, 1]]}
    results = {key: np.array(rows) for key, rows in results.items()}
    means = over_seeds(results)
    assert {key: rows.tolist() for key, rows in means.items()} == {
        ("judge", "mean"): [[0, 0.5], [1, 1]],
        ("judge - control", "mean"): [[0, 0], [1, 0]]}
    *_, last = table(results, 1)
    assert last.startswith("| judge - control | mean | 0.000 (0.000 to 0.000) | 0.500 ")


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
