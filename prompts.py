"""The words of Meta-Rewarding: the rubric, the prompt templates, and the parsers that read replies.

Everything that a model is asked, and everything that is read out of its replies, stands here, in
our own wording. Standard library only. Left out: the chat template, which belongs to a tokenizer
(see sampling.py), and any notion of what a good answer is beyond the rubric.

Templates are filled in one pass, so that braces, template words and control tokens inside a
question, an answer or a judgment stay plain text. Parsers read the end only, which the model wrote
last: what an answer or a judgment quotes further up cannot steer them. The line that counts is a
score or a winner and nothing else, and at most two short lines of farewell may follow it.
"""
import re

RUBRIC = """\
Give points step by step; each point comes on top of those before it, 5 in all:
- 1 point if the answer has something to do with the question, even if it is incomplete or \
wanders off.
- 1 more point if it covers a good part of what was asked, but not yet all of it.
- 1 more point if it settles the main parts of the question in a useful way, whoever may have \
written it.
- 1 more point if it speaks to the user as a helpful assistant would: to the point, complete, \
in a good order, with little left to improve.
- 1 more point if it could hardly be better: made for this very question, expert, easy to \
read, and without a superfluous word."""

JUDGE = """\
Score an answer to a user's question by the rubric. Give your reasons first, and end with the \
line "Score: n".

Rubric:
{rubric}

Question:
{question}

Answer:
{response}

Give your reasons, then the line "Score: n"."""

META_JUDGE = """\
Two judgments scored the same answer to a user's question by the rubric. Decide which one \
applies the rubric more correctly; neither its length nor its place is a merit. Give your \
reasons first, and end with the line "Winner: Judgment A" or "Winner: Judgment B".

Rubric:
{rubric}

Question:
{question}

Answer:
{response}

Judgment A:
{judgment_a}

Judgment B:
{judgment_b}

Give your reasons, then the winner."""

COMPARE = """\
Which of two answers to a user's question is better? Prefer the one that does more of what was \
asked, correctly and in a way that the user can act on; neither its length nor its place is a \
merit. Give your reasons first, and end with the line "Winner: Answer A" or "Winner: Answer B".

Question:
{question}

Answer A:
{answer_a}

Answer B:
{answer_b}

Give your reasons, then the winner."""

NEW_TASK = """\
Here are some tasks that people gave to an assistant:

{tasks}

Write one more task that somebody might give. It should differ from all of these in subject \
and in kind, and it must be possible to do it in writing, with nothing else at hand. Begin \
with "Task:" and write nothing after the task."""

MARKUP = r"[\s*_`\"']*"  # what models put around the words of their last line
START = r"[\s*_`\"'#•-]*"  # the same, with the marks of a heading and of a list
# There are never two MARKUPs in a row, which would take quadratic time on a long run of stars.
END = rf"(?:{MARKUP}\((?P<comment>[^()]{{0,40}})\))?{MARKUP}(?:\.{MARKUP})?"
NUMBER = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"
FAREWELL = 2  # lines, at most, that may follow the score or the winner
SHORT = 80    # characters that such a line may have
# A line, or a comment, that speaks of these may be a second opinion or a quotation.
OPINION = r"[0-9]|score|rating|winner|verdict|judge?ment|answer|both|neither|equal|\[\["
TIE = r"\b([AB]|[Tt]ied?|[Dd]raw)\b"  # so does a comment on a winner that speaks of these
FULL_WIDTH = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x3002: "."}


# ---- what is asked

def fill(template, **texts):
    """Put texts where the template says {name}, all at once: what is put in is not read again."""
    return re.sub(r"\{(\w+)\}", lambda match: texts[match[1]], template)


def judge_prompt(question, response, rubric=RUBRIC):
    """The user turn that asks for a judgment of `response`: reasons, then "Score: n"."""
    return fill(JUDGE, rubric=rubric, question=question, response=response)


def meta_judge_prompt(question, response, judgment_a, judgment_b, rubric=RUBRIC):
    """The user turn that asks which of two judgments is better: reasons, then the winner.

    The judgments come last, so that all comparisons of one answer share what stands before them.
    """
    return fill(META_JUDGE, rubric=rubric, question=question, response=response,
                judgment_a=judgment_a, judgment_b=judgment_b)


def compare_prompt(question, answer_a, answer_b):
    """The user turn that asks which answer is better. No part of the method: `eval.py compare`."""
    return fill(COMPARE, question=question, answer_a=answer_a, answer_b=answer_b)


def new_task_prompt(tasks):
    """The user turn that asks for one more task like `tasks` (a list of texts; the paper: 8)."""
    return fill(NEW_TASK, tasks="\n\n".join(f"Task: {task}" for task in tasks))


# ---- what is read out of the replies

def conclusion(text, *patterns):
    """The match of the last line that is nothing but one of the patterns, or None."""
    lines = [line for line in text.splitlines() if line.strip()]
    for line in reversed(lines[-1 - FAREWELL:]):
        line = line.translate(FULL_WIDTH)
        for pattern in patterns:
            if match := re.fullmatch(pattern, line, re.IGNORECASE):
                return None if re.search(OPINION, match["comment"] or "", re.I) else match
        if len(line) > SHORT or re.search(OPINION, line, re.IGNORECASE):
            return None
    return None


def parse_score(judgment, max_score=5):
    """The score in 0..max_score that a judgment ends in, or None.

    Read are "Score: 4", also as a total, final or overall score or rating, of max_score, in points
    or in brackets, and "[[4]]"; a comment in brackets may follow, "Score: 4 (good)", that speaks of
    no other number or score. None: there is no such line, or it is out of range.
    """
    name = r"(?:(?:total|final|overall)\s)?(?:score|rating)"
    out_of = rf"(?:{MARKUP}\(?(?:/|out of){MARKUP}{NUMBER}\)?)?"
    match = conclusion(
        judgment, rf"{START}{name}{MARKUP}[:=]{MARKUP}\[{{0,2}}{NUMBER}{out_of}\]{{0,2}}{out_of}"
        rf"(?:{MARKUP}points?)?{END}", rf"{START}\[\[{NUMBER}{out_of}\]\]{out_of}{END}")
    if match is None or any(float(most) != max_score for most in match.group(2, 3) if most):
        return None
    score = float(match[1])
    return score if score <= max_score else None


def parse_winner(verdict, of="Judgment"):
    """"A" or "B", the winner that a verdict ends in, or None if it does not name one.

    of: what was compared, "Judgment" or "Answer". Read are "Winner: Judgment A", also as a verdict,
    in brackets or as "The winner is Judgment A", and "[[A]]"; a comment in brackets may follow that
    names no side.
    """
    side = rf"(?:{of.replace('Judgm', 'Judge?m')}\s+)?([AB])"
    name = rf"(?:the\s|final\s)?(?:winner|verdict)(?:{MARKUP}:|\sis)"
    match = conclusion(verdict, rf"{START}{name}{MARKUP}\[{{0,2}}{side}\]{{0,2}}{END}",
                       rf"{START}\[\[{side}\]\]{END}")
    doubt = match is None or re.search(TIE, match["comment"] or "")
    return None if doubt else match[1].upper()


def parse_task(reply):
    """The new task in the reply to `new_task_prompt`, or None if there is not exactly one."""
    parts = re.split(r"^[ \t]*Task:", reply, flags=re.MULTILINE)
    if len(parts) != 2 or parts[0].strip():
        return None
    return parts[1].strip() or None
