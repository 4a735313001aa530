"""A model that cannot give a stage what it asks for is told so early, not after a day."""

from harness.lines import shorten

EARLY = 200  # replies after which a stage's first ones are looked at
LEAST = 0.05  # share of them that must be readable
WANTED = {  # stage: what its replies must end in, and what to do if they do not
    "judgments": ("a score", "choose a larger model, give --eft replies that carry a "
                             "\"judgment\", or raise --max-judgment-tokens"),
    "comparisons": ("a winner", "choose a larger model, give --eft replies that carry "
                                "\"comparisons\", or raise --max-verdict-tokens"),
    "new prompts": ("a task", "choose a larger model, or give a file with --prompts"),
}


def first_prompts(run):
    """As many held-out prompts as it takes for EARLY judgments; none if no judge is wanted, or an
    iteration has fewer judgments.
    """
    s = run.settings
    of_prompt = s.responses * s.judgments
    wanted = s.reward == "judge" and s.prompts_per_iter * of_prompt >= EARLY
    return run.eval_prompts[:-(-EARLY // of_prompt)] if wanted else []


def check_judging(records):
    """Raise Unreadable if hardly any of the seed's first judgments gives a score."""
    # A process that has drawn few of them itself, or none anew, has not looked at them yet.
    texts = [one["text"] for record in records for one in record["judgments"] if one["text"]]
    check_readable("first judgments", "judgments", sum(map(count_read, records)), texts)


class Unreadable(ValueError):
    """Hardly any reply of a stage could be read."""


class FirstReplies:
    """Counts the first replies of a stage, and raises Unreadable if hardly any can be read."""

    def __init__(self, t, label):
        """t, label: the iteration, and the stage. "held-out judgments" of M_0 count as "judgments";
        a later model is measured whatever it says.
        """
        self.label, self.texts, self.read = label, [], 0
        stages = [stage for stage in WANTED if stage == label or t == 0 and stage in label]
        self.stage = stages[0] if stages else None  # answers can always be read

    def add(self, record, samples):
        """Count a record's replies. samples: a list for each of its prompts."""
        if self.stage is None or len(self.texts) >= EARLY:
            return
        replies = [one for of_prompt in samples for one in of_prompt if one.tokens]
        self.read += count_read(record)
        self.texts += [one.text for one in replies]
        check_readable(self.label, self.stage, self.read, self.texts)


def check_readable(label, stage, read, texts):
    """Raise Unreadable if hardly any of the first replies, at least EARLY, could be read."""
    if len(texts) >= EARLY and read < LEAST * len(texts):
        what, advice = WANTED[stage]
        raise Unreadable(f"{label}: {read} of the first {len(texts)} replies end in {what}, and so "
                         f"nothing could be learned: {advice}. One of them: "
                         f"{shorten(texts[-1])}")


def count_read(record):
    """How many of the replies that a record came from named a winner, a score or a task."""
    if "verdicts" in record:
        return sum(verdict != 0 for row in record["verdicts"] for verdict in row)
    if "judgments" in record:
        return sum(judgment["score"] is not None for judgment in record["judgments"])
    return int(record["task"] is not None)
