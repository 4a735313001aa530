"""benchmarks/real_model.py: the judgments it makes for the warm start, and how it counts marks."""
import random

import numpy as np
import pytest

from benchmarks.real_model import (
    DEMANDS,
    comparison,
    judgment,
    kind_of,
    lessons,
    marks_right,
    prompts,
)
from data import make
from harness.checks import meets
from prompts import parse_score
from sampling import Sample

RECORDS = prompts(make.TASKS, random.Random(0))
SHORT = "Today a simple thing."
LONG = "Once there was a bright morning, and a careful friend, and a bridge, and a song. " * 3


def true_score(record, text):
    return sum(meets(check, text) for check in record["checks"])


@pytest.mark.parametrize("text, long", [(SHORT, False), (LONG, True)])
def test_made_judgments_are_a_hurried_reader_s(text, long):
    """One mark in ten is wrong; of a long answer a quarter of what is missing is seen as there."""
    rng, wrong, seen, missing = random.Random(1), [], [], []
    for record in RECORDS:
        said, score = judgment(record, text, long, rng)
        *lines, last = said.splitlines()
        assert len(lines) == DEMANDS and parse_score(said, DEMANDS) == score
        assert [line[:3] for line in lines] == ["1. ", "2. ", "3. ", "4. "]
        assert last == f"Score: {score}"
        for line, check in zip(lines, record["checks"]):
            met, mark = meets(check, text), not line.endswith("not met")
            if met:
                wrong.append(not mark)
            else:
                (seen if long else wrong).append(mark)
                missing.append(mark)
    assert abs(np.mean(wrong) - 0.1) < 0.04
    if long:  # 0.1 + 0.9 * 0.25
        assert abs(np.mean(seen) - 0.325) < 0.06


def test_the_better_of_two_made_judgments_is_mostly_nearer_to_the_truth():
    rng, nearer = random.Random(2), []
    for record in RECORDS:
        two = comparison(record, LONG, True, rng)
        if two:
            off = [abs(parse_score(said, DEMANDS) - true_score(record, LONG))
                   for said in two["judgments"]]
            nearer.append(off[two["better"]] < off[1 - two["better"]])
    assert len(nearer) > 100 and abs(np.mean(nearer) - 0.9) < 0.05


def test_what_is_taught():
    """A judgment of each answer, an answer of each prompt if it has ended, and comparisons in both
    orders for some.
    """
    records = [{**record, "prompt_id": f"{i}"} for i, record in enumerate(RECORDS[:30])]
    answers = [[Sample(SHORT, [1], True), Sample(LONG, [1], False)]] * 30
    lines = lessons(records, answers, random.Random(0))
    said = [line["completion"][0]["content"] for line in lines]
    assert said.count(SHORT) == 30 and LONG not in said
    assert sum(parse_score(text, DEMANDS) is not None for text in said) == 60
    verdicts = [text for text in said if text.startswith("Winner")]
    assert len(verdicts) % 2 == 0 and 2 <= len(verdicts) <= 20
    assert verdicts.count("Winner: Judgment A") == len(verdicts) / 2
    assert len(lines) == 30 + 60 + len(verdicts)


def test_every_kind_of_demand_has_a_name():
    kinds = {kind_of(check) for record in RECORDS for check in record["checks"]}
    assert kinds == {"less than", "at least", "no_comma", "question", "first word", "word"}


def test_marks_are_counted_by_demand():
    """Of two judgments, one says that the first demand is met, which it is, and one that it is not;
    a third has no score and a fourth no mark, and do not count. M_1 has said nothing readable.
    """
    checks = {"0": [{"id": "no_comma"}, r"(?i)\bwarm\b"]}
    judgments = [{"text": "1. met\n2. not met\nScore: 1", "score": 1},
                 {"text": "1. not met\n2. not met\nScore: 0", "score": 0},
                 {"text": "1. not met\n2. met", "score": None},
                 {"text": "1. not met\n2. unclear\nScore: 0", "score": 0}]
    answer = {"prompt_id": "0", "text": "It is cold."}
    rights = marks_right([[answer | {"judgments": judgments}],
                          [answer | {"judgments": [{"text": "Good.", "score": None}]}]], checks)
    assert rights.keys() == {"no_comma", "always no_comma", "word", "always word", "judgments read"}
    assert rights["no_comma"][0] == 0.5 and rights["always no_comma"][0] == 1
    assert rights["word"][0] == rights["always word"][0] == 1
    assert rights["judgments read"] == [0.5, 0]
    assert all(np.isnan(rights[name][1]) for name in rights if name != "judgments read")
