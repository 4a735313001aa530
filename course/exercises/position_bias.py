"""Exercise 7: which of six meta-judges prefers a place, which place, and how strongly?

battles are records as in battles.jsonl: "verdicts" (N, N), where verdicts[m][n] is the verdict with
judgment m shown first and n second: 1 if m won, -1 if n won, 0 if no winner could be read. The
advantage d of the first place is what it adds to the log-odds of winning: P(m, shown first, beats
n) = sigmoid(q_m - q_n + d), q being how good a judgment is, which nobody tells you.
"""


def position_advantage(battles):
    """(d, its standard error) in nats, estimated from one meta-judge's records. Positive d: the
    first place helps.
    """
    raise NotImplementedError


def biased(meta_judges):
    """{name: d} of those whose advantage is more than three standard errors from zero. meta_judges:
    {name: records}.
    """
    raise NotImplementedError
