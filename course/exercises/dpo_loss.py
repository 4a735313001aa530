"""Exercise 2: the DPO loss [E5]."""


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """The loss of each pair, and the implicit rewards of its two answers.

    All arguments but beta are (B,) torch: summed log-probabilities of the answers under the policy
    and under the reference. Returns (losses, chosen_rewards, rejected_rewards), (B,) each. The
    rewards carry no gradient.
    """
    raise NotImplementedError
