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
    known = [what for value, what in mistakes if close(got, value, tolerance)]
    told = f"{case} gives {shown(got)} and should give {shown(wanted)}"
    raise AssertionError("\n".join([told, *known[:1]]))


def numbers(value):
    return np.array(value.tolist() if hasattr(value, "tolist") else value, dtype=float)


def close(a, b, tolerance):
    if a is None or b is None:
        return a is b
    a, b = numbers(a), numbers(b)
    return a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def shown(value):
    return "None" if value is None else str(np.round(numbers(value), 6).tolist())
