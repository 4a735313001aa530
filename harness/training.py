"""A training and its folder: log, checkpoint, reference and adapter, so that a kill loses little.

train.jsonl gets a line for each record as it is yielded. reference.jsonl is written whole, once
all of it is computed. checkpoint.safetensors has everything a training needs to go on, in one
file, so that its parts always belong together.
"""
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from tqdm import tqdm

from dpo import State, reference
from harness.engine.processes import barrier, rank
from harness.files import digest, read_jsonl, write_jsonl, write_whole

HELD_OUT = 0.1   # share of the prompts whose examples pick the epoch instead of training
SAVE_EVERY = 20  # steps between checkpoints; there is one after each epoch as well
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each weight


def train_in_folder(model, recipe, training, held_out, folder, label="training", **settings):
    """Train the model's adapter, and leave it in folder/adapter: the record of the best epoch.

    recipe: dpo.train_dpo or dpo.train_sft, which takes the settings. label: what the progress bar
    says. The same call on the same folder goes on where an earlier one stopped, if its model is
    the same, a fresh adapter included. Of several processes the first one writes the files.
    Raises ValueError if the folder's files are damaged or those of another training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, examples = State(model), [*training, *held_out]
    if not training:
        raise ValueError("there are no examples to train on")
    if "chosen_ids" in training[0]:
        set_reference(model, examples, folder / "reference.jsonl")
    call = {"examples": digest([names_of(training), names_of(held_out)]), "recipe": recipe.__name__,
            **settings, "adapter": digest([[name, list(weight.shape)]
                                           for name, weight in state.weights.items()])}
    checkpoint = folder / "checkpoint.safetensors"
    records = load_checkpoint(checkpoint, state, call) if checkpoint.exists() else []
    log = folder / "train.jsonl"
    if rank() == 0:
        write_jsonl(log, records)  # steps after the last checkpoint are taken again
    steps = -(-len(training) // settings["batch_size"]) * settings["epochs"]
    with tqdm(total=steps, initial=state.step, desc=label, unit="step") as bar:
        for record in recipe(model, training, held_out, state=state, **settings):
            records.append(record)
            if rank() == 0:
                with open(log, "a") as out:
                    out.write(json.dumps(record) + "\n")
                if "step" not in record or record["step"] % SAVE_EVERY == 0:
                    save_checkpoint(checkpoint, state, call, records)
            if "step" in record:
                bar.set_postfix_str(f"loss {record['loss']:.3f}, "
                                    f"{record['tokens_per_second']:,} tokens/s", refresh=False)
                bar.update()
    save_adapter(model, folder / "adapter")
    return state.best


def names_of(examples):
    """For each example a few digits that tell its token ids from others."""
    return [digest([example[key] for key in sorted(example) if key.endswith("_ids")])
            for example in examples]


def set_reference(model, pairs, file):
    """Give the pairs their reference log-probabilities: from the file, or else from the model."""
    names = names_of(pairs)
    if file.exists():
        lines = read_jsonl(file)
        if [line.get("pair") for line in lines] != names:
            raise ValueError(f"{file} belongs to other pairs, or is cut short: delete it, and it "
                             "is computed again, or choose another folder")
        for pair, line in zip(pairs, lines):
            pair |= {"ref_chosen": line["ref_chosen"], "ref_rejected": line["ref_rejected"]}
        return
    reference(model, pairs)
    if rank() == 0:
        write_jsonl(file, [{"line": pair.get("line"), "pair": name,
                            "ref_chosen": pair["ref_chosen"], "ref_rejected": pair["ref_rejected"]}
                           for pair, name in zip(pairs, names)])
    barrier()  # nobody looks for it before it is there


# ---- the checkpoint

def save_checkpoint(file, state, call, records):
    """Write all that a training needs to go on."""
    tensors = {f"best.{name}": weight for name, weight in state.best_weights.items()}
    for name, weight in state.weights.items():
        tensors[f"weight.{name}"] = weight.detach()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = state.optimizer.state[weight][moment]
    rest = {"call": call, "step": state.step, "epoch": state.epoch, "best": state.best,
            "records": records}
    rest["checksum"] = checksum(tensors, rest)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(file, save(tensors, metadata={"state": json.dumps(rest)}))


def load_checkpoint(file, state, call):
    """Put a checkpoint into the state: the records of the training so far."""
    try:
        tensors = load_file(file, device=str(next(iter(state.weights.values())).device))
        with safe_open(file, "pt") as content:
            rest = json.loads(content.metadata()["state"])
        if rest.pop("checksum") != checksum(tensors, rest):
            raise ValueError("its content is not what was written")
    except (SafetensorError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and this training starts "
                         "again") from None
    other = [name for name, value in call.items() if rest["call"].get(name) != value]
    if other:
        raise ValueError(f"{file} belongs to a training with other {', '.join(other)}: choose "
                         "another folder")
    state.step, state.epoch, state.best = rest["step"], rest["epoch"], rest["best"]
    for name, weight in state.weights.items():
        weight.data.copy_(tensors[f"weight.{name}"])
        moments = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
        state.optimizer.state[weight] = {"step": torch.tensor(float(state.step)), **moments}
    state.best_weights = {name: tensors[f"best.{name}"] for name in state.weights
                          if f"best.{name}" in tensors}
    return rest["records"]


def checksum(tensors, rest):
    """What tells the content of a checkpoint from any other."""
    whole = hashlib.sha256(json.dumps(rest).encode())
    for name in sorted(tensors):
        whole.update(name.encode())
        flat = tensors[name].detach().cpu().contiguous().flatten()
        whole.update(flat.view(torch.uint8).numpy())
    return whole.hexdigest()


# ---- adapters on disk

def save_adapter(model, folder):
    """Write the adapter as a PEFT folder, which is never half there."""
    if rank() == 0:
        temporary = Path(f"{folder}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        for config in model.peft_config.values():  # found from any working directory
            base = config.base_model_name_or_path
            if base and Path(base, "config.json").is_file():
                config.base_model_name_or_path = str(Path(base).resolve())
        model.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)
        like_its_config(temporary, "adapter_config.json")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    barrier()  # nobody reads it before it is there


def like_its_config(folder, config):
    """Give weights the permissions of the file beside them: safetensors lets nobody else read."""
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / config).stat().st_mode)


def set_adapter(model, folder, sha256=None):
    """Put the adapter in `folder` in the place of the model's own.

    sha256: of its file as it was written, if known. Raises ValueError for a file that is missing,
    damaged, or not that one. (harness.loading checks adapters that come from outside.)
    """
    try:
        content = (Path(folder) / "adapter_model.safetensors").read_bytes()
        weights = load(content)
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise SafetensorError("its content is not what was written")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"adapter {folder} is missing or damaged ({error}): put it back from a "
                         "copy, or start again in another folder") from None
    if weights.keys() != get_peft_model_state_dict(model, save_embedding_layers=False).keys():
        raise ValueError(f"adapter {folder} does not fit the model: it has other keys")
    set_peft_model_state_dict(model, weights)


# ---- what trains, as token ids

def hold_out(examples, seed):
    """Split off the examples of a tenth of the prompts, if there are enough: (training, rest).

    Records of one prompt, as "7" and "7.1", are on the same side.
    """
    prompts = [example["prompt_id"].partition(".")[0] for example in examples]
    ids = sorted(set(prompts))
    held = set(random.Random(f"{seed}/held out").sample(ids, int(HELD_OUT * len(ids))))
    return ([example for example, prompt in zip(examples, prompts) if prompt not in held],
            [example for example, prompt in zip(examples, prompts) if prompt in held])


def encode_examples(chat, examples):
    """Pairs, or EFT examples, as token ids; "line" is the line in their file.

    They have "prompt_ids", and "chosen_ids" and "rejected_ids", or "answer_ids". What a model drew
    has the ids that it drew.
    """
    names = {"chosen": "chosen_ids", "rejected": "rejected_ids", "completion": "answer_ids"}
    records = []
    for line, example in enumerate(examples, 1):
        ids = {"prompt_ids": chat.prompt(example["prompt"][0]["content"])}
        for name in names.keys() & example.keys():
            drawn = example.get("ids", {}).get(name)
            ids[names[name]] = drawn or chat.answer(example[name][0]["content"])
        records.append({"prompt_id": example["prompt_id"], "line": line, **ids})
    return records
