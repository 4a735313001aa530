"""Lines of a run's files: a text that a model wrote, its verdict, and what training reads."""
import re

import prompts as words

VERDICTS = {"A": 1, "B": -1, None: 0}  # of a comparison, as battles.jsonl has them


def as_reply(chat, sample):
    """A record of a text that a model drew. What trains is its tokens, as they were drawn.

    It has these "ids" where the text, encoded, would be cut into others. "marked": among them are
    control tokens, which the text does not show.
    """
    record = {"text": sample.text, "finished": sample.finished}
    if sample.finished and chat.answer(sample.text) != sample.tokens:
        record["ids"] = sample.tokens
        if not chat.marks.isdisjoint(sample.tokens[:-1]):
            record["marked"] = True
    return record


def score_of(reply, max_score):
    """The score of a judgment, as `as_reply` has it; None of one that was cut off, is malformed, or
    has control tokens in it.
    """
    whole = reply["finished"] and not reply.get("marked")
    return words.parse_score(reply["text"], max_score) if whole else None


def winner_of(sample, what="Judgment"):
    """"A", "B" or None: a verdict that was cut off has no winner. what: the winners' kind."""
    return words.parse_winner(sample.text, what) if sample.finished else None


def as_pair(kind, prompt_id, prompt, chosen, rejected, ids=(None, None), **figures):
    """A line of pairs.jsonl, which TRL's DPOTrainer reads as it is.

    ids: the token ids of both sides as they were drawn, None for a side that is encoded so anyway.
    """
    return {"prompt": message("user", prompt), "chosen": message("assistant", chosen),
            "rejected": message("assistant", rejected), "kind": kind, "prompt_id": prompt_id,
            **figures, **known_ids(chosen=ids[0], rejected=ids[1])}


def as_example(prompt_id, prompt, completion, ids=None, **figures):
    """A line of sft.jsonl, which TRL's SFTTrainer reads as it is. ids: as in `as_pair`."""
    return {"prompt": message("user", prompt), "completion": message("assistant", completion),
            "prompt_id": prompt_id, **figures, **known_ids(completion=ids)}


def known_ids(**ids):
    """{"ids": those of the texts that have some}, or nothing."""
    known = {name: of_text for name, of_text in ids.items() if of_text}
    return {"ids": known} if known else {}


def message(role, text):
    return [{"role": role, "content": text}]


def visible(text):
    """Text for a terminal: what would steer it is shown as its code."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)


def shorten(text, limit=160):
    """A text on one line, its middle left out if it is long."""
    text = " ".join(text.split())
    if len(text) > limit:
        text = f"{text[:limit // 2]} ... {text[-limit // 2:]}"
    return f'"{text}"'
