"""DPO and SFT with LoRA on a frozen base: the losses, sequence log-probabilities, adapters, and one training loop that survives kill -9.

    symbol         name here                   shape   meaning
    pi, pi_ref     policy, reference                   the model that trains; the same model as it was when training began
    y_c, y_r       chosen, rejected                    the better and the worse answer to prompt x
    log pi(y|x)    policy_chosen, ...          (B,)    log-probability of the answer's tokens, summed, prompt and padding left out
    beta           beta                                how far the policy may move from the reference
    r(x, y)        chosen_rewards, ...         (B,)    beta (log pi(y|x) - log pi_ref(y|x)), the implicit reward

The reference needs no second model: its log-probabilities are computed once, before the first step, and kept in a file.
Adapters never touch the base weights, so the base may be in 4 bits. Left out: other losses, other optimizers, several GPUs.
"""
import json
import logging
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on every import it recommends a package that nobody here needs
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

LOGIT_ROWS = 512                                  # answer tokens whose vocabulary-wide logits exist at the same time
PASS_TOKENS = {"cuda": 4096, "cpu": 16384}        # tokens per forward pass, padding included; a batch is accumulated from as many as it takes


# ---- the losses

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """DPO [E5] (Rafailov et al. 2023, eq. 7). All arguments (B,) torch: summed log-probabilities of the answers.

    Returns (losses, chosen_rewards, rejected_rewards), (B,) each; the rewards carry no gradient.
    """
    chosen_rewards = beta * (policy_chosen - ref_chosen)
    rejected_rewards = beta * (policy_rejected - ref_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)  # [E5]
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def sft_loss(answer_logps, answer_ids):
    """Mean negative log-probability per answer token, (B,); the prompt counts for nothing. answer_logps (B,), answer_ids: B lists."""
    return -answer_logps / torch.tensor([len(ids) for ids in answer_ids], device=answer_logps.device)


# ---- log-probabilities of answers

def token_logps(head, hidden, targets):
    """Log-probability of each target, in fp32 or better. hidden (N, width), targets (N,) -> (N,); the (N, V) logits live only inside."""
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def answer_logps(model, prompt_ids, answer_ids):
    """log p(answer | prompt), summed over the answer's tokens. Lists of B token-id lists -> torch (B,).

    Logits are computed for answer positions only, LOGIT_ROWS at a time, and again in the backward pass.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_logits(base)
    rows = [list(prompt) + list(answer) for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, T, width)

    row = torch.tensor([b for b, answer in enumerate(answer_ids) for _ in answer], device=model.device)
    at = torch.tensor([len(prompt) + t for prompt, answer in zip(prompt_ids, answer_ids) for t in range(len(answer))], device=model.device)
    hidden, targets = hidden[row, at - 1], ids[row, at]  # the token at t is predicted from t - 1
    pieces = [checkpoint(token_logps, base.get_output_embeddings(), h, t, use_reentrant=False)
              for h, t in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS))]
    logps = torch.cat(pieces)
    return logps.new_zeros(len(rows)).index_add(0, row, logps)


def pair_logps(model, prompt_ids, chosen_ids, rejected_ids):
    """Summed log-probabilities of the chosen and the rejected answers. Lists of B token-id lists -> two torch (B,)."""
    both = answer_logps(model, [*prompt_ids, *prompt_ids], [*chosen_ids, *rejected_ids])
    return both[: len(prompt_ids)], both[len(prompt_ids):]


# ---- adapters

def add_lora(model, rank):
    """Wrap a frozen model with a fresh LoRA adapter on all linear layers but the head. A fresh adapter changes nothing yet."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    config.target_modules = sorted(config.target_modules)  # a set by now, which every process would write in another order
    return model


def check_logits(model):
    """Raise ValueError for a model whose logits are more than its head's output, which `token_logps` would get wrong."""
    for option in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, option, None) is not None:
            raise ValueError(f"{model.config.model_type} changes its logits by {option}, which this loss does not do: choose another model")


def trainable(model):
    """The LoRA weights by name, in a fixed order, set to require gradients."""
    weights = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


def save_adapter(model, folder):
    """Write the adapter as a PEFT folder, beside and renamed, so that a folder of that name is always whole."""
    beside = Path(f"{folder}.part")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside, save_embedding_layers=False)
    (beside / "README.md").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def set_adapter(model, folder):
    """Put the adapter in `folder` in the place of the model's own. Every key must match (sampling.load checks files from outside)."""
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    if weights.keys() != get_peft_model_state_dict(model, save_embedding_layers=False).keys():
        raise ValueError(f"adapter {folder} does not fit the model: it has other keys")
    set_peft_model_state_dict(model, weights)


# ---- training

