"""harness/training.py: what a training leaves on disk, and that it can be interrupted anywhere.

A training that stops at any step and is called again must leave the same bytes as one that never
stopped.
"""
import hashlib
import json
import math

import numpy as np
import pytest
import torch
from conftest import TEXTS, TINY, columns, flip, random_model, tokenized, with_lora
from safetensors.torch import load_file
from transformers import LlamaConfig

import dpo
import harness.training
from dpo import pair_logps, train_dpo, train_sft, trainable
from harness.files import read_jsonl
from harness.loading import load
from harness.training import save_adapter, set_adapter, set_reference, train_in_folder

# ---- what it leaves

def test_a_training_leaves_log_reference_and_adapter(fresh_tiny, tiny, tmp_path):
    """The rewards' difference is the margin, the references stand under the lines by which the
    steps call their pairs, and the adapter on disk is the model's.
    """
    examples = [pair | {"line": line} for line, pair in enumerate(tokenized(tiny[1]), 1)]
    model = with_lora(fresh_tiny)
    best = train_in_folder(model, train_dpo, examples, [], tmp_path, beta=0.1, epochs=2,
                           batch_size=2, lr=5e-3)
    references = {line["line"]: line for line in read_jsonl(tmp_path / "reference.jsonl")}
    records = read_jsonl(tmp_path / "train.jsonl")
    steps = [record for record in records if "step" in record]
    for step in steps:
        before = np.mean([references[line]["ref_chosen"] for line in step["lines"]])
        margin = step["chosen_reward"] - step["rejected_reward"]
        assert step["margin"] == pytest.approx(margin, abs=1e-9)
        reward = 0.1 * (step["chosen_logp"] - before)
        assert step["chosen_reward"] == pytest.approx(reward, abs=1e-6)
    assert sorted(references) == [1, 2, 3, 4, 5] and abs(steps[-1]["chosen_reward"]) > 0.01
    assert best == records[-1] == {"epoch": 2} and len(steps) == 6
    weights, config = (tmp_path / "adapter" / name
                       for name in ("adapter_model.safetensors", "adapter_config.json"))
    assert weights.stat().st_mode == config.stat().st_mode, "whoever reads one may read the other"
    saved = load_file(weights)
    for name, weight in trainable(model).items():
        assert torch.equal(saved[name.replace(".default", "")], weight)


def test_sft_needs_no_reference(fresh_tiny, tiny, tmp_path):
    examples = [{"prompt_ids": pair["prompt_ids"], "answer_ids": pair["chosen_ids"]}
                for pair in tokenized(tiny[1])]
    best = train_in_folder(with_lora(fresh_tiny), train_sft, examples[1:], examples[:1], tmp_path,
                           epochs=1, batch_size=2, lr=1e-3)
    assert best["held_out_loss"] > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "adapter", "checkpoint.safetensors", "train.jsonl"]


def test_training_on_nothing_is_refused(fresh_tiny, tmp_path):
    with pytest.raises(ValueError, match="no examples"):
        train_in_folder(with_lora(fresh_tiny), train_sft, [], [], tmp_path, epochs=1, batch_size=1,
                        lr=1e-3)


@pytest.mark.parametrize("name, other", [
    ("epochs", {"epochs": 2}), ("batch_size", {"batch_size": 2}), ("lr", {"lr": 2e-3}),
    ("beta", {"beta": 0.2}), ("seed", {"seed": 1}), ("adapter", {"rank": 4}),
    ("examples", {"held_out": 1})])
def test_a_checkpoint_of_another_call_is_refused(tiny, tmp_path, name, other):
    """By the name of what differs. The old result would otherwise be returned as that of the new
    call, or two trainings be mixed.
    """
    settings = {"epochs": 1, "batch_size": 5, "lr": 1e-3, "beta": 0.1, "seed": 0, "rank": 2,
                "held_out": 0}

    def call(rank, held_out, **settings):
        (tmp_path / "reference.jsonl").unlink(missing_ok=True)
        examples = tokenized(tiny[1])
        return train_in_folder(with_lora(load(str(TINY))[0], rank), train_dpo, examples[held_out:],
                               examples[:held_out], tmp_path, **settings)

    assert call(**settings) == call(**settings)
    message = f"checkpoint.safetensors belongs to a training with other {name}: choose another"
    with pytest.raises(ValueError, match=message):
        call(**settings | other)


# ---- adapters

