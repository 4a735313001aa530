"""Solution 4: the actor pair with length control [E1]."""

import math

ROUNDING = 1e-9  # scores are means: at a tier's edge the last bit must not decide


def actor_pair(scores, lengths, rho):
    """Indices (chosen, rejected) of one prompt's answers, or None [E1]."""
    scored = [i for i, score in enumerate(scores) if not math.isnan(score)]
    if len(scored) < 2:
        return None
    high, low = (best(scores[i] for i in scored) for best in (max, min))
    if high - low < ROUNDING:
        return None
    top = [i for i in scored if scores[i] >= high - rho * (high - low) - ROUNDING]  # [E1]
    bottom = [i for i in scored if scores[i] <= low + rho * (high - low) + ROUNDING]  # [E1]
    chosen = min(top, key=lambda i: (lengths[i], -scores[i]))
    rejected = min(bottom, key=lambda i: (-lengths[i], scores[i]))
    return None if chosen == rejected else (chosen, rejected)
