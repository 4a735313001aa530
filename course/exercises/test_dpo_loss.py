"""Checks of exercise 2, by hand arithmetic.

Pair 1: the chosen answer has become 2 nats likelier than it was to the reference, the rejected one
2 nats less likely. With beta 0.1 the rewards are 0.2 and -0.2, the margin 0.4 and the loss log(1 +
exp(-0.4)). Pair 2 has moved the other way, by 1 and 3 nats.
"""

import math

import pytest
import torch

from exercises.diagnosis import expect


def pairs(**options):
    return [
        torch.tensor(values, dtype=torch.float64, **options)
        for values in ([-10.0, -31.0], [-20.0, -7.0], [-12.0, -30.0], [-18.0, -10.0])
    ]


def test_losses_and_rewards_of_two_pairs(task):
    losses, chosen, rejected = task.dpo_loss(*pairs(), beta=0.1)
    assert losses.shape == (2,), "one loss for each pair: the mean is the training loop's"

    def softplus(*values):
        return [math.log1p(math.exp(x)) for x in values]

    expect(
        losses,
        softplus(-0.4, 0.4),
        "pairs whose margins are 0.4 and -0.4",
        [
            (softplus(0.4, -0.4), "chosen and rejected are exchanged, or the sign of the margin"),
            (softplus(-4, 4), "beta is missing"),
            (softplus(-1, 2.4), "the reference is missing"),
            (softplus(-1.6, 4.4), "the reference is added; take it away"),
            ([1 / (1 + math.exp(-0.4)), 1 / (1 + math.exp(0.4))], "that is the sigmoid; the loss "
             "is minus its logarithm"),
            ([-x for x in softplus(-0.4, 0.4)], "the sign: a loss is minus the logarithm"),
        ],
    )
    expect(chosen, [0.2, -0.1], "the rewards of the chosen answers",
           [([2, -1], "a reward is beta times the difference to the reference")])
    expect(rejected, [-0.2, 0.3], "the rewards of the rejected answers",
           [([0.2, -0.3], "of the rejected answer, too, policy less reference")])


def test_beta_scales_the_margin(task):
    losses, chosen, _ = task.dpo_loss(*pairs(), beta=0.5)
    assert losses.tolist() == pytest.approx(
        [math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))]
    ) and chosen[0] == pytest.approx(1.0)


def test_a_policy_that_is_its_reference_has_the_loss_log_2(task):
    chosen, rejected, *_ = pairs()
    assert task.dpo_loss(chosen, rejected, chosen, rejected)[0].tolist() == pytest.approx(
        [math.log(2)] * 2
    )


def test_the_gradient_raises_the_chosen_answer(task):
    """The derivative is -beta sigmoid(-margin) for the chosen answer and its negative for the
    rejected one.
    """
    arguments = pairs(requires_grad=True)
    losses, *rewards = task.dpo_loss(*arguments)
    losses.sum().backward()
    expected = [-0.1 / (1 + math.exp(0.4)), -0.1 / (1 + math.exp(-0.4))]
    assert arguments[0].grad.tolist() == pytest.approx(expected) and arguments[
        1
    ].grad.tolist() == pytest.approx([-x for x in expected])
    assert not any(reward.requires_grad for reward in rewards), (
        "the rewards are for the log: detach them"
    )


def test_a_pair_that_is_far_off_still_has_a_loss(task):
    """In float32 sigmoid(-1000) is 0, and the logarithm of 0 is no loss."""
    zero = torch.zeros(1)
    assert task.dpo_loss(zero - 1000, zero, zero, zero, beta=1.0)[0].item() == pytest.approx(1000)
    assert task.dpo_loss(zero + 1000, zero, zero, zero, beta=1.0)[0].item() == pytest.approx(0)
