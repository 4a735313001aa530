"""Checks of exercise 1: by hand for three tokens of a vocabulary of two, and against the loss that
transformers computes itself.
"""

import math
from pathlib import Path

import pytest
import torch

from harness.loading import load
from sampling import Chat

TINY = Path(__file__).parents[2] / "tiny"
PAIRS = [
    (
        "How do I keep bread fresh?",
        "Wrap the food in a dry cloth, because damp food turns bad quickly.",
    ),
    ("How do I sing?", "No idea."),
    ("What is a good way to boil an egg?", "First, heat the pot slowly."),
]


def test_three_tokens_by_hand(task):
    """After the prompt, token 0, the model gives token 1 the probability 3/4; after that, 1/2. What
    it says at the end is asked of nobody.
    """
    logits = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]]).log()
    ids, prompt_lengths, lengths = torch.tensor([[0, 1, 1]]), torch.tensor([1]), torch.tensor([3])
    assert task.answer_logps(logits, ids, prompt_lengths, lengths).tolist() == pytest.approx(
        [math.log(3 / 8)], abs=1e-6
    )
    assert task.answer_logps(logits + 7, ids, prompt_lengths, lengths).tolist() == pytest.approx(
        [math.log(3 / 8)], abs=1e-5
    ), "logits, not logs"


@pytest.fixture(scope="module")
def batch():
    """(logits, ids, prompt_lengths, lengths, what transformers says) of three pairs of unequal
    lengths, padded with token 5.
    """
    model, tokenizer = load(str(TINY))
    chat, rows, lengths, expected = Chat(tokenizer), [], [], []
    for question, text in PAIRS:
        prompt, answer = chat.prompt(question), chat.answer(text)
        labels = torch.tensor([[-100] * len(prompt) + answer])
        expected.append(
            -len(answer)
            * model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item()
        )
        rows.append(prompt + answer)
        lengths.append((len(prompt), len(prompt + answer)))
    ids = torch.tensor([row + [5] * (max(map(len, rows)) - len(row)) for row in rows])
    with torch.no_grad():
        return model(input_ids=ids).logits, ids, *torch.tensor(lengths).T, expected


def test_it_is_what_transformers_says(task, batch):
    *arguments, expected = batch
    assert task.answer_logps(*arguments).tolist() == pytest.approx(expected, rel=1e-4)


def test_only_the_places_that_predict_the_answer_have_a_gradient(task, batch):
    """They begin at the prompt's last token and end one before the answer's last; neither prompt
    nor padding trains.
    """
    logits, ids, prompt_lengths, lengths, _ = batch
    logits = logits.clone().requires_grad_()
    task.answer_logps(logits, ids, prompt_lengths, lengths).sum().backward()
    for row, prompt, length in zip(logits.grad, prompt_lengths.tolist(), lengths.tolist()):
        assert row.abs().sum(-1).nonzero()[:, 0].tolist() == list(range(prompt - 1, length - 1))
