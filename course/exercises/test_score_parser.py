"""Checks of exercise 3: judgments whose scores were written down by hand, and the ones that were
found to fool the naive parser.
"""

import time

import pytest

RIGHT = [
    ("It names the task.\nScore: 3", 5, 3),
    ("Score: 3\n\n  ", 5, 3),
    ("score: 0", 5, 0),
    ("**Score: 4**", 5, 4),
    ("Score: **4**.", 5, 4),
    ("`Score`: 5", 5, 5),
    ("Score: 4/5", 5, 4),
    ("SCORE: 4 out of 5.", 5, 4),
    ("Score: 2 points", 5, 2),
    ("Score: 1 point.", 5, 1),
    ("Score: 3.5", 5, 3.5),
    ("Score: 10", 10, 10),
    ("Score: 7/10", 10, 7),
    ("Score: 1\nScore: 2", 5, 2),
    ('"Score: 5", says the answer.\nIt is no answer.\n\nScore: 0', 5, 0),
    ("Score: 04", 5, 4),
]
WRONG = [
    ("", 5),
    ("  \n", 5),
    ("Score:", 5),
    ("Score: four", 5),
    ("Score: 6", 5),
    ("Score: -1", 5),
    ("Score: 5.1", 5),
    ("Score: 7/5", 10),
    ("Score: 4/10", 5),
    ("Score: 3 or 4", 5),
    ("Score: 3, Score: 5", 5),
    ("Score: 3\nBut see above.", 5),
    ("The score is 4", 5),
    ("Total score: 4", 5),
    ("4", 5),
    ("Score: \u0664", 5),
    ("Score: 1e0", 5),
    ("Score: nan", 5),
    ("Score: 3 4", 5),
    ("Winner: Judgment A", 5),
    ("Score\n3", 5),
]


@pytest.mark.parametrize("judgment, max_score, score", RIGHT)
def test_judgments_with_a_score(task, judgment, max_score, score):
    assert task.parse(judgment, max_score) == score


@pytest.mark.parametrize("judgment, max_score", WRONG)
def test_judgments_without_a_score(task, judgment, max_score):
    assert task.parse(judgment, max_score) is None


def test_what_stands_further_up_changes_nothing(task):
    for above in (judgment for judgment, *_ in [*RIGHT, *WRONG]):
        assert task.parse(f"{above}\nScore: 2") == 2 and task.parse(f"{above}\nthe end") is None


def test_the_judgments_that_fool_the_naive_parser(task):
    texts, kinds = [text for text, _ in task.FOOLING], []
    for text, right in task.FOOLING:
        said = task.naive_parse(text)
        assert said != right, f"the naive parser is right about {text!r}"
        assert task.parse(text) == right, f"{right} is not the score of {text!r}"
        kinds.append(
            "a score though there is none"
            if right is None
            else "no score though there is one"
            if said is None
            else "another score"
        )
    assert len(set(texts)) >= 6, "six different judgments"
    for kind, least in {
        "a score though there is none": 2,
        "another score": 2,
        "no score though there is one": 1,
    }.items():
        assert kinds.count(kind) >= least, f"{least} or more that get {kind}"


@pytest.mark.parametrize("junk", ["*", " ", "9", "Score: 3 ", "' "])
def test_a_long_last_line_takes_no_time(task, junk):
    """A pattern with two neighbours that both take the same characters tries all ways to divide
    30,000 of them.
    """
    for length in (300, 600, 1_200, 2_400, 30_000):
        start = time.perf_counter()
        assert task.parse("Score: 3" + length // len(junk) * junk + "x") is None
        took = time.perf_counter() - start
        assert took < 1, (
            f"{took:.1f} s for {length:,} characters of {junk!r}: two neighbours in your pattern "
            "can take the same characters, and all ways to divide these are tried"
        )
