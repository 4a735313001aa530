"""Exercise 5: position weights [E2] and the battle matrix [E3]."""


def position_weights(matrices):
    """The weights (w1, w2) of a win in the first and in the second place [E2], from the verdicts of
    a whole iteration.

    matrices: one (N, N) matrix of verdicts for each compared answer, an array or nested lists; N
    may differ. verdicts[m][n] is the verdict with judgment m shown first and n second: 1 if m won,
    -1 if n won, 0 if no winner could be read. Without any winner both weights are 1/2.
    """
    raise NotImplementedError


def battle_matrix(verdicts, w1, w2):
    """How much each judgment won against each other, (N, N) numpy [E3]. verdicts: as above."""
    raise NotImplementedError
