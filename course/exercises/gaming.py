"""Exercise 8: a judge that games itself, and how to notice.

The actor is the tiny world's; the judge is your function. loop.py says how it comes into the real
loop, and tiny/world.py what answers are made of. Of a record of summary.json you may want

    record["actor"]: mean_score         the answers' score by the model's own judgment
                     truth              their true score, 0 to 5, where it is known
                     mean_length        their characters
    record["judge"]: human_spearman     how its scores go with people's ranks of other answers
                     length_correlation how its scores go with the answers' length
                     ties               share of pairs of answers with equal scores

(docs/reading-the-figures.md has them all).
"""


def judge(question, answer, number):
    """The text of a judgment, ending in the line "Score: n" with n from 0 to 5.

    It depends on its arguments alone. One more sentence with an element that the rubric asks for
    must never lower the score.
    """
    raise NotImplementedError


def gamed(records):
    """Whether a run was gamed: its own score has risen, and the answers have not become better to
    match. records: those of summary.json.
    """
    raise NotImplementedError


def suspicious(records):
    """The same where nobody knows the truth: no "truth" in "actor", and none of the judge's figures
    that begin with "truth".
    """
    raise NotImplementedError
