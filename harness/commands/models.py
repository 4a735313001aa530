"""Finished models speak once more: their answers, and what they say of answers and judgments.

The commands of eval.py share this.
"""
import dataclasses
import gc
import os
import re
from pathlib import Path

import torch
from transformers import AutoConfig

import prompts as words
from harness.files import digest, iterations, sha256
from harness.loading import adapter_of, base_name, config_of, fingerprint, load, load_tokenizer
from harness.records import read_text
from harness.settings import HERE, flag, read_preset
from harness.stage import read_kept, sample_items, tell_too_long
from sampling import Sample


def sample_each(model, tokenizer, prompts, label, max_new_tokens, part=None, made=None, **settings):
    """One Sample for each prompt, a text or the turns of a conversation, with a bar.

    part: a file that keeps them, so that a command that was killed goes on; None: nothing is kept.
    made: {what they depend on beside the prompts and settings: its value}, which must be the same
    then. settings: as `sample` takes them.
    """
    made = {**(made or {}), "set of prompts": digest(prompts), "max_tokens": max_new_tokens,
            **settings}
    fields = [field.name for field in dataclasses.fields(Sample)]

    def read(item, samples):
        (sample,), = samples
        return {"id": item["id"], **dataclasses.asdict(sample), **made}

    known = read_kept(part, made) if part else {}
    left = [{"id": f"{i}", "prompt": prompt} for i, prompt in enumerate(prompts)
            if f"{i}" not in known]
    sample_items(model, tokenizer, left, lambda item: [item["prompt"]], read, 1, label,
                 part or os.devnull, known, max_new_tokens=max_new_tokens, **settings)
    samples = [Sample(**{name: known[f"{i}"][name] for name in fields})
               for i in range(len(prompts))]
    tell_too_long(label, known.values(), max_new_tokens)
    return samples


def made_by(model, bits):
    """What tells a model's answers from those of another: its weights, its adapter's, its bits.

    The base of a run's iteration is what its config.json says: `check_base` has seen to that.
    """
    adapter = adapter_of(model)
    return {"model": known_base(model) or fingerprint(model), "bits": bits,
            "adapter": sha256(adapter / "adapter_model.safetensors")[:8] if adapter else None}


def load_alone(model, bits=None):
    """Load a model in the place of the one before, which nobody may hold any more."""
    check_base(model)
    gc.collect()
    torch.cuda.empty_cache()
    return load(model, bits=bits)


def models_of(sources):
    """{name: model}. A run's folder stands for its iterations, in order.

    Raises OSError or ValueError if there is no such model, before any of them speaks.
    """
    models = {}
    for source in sources:
        folders = [folder for _, folder in sorted(iterations(source).items())
                   if (folder / "adapter").exists()]
        for model in folders or [source]:
            name = name_of(model)
            if name in models:
                raise ValueError(f"two models are called {name}: measure them one by one")
            models[name] = str(model)
    for model in models.values():
        if not adapter_of(model):
            load_tokenizer(model)
    return models


def name_of(model):
    """What a model is called on the screen and as a file: "x-iter4" for runs/x/iter4."""
    folder = Path(model).resolve()
    in_a_run = re.fullmatch("iter[0-9]+", folder.name)
    return f"{folder.parent.name}-{folder.name}" if in_a_run else folder.name


def own_settings(model):
    """The settings of the run that a folder iterT belongs to, else a model folder's preset.

    {} for other models.
    """
    return config_of(model).get("settings") or read_preset(model)


def file_of(model, name):
    """A file that a model's run, or its preset, has read, such as its "rubric"; None: none.

    A path may be meant as it is seen from any folder above the run: it may have been moved. Raises
    ValueError if the file is gone, or is not what the run has read.
    """
    path = own_settings(model).get(name)
    if not path:
        return None
    places = [Path(above, path) for above in ("", *Path(model).resolve().parents, HERE)]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"{model}: {flag(name)} {path}, which its run has read, is gone: put it "
                         "back")
    known = config_of(model).get("files", {}).get(flag(name))
    if known and sha256(file) != known:
        raise ValueError(f"{model}: {flag(name)} {file} has another content than its run has read: "
                         "put it back from a copy")
    return file


def rubric_of(model):
    """The rubric of a run, given one of its iterations, or of a preset."""
    file = file_of(model, "rubric")
    return read_text(file, "--rubric").strip() if file else words.RUBRIC


def known_base(model):
    """The hash of the base that the run of an iteration had; None for other models."""
    return adapter_of(model) and config_of(model).get("files", {}).get("--model")


def check_base(model):
    """Raise ValueError if the base of a run's iteration is not the one that the run had."""
    known = known_base(model)
    if known and fingerprint(model) != known:
        raise ValueError(f"{model}: its base {base_name(model)} has another content than "
                         "its run had: put it back from a copy")


def answer_tokens(model):
    """How long a model's answers may be, in tokens: as long as in its run."""
    return own_settings(model).get("max_answer_tokens", 1024)


def benchmark_tokens(model, tokens):
    """How long a model's answers to a benchmark may be, in tokens: its own number, or half of a
    smaller context. (A run's limit is one of training, and would cut answers short.)
    """
    config = AutoConfig.from_pretrained(base_name(model), trust_remote_code=False)
    config = config.get_text_config()
    return min(tokens, (getattr(config, "max_position_embeddings", None) or 2 * tokens) // 2)
