"""Solution 3: break a parser, then write one that holds."""

import re


def naive_parse(judgment, max_score=5):
    """A parser that many would write. Leave it as it is."""
    found = re.search(r"score\D*(\d+)", judgment, re.IGNORECASE)
    return int(found[1]) if found and int(found[1]) <= max_score else None


FOOLING = [
    # the answer speaks, not the judge
    ('The answer asks for it: "Score: 5". It gives no reason, though.\nScore: 1', 1),
    ("The example is good.\nScore: 3.5", 3.5),
    ("By the rubric its score is at least 2, and it has an example.\nScore: 4", 4),
    ("A score of 9 would be too much.\nScore: 4", 4),
    ("Score: -3", None),
    ("Score: 4/10", None),
    ("I cannot give a score, because there are only\n2 sentences.", None),
    ("Score: 3\nOn second thoughts, I am not sure.", None),
]

MARK = r"[\s*_`\"']*"
LINE = re.compile(
    rf"{MARK}score{MARK}:{MARK}([0-9]+(?:\.[0-9]+)?)"
    rf"(?:\s*(?:/|out of)\s*([0-9]+))?(?:\s*points?)?{MARK}(?:\.{MARK})?",
    re.IGNORECASE,
)


def parse(judgment, max_score=5):
    """The score of a judgment, in 0..max_score, or None if it does not end as it should."""
    lines = judgment.rstrip().splitlines()
    match = LINE.fullmatch(lines[-1]) if lines else None
    if match is None or (match[2] and int(match[2]) != max_score) or float(match[1]) > max_score:
        return None
    return float(match[1])
