"""Exercise 6: ratings by maximum likelihood [E4], and why they need a regulariser."""


def log_likelihood(ratings, battles):
    """sum_mn B_mn log sigmoid(e_m - e_n), a number [E4]. ratings (N,), battles (N, N). Finite for
    ratings that are thousands apart.
    """
    raise NotImplementedError


def elo(battles, ridge=1e-6):
    """The ratings e (N,), mean zero, that maximise log_likelihood(e, B) - ridge / 2 sum_m e_m^2,
    natural-log scale.

    B is battles without its diagonal, scaled so that it sums to N (N - 1) / 2: one battle per pair
    on average. Without battles: zeros.
    """
    raise NotImplementedError


def has_finite_maximum(battles):
    """Whether the likelihood without a regulariser has a maximum at finite ratings, the only one up
    to a constant that all ratings share.
    """
    raise NotImplementedError
