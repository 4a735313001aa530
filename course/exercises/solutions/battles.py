"""Solution 5: position weights [E2] and the battle matrix [E3]."""

import numpy as np


def position_weights(matrices):
    """The weights (w1, w2) of a win in the first and in the second place [E2], from the verdicts of
    a whole iteration.
    """
    first = sum(int((np.asarray(r) == 1).sum()) for r in matrices)
    second = sum(int((np.asarray(r) == -1).sum()) for r in matrices)
    if first + second == 0:
        return 0.5, 0.5
    return second / (first + second), first / (first + second)  # [E2]: the rarer win weighs more


def battle_matrix(verdicts, w1, w2):
    """How much each judgment won against each other, (N, N) numpy [E3]."""
    r = np.asarray(verdicts)
    # [E3]: m wins in the second place where it stands in the column
    return w1 * (r == 1) + w2 * (r.T == -1)
