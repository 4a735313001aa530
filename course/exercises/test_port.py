"""Checks of exercise 10: the folder that make_folder writes goes through a whole iteration of the
loop, about 15 seconds, and its model behaves.
"""

import functools
import json

import pytest

from exercises.loop import run
from harness.files import read_jsonl
from harness.loading import load
from sampling import Chat, sample

REPLIES = ["Yes, of course.", "No."]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a maker, made when it is first asked for."""

    @functools.cache
    def folder_of(make_folder):
        folder = tmp_path_factory.mktemp("model")
        make_folder(folder)
        return folder

    return folder_of


def test_the_folder_goes_through_the_loop(task, folder_of, tmp_path):
    """The ordinary rubric, a warm start, pairs of both kinds; next to nothing is cut off, and no
    control token gets into a text.
    """
    (tmp_path / "prompts.txt").write_text("\n".join(f"What now, number {i}?" for i in range(6)))
    replies = [{"text": text, "rank": rank} for rank, text in enumerate(REPLIES)]
    ranked = [{"prompt": f"Is it late, number {i}?", "replies": replies} for i in range(6)]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ranked))
    (tmp_path / "eval.txt").write_text("Shall I go?\nWhat now?\n")
    records = run(
        tmp_path / "run",
        "--model",
        folder_of(task.make_folder),
        "--iters",
        1,
        "--prompts",
        tmp_path / "prompts.txt",
        "--prompts-per-iter",
        6,
        "--responses",
        4,
        "--judgments",
        3,
        "--eft",
        tmp_path / "ranked.jsonl",
        "--eval-prompts",
        tmp_path / "eval.txt",
        "--max-answer-tokens",
        40,
        "--max-judgment-tokens",
        40,
        "--max-verdict-tokens",
        40,
        "--epochs",
        1,
        "--eft-epochs",
        1,
    )
    pairs, judge = records[1]["pairs"], records[1]["judge"]
    assert pairs["actor"] and pairs["judge"] and judge["valid_rate"] > 0.8
    assert records[1]["actor"]["cut_off"] <= 1 and pairs["dropped"].get("answer cut off", 0) <= 3
    texts = [record["text"] for record in read_jsonl(tmp_path / "run" / "iter1" / "eval.jsonl")]
    assert not any(
        mark in text for text in texts for mark in ("<|", "<s", "</s", "[INST", "think", "turn>")
    ), texts


def opened(folder):
    """(model, tokenizer, Chat) of a folder."""
    model, tokenizer = load(str(folder))
    try:
        return model, tokenizer, Chat(tokenizer)
    except ValueError as error:
        pytest.fail(str(error))


def test_the_model_is_of_another_family_and_asks_as_its_template_does(task, folder_of):
    """The prompt is the template's, token by token, thinking switched off; if there is a padding
    token, it ends nothing.
    """
    model, tokenizer, chat = opened(folder_of(task.make_folder))
    assert model.config.model_type != "llama"
    assert chat.prompt("What now?") == tokenizer.apply_chat_template(
        [{"role": "user", "content": "What now?"}],
        add_generation_prompt=True,
        return_dict=False,
        enable_thinking=False,
    )
    assert tokenizer.pad_token_id is None or tokenizer.pad_token_id not in (
        tokenizer.eos_token_id,
        chat.end,
    )


def test_answers_end_by_themselves(task, folder_of):
    model, tokenizer, _ = opened(folder_of(task.make_folder))
    answers = [
        answer
        for drawn in sample(model, tokenizer, ["What now?", "Shall I go?"], 20, max_new_tokens=60)
        for answer in drawn
    ]
    assert sum(answer.finished for answer in answers) >= 36, "36 of 40"
    assert len({answer.text for answer in answers}) > 5