def test_adapters_can_be_exchanged(tiny, fresh_tiny, tmp_path):
    """save_adapter and set_adapter bring back the exact weights, over an older folder as well. An
    adapter with other keys is refused.
    """
    model = with_lora(fresh_tiny, fresh=False)
    before = {name: weight.detach().clone() for name, weight in trainable(model).items()}
    save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
    for weight in trainable(model).values():
        weight.data.zero_()
    set_adapter(model, tmp_path / "adapter")
    assert all(torch.equal(weight, before[name]) for name, weight in trainable(model).items())
    save_adapter(with_lora(random_model(LlamaConfig, tiny[1])), tmp_path / "other")
    with pytest.raises(ValueError, match="other keys"):
        set_adapter(model, tmp_path / "other")


def test_an_adapter_whose_numbers_changed_is_refused(fresh_tiny, tmp_path):
    """The file is still well formed, and is taken where nobody says what it was."""
    model, folder = with_lora(fresh_tiny, fresh=False), tmp_path / "adapter"
    save_adapter(model, folder)
    file = folder / "adapter_model.safetensors"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    set_adapter(model, folder, sha256)
    flip(file)
    set_adapter(model, folder)
    with pytest.raises(ValueError, match="missing or damaged .its content is not what was written"):
        set_adapter(model, folder, sha256)


# ---- being interrupted

class Interrupted(Exception):
    pass


def run(folder, tokenizer, monkeypatch, stop_at=None):
    """A DPO training as a new process would call it: (the best epoch, calls of pair_logps).

    stop_at: the number of the call of pair_logps that does not return.
    """
    model = with_lora(load(str(TINY))[0])
    calls = 0

    def counted(*args):
        nonlocal calls
        if calls == stop_at:
            raise Interrupted
        calls += 1
        return pair_logps(*args)

    monkeypatch.setattr(dpo, "pair_logps", counted)
    monkeypatch.setattr(harness.training, "SAVE_EVERY", 3)
    examples = tokenized(tokenizer)
    best = train_in_folder(model, train_dpo, examples[:4], examples[4:], folder, beta=0.1, epochs=2,
                           batch_size=2, lr=1e-3, seed=7)
    return best, calls


def leavings(folder):
    """What must not depend on interruptions: the log but for its timings, and two files' bytes."""
    log = [{name: value for name, value in record.items() if name != "tokens_per_second"}
           for record in read_jsonl(folder / "train.jsonl")]
    files = ("adapter/adapter_model.safetensors", "reference.jsonl")
    return log, *((folder / name).read_bytes() for name in files)


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as monkeypatch:
        best, calls = run(folder, tiny[1], monkeypatch)
    assert calls == 1 + 2 * (2 + 1), "the reference; two epochs of two steps and one held-out pass"
    return best, leavings(folder)


@pytest.mark.parametrize("stop_at, left", [(0, 7), (1, 6), (2, 6), (3, 6), (4, 3), (5, 2), (6, 2)])
def test_training_resumes_from_any_call_to_the_same_bytes(uninterrupted, tiny, tmp_path,
                                                          monkeypatch, stop_at, left):
    """Checkpoints are written after the first epoch, step 3 and the second epoch, so that some
    interruptions lose steps and some do not. left: the calls that a second start makes.
    """
    with pytest.raises(Interrupted):
        run(tmp_path, tiny[1], monkeypatch, stop_at)
    assert not (tmp_path / "adapter").exists()
    best, calls = run(tmp_path, tiny[1], monkeypatch)
    assert (best, leavings(tmp_path)) == uninterrupted
    assert calls == left, "what was saved is not computed again"


def test_training_resumes_however_often_it_is_interrupted(uninterrupted, tiny, tmp_path,
                                                          monkeypatch):
    for stop_at in (0, 2, 3, 0, 1, 1, 0):
        with pytest.raises(Interrupted):
            run(tmp_path, tiny[1], monkeypatch, stop_at)
        with open(tmp_path / "train.jsonl", "a") as file:
            file.write('{"torn')
    best, _ = run(tmp_path, tiny[1], monkeypatch)
    assert (best, leavings(tmp_path)) == uninterrupted


@pytest.mark.parametrize("name, half", [("save", "checkpoint.safetensors.part"),
                                        ("save_adapter", "adapter.part")])