def passes(examples, limit):
    """Split a list of examples, in order, into runs of at most `limit` tokens each, padding included, at least one example.

    "size" of an example: its tokens when it is alone, so that a run takes the largest size once for each of its examples.
    """
    runs, largest = [], 0
    for example in examples:
        largest = max(largest, example["size"])
        if not runs or (len(runs[-1]) + 1) * largest > limit:
            runs.append([])
            largest = example["size"]
        runs[-1].append(example)
    return runs


def learning_rate(step, total, peak, warmup=0.1):
    """Linear warm-up over the first tenth of the steps, then a cosine down to zero."""
    start = max(1, round(warmup * total))
    return peak * ((step + 1) / start if step < start else 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, total - start))))


def train(model, examples, held_out, compute, folder, *, epochs, batch_size, lr, seed=0, save_every=20, label="train", unit="examples"):
    """Train the model's adapter on `examples`, keep the epoch that is best on `held_out`, and write it to folder/adapter.

    examples, held_out: lists of dicts with "tokens" and "size", their tokens without and with padding. `compute(list of examples)`
    returns (losses (B,), figures: name -> (B,)). Steps go to folder/train.jsonl as they are done. AdamW without decay, cosine schedule
    with warm-up, gradients clipped to norm 1, a fresh optimizer each call. Every `save_every` steps all state goes to
    folder/checkpoint.safetensors; the same call on the same folder goes on from there, bit for bit as if it had never stopped. Delete
    that file once the result is safe.
    Returns the figures of the best epoch.
    Raises FloatingPointError when a loss is not finite.
    """
    folder = Path(folder)
    state = State(model, folder)
    steps = math.ceil(len(examples) / batch_size)
    limit = PASS_TOKENS[model.device.type]
    if model.device.type == "cuda":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with tqdm(total=epochs * steps, initial=state.step, desc=label, unit="step") as bar:
        while state.step < epochs * steps:
            epoch, nth = divmod(state.step, steps)
            order = np.random.default_rng([seed, epoch]).permutation(len(examples))
            batch = [examples[i] for i in order[nth * batch_size: (nth + 1) * batch_size]]
            rate = learning_rate(state.step, epochs * steps, lr)
            start = time.perf_counter()
            figures = take_step(model, state, batch, compute, rate, limit)
            state.log({"step": state.step, "epoch": epoch + 1, "lr": rate, **figures})
            bar.set_postfix_str(f"loss {figures['loss']:.3f}, {len(batch) / (time.perf_counter() - start):.1f} {unit}/s", refresh=False)
            bar.update()
            if nth == steps - 1:
                measured = measure(model, held_out, compute, limit) if held_out else {}
                state.end_epoch({"epoch": epoch + 1, **{f"held_out_{name}": value for name, value in measured.items()}})
            if state.step % save_every == 0 or nth == steps - 1:
                state.save()
    model.eval()
    return state.finish()


def take_step(model, state, batch, compute, rate, limit):
    """One optimizer step on the mean loss of a batch, accumulated over passes: returns its figures."""
    state.optimizer.zero_grad()
    totals = {}
    for part in passes(batch, limit):
        losses, figures = compute(part)
        if not torch.isfinite(losses).all():
            raise FloatingPointError(f"the loss at step {state.step + 1} is not finite: start again, in another folder, with a lower --lr")
        (losses.sum() / len(batch)).backward()
        for name, values in {"loss": losses.detach(), **figures}.items():
            totals[name] = totals.get(name, 0) + values.sum().item() / len(batch)
    norm = torch.nn.utils.clip_grad_norm_(state.weights.values(), 1.0).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient at step {state.step + 1} is not finite: start again, in another folder, with a lower --lr")
    state.optimizer.param_groups[0]["lr"] = rate
    state.optimizer.step()
    state.step += 1
    return {**totals, "grad_norm": norm, "tokens": sum(example["tokens"] for example in batch)}


@torch.no_grad()
def measure(model, examples, compute, limit):
    """Mean loss and figures over examples, without training on them."""
    model.eval()
    totals = {}
    for part in passes(examples, limit):
        losses, figures = compute(part)
        if not torch.isfinite(losses).all():
            raise FloatingPointError("the loss on held-out examples is not finite: start again, in another folder, with a lower --lr")
        for name, values in {"loss": losses, **figures}.items():
            totals[name] = totals.get(name, 0) + values.sum().item() / len(examples)
    model.train()
    return totals


