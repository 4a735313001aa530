"""Models of runs and from elsewhere: loaded one at a time, asked with a bar, as their run was set."""
import gc
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from harness.files import read_json
from sampling import load, sample


def drawn(model, tokenizer, prompts, label, max_new_tokens, **settings):
    """One sample for each prompt, with a bar, and a line about prompts that are too long: theirs have no tokens."""
    tokens, start = 0, time.perf_counter()

    def ended(i, number, sample):
        nonlocal tokens
        tokens += len(sample.tokens)
        bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
        bar.update()

    with tqdm(total=len(prompts), desc=label, unit="sample") as bar:
        samples = [one for (one,) in sample(model, tokenizer, prompts, max_new_tokens=max_new_tokens, on_end=ended, skip_too_long=True, **settings)]
    if too_long := sum(not one.tokens for one in samples):
        about = f"the model's context has no room for them and a reply of {max_new_tokens} tokens"
        print(f"{label}: {too_long} prompts are too long, {about}; they got none", file=sys.stderr)
    return samples


def load_alone(model, bits=None):
    """Load a model in the place of the one before, which nobody may hold any more."""
    gc.collect()
    torch.cuda.empty_cache()
    return load(model, bits=bits)


def own_settings(model):
    """The settings of the run that an iteration's folder belongs to; else those of a preset.json.

    {} for other models.
    """
    run, preset = Path(model).parent / "config.json", Path(model) / "preset.json"
    for file in (run, preset):
        content = read_json(file) if file.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError(f"{file}: not a JSON record; put it back from a copy")
        if file == run and isinstance(content.get("settings"), dict):
            return content["settings"]
        if file == preset and content:
            own = {"eval_prompts": preset.parent / content.get("eval_prompts", "none")}
            return content | own
    return {}


def answer_tokens(model, args):
    return args.max_new_tokens or own_settings(model).get("max_answer_tokens", 1024)