def test_training_resumes_from_a_failed_write(uninterrupted, tiny, tmp_path, monkeypatch, name,
                                              half):
    """A checkpoint or an adapter that is half written when the process dies is never taken for a
    whole one.
    """
    def fail(*args, **kwargs):
        (tmp_path / half).write_text("half")
        raise Interrupted

    with monkeypatch.context() as context, pytest.raises(Interrupted):
        context.setattr(harness.training, name, fail)
        run(tmp_path, tiny[1], context)
    if name == "save_adapter":
        (tmp_path / half).unlink()
    best, _ = run(tmp_path, tiny[1], monkeypatch)
    assert (best, leavings(tmp_path)) == uninterrupted


def test_a_finished_training_called_again_computes_nothing(uninterrupted, tiny, tmp_path,
                                                           monkeypatch):
    run(tmp_path, tiny[1], monkeypatch)
    best, calls = run(tmp_path, tiny[1], monkeypatch)
    assert (best, leavings(tmp_path)) == uninterrupted and calls == 0


def change_step(file):
    """Another digit in what a checkpoint says beside its tensors."""
    content, before = file.read_bytes(), b'\\"step\\": 3, \\"epoch\\": 1, \\"best'
    assert content.count(before) == 1
    file.write_bytes(content.replace(before, before.replace(b"3", b"9")))


@pytest.mark.parametrize("change", [flip, change_step])
def test_a_checkpoint_whose_content_changed_is_refused(uninterrupted, tiny, tmp_path, monkeypatch,
                                                       change):
    """And once it is deleted, training starts again."""
    with pytest.raises(Interrupted):
        run(tmp_path, tiny[1], monkeypatch, 5)
    file = tmp_path / "checkpoint.safetensors"
    change(file)
    message = "checkpoint.safetensors is damaged .its content is not what was written.: delete it"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tiny[1], monkeypatch)
    file.unlink()
    best, _ = run(tmp_path, tiny[1], monkeypatch)
    assert (best, leavings(tmp_path)) == uninterrupted


# ---- the reference

@pytest.fixture
def referenced(tiny, tmp_path, monkeypatch):
    """(call, file): call() gives the pairs of TEXTS their reference; it returns (the pairs, of how
    many the model was asked).
    """
    asked = []

    def counted(model, *columns):
        asked.extend(columns[0])
        return pair_logps(model, *columns)

    monkeypatch.setattr(dpo, "pair_logps", counted)

    def call():
        asked.clear()
        pairs = tokenized(tiny[1])
        set_reference(tiny[0], pairs, tmp_path / "reference.jsonl")
        return pairs, len(asked)
    return call, tmp_path / "reference.jsonl"


def test_the_reference_is_computed_once(referenced, tiny):
    call, file = referenced
    pairs, asked = call()
    with torch.no_grad():
        chosen, rejected = pair_logps(tiny[0], *columns(pairs))
    assert [pair["ref_chosen"] for pair in pairs] == pytest.approx(chosen.tolist(), abs=1e-4)
    assert [pair["ref_rejected"] for pair in pairs] == pytest.approx(rejected.tolist(), abs=1e-4)
    before = file.read_bytes()
    assert asked == len(TEXTS) and call() == (pairs, 0) and file.read_bytes() == before


@pytest.mark.parametrize("change", [
    lambda lines: lines * 2, lambda lines: lines[::-1], lambda lines: lines[1:],
    lambda lines: lines[:-1], lambda lines: [b'{"a": 1}\n']])
def test_a_reference_of_other_pairs_is_refused(referenced, change):
    """More lines than pairs, fewer, others, or none that are known: training would start from
    another policy than its reference. Once the file is deleted it is computed again.
    """
    call, file = referenced
    pairs, _ = call()
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))
    with pytest.raises(ValueError, match="reference.jsonl belongs to other pairs.* delete it"):
        call()
    file.unlink()
    assert call() == (pairs, len(TEXTS))


def test_a_reference_that_is_not_finite_is_refused(tiny, tmp_path, monkeypatch):
    """Before it is written: the remedy is no other learning rate."""
    def not_a_number(model, prompts, *answers):
        return (torch.full((len(prompts),), math.nan),) * 2

    monkeypatch.setattr(dpo, "pair_logps", not_a_number)
    with pytest.raises(FloatingPointError, match="the model as it is"):
        set_reference(tiny[0], tokenized(tiny[1]), tmp_path / "reference.jsonl")
    assert not (tmp_path / "reference.jsonl").exists()