class State:
    """What training must not lose: adapter, optimizer, best epoch so far, log. One file holds it, so that it is never half written."""

    def __init__(self, model, folder):
        self.model, self.folder, self.file = model, folder, folder / "checkpoint.safetensors"
        self.weights = trainable(model)
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.0, weight_decay=0.0)
        self.step, self.records, self.best, self.best_weights = 0, [], None, {}
        if self.file.exists():
            self.load()
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        (folder / "train.jsonl").write_text(text)  # steps after the last checkpoint are taken again

    def load(self):
        tensors = load_file(self.file, device=str(self.model.device))
        with safe_open(self.file, "pt") as file:
            told = json.loads(file.metadata()["state"])
        self.step, self.records, self.best = told["step"], told["records"], told["best"]
        for name, weight in self.weights.items():
            weight.data.copy_(tensors[f"weight.{name}"])
            moments = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {"step": torch.tensor(float(self.step)), **moments}
        self.best_weights = {name: tensors[f"best.{name}"] for name in self.weights if f"best.{name}" in tensors}

    def save(self):
        tensors = {f"best.{name}": weight for name, weight in self.best_weights.items()}
        for name, weight in self.weights.items():
            tensors[f"weight.{name}"] = weight.detach()
            tensors |= {f"{key}.{name}": self.optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq")}
        told = json.dumps({"step": self.step, "records": self.records, "best": self.best})
        beside = Path(f"{self.file}.part")  # safetensors' own save_file leaves a file of a random name when it is killed
        beside.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"state": told}))
        os.replace(beside, self.file)

    def log(self, record):
        self.records.append(record)
        with open(self.folder / "train.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def end_epoch(self, record):
        """Log an epoch's figures and remember the adapter if it is the best so far (the last one where nothing is held out)."""
        self.log(record)
        if self.best is None or record.get("held_out_loss", -math.inf) <= self.best.get("held_out_loss", -math.inf):
            self.best = record
            self.best_weights = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def finish(self):
        """Leave the best epoch in the model and in folder/adapter."""
        for name, weight in self.weights.items():
            weight.data.copy_(self.best_weights[name])
        save_adapter(self.model, self.folder / "adapter")
        return self.best


def train_sft(model, examples, held_out, folder, **settings):
    """Supervised fine-tuning. examples: dicts with "prompt_ids" and "answer_ids". See `train` for the rest."""
    def compute(part):
        answers = [example["answer_ids"] for example in part]
        return sft_loss(answer_logps(model, [example["prompt_ids"] for example in part], answers), answers), {}

    for example in [*examples, *held_out]:
        example["size"] = example["tokens"] = len(example["prompt_ids"]) + len(example["answer_ids"])
    return train(model, examples, held_out, compute, folder, label="SFT", unit="judgments", **settings)


def train_dpo(model, examples, held_out, folder, *, beta, **settings):
    """DPO from the model as it is, which is also the reference. examples: dicts with "prompt_ids", "chosen_ids" and "rejected_ids".

    Reference log-probabilities go to folder/reference.jsonl, one line a pair in the order of [*examples, *held_out].
    """
    def logps(part):
        return pair_logps(model, *([example[key] for example in part] for key in ("prompt_ids", "chosen_ids", "rejected_ids")))

    def compute(part):
        ref_chosen, ref_rejected = (torch.tensor([example[key] for example in part], device=model.device) for key in ("ref_chosen", "ref_rejected"))
        chosen, rejected = logps(part)
        losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
        figures = {"margin": chosen_rewards - rejected_rewards, "accuracy": (chosen_rewards > rejected_rewards).float(),
                   "chosen_logp": chosen, "rejected_logp": rejected}
        return losses, {name: values.detach() for name, values in figures.items()}

    for example in [*examples, *held_out]:
        prompt, chosen, rejected = (len(example[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
        example["size"], example["tokens"] = 2 * (prompt + max(chosen, rejected)), 2 * prompt + chosen + rejected
    reference(model, [*examples, *held_out], logps, Path(folder) / "reference.jsonl")
    return train(model, examples, held_out, compute, folder, label="DPO", unit="pairs", **settings)


@torch.no_grad()
def reference(model, examples, logps, file):
    """Give every example its "ref_chosen" and "ref_rejected", from the file as far as it goes, the rest from the model as it is."""
    lines = whole_lines(file)
    model.eval()
    with open(file, "a") as out, tqdm(total=len(examples), desc="reference", unit="pair") as bar:
        done = 0
        for part in passes(examples, PASS_TOKENS[model.device.type]):
            if len(lines) < done + len(part):
                fresh = [{"ref_chosen": c, "ref_rejected": r} for c, r in zip(*(x.tolist() for x in logps(part)))][len(lines) - done:]
                out.write("".join(json.dumps(line) + "\n" for line in fresh))
                out.flush()
                lines += fresh
            done += len(part)
            bar.update(len(part))
    for example, line in zip(examples, lines, strict=True):
        example |= line


def whole_lines(file):
    """The records of a JSONL file; a torn last line is cut off the file, which may be missing."""
    text = file.read_bytes() if file.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(file, len(whole))
    return [json.loads(line) for line in whole.splitlines()]
