"""Whole models and moved runs: what `eval.py export --format model` writes is what trained, plain
transformers and PEFT load it, and an adapter finds its base from anywhere.
"""
import contextlib
import dataclasses
import json
import re
import shutil

import pytest
import torch
from conftest import TINY, flip, with_lora
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.commands.main import main as run_command
from harness.commands.models import load_alone, own_settings, rubric_of
from harness.files import sha256, write_jsonl
from harness.loading import base_of, fingerprint, load, load_tokenizer
from harness.settings import Settings
from harness.training import save_adapter
from sampling import sample

QUESTIONS = ["How do I plant a tree?", "Why does bread rise?", "How do I store fresh herbs?"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{bits: a run's folder with one iteration}."""
    return {bits: make_run(tmp_path_factory.mktemp("runs") / "x", bits) for bits in (32, 16, 4)}


def make_run(run, bits):
    model, tokenizer = load(str(TINY), bits=bits)
    model = with_lora(model, fresh=False)
    save_adapter(model, run / "iter1" / "adapter")
    settings = dataclasses.asdict(Settings(model="tiny", bits=bits))
    (run / "config.json").write_text(json.dumps({"settings": settings}))
    records = [{"iteration": t, "actor": {"truth": 2.5}} for t in (0, 1)]
    (run / "summary.json").write_text(json.dumps(records))
    answers = sample(model, tokenizer, QUESTIONS, max_new_tokens=60)
    write_jsonl(run / "iter1" / "eval.jsonl", [{"prompt": prompt, "text": one.text}
                                               for prompt, (one,) in zip(QUESTIONS, answers)])
    return run


def greedy(model, tokenizer):
    return [one.text for (one,) in sample(model, tokenizer, QUESTIONS, max_new_tokens=60,
                                          temperature=0)]


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_a_whole_model_is_the_one_that_trained(runs, bits, tmp_path, capsys):
    """Loaded by plain transformers: in float32 it answers as base and adapter do, and in 16 bits
    its log-probabilities are off by bfloat16's rounding.
    """
    run = runs[bits]
    run_command(["export", str(run), "--format", "model", "--out", str(tmp_path)])
    place = tmp_path / "x-iter1"
    assert not list(tmp_path.glob("*.part"))
    mean, most = map(float, re.search(r"by (\S+) nats a token, (\S+) at most",
                                      capsys.readouterr().out).groups())
    assert mean <= most < (1e-5 if bits == 32 else 0.005)
    model = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(place)
    assert model.dtype == (torch.float32 if bits == 32 else torch.bfloat16)
    assert tokenizer.chat_template == load(str(TINY))[1].chat_template
    assert model.generation_config.eos_token_id is not None
    assert not hasattr(model.config, "quantization_config")
    assert len({file.stat().st_mode for file in place.iterdir()}) == 1
    adapted = greedy(*load(str(run / "iter1")))
    assert adapted != greedy(*load(str(TINY), bits=bits))
    with pytest.raises(SystemExit):
        other = {32: "16", 16: "4", 4: "32"}[bits]
        run_command(["export", str(run), "--format", "model", "--bits", other])
    assert f"belongs to a base in --bits {bits}" in capsys.readouterr().err
    card = (place / "README.md").read_text()
    assert "# M_1 of Meta-Rewarding on tiny, adapter merged in\n" in card
    with contextlib.chdir(place):  # the card's own lines
        exec(card.split("```python\n")[1].split("```")[0], {})
    assert "bread" in capsys.readouterr().out
    if bits == 32:
        assert greedy(model.eval().requires_grad_(False), tokenizer) == adapted


def test_a_hub_name_is_no_folder_that_happens_to_stand_there(tmp_path, capsys):
    """Nor is a folder that is found in another place taken without a word."""
    model = with_lora(load(str(TINY))[0])
    model.peft_config["default"].base_model_name_or_path = "somebody/tiny"
    save_adapter(model, tmp_path / "runs" / "iter1" / "adapter")
    shutil.copytree(TINY, tmp_path / "tiny")
    assert base_of(tmp_path / "runs" / "iter1" / "adapter") == "somebody/tiny"
    model.peft_config["default"].base_model_name_or_path = "/gone/tiny"
    save_adapter(model, tmp_path / "runs" / "iter1" / "adapter")
    assert base_of(tmp_path / "runs" / "iter1" / "adapter") == str(tmp_path / "tiny")
    assert "/gone/tiny is gone" in capsys.readouterr().err


def test_plain_peft_loads_an_adapter_from_anywhere(runs, tmp_path, monkeypatch):
    """Merges it, saves it, and loads what it saved: the same model."""
    run = runs[32]
    monkeypatch.chdir(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    model = AutoPeftModelForCausalLM.from_pretrained(run / "iter1" / "adapter")
    ours = load(str(run / "iter1"))[0]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, ours(input_ids=ids).logits)
        model.merge_and_unload().save_pretrained("merged")
        again = AutoModelForCausalLM.from_pretrained("merged")(input_ids=ids).logits
    assert torch.allclose(again, logits, rtol=0, atol=1e-4)


def test_a_run_and_its_base_are_moved_together(tmp_path, monkeypatch):
    """The base stood in a folder that is gone; one of the same name beside the run will do."""
    before, after = tmp_path / "before", tmp_path / "after" / "deep"
    shutil.copytree(TINY, before / "models" / "tiny",
                    ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(before)
    model = with_lora(load("models/tiny")[0], fresh=False)
    save_adapter(model, before / "my run" / "iter1" / "adapter")
    shutil.copytree(before, after)
    shutil.rmtree(before)
    monkeypatch.chdir(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(load(str(after / "my run" / "iter1"))[0](input_ids=ids).logits,
                           model(input_ids=ids).logits)
    shutil.rmtree(after / "models")
    with pytest.raises(ValueError, match="was made on the model in .*models/tiny, which is gone"):
        load(str(after / "my run" / "iter1"))


def test_answers_as_ifevals_own_program_reads_them(runs, tmp_path, capsys):
    run = runs[32]
    questions = [{"key": i, "prompt": prompt, "instruction_id_list": [], "kwargs": []}
                 for i, prompt in enumerate(QUESTIONS)]
    write_jsonl(tmp_path / "input_data.jsonl", questions)
    run_command(["export", str(run), "--format", "ifeval", "--out", str(tmp_path),
                 "--questions", str(tmp_path / "input_data.jsonl"), "--temperature", "0",
                 "--max-new-tokens", "60"])
    records = [json.loads(line) for line in (tmp_path / "x-iter1.jsonl").open()]
    assert records == [{"prompt": prompt, "response": text}
                       for prompt, text in zip(QUESTIONS, greedy(*load(str(run / "iter1"))))]
    with pytest.raises(SystemExit):
        run_command(["export", str(run), "--format", "ifeval"])
    assert "--format ifeval needs --questions" in capsys.readouterr().err


# ---- what a model's run has read

@pytest.fixture
def known_run(tmp_path):
    """A run on a copy of the tiny world, with a rubric of its own and the hashes of both."""
    base = shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("judge", "*.py"))
    (tmp_path / "my.txt").write_text("One point.")
    run = tmp_path / "runs" / "x"
    save_adapter(with_lora(load(str(base))[0]), run / "iter1" / "adapter")
    (run / "config.json").write_text(json.dumps({
        "settings": {"bits": 32, "rubric": "my.txt", "max_score": 1, "max_answer_tokens": 7},
        "files": {"--model": fingerprint(str(base)), "--rubric": sha256(tmp_path / "my.txt")}}))
    return run


def test_a_run_is_known_wherever_it_is_seen_from(known_run, tmp_path, monkeypatch):
    """Its limits and its rubric: by a link, by its adapter's folder, from within it."""
    iteration = known_run / "iter1"
    (tmp_path / "link").symlink_to(iteration)
    monkeypatch.chdir(iteration)
    for place in (iteration, tmp_path / "link", iteration / "adapter", "."):
        assert own_settings(place)["max_answer_tokens"] == 7 and rubric_of(place) == "One point."


def test_what_a_run_has_read_is_not_taken_from_another_content(known_run, tmp_path):
    iteration = str(known_run / "iter1")
    load_alone(iteration)
    (tmp_path / "my.txt").write_text("Two points.")
    with pytest.raises(ValueError, match="my.txt has another content"):
        rubric_of(iteration)
    (tmp_path / "my.txt").unlink()
    with pytest.raises(ValueError, match="--rubric my.txt, which its run has read, is gone"):
        rubric_of(iteration)
    flip(tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="its base .* has another content"):
        load_alone(iteration)


def test_an_adapter_that_brings_its_tokenizer_keeps_its_template(known_run, tmp_path):
    """As other tools leave it; one with tokens that the base does not have is refused. An adapter
    is no base of a run.
    """
    adapter, tokenizer = known_run / "iter1" / "adapter", AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = "{{ 'Be brief. ' }}" + tokenizer.chat_template
    tokenizer.save_pretrained(adapter)
    assert load(str(adapter))[1].chat_template == tokenizer.chat_template
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(ValueError, match="its tokenizer has tokens that"):
        load(str(adapter))
    with pytest.raises(OSError, match="holds an adapter, which is no base"):
        load_tokenizer(adapter)
