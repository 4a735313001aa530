"""Exercise 3: break a parser, then write one that holds.

What a judgment must look like: its last line, blank lines after it aside, is "Score: n" in any case
of letters, and n is a number from 0 to max_score, a whole one or with decimal places, in the digits
0 to 9. After n may come "/5" or "out of 5", if max_score is 5, and "points" or "point". Around the
words may stand spaces and the marks * _ ` " ', and a full stop at the end. Nothing else is on that
line. A judgment that does not look like this has no score: None.
"""

import re


def naive_parse(judgment, max_score=5):
    """A parser that many would write. Leave it as it is."""
    found = re.search(r"score\D*(\d+)", judgment, re.IGNORECASE)
    return int(found[1]) if found and int(found[1]) <= max_score else None


# Judgments on the scale 0 to 5 that naive_parse reads wrongly, each with the right score, or None
# where there is none: [(text, right), ...]. Six or more: at least two that get a score though there
# is none, two that get another score, and one that gets none though there is one.
FOOLING = []


def parse(judgment, max_score=5):
    """The score of a judgment, in 0..max_score, or None if it does not end as it should."""
    raise NotImplementedError
