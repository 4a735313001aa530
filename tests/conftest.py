"""Models for the tests: the tiny world, and random ones of other families with the tiny world's
tokenizer, built on the spot. No network.
"""
import functools
import json
import os
import string
import warnings
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["OMP_NUM_THREADS"] = "1"  # of programs that tests start, too: tests run side by side

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    Qwen3Config,
)

from dpo import add_lora, trainable  # noqa: E402
from harness.loading import load  # noqa: E402
from sampling import Chat  # noqa: E402

TINY = Path(__file__).parent.parent / "tiny"

SHARED = ("Compare these two judgments of one answer, point by point, and say which of them is "
          "right. ") * 2
PROMPTS = ["How do I plant a tree?", SHARED + "A", SHARED + "A and then B", "Why?",
           SHARED + "C, which is longer than the others by a few words",
           "How do I plant a hedge before the frost comes?", ""]

# chat templates, in our own words, of models that several tests play with
LLAMA_3 = ("{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] "
           "+ '<|end_header_id|>\n\n' "
           "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
           "{% endif %}")
QWEN_3 = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if "
          "message['role'] == 'assistant' %}"
          "{{ message['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ "
          "message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
          "{% if enable_thinking is defined and enable_thinking is false %}{{ "
          "'<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")


ZEPHYR = ("{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + "
          "eos_token + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
          "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def llama_tokenizer(texts, template, legacy=False, special=(), vocab_size=700):
    """transformers' own LlamaTokenizer, SentencePiece's kind of BPE with bytes to fall back on,
    whose merges are learned from texts.
    """
    learned = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    single = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learned.train_from_iterator([text.replace("\n", " ") for text in texts], trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=single, show_progress=False,
        initial_alphabet=[*string.ascii_letters, *string.digits, *string.punctuation, "\u2581"]))
    model = json.loads(learned.to_str())["model"]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=[*map(tuple, model["merges"])],
                               legacy=legacy, chat_template=template)
    tokenizer.add_tokens([*special], special_tokens=True)
    return tokenizer


cases = Counter()  # that were generated, by test


def FUZZ(test):
    """A test over generated cases: 150 of them, or as many as CASES says. `CASES=20000 python -m
    pytest -m fuzz` runs these tests alone.
    """
    inner = test.hypothesis.inner_test

    @functools.wraps(inner)
    def counted(*args, **kwargs):
        cases[test.__name__] += 1
        return inner(*args, **kwargs)

    test.hypothesis.inner_test = counted
    return pytest.mark.fuzz(settings(max_examples=int(os.environ.get("CASES", 150)),
                                     deadline=None)(test))


def pytest_terminal_summary(terminalreporter):
    if cases:
        terminalreporter.write_line(f"{cases.total():,} generated cases in {len(cases)} tests")


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the tiny world, shared by all tests: look, don't touch."""
    return load(str(TINY))


@pytest.fixture
def fresh_tiny():
    """The tiny world's model for a test that changes it."""
    return load(str(TINY))[0]


def random_model(config_class, tokenizer, dtype=torch.float32, **settings):
    """A random model whose greedy answers vary with the prompt; one token in sixteen ends an
    answer, so that rows end at different times.
    """
    torch.manual_seed(0)
    config = config_class(**{
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(15, len(tokenizer), 16)]
    return model.requires_grad_(False)


FAMILIES = {"llama": (LlamaConfig, {}), "qwen3": (Qwen3Config, {}),
            "mistral": (MistralConfig, {"sliding_window": None}), "gemma": (GemmaConfig, {})}


@pytest.fixture(scope="session", params=["tiny", *FAMILIES])
def family(request, tiny):
    """(model, tokenizer) of each family in turn."""
    if request.param == "tiny":
        return tiny
    config_class, settings = FAMILIES[request.param]
    return random_model(config_class, tiny[1], **settings), tiny[1]


@pytest.fixture(scope="session")
def llama(tiny):
    """(model, tokenizer) of a random Llama, whose next token is far less certain than the tiny
    world's.
    """
    return random_model(LlamaConfig, tiny[1]), tiny[1]


# ---- oracles that several tests hold us to

def greedy_ids(model, ids, max_new_tokens):
    """transformers' greedy continuation of token ids: token ids."""
    ids = torch.tensor([ids])
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "max_length": None,
                "pad_token_id": 0}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return out[0, ids.shape[1]:].tolist()


def plain_logps(model, prompts, answers):
    """log p of the answer to each prompt, (prompts,), every sequence by a plain pass of its own."""
    sums = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        logps = logits[len(prompt) - 1: -1].double().log_softmax(-1)
        sums.append(logps.gather(-1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(sums)


# ---- pairs to train on, and the model that trains

TEXTS = [  # prompt, chosen, rejected: of different lengths, one answer a beginning of the other
    ("How do I plant a tree?", "Dig a hole. Water it well, because roots are thirsty.",
     "Dig a hole."),
    ("Why?", "Because.", "There are many reasons, and here they all are, one by one."),
    ("Write a short poem about the sea, please.", "Waves.", "The sea is wide, the sea is deep."),
    ("And now?", "Wait for the rain.", "Run."),
    ("What is a hedge good for?", "Birds live in it, for example.", "It is green. It is a hedge."),
]


def tokenized(tokenizer, texts=TEXTS):
    """Fresh examples for train_dpo."""
    chat = Chat(tokenizer)
    return [{"prompt_ids": chat.prompt(prompt), "chosen_ids": chat.answer(chosen),
             "rejected_ids": chat.answer(rejected)} for prompt, chosen, rejected in texts]


def columns(examples):
    """The three lists that pair_logps takes."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return tuple([example[name] for example in examples] for name in names)


def with_lora(model, rank=2, fresh=True):
    """The model with an adapter, always the same one; unless fresh, it has an effect already."""
    torch.manual_seed(0)
    model = add_lora(model, rank)
    for name, weight in trainable(model).items():
        if not fresh and "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def flip(file):
    """Change one bit of a safetensors file's last number."""
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
