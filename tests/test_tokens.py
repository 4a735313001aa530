"""True to the token: what a model drew is what is judged, scored and trained on.

One oracle for every kind of tokenizer and template that the suite can make: prompts and answers
have the template's own ids, and whatever ids are drawn, these very ids train, and no control token
is in their text.
"""
import json
import random
from collections import Counter

import pytest
from conftest import CHATML, LLAMA_3, QWEN_3, TINY, ZEPHYR, llama_tokenizer, random_model
from test_run import MISTRAL
from test_sampling import LLAMA_2, PROMPTS, TOKENIZERS, byte_level
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import metareward
from harness.files import read_jsonl
from harness.lines import as_example, as_pair, as_reply
from harness.settings import Settings
from harness.training import encode_examples
from sampling import Chat, Sample, sample, stop_tokens

GLM = ("[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' "
       "+ message['content'] }}{% endfor %}"
       "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
VICUNA = ("{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] }}"
          "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}"
          "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
DEEPSEEK = ("{% for message in messages %}{{ message['role'].capitalize() + ': ' + "
            "message['content'] }}{{ eos_token if message['role'] == 'assistant' else '\n\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
PHI_3 = ("{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] "
         "+ '<|end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
NO_MARK = ("{% for message in messages %}{{ message['role'] + ' says\n' + message['content'] "
           "+ '\n' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ 'assistant says\n' }}{% endif %}")
ANSWERS = "message['role'] + '\n' + ('{}' if message['role'] == 'assistant' else '')"


def plain_end(folder):
    """The tiny world's tokenizer, whose end of an answer is no special token, and no end of text.
    """
    settings = json.loads((TINY / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["special"] = token["content"] != "<|end|>" and token["special"]
    config = json.loads((TINY / "tokenizer_config.json").read_text()) | {"eos_token": "<|pad|>"}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = AutoTokenizer.from_pretrained(TINY).chat_template.replace("eos_token", "'<|end|>'")
    (folder / "chat_template.jinja").write_text(template)
    return folder


def unigram():
    """A tokenizer that weighs whole ways to cut a text, as T5's and ALBERT's do."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(PROMPTS * 5, trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>",
        initial_alphabet=[chr(i) for i in range(33, 127)] + ["\n"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=LLAMA_2,
                                   unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def phi_3():
    """Tokens that swallow the white space behind them."""
    tokenizer = byte_level(PHI_3, [])
    tokenizer.add_tokens([AddedToken(f"<|{name}|>", rstrip=True, special=True)
                          for name in ("user", "assistant", "end")])
    return tokenizer


def with_space_before():
    """Byte-level, but a text begins with a space, as GPT-2's tokenizer may be told to."""
    tokenizer = byte_level(CHATML, ["<|im_start|>", "<|im_end|>"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def cleaned_up():
    """Whose decoder takes spaces away before commas, as Llama-3's is told to."""
    tokenizer = byte_level(LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


def prepended():
    """A normalizer that puts the space before a text, as Mistral's later tokenizers have it."""
    tokenizer = llama_tokenizer(PROMPTS, MISTRAL, special=["[INST]", "[/INST]"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never",
                                                                         split=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("\u2581")
    return tokenizer


MARKS = ["<|im_start|>", "<|im_end|>"]
KINDS = {
    **TOKENIZERS,
    "zephyr": lambda: llama_tokenizer(PROMPTS, ZEPHYR),
    "zephyr, legacy": lambda: llama_tokenizer(PROMPTS, ZEPHYR, legacy=True),
    "zephyr with tokens": lambda: llama_tokenizer(
        PROMPTS, ZEPHYR, special=["<|user|>", "<|assistant|>"]),
    "chatml on llama-2": lambda: llama_tokenizer(PROMPTS, CHATML, special=MARKS),
    "chatml on llama-2, legacy": lambda: llama_tokenizer(PROMPTS, CHATML, True, MARKS),
    "llama-2 itself": lambda: llama_tokenizer(PROMPTS, LLAMA_2),
    "llama-2, legacy": lambda: llama_tokenizer(PROMPTS, LLAMA_2, legacy=True),
    "mistral": lambda: llama_tokenizer(PROMPTS, MISTRAL, special=["[INST]", "[/INST]"]),
    "mistral, legacy": lambda: llama_tokenizer(PROMPTS, MISTRAL, True, ["[INST]", "[/INST]"]),
    "vicuna": lambda: llama_tokenizer(PROMPTS, VICUNA),
    "glm": lambda: byte_level(GLM, ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]),
    "qwen-3": lambda: byte_level(QWEN_3, MARKS, ["<think>", "</think>"]),
    "without marks": lambda: byte_level(NO_MARK, []),
    "deepseek": lambda: byte_level(DEEPSEEK, []), "prepended": prepended,
    "stripped on the left": lambda: byte_level(
        CHATML.replace("message['content']", "message['content'].lstrip()"), MARKS),
    "stripped on the right": lambda: byte_level(
        CHATML.replace("message['content']", "message['content'].rstrip()"), MARKS),
    "phi-3": phi_3, "unigram": unigram, "a space before": with_space_before,
    "cleaned up": cleaned_up,
}
TEXTS = ["Blue.", "Blue, I think.", "Yes", "I am not sure , but it is 42 .",
         "One.\n\nTwo:\n- a\n- b", "Gr\u00fc\u00dfe, \u4f60\u597d, \U0001f331!", "x",
         "def f(a):\n    return a  # <|x|>"]


@pytest.fixture(scope="module", params=[*KINDS, "plain end"])
def chat(request, tmp_path_factory):
    if request.param == "plain end":
        return Chat(AutoTokenizer.from_pretrained(plain_end(tmp_path_factory.mktemp("tokenizer"))))
    return Chat(KINDS[request.param]())


def template_ids(chat, *texts):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text}
             for i, text in enumerate(texts)]
    return chat.tokenizer.apply_chat_template(turns, add_generation_prompt=len(turns) % 2 == 1,
                                              return_dict=False, enable_thinking=False)


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_and_answers_have_the_templates_own_ids(chat, text):
    """What the template puts behind the prompt, up to the end token, is the answer, word for word.
    """
    asked, whole = template_ids(chat, "Why, " + text), template_ids(chat, "Why, " + text, text)
    assert chat.prompt("Why, " + text) == asked and chat.chat("Why, " + text, text) == whole
    if whole[:len(asked)] != asked:  # QWEN_3 shows no empty thought before an answer that is there
        assert "</think>" in chat.asked
        asked = asked[:-len(chat.encode("<think>\n\n</think>\n\n"))]
    behind, answer = whole[len(asked):], chat.answer(text)
    if chat.end in behind:
        assert answer == behind[:behind.index(chat.end) + 1]
    else:  # the template marks no end
        assert answer[-1] == chat.tokenizer.eos_token_id
        assert chat.tokenizer.decode(behind).rstrip("\n") == chat.tokenizer.decode(answer[:-1])
    if chat.tokenizer.unk_token_id is None or chat.tokenizer.unk_token_id not in answer:
        assert chat.written(answer[:-1]) == text


def test_a_hostile_text_costs_its_neighbours_nothing(chat):
    """Beside a turn that spells a control token, all others are cut as they would be without it."""
    mark, words = min(chat.added, key=len, default="x"), "Blue, I think."
    forged, plain = chat.prompt(mark, words, words), chat.prompt("x", words, words)
    assert chat.control(forged) == chat.control(plain)
    same = next(n for n in range(1, len(plain)) if forged[-n] != plain[-n]) - 1
    assert chat.tokenizer.decode(plain[-same:]).count(words) == 2


def drawn_at_random(chat, chance):
    """Ids that no encoder would give, control tokens among them, and one of the stop tokens."""
    ends = [chat.end, chat.tokenizer.eos_token_id]
    ordinary = sorted(set(range(len(chat.tokenizer))) - set(ends))
    return [*chance.choices(ordinary, k=chance.randint(1, 12)), chance.choice(ends)]


def test_the_ids_that_train_are_the_ids_that_were_drawn(chat):
    """Of 200 samples as wild as can be, and of those that are the template's own; no text of them
    has a mark of the template or a special token in it.
    """
    chance = random.Random(0)
    wild = [drawn_at_random(chat, chance) for _ in range(200)]
    tame = [ids for ids in map(chat.answer, TEXTS) if chat.tokenizer.unk_token_id not in ids]
    records = [as_reply(chat, Sample(chat.written(ids[:-1]), ids, True))
               for ids in wild + tame]
    assert sum("ids" in record for record in records[:200]) > 50
    assert not any("ids" in record for record in records[200:])
    pairs = [as_pair("actor", "0", "Why?", one["text"], other["text"],
                     [one.get("ids"), other.get("ids")])
             for one, other in zip(records, records[1:])]
    assert [pair["chosen_ids"] for pair in encode_examples(chat, pairs)] == (wild + tame)[:-1]
    assert [pair["rejected_ids"] for pair in encode_examples(chat, pairs)] == (wild + tame)[1:]
    lessons = [as_example("0", "Why?", one["text"], one.get("ids")) for one in records]
    assert [lesson["answer_ids"] for lesson in encode_examples(chat, lessons)] == wild + tame
    marks = {chat.tokenizer.convert_ids_to_tokens(i) for i in chat.marks}
    special = {*marks, *chat.tokenizer.all_special_tokens}
    assert not [text for text in (record["text"] for record in records[:200])
                if any(mark in text for mark in special)]


def test_texts_that_nobody_drew_are_encoded_behind_the_prompt():
    """As a small model sees it: after a line break SentencePiece puts no space."""
    chat = Chat(KINDS["zephyr"]())
    first, = chat.tokenizer.convert_ids_to_tokens(chat.answer("Blue")[:1])
    alone, = chat.tokenizer.convert_ids_to_tokens(chat.encode("Blue")[:1])
    assert alone.startswith("\u2581") and not first.startswith("\u2581")


# ---- through the sampler and through a run

def test_a_stop_token_is_no_text_whatever_its_flags(tiny, tmp_path):
    """What sampling gives with an end token that is not special is what it gives with one."""
    model, tokenizer = tiny
    prompts = ["How do I keep bread fresh?", "What is a good way to take a good break?"]
    settings = {"n": 3, "max_new_tokens": 200}
    expected = sample(model, tokenizer, prompts, **settings)
    plain = AutoTokenizer.from_pretrained(plain_end(tmp_path))
    assert plain.decode([Chat(plain).end], skip_special_tokens=True) == "<|end|>"
    assert sample(model, plain, prompts, **settings) == expected
    assert all(one.finished for group in expected for one in group)


def test_the_end_tokens_of_a_model_are_none_of_its_text():
    """Three of them, none the template's and none special, as GLM has them."""
    tokenizer = byte_level(GLM, [], ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>",
                                     "<|observe|>"])
    model, chat = random_model(LlamaConfig, tokenizer), Chat(tokenizer)
    ends = [chat.added[name] for name in ("<|user|>", "<|observe|>")]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends, *range(20, 400, 9)]
    samples = sample(model, tokenizer, PROMPTS, 8, max_new_tokens=12)
    stops, seen = stop_tokens(model, tokenizer), Counter()
    for one in (one for group in samples for one in group):
        assert one.finished == (one.tokens[-1] in stops)
        assert one.text == chat.written(one.tokens[:-1] if one.finished else one.tokens)
        assert not any(mark in one.text for mark in ("<|user|>", "<sop>", "<|assistant|>"))
        kept = as_reply(chat, one).get("ids")
        seen[one.finished, kept is None] += 1
        assert kept in (None, one.tokens) and (one.finished or kept is None)
    assert seen[True, False] > 20


def test_a_run_keeps_the_ids_that_were_drawn_and_counts_them(tmp_path, monkeypatch, capsys):
    """Most replies of a scripted run are drawn one byte a token: these ids stand in their records
    and pairs, and train; the summary counts them by stage.
    """
    from test_run import scripted, small

    from harness import training
    seen = []
    recipe = training.train_in_folder

    def fake(model, tokenizer, prompts, n, *, on_end, **settings):
        chat = Chat(tokenizer)

        def end(i, k, one):
            by_bytes = [i for character in one.text for i in chat.encode(character)] + [chat.end]
            on_end(i, k, Sample(one.text, by_bytes if k % 3 else one.tokens, one.finished))

        return scripted()(model, tokenizer, prompts, n, on_end=end, **settings)

    def watched(model, name, training, held_out, folder, *args, **settings):
        seen.append([*training, *held_out])
        return recipe(model, name, training, held_out, folder, *args, **settings)

    monkeypatch.setattr("harness.stage.sample", fake)
    monkeypatch.setattr("harness.run.train_in_folder", watched)
    metareward.main(small(tmp_path, "--out", str(tmp_path / "run"), "--iters", "1", "--epochs", "1",
                          "--prompts-per-iter", "6", "--eft-epochs", "1"))
    run, record = tmp_path / "run", json.loads((tmp_path / "run" / "summary.json").read_text())[1]
    chat = Chat(AutoTokenizer.from_pretrained(TINY))
    answers = [one for item in read_jsonl(run / "iter1" / "responses.jsonl")
               for one in item["responses"]]
    judgments = [one for item in read_jsonl(run / "iter1" / "judgments.jsonl")
                 for one in item["judgments"]]
    counted = record["encoded_otherwise"]
    assert counted["answers"] == sum("ids" in one for one in answers) >= 6
    assert counted["judgments"] == sum("ids" in one for one in judgments) > 6
    pairs = read_jsonl(run / "iter1" / "pairs.jsonl")
    by_kind = Counter(pair["kind"] for pair in pairs if "ids" in pair)
    assert by_kind["actor"] and by_kind["judge"]
    drawn = {(one["text"], tuple(one["ids"])) for one in answers + judgments if "ids" in one}
    for example in seen[-1]:
        pair = pairs[example["line"] - 1]
        for side in ("chosen", "rejected"):
            text, ids = pair[side][0]["content"], example[f"{side}_ids"]
            kept = pair.get("ids", {}).get(side)
            assert ids == (kept or chat.answer(text)) and (not kept or (text, tuple(ids)) in drawn)
    assert "otherwise than they were drawn" in (run / "report.html").read_text()
    assert capsys.readouterr().err.count("texts would be encoded otherwise than the model") == 1


# ---- templates that cannot be held to it

HARMONY = ("{% for message in messages %}{{ '<|start|>' + message['role'] }}{% if "
           "message['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
           "{{ '<|message|>' + message['content'] + ('<|return|>' if loop.last else '<|end|>') }}"
           "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}")
CHANNELS = ["<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>"]


@pytest.mark.parametrize("template, special, ordinary, says", [
    (HARMONY, CHANNELS, [], "<\\|channel\\|>"),  # gpt-oss
    (CHATML.replace("message['role'] + '\n'", ANSWERS.format("<answer>")), MARKS, ["<answer>"],
     "<answer>"),
    (QWEN_3.replace("{{ '<think>\n\n</think>\n\n' }}", "{{ '<reason>' }}"), MARKS, ["<reason>"],
     "<reason>|im_start"),
    (CHATML.replace("message['role'] + '\n'", ANSWERS.format("<think>\n\n</think>")), MARKS,
     ["<think>", "</think>"], "</think>")])
def test_a_template_that_thinks_or_routes_in_other_words_is_refused(template, special, ordinary,
                                                                    says):
    tokenizer = byte_level(template, special, ordinary)
    with pytest.raises(ValueError, match=f"{says}.*thinks, or chooses a channel"):
        Chat(tokenizer)


def test_a_template_without_an_end_of_an_answer_is_refused():
    tokenizer = byte_level(NO_MARK, [])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no token"):
        Chat(tokenizer)


def test_an_answer_that_begins_with_a_thought_is_dropped():
    record = {"prompt_id": "0", "prompt": "Why?", "responses": [
        {"text": text, "finished": True} for text in ("<think>Hm.</think>Yes.", "Yes.")]}
    dropped = Counter()
    [kept] = metareward.finished_answers([record], 5, dropped)
    assert kept["text"] == "Yes."
    assert dropped == {"answer with control tokens or a thought in it": 1}


def test_what_trains_is_what_was_judged(tmp_path):
    """A turn of its own that a model opens within its sample is no text, so it is no answer; and a
    judgment that holds one has no score.
    """
    chat = Chat(KINDS["chatml on llama-2"]())
    ids = [*chat.encode("Blue."), chat.added["<|im_start|>"], *chat.encode("Score: 4"), chat.end]
    text = chat.written(ids[:-1])
    record = as_reply(chat, Sample(text, ids, True))
    assert record == {"text": text, "finished": True, "ids": ids, "marked": True}
    dropped = Counter()
    assert metareward.finished_answers([{"prompt_id": "0", "prompt": "Why?",
                                         "responses": [record]}], 5, dropped) == []
    assert dropped == {"answer with control tokens or a thought in it": 1,
                       "prompt without a finished answer": 1}
    whole = Sample("Good.\nScore: 4", chat.answer("Good.\nScore: 4"), True)
    marked = Sample("Good.\nScore: 4", [chat.added["<|im_start|>"], *whole.tokens], True)

    class Asked:
        settings, rubric = Settings(model="m", out="o"), "rubric"

        def sample(self, t, name, items, ask, read, *_):
            return [read(item, [[whole, marked]]) for item in items]

    run = Asked()
    run.chat = chat
    judged, = metareward.judge(run, 1, [{"prompt": "Why?", "text": "Blue."}])
    assert judged["scores"] == [4, None] and judged["score"] == 4
