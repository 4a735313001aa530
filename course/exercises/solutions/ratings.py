"""Solution 6: ratings by maximum likelihood [E4], and why they need a regulariser."""

import numpy as np


def log_likelihood(ratings, battles):
    """sum_mn B_mn log sigmoid(e_m - e_n), a number [E4]."""
    e = np.asarray(ratings, dtype=float)
    return float((np.asarray(battles) * -np.logaddexp(0, e[None, :] - e[:, None])).sum())


def elo(battles, ridge=1e-6):
    """The ratings e (N,), mean zero, that maximise log_likelihood(e, B) - ridge / 2 sum_m e_m^2,
    natural-log scale: Newton's method.
    """
    B = np.array(battles, dtype=float)
    np.fill_diagonal(B, 0)
    e = np.zeros(len(B))
    if B.sum() == 0:
        return e
    B *= len(B) * (len(B) - 1) / 2 / B.sum()
    for _ in range(200):
        p = 1 / (1 + np.exp(e[:, None] - e[None, :]))  # (N, N), P(m loses to n)
        weight = (B + B.T) * p * (1 - p)
        gradient = (B * p).sum(1) - (B * p).sum(0) - ridge * e
        step = np.linalg.solve(np.diag(weight.sum(1)) - weight + ridge * np.eye(len(e)), gradient)
        # a whole step may overshoot far from the maximum
        e = e + step * min(1, 1 / max(np.abs(step).max(), 1e-300))
        if np.abs(step).max() < 1e-10:
            break
    return e - e.mean()


def has_finite_maximum(battles):
    """Whether everybody has beaten everybody, perhaps by way of others.

    If not, those whom one judgment has beaten by any way, with it, have never beaten the rest:
    moving the rest up costs nothing, without end.
    """
    reached = (np.asarray(battles) > 0) | np.eye(len(battles), dtype=bool)
    for _ in range(len(reached)):
        reached = reached @ reached
    return bool(reached.all())
