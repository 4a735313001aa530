"""Solution 1: the log-probability of an answer."""

import torch


def answer_logps(logits, ids, prompt_lengths, lengths):
    """The log-probability of each answer given its prompt, summed over the answer's tokens: (B,)
    torch.
    """
    # (B, T - 1), place t - 1 is that of token t
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    token = torch.arange(1, ids.shape[1])
    answer = (token >= prompt_lengths[:, None]) & (token < lengths[:, None])  # (B, T - 1)
    return logps.masked_fill(~answer, 0).sum(1)
