"""Exercise 11: one token from the nucleus, by one uniform number."""


def sample_top_p(probs, uniform, top_p):
    """The token that a uniform number draws from the nucleus: its id, an int.

    probs (V,) numpy: what the model gives each token, sum 1. uniform: a number in [0, 1). top_p in
    (0, 1]. The nucleus is the smallest set of the likeliest tokens whose probabilities sum to top_p
    or more (to 1e-12); tokens as likely as the last of these belong to it too. Laid end to end in
    the order of their ids, the probabilities of the nucleus make a line of a certain length: the
    token is the one on which uniform times that length lies (at a border the later one).
    """
    raise NotImplementedError
