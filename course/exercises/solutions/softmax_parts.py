"""Solution 12: attention to two sets of keys, joined into one."""

import numpy as np


def join(out_a, total_a, out_b, total_b):
    """Attention over the keys of a and of b together, from that over each: (out, total)."""
    total = np.logaddexp(total_a, total_b)
    if total == -np.inf:
        return np.zeros_like(out_a), total
    # exp(total) is the sum of all weights, of which a's part is exp(total_a)
    return np.exp(total_a - total) * out_a + np.exp(total_b - total) * out_b, total
