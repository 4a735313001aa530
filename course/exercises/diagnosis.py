"""What the checks say of a wrong value: the whole case, and the usual mistake that gives just this
value; nothing to fill in.
"""

import numpy as np


def expect(got, wanted, case, mistakes=(), tolerance=1e-6):
    """Assert that a value (a number, None, or numbers in tuples, arrays or tensors) is the wanted
    one.

    case: the call, in words. mistakes: pairs (value, what was mistaken).
    """
    if close(got, wanted, tolerance):
        return
    known = {what: None for value, what in mistakes if close(got, value, tolerance)}
    told = f"{case} gives {shown(got)} and should give {shown(wanted)}"
    if len(known) > 1:  # this case does not tell them apart
        told += "\none of these:"
    raise AssertionError("\n".join([told, *known]))


def numbers(value):
    return np.array(value.tolist() if hasattr(value, "tolist") else value, dtype=float)


def close(a, b, tolerance):
    if a is None or b is None:
        return a is b
    a, b = numbers(a), numbers(b)
    return a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def shown(value):
    if value is None:
        return "None"
    rounded = np.round(numbers(value), 6)
    return str((rounded.astype(int) if (rounded % 1 == 0).all() else rounded).tolist())
