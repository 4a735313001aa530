"""Exercise 9: a scale from 0 to 10 for the tiny world. What stands here is its scale from 0 to 5,
and says nothing about padding.
"""

# One rule a line. Lines that give points begin with "+" and their number, lines that take some away
# with "-" and theirs; those that give points add up to the highest score. The other lines say what
# you like.
RUBRIC = """Give points for what the answer has:
+1 It names the task.
+1 It tells the first step.
+1 It says why.
+1 It gives an example.
+1 It says how to see that it worked."""


def flags(file):
    """What must be added to the command line so that a run takes the rubric in this file: a list of
    texts.
    """
    raise NotImplementedError


def score(checks, text):
    """The score that your rubric gives an answer, a whole number from 0 to 10. checks: regular
    expressions, one for each of the five elements.
    """
    raise NotImplementedError


def judgment(checks, text):
    """A judgment of an answer by your rubric: a reason or two, then the last line, so that
    prompts.parse_score reads the score.
    """
    raise NotImplementedError
