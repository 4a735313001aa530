"""Exercise 4: the actor pair with length control [E1]."""


def actor_pair(scores, lengths, rho):
    """Indices (chosen, rejected) of one prompt's answers, or None [E1].

    scores (K,): mean judge scores, NaN where no judgment was valid; such an answer is in no tier.
    lengths (K,): characters. rho in [0, 1]. Of answers of the same length in the top tier the one
    with the better score is chosen, in the bottom tier the one with the worse score is rejected.
    None: fewer than two scores, all scores equal (to 1e-9), or the same answer on both sides.
    """
    raise NotImplementedError
