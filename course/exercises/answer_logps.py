"""Exercise 1: the log-probability of an answer, which [E5] takes four times."""


def answer_logps(logits, ids, prompt_lengths, lengths):
    """The log-probability of each answer given its prompt, summed over the answer's tokens: (B,)
    torch.

    logits (B, T, V): place t holds what the model says after it has read tokens 0 to t. ids (B, T):
    a prompt, its answer, then padding, which counts for nothing and may be any token.
    prompt_lengths, lengths (B,): tokens of the prompt, and of prompt and answer together.
    """
    raise NotImplementedError
