"""`eval.py export --format model`: an iteration as one model folder, and how far it is off.

The adapter is added to the base as it was while it trained: to the dequantised weights, if these
were in 4 bits. Those are the weights that the adapter knows, and that the run's figures describe.
What is written is never in 4 bits, in which an adapter would be rounded away.
"""
import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel

from dpo import answer_logps
from harness.commands.models import load_alone, own_settings
from harness.engine.chat import Chat
from harness.files import read_json, read_jsonl
from harness.loading import base_of, check_adapter
from harness.settings import Settings, tupled
from harness.training import like_its_config
from harness.views.card import write_card

ANSWERS = 32  # held-out answers whose log-probabilities are compared


def export_model(folder, place, bits):
    """Write the model of `folder` (runs/x/iterT) to the folder `place`: a line that says so."""
    settings = own_settings(folder)
    own = settings.get("bits")
    if own is None:
        raise ValueError(f"{folder} is no iteration of a run with a config.json, which says in "
                         "which --bits it was trained")
    if bits not in (None, own):
        raise ValueError(f"the adapter of {folder} belongs to a base in --bits {own}: leave --bits "
                         "out")
    adapter = Path(folder) / "adapter"
    model, tokenizer = load_alone(folder, own)
    answers = held_out_answers(folder, tokenizer)
    before = logps_per_token(model, answers)
    del model
    base, _ = load_alone(base_of(adapter), own)
    if own == 4:
        base = base.dequantize()
    model = PeftModel.from_pretrained(base, str(adapter))
    check_adapter(model, adapter)
    whole = model.merge_and_unload().to(torch.float32 if own == 32 else torch.bfloat16)
    save_model(whole, tokenizer, place)
    run, t = Path(folder).resolve().parent, int(Path(folder).resolve().name[4:])
    records = read_json(run / "summary.json", list)[:t + 1]
    if len(records) > t:  # else it is trained, and not yet measured
        there = settings | {"model": base_of(adapter)}  # as it is found from here
        write_card(place, Settings(**tupled(there)), records, merged=True)
    dtype = str(whole.dtype).removeprefix("torch.")
    del base, model, whole
    model, _ = load_alone(place, bits=max(16, own))
    after = logps_per_token(model, answers)
    return f"{place}: one model in {dtype}; {how_far_off(before, after)}"


def save_model(model, tokenizer, place):
    """Write a plain model folder, which is never half there."""
    temporary = Path(f"{place}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    like_its_config(temporary, "config.json")
    shutil.rmtree(place, ignore_errors=True)
    os.replace(temporary, place)


def held_out_answers(folder, tokenizer):
    """Token ids (prompt, answer) of the first held-out answers of an iteration."""
    chat = Chat(tokenizer)
    records = read_jsonl(Path(folder) / "eval.jsonl")
    return [(chat.prompt(record["prompt"]), record.get("ids") or chat.answer(record["text"]))
            for record in records if record["text"]][:ANSWERS]


@torch.no_grad()
def logps_per_token(model, answers):
    """The mean log-probability of each answer's tokens."""
    return [answer_logps(model, [prompt], [[answer]]).item() / len(answer)
            for prompt, answer in answers]


def how_far_off(before, after):
    if not before:
        return "not compared with base and adapter, since there are no held-out answers"
    off = [abs(a - b) for a, b in zip(before, after, strict=True)]
    return (f"log-probabilities of {len(off)} held-out answers differ from those of base and "
            f"adapter by {sum(off) / len(off):.2g} nats a token, {max(off):.2g} at most")
