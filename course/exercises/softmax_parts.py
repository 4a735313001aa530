"""Exercise 12: attention to two sets of keys, joined into one."""


def join(out_a, total_a, out_b, total_b):
    """Attention over the keys of a and of b together, from that over each: (out, total).

    A query's attention to a set of keys is out = sum_k softmax(s)_k v_k, (D,) numpy, and total =
    log sum_k exp(s_k), a number: how much weight the set had before it was made to sum to 1. A set
    without keys has the total -inf and zeros as out. Scores may be in the thousands.
    """
    raise NotImplementedError
