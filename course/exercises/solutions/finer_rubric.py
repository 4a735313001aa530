"""Solution 9: a scale from 0 to 10 for the tiny world: two points for an element, one less for an
answer that pads.
"""

import re

RUBRIC = """Add these points up; the sum is never below 0.
+2 It names the task.
+2 It tells the first step.
+2 It says why.
+2 It gives an example.
+2 It says how to see that it worked.
-1 Two sentences or more say none of this, however friendly they are."""


def flags(file):
    """What must be added to the command line so that a run takes the rubric in this file."""
    return ["--rubric", str(file), "--max-score", "10"]


def counts(checks, text):
    """How many elements an answer has, and how many sentences without any."""
    empty = [
        sentence
        for sentence in re.split(r"(?<=[.!?])\s+", text)
        if not any(re.search(check, sentence) for check in checks)
    ]
    return sum(re.search(check, text) is not None for check in checks), len(empty)


def score(checks, text):
    """The score that the rubric gives an answer. The order of the true score stays: an element is
    worth more than all padding.
    """
    elements, padding = counts(checks, text)
    return max(0, 2 * elements - (padding > 1))


def judgment(checks, text):
    elements, padding = counts(checks, text)
    found = f"{elements} of five elements, {padding} sentences without any."
    return f"{found}\nScore: {score(checks, text)}"
