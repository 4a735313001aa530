"""Solution 2: the DPO loss [E5]."""

import torch.nn.functional as F


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """The loss of each pair, and the implicit rewards of its two answers, (B,) each."""
    chosen_rewards = beta * (policy_chosen - ref_chosen)
    rejected_rewards = beta * (policy_rejected - ref_rejected)
    # [E5]: -log sigmoid(x) = log(1 + exp(-x)), which does not overflow
    losses = F.softplus(rejected_rewards - chosen_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()
