"""Checks of exercise 1: by hand for three tokens of a vocabulary of two, and against the loss that
transformers computes itself.
"""

import math
from pathlib import Path

import pytest
import torch

from exercises.diagnosis import expect
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
    expect(
        task.answer_logps(logits, ids, prompt_lengths, lengths),
        [math.log(3 / 8)],
        "the answer 1, 1 behind the prompt 0, with probabilities 3/4 and 1/2",
        [
            ([math.log(0.5 * 0.1)], "you read what stands at the token's own place; it is "
             "predicted one place before"),
            ([math.log(3 / 8) / 2], "a mean over the answer's tokens; wanted is their sum"),
            ([3 / 8], "a probability; wanted is its logarithm"),
            ([math.log(3 / 4)], "the answer's last token is missing"),
            ([math.log(1 / 2)], "the answer's first token is missing: the prompt's last place "
             "predicts it"),
        ],
    )
    expect(
        task.answer_logps(logits + 7, ids, prompt_lengths, lengths),
        [math.log(3 / 8)],
        "the same with 7 added to all logits",
        [([math.log(3 / 8) + 14], "logits are not yet logarithms of probabilities: log_softmax")],
        tolerance=1e-5,
    )


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
    logits, ids, prompt_lengths, lengths, expected = batch
    logps, width = logits.log_softmax(-1), ids.shape[1]

    def summed(first, last, of=lambda terms: sum(terms)):
        return [
            of([logps[row, t - 1, ids[row, t]].item() for t in range(a, b)])
            for row, (a, b) in enumerate(zip(first, last))
        ]

    ones, ends = [1] * len(ids), lengths.tolist()
    expect(
        task.answer_logps(logits, ids, prompt_lengths, lengths),
        expected,
        "three pairs of unequal lengths",
        [
            (summed(ones, ends), "the prompt's tokens count too"),
            (summed(prompt_lengths.tolist(), [width] * len(ids)), "padding counts too"),
            (summed(prompt_lengths.tolist(), [min(width, end + 1) for end in ends]), "a token of "
             "padding counts too: token t belongs to the answer if t < length"),
            ([-x for x in expected], "the sign: these are logarithms of probabilities"),
            (summed(prompt_lengths.tolist(), ends, lambda terms: sum(terms) / len(terms)),
             "means; wanted are sums"),
        ],
        tolerance=1e-4,
    )


def test_only_the_places_that_predict_the_answer_have_a_gradient(task, batch):
    """They begin at the prompt's last token and end one before the answer's last; neither prompt
    nor padding trains.
    """
    logits, ids, prompt_lengths, lengths, _ = batch
    logits = logits.clone().requires_grad_()
    task.answer_logps(logits, ids, prompt_lengths, lengths).sum().backward()
    for row, prompt, length in zip(logits.grad, prompt_lengths.tolist(), lengths.tolist()):
        assert row.abs().sum(-1).nonzero()[:, 0].tolist() == list(range(prompt - 1, length - 1))
