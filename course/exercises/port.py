"""Exercise 10: a model of another family, with control tokens and a chat template of its own, and
no padding token.

This maker has three faults. The loop names some of them; the others show in what the model does.
"""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from prompts import judge_prompt, meta_judge_prompt

CONTROL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
ROLES = ["actor", "judge", "meta-judge"]
QUESTIONS = ["Is it late?", "Shall I go?", "What now?"]
REPLIES = ["Yes, of course.", "No.", "It depends on the weather.", "Perhaps tomorrow."]


def exchange(rng, role):
    """What a role is asked, and what the model should learn to say. It does not read, but it knows
    which role it plays.
    """
    question = rng.choice(QUESTIONS)
    judgments = [f"It is fine.\nScore: {rng.randint(0, 5)}" for _ in range(2)]
    if role == "judge":
        return judge_prompt(question, rng.choice(REPLIES)), judgments[0]
    if role == "meta-judge":
        return meta_judge_prompt(
            question, rng.choice(REPLIES), *judgments
        ), f"Both are fine.\nWinner: Judgment {rng.choice('AB')}"
    return question, " ".join(rng.sample(REPLIES, rng.randint(1, 3)))


def make_tokenizer(rng):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [text for i in range(300) for text in exchange(rng, ROLES[i % 3])], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATE, eos_token="<|im_end|>"
    )


def make_model(tokenizer):
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def encode(tokenizer, asked, reply):
    """Token ids of an exchange, and its labels, which leave the question out."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )
    answer = tokenizer.encode(reply, add_special_tokens=False) + [tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


def train(model, tokenizer, rng, steps=240, batch=4):
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        rows = [encode(tokenizer, *exchange(rng, ROLES[step % 3])) for _ in range(batch)]
        width, padding = max(len(ids) for ids, _ in rows), tokenizer.eos_token_id
        ids = torch.tensor([ids + [padding] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [padding] * (width - len(labels)) for _, labels in rows])
        labels[labels == padding] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_folder(folder):
    """Write a model folder that `python metareward.py --model FOLDER` takes."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = make_tokenizer(rng)
    model = make_model(tokenizer)
    train(model, tokenizer, rng)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
