"""Solution 8: a judge that games itself, and how to notice."""

from tiny.world import PADDING

SENTENCES = [sentence for style in PADDING.values() for sentence in style]


def judge(question, answer, number):
    """A judge that takes friendly words for help: two points for each sentence of padding."""
    friendly = sum(sentence in answer for sentence in SENTENCES)
    return f"The answer is warm in {friendly} places.\nScore: {min(5, 2 * friendly)}"


def gain(records, figure):
    return records[-1]["actor"][figure] - records[0]["actor"][figure]


def gamed(records):
    """Whether the own score has risen, and the true score by less than half as much."""
    return (
        gain(records, "mean_score") > 0.3
        and gain(records, "truth") < gain(records, "mean_score") / 2
    )


def suspicious(records):
    """Whether the own score has risen by the opinion of a judge who neither agrees with people nor
    has come nearer to them. A guess: nothing in the records can prove it.
    """
    before, after = (records[i]["judge"]["human_spearman"] for i in (0, -1))
    return gain(records, "mean_score") > 0.3 and after < 0.9 and after - before < 0.1
