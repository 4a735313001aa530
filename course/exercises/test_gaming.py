"""Checks of exercise 8: two real runs of two iterations, one with your judge and one with a judge
that tells the truth, and runs on paper.

About 15 seconds each on one core. In the honest run the true score rises from 2.75 to about 4.2,
and the answers grow by a third.
"""

import copy
import functools
import random

import pytest

from exercises.loop import TINY, first_lines, run
from harness.checks import truth
from harness.files import read_jsonl
from prompts import parse_score
from tiny import make

CHECKS = {
    record["prompt"]: record["checks"]
    for name in ("prompts", "eval", "ranked_eval")
    for record in read_jsonl(TINY / f"{name}.jsonl")
}


def honest(question, answer, number):
    return f"It has these elements and no others.\nScore: {truth(CHECKS[question], answer)}"


@pytest.fixture(scope="module")
def records_of(tmp_path_factory):
    """The records of a run with a judge; each judge's run is made when it is first asked for."""

    @functools.cache
    def records_of(judge):
        folder = tmp_path_factory.mktemp("gaming")
        return run(
            folder / "run",
            "--model",
            TINY,
            "--iters",
            2,
            "--no-eft",
            "--no-meta-judge",
            "--judgments",
            1,
            "--rho",
            0,
            "--eval-prompts",
            first_lines("eval.jsonl", 20, folder),
            "--ranked",
            first_lines("ranked_eval.jsonl", 8, folder),
            judge=judge,
        )

    return records_of


def without_truth(records):
    records = copy.deepcopy(records)
    for record in records:
        for role in ("actor", "judge"):
            record[role] = {
                name: value for name, value in record[role].items() if not name.startswith("truth")
            }
    return records


def on_paper(own, true, characters, people, with_length):
    """Records with these figures, a value for each model: of the actor, then the judge's Spearman
    with people and of its score with length.
    """
    return [
        {
            "iteration": t,
            "actor": {
                "mean_score": own[t],
                "truth": true[t],
                "mean_length": characters[t],
                "cut_off": 0,
            },
            "judge": {
                "mean_score": own[t],
                "human_spearman": people[t],
                "human_agreement": (1 + people[t]) / 2,
                "human_agreement_with_ties": people[t] / 2,
                "length_correlation": with_length[t],
                "truth_length_correlation": 0.75,
                "truth_agreement": (1 + people[t]) / 2,
                "valid_rate": 1.0,
                "ties": 0.1,
                "histogram": {"3": 10},
            },
        }
        for t in range(len(own))
    ]


def test_the_judge_is_a_function_and_does_not_punish_elements(task):
    """300 answers of the tiny world and each with one more element at its end: the score, always
    readable, does not fall.
    """
    rng = random.Random(0)
    for _ in range(300):
        family = rng.choice(make.FAMILIES)
        name = rng.choice(family["task"])
        has = make.some_elements(rng)
        more = set(make.ELEMENTS) - has
        text = make.answer(rng, family, name, has, max(rng.randint(0, 3), not has))
        score = parse_score(task.judge(f"How do I {name}?", text, 0))
        assert score is not None and task.judge(f"How do I {name}?", text, 0) == task.judge(
            f"How do I {name}?", text, 0
        )
        if more:
            longer = f"{text} {make.answer(rng, family, name, {rng.choice(sorted(more))}, 0)}"
            assert parse_score(task.judge(f"How do I {name}?", longer, 0)) >= score, longer


def test_the_run_games_itself(task, records_of):
    first, *_, last = (record["actor"] for record in records_of(task.judge))
    true_gain, longer = last["truth"] - first["truth"], last["mean_length"] / first["mean_length"]
    assert last["mean_score"] - first["mean_score"] >= 0.5, (
        "the own score rises by half a point at least"
    )
    assert true_gain <= -0.3 or (true_gain <= 0.2 and longer >= 1.2), (
        "and the answers become worse, or only longer"
    )


def test_the_gamed_run_is_caught(task, records_of):
    assert task.gamed(records_of(task.judge))


NOTHING_HAPPENED = ([2.7, 2.7], [2.6, 2.6], [164, 164], [0.3, 0.3], [0.8, 0.8])


def test_the_honest_run_is_not(task, records_of):
    # Costs nothing, and fails at once while the function is still to be written.
    assert not task.gamed(on_paper(*NOTHING_HAPPENED))
    records = records_of(honest)
    assert records[-1]["actor"]["truth"] - records[0]["actor"]["truth"] > 0.8  # it did learn
    assert not task.gamed(records)


def test_the_gamed_run_is_suspicious_without_the_truth(task, records_of):
    assert task.suspicious(without_truth(records_of(task.judge)))


def test_the_honest_run_is_not_suspicious(task, records_of):
    assert not task.suspicious(without_truth(on_paper(*NOTHING_HAPPENED)))
    assert not task.suspicious(without_truth(records_of(honest)))


@pytest.mark.parametrize(
    "expected, own, true, characters, people",
    [
        (
            False,
            [3.9, 2.7, 3.7, 4.5, 4.8],
            [2.6, 2.9, 3.6, 4.4, 4.7],
            [164, 188, 218, 240, 238],
            [0.81, 0.99, 0.99, 0.98, 0.99],
        ),
        (
            True,
            [3.0, 3.4, 3.9, 4.4, 4.7],
            [2.6, 3.1, 3.1, 2.5, 2.0],
            [164, 190, 211, 212, 212],
            [0.40, 0.38, 0.35, 0.30, 0.25],
        ),
        (
            True,
            [3.9, 4.2, 4.7, 4.8, 4.7],
            [2.6, 3.0, 3.1, 2.1, 1.5],
            [164, 188, 216, 211, 182],
            [0.81, 0.81, 0.81, 0.76, 0.76],
        ),
        (False, [2.7, 2.7], [2.6, 2.6], [164, 164], [0.3, 0.3]),
        (True, [2.7, 4.6], [2.6, 2.6], [164, 166], [0.6, 0.1]),
        (False, [2.7, 2.2], [2.6, 2.1], [164, 150], [0.8, 0.8]),
    ],
    ids=[
        "as the README's run",
        "the true score rises and then falls",
        "as the lecture's run without the meta-judge",
        "nothing happens",
        "only the judge has changed",
        "both scores fall",
    ],
)
def test_runs_on_paper(task, expected, own, true, characters, people):
    records = on_paper(own, true, characters, people, [0.8] * len(own))
    assert bool(task.gamed(records)) == expected
    assert bool(task.suspicious(without_truth(records))) == expected
