"""Checks of exercise 9: on answers of the tiny world, whose truth is known, and in a small run of
the loop.
"""

import random
import re
from itertools import combinations

import pytest

from exercises.loop import TINY, first_lines, run
from harness.checks import truth
from harness.files import read_jsonl
from harness.loading import load_tokenizer
from metareward import parse_settings
from prompts import fill, judge_prompt, parse_score
from sampling import Chat
from tiny import make
from tiny.world import PADDING

CHECKS = {
    record["prompt"]: record["checks"]
    for name in ("prompts", "eval", "ranked_eval")
    for record in read_jsonl(TINY / f"{name}.jsonl")
}


@pytest.fixture(scope="module")
def answers():
    """60 tasks with seven answers each, as the seed model gives them: [(checks, texts), ...]."""
    rng, groups = random.Random(0), []
    for _ in range(60):
        family = rng.choice(make.FAMILIES)
        name, texts = rng.choice(family["task"]), []
        for _ in range(7):
            has = make.some_elements(rng, make.HAS)
            texts.append(
                make.answer(
                    rng, family, name, has, max(rng.choices(range(4), make.PADS)[0], not has)
                )
            )
        groups.append(([fill(make.CHECKS[element], task=name) for element in make.ELEMENTS], texts))
    return groups


def pairs(answers):
    return [(checks, a, b) for checks, texts in answers for a, b in combinations(texts, 2)]


def test_the_points_of_the_text_add_up_to_ten(task):
    given = [int(points) for points in re.findall(r"^\+([0-9]+) ", task.RUBRIC, re.MULTILINE)]
    assert sum(given) == 10
    assert not re.search(r"score:|winner:|[{}]", task.RUBRIC, re.IGNORECASE), (
        "what the templates say, or might take for a slot"
    )


def test_a_run_takes_the_rubric(task, tmp_path):
    """The command line with its file is accepted, and the longest ranked reply with it leaves 400
    of 1,024 tokens for judgments.
    """
    file = tmp_path / "rubric.txt"
    file.write_text(task.RUBRIC)
    settings, _ = parse_settings(["--model", str(TINY), *task.flags(file)])
    assert settings.rubric == str(file) and settings.max_score == 10
    longest = max(
        (
            reply["text"]
            for record in read_jsonl(TINY / "ranked.jsonl")
            for reply in record["replies"]
        ),
        key=len,
    )
    assert (
        len(
            Chat(load_tokenizer(str(TINY))).prompt(
                judge_prompt("How do I store fresh herbs?", longest, file.read_text())
            )
        )
        <= 1024 - 400
    )


def test_scores_are_whole_numbers_of_the_whole_scale(task, answers):
    scores = [task.score(checks, text) for checks, texts in answers for text in texts]
    assert (
        all(score == int(score) and 0 <= score <= 10 for score in scores) and len(set(scores)) >= 8
    )
    family = make.FAMILIES[0]
    checks = [fill(make.CHECKS[element], task=family["task"][0]) for element in make.ELEMENTS]
    best = make.answer(random.Random(0), family, family["task"][0], set(make.ELEMENTS), 0)
    assert task.score(checks, best) == 10 and task.score(checks, "What a wonderful question!") <= 1


def test_the_order_of_the_truth_is_kept(task, answers):
    """An answer with more elements never scores less, nor the same: what the scale adds may only
    tell ties apart.
    """
    for checks, a, b in pairs(answers):
        more, less = (a, b) if truth(checks, a) > truth(checks, b) else (b, a)
        if truth(checks, more) > truth(checks, less):
            assert task.score(checks, more) > task.score(checks, less), (more, less)


def test_padding_earns_nothing(task, answers):
    """One more sentence of padding at the end never raises the score: chance, or what has no merit,
    may not tell ties apart.
    """
    sentences = [sentence for style in PADDING.values() for sentence in style]
    for checks, texts in answers:
        for text in texts:
            assert all(
                task.score(checks, f"{text} {sentence}") <= task.score(checks, text)
                for sentence in sentences
            ), text


def test_there_are_fewer_ties(task, answers):
    """By the five elements alone more than a quarter of all pairs tie; at most 0.7 of these may be
    left.
    """
    tied = [
        (truth(checks, a) == truth(checks, b), task.score(checks, a) == task.score(checks, b))
        for checks, a, b in pairs(answers)
    ]
    before, after = (sum(column) / len(tied) for column in zip(*tied))
    assert before > 0.25 and after <= 0.7 * before, f"ties: {before:.0%} before, {after:.0%} now"


def test_judgments_are_read_on_the_new_scale(task, answers):
    for checks, texts in answers[:10]:
        for text in texts:
            assert parse_score(task.judgment(checks, text), 10) == task.score(checks, text)
    assert any(
        parse_score(task.judgment(checks, text)) is None
        for checks, texts in answers
        for text in texts
    ), "some are above 5"


def test_the_loop_runs_on_the_new_scale(task, tmp_path):
    """One iteration on six prompts with your judgments: all are valid, and there are scores that
    the old scale does not have.
    """
    file = tmp_path / "rubric.txt"
    file.write_text(task.RUBRIC)
    records = run(
        tmp_path / "run",
        "--model",
        TINY,
        "--iters",
        1,
        "--no-eft",
        "--no-meta-judge",
        "--judgments",
        1,
        "--prompts-per-iter",
        6,
        "--epochs",
        1,
        "--eval-prompts",
        first_lines("eval.jsonl", 6, tmp_path),
        "--ranked",
        first_lines("ranked_eval.jsonl", 4, tmp_path),
        *task.flags(file),
        judge=lambda question, answer, number: task.judgment(CHECKS[question], answer),
    )
    judge = records[1]["judge"]
    assert (
        judge["valid_rate"] == 1
        and max(map(float, judge["histogram"])) > 5
        and judge["human_agreement"] == 1
    )
    pairs = read_jsonl(tmp_path / "run" / "iter1" / "pairs.jsonl")
    assert pairs and all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
