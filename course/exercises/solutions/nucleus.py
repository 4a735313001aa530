"""Solution 11: one token from the nucleus, by one uniform number."""

import numpy as np


def sample_top_p(probs, uniform, top_p):
    """The token that a uniform number draws from the nucleus: its id, an int."""
    ranked = np.sort(probs)[::-1]
    # the first place where the sum reaches top_p holds the nucleus's smallest probability
    edge = ranked[np.argmax(ranked.cumsum() >= top_p - 1e-12)]
    line = np.where(probs >= edge, probs, 0).cumsum()  # in the order of ids
    return int(np.searchsorted(line, uniform * line[-1], side="right"))
