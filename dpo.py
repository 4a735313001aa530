"""DPO and SFT with LoRA on a frozen base: the losses, sequence log-probabilities, adapters, and one training loop that survives kill -9.

    symbol         name here                   shape   meaning
    pi, pi_ref     policy, reference                   the model that trains; the same model as it was when training began
    y_c, y_r       chosen, rejected                    the better and the worse answer to prompt x
    log pi(y|x)    policy_chosen, ...          (B,)    log-probability of the answer's tokens, summed, prompt left out
    beta           beta                                how far the policy may move from the reference
    r(x, y)        chosen_rewards, ...         (B,)    beta (log pi(y|x) - log pi_ref(y|x)), the implicit reward

A prompt and its answers stand in one row, `prompt chosen rejected prompt chosen ...`: the prompt is computed once, no answer sees another,
and nothing is padded (prefix sharing, Wang and Hegde 2024, arXiv 2410.20305). Logits exist for answers only, a few hundred rows at a time.
The reference needs no second model: its log-probabilities are computed once, before the first step, and kept in a file.
Adapters never touch the base weights, so the base may be in 4 bits, on CUDA or a CPU. Several processes under torch.distributed share every
batch. Left out: other losses, models that one GPU cannot hold, and 8-bit AdamW, which would save no more than a quarter of a gigabyte on an
8B model's adapter of rank 16.
"""
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on every import it recommends a package that nobody here needs
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each shape of attention anew, and shapes hardly ever repeat here
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing")  # of a new name, which older versions and peft do not have
LOGIT_ROWS = 256                                  # answer tokens whose vocabulary-wide logits exist at the same time
PASS_TOKENS = {"cuda": 16384, "cpu": 512}         # most tokens per pass: more are not faster, and take memory


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


# ---- prompts and their answers in one row

@dataclass
class Layout:
    """What stands where in a packed row: for each prompt its length and the lengths of its answers, all in tokens."""
    groups: list
    layers: int = 0  # that have attended by it


def packed_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, *, layout=None, **kwargs):
    """transformers' attention interface: query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D). Without a layout it is sdpa.

    An answer attends to its prompt and to itself. Each of these is a plain causal attention, which fast kernels take, and what no token may
    see is never computed.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    for option in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise ValueError(f"{module.config.model_type} attends with {option}, which this packing does not do: choose another model")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{module.config.model_type} attends in both directions, which this packing does not do: choose another model")
    layout.layers += 1
    settings = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    pieces = zip(*(x.split([length for group in layout.groups for length in group], 2) for x in (query, key, value)))
    out = []
    for prompt, *answers in layout.groups:
        q, prompt_k, prompt_v = next(pieces)
        out.append(F.scaled_dot_product_attention(q, prompt_k, prompt_v, is_causal=True, **settings))
        for answer in answers:
            q, k, v = next(pieces)
            mask = causal_lower_right(answer, prompt + answer)
            out.append(F.scaled_dot_product_attention(q, torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2), attn_mask=mask, **settings))
    return torch.cat(out, 2).transpose(1, 2), None


AttentionInterface.register("packed_answers", packed_attention)
AttentionMaskInterface.register("packed_answers", sdpa_mask)


def attend_packed(model, longest):
    """Let the model attend by `packed_attention` from now on: also in a backward pass that computes layers again. longest: a sequence, in tokens.

    Raises ValueError that names the model if its sequences cannot be packed.
    """
    config = model.config
    if set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"} and not model._is_stateful:
        if config._attn_implementation != "packed_answers":
            model.set_attn_implementation("packed_answers")  # older models keep their own
    if config._attn_implementation != "packed_answers":
        raise ValueError(f"{config.model_type} attends in a way that this packing does not do: choose another model")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if longest > limit:
            raise ValueError(f"{config.model_type} rotates all sequences of a pass in another way when one has more than {limit} tokens, and there "
                             f"is one of {longest}: shorten the prompts or the answers")


# ---- log-probabilities of answers

def pack(prompt_ids, answers):
    """One row of token ids, prompt after prompt with its answers, as lists: (ids, positions, sources, targets, owners).

    The answer token targets[i] is predicted from where ids[sources[i]] stands, and is one of answer number owners[i].
    """
    ids, positions, sources, targets, owners = [], [], [], [], []
    for prompt, group in zip(prompt_ids, answers):
        ids += prompt
        positions += range(len(prompt))
        last = len(ids) - 1  # the first tokens of all its answers are predicted from the prompt's last
        for answer in group:
            sources += [last, *range(len(ids), len(ids) + len(answer) - 1)]
            targets += answer
            owners += [owners[-1] + 1 if owners else 0] * len(answer)
            ids += answer
            positions += range(len(prompt), len(prompt) + len(answer))
    return ids, positions, sources, targets, owners


def answer_logps(model, prompt_ids, answers):
    """log p(answer | prompt), summed over the answer's tokens, of any number of answers to each of B prompts.

    prompt_ids: B lists of token ids; answers: B lists of lists of token ids. Returns torch (number of answers,), prompt after prompt, in
    float64: of a sum of 4,000 nats float32 keeps no more than three decimals, and the loss is a difference of such sums.
    Raises ValueError for an empty prompt, which the first token of an answer could not be predicted from, for an empty answer, for token ids
    that the model does not have, and for models whose sequences cannot be packed.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if len(prompt_ids) != len(answers):
        raise ValueError("prompt_ids and answers must have the same length")
    if not all(map(len, prompt_ids)) or not all(map(len, itertools.chain(*answers))) or not any(map(len, answers)):
        raise ValueError("prompt_ids and answers must not be empty")
    packed, vocabulary = pack(prompt_ids, answers), base.get_input_embeddings().num_embeddings
    if min(packed[0]) < 0 or max(packed[0]) >= vocabulary:
        raise ValueError(f"prompt_ids and answers must be token ids from 0 to {vocabulary - 1}")
    check_logits(base)
    attend_packed(base, max(packed[1]) + 1)

    layout = Layout([[len(prompt), *map(len, group)] for prompt, group in zip(prompt_ids, answers)])
    ids, positions, sources, targets, owners = (torch.tensor(x, device=model.device) for x in packed)
    half = base.dtype == torch.bfloat16  # as it is, each adapter would keep a copy of its input in float32
    with torch.autocast(model.device.type, base.dtype, enabled=half), disable_input_dtype_casting(base, active=half):
        hidden = base.base_model(input_ids=ids[None], position_ids=positions[None], attention_mask=torch.ones_like(ids)[None], use_cache=False,
                                 layout=layout).last_hidden_state[0, sources]
        chunks = math.ceil(len(targets) / LOGIT_ROWS)
        logps = [head_logps(base.get_output_embeddings(), h, t) for h, t in zip(hidden.chunk(chunks), targets.chunk(chunks))]
    if not layout.layers and base.config.num_hidden_layers:
        raise ValueError(f"{base.config.model_type} does not hand the packed row's layout on to its layers: choose another model")
    return logps[0].new_zeros(sum(map(len, answers)), dtype=torch.float64).index_add(0, owners, torch.cat(logps).double())


def pair_logps(model, prompt_ids, chosen_ids, rejected_ids):
    """Summed log-probabilities of the chosen and the rejected answers. Lists of B token-id lists -> two torch (B,), float64."""
    if not len(prompt_ids) == len(chosen_ids) == len(rejected_ids):
        raise ValueError("prompt_ids, chosen_ids and rejected_ids must have the same length")
    return answer_logps(model, prompt_ids, list(zip(chosen_ids, rejected_ids))).view(-1, 2).unbind(1)


def head_logps(head, hidden, targets):
    """Log-probability of each target, in fp32 or better. hidden (N, width), targets (N,) -> (N,); the (N, V) logits live only inside."""
    if type(head) is torch.nn.Linear and not head.weight.requires_grad:
        return FrozenHead.apply(hidden, head, targets)
    return checkpoint(token_logps, head, hidden, targets, use_reentrant=False)


def token_logps(head, hidden, targets):
    return all_logps(head, hidden).gather(-1, targets[:, None])[:, 0]


def all_logps(head, hidden):
    """Log-probabilities of all tokens, (N, V), in fp32 or better, from logits of the model's own type."""
    logits = head(hidden)
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class FrozenHead(torch.autograd.Function):
    """`token_logps` of a head that does not train. The gradient is taken with the logits, which then need not be computed again."""

    @staticmethod
    def forward(ctx, hidden, head, targets):
        every = all_logps(head, hidden)
        logps = every.gather(-1, targets[:, None])[:, 0]
        if ctx.needs_input_grad[0]:
            shares = every.exp_()  # d log p(target) / d logits = 1[target] - shares
            shares[torch.arange(len(targets), device=targets.device), targets] -= 1
            ctx.save_for_backward(shares.to(hidden.dtype) @ head.weight)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return (-grad[:, None] * slope).to(slope.dtype), None, None


# ---- adapters

def add_lora(model, rank):
    """Wrap a frozen model with a fresh LoRA adapter on all linear layers but the head. A fresh adapter changes nothing yet."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    config.target_modules = sorted(config.target_modules)  # a set by now, which every process would write in another order
    return model


def check_logits(model):
    """Raise ValueError for a model whose logits are more than its head's output, which `head_logps` would get wrong."""
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
    if rank() > 0:
        return collect(None)
    beside = Path(f"{folder}.part")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside, save_embedding_layers=False)
    (beside / "README.md").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    collect(None)  # nobody reads it before it is there


def set_adapter(model, folder, sha256=None):
    """Put the adapter in `folder` in the place of the model's own. Every key must match (sampling.load checks files from outside).

    sha256: of its file as it was written, if known. Raises ValueError for a file that is missing, damaged, or not that one.
    """
    try:
        content = (Path(folder) / "adapter_model.safetensors").read_bytes()
        weights = load(content)
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise SafetensorError("its content is not what was written")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"adapter {folder} is missing or damaged ({error}): put it back from a copy, or start again in another folder") from None
    if weights.keys() != get_peft_model_state_dict(model, save_embedding_layers=False).keys():
        raise ValueError(f"adapter {folder} does not fit the model: it has other keys")
    set_peft_model_state_dict(model, weights)


# ---- several processes, as torchrun starts them

def rank():
    """This process's number, 0 for the one that writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items):
    """Those of a list that fall to this process."""
    return items[rank()::world()]


def collect(mine):
    """What every process has, a list in the order of their numbers; all wait for the last one."""
    everyone = [mine] * world()
    if world() > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def add_up(figures):
    """The sums of all processes' figures, dicts from names to numbers."""
    everyone = collect(figures)
    return {name: sum(part.get(name, 0) for part in everyone) for name in dict.fromkeys(itertools.chain(*everyone))}


# ---- training

class Budget:
    """How many tokens a pass may have. On CUDA it is what free memory seems to hold, and half of that where it did not."""

    def __init__(self, model, examples):
        self.model, self.tokens, self.recomputing = model, PASS_TOKENS[model.device.type], False
        if model.device.type == "cuda":
            model.gradient_checkpointing_disable()
            fits = int(0.8 * free_memory() / activation_bytes(model))
            if fits < max((example["tokens"] for example in examples), default=0):
                self.recompute()
            else:
                self.tokens = min(self.tokens, fits)

    def recompute(self):
        """Gradient checkpointing: layers keep their input only, and are computed again in the backward pass."""
        self.recomputing = True
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def passes(self, work, examples):
        """Yield (part, work(part)) for runs of examples, in order, of at most so many tokens, at least one example."""
        done = 0
        while done < len(examples):
            part, result = self.part(examples[done:]), None
            try:
                result = work(part)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in ("out of memory", "ALLOC_FAILED")):
                    raise
            if result is None:  # only here the tensors that the error held are free
                self.shrink(part)
            else:
                done += len(part)
                yield part, result

    def part(self, examples):
        count = total = 0
        while count < len(examples) and (count == 0 or total + examples[count]["tokens"] <= self.tokens):
            total += examples[count]["tokens"]
            count += 1
        return examples[:count]

    def shrink(self, part):
        """After a pass over `part` ran out of memory: smaller passes, and when there is only one example, gradient checkpointing."""
        total = sum(example["tokens"] for example in part)
        torch.cuda.empty_cache()
        if len(part) > 1:
            self.tokens = min(self.tokens, total) // 2
            print(f"out of memory: training goes on with passes half as large, {self.tokens} tokens", file=sys.stderr)
        elif self.model.training and not self.recomputing:
            self.recompute()
            print("out of memory: training goes on with gradient checkpointing, which is slower", file=sys.stderr)
        else:
            raise ValueError(f"an example of {total} tokens does not fit into the GPU's memory: use --bits 4, or lower the limits on tokens")


def activation_bytes(model):
    """Roughly what a token of a training pass keeps for the backward pass: what goes into and comes out of the adapted layers, and three
    quarters more for norms, rotations and gates."""
    features = sum(layer.in_features + layer.out_features for layer in model.modules() if isinstance(layer, LoraLayer))
    return 1.75 * features * model.get_input_embeddings().weight.element_size()


def free_memory():
    """Bytes of CUDA memory that are free, those included that PyTorch holds and does not use."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def learning_rate(step, total, peak, warmup=0.1):
    """Linear warm-up over the first tenth of the steps, then a cosine down to zero."""
    start = max(1, round(warmup * total))
    return peak * ((step + 1) / start if step < start else 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, total - start))))


def train(model, examples, held_out, compute, folder, *, epochs, batch_size, lr, seed=0, save_every=20, label="train", unit="examples"):
    """Train the model's adapter on `examples`, keep the epoch that is best on `held_out`, and write it to folder/adapter.

    examples, held_out: lists of dicts with "tokens", their number of tokens, and perhaps "line", by which train.jsonl calls them.
    `compute(list of examples)` returns (losses (B,), figures: name -> (B,)). Steps go to folder/train.jsonl as they are done. AdamW without
    decay, cosine schedule with warm-up, gradients clipped to norm 1, a fresh optimizer each call; `seed` orders the examples. Where
    torch.distributed is initialised, each process takes its share of every batch and the first one writes the files. No dropout:
    where training begins, the policy is its reference. Every `save_every` steps all state goes to folder/checkpoint.safetensors; the same
    call on the same folder goes on from there, on a CPU bit for bit as if it had never stopped, if its model is the same, a fresh adapter
    included (torch.manual_seed before `add_lora`). Delete the checkpoint when this has returned: a further call would return the old result.
    Returns the figures of the best epoch, which is the last one where nothing is held out.
    Raises FloatingPointError when a loss is not finite, and ValueError when the folder's checkpoint is that of another call.
    """
    folder = Path(folder)
    ids = [list(map(token_ids, part)) for part in (examples, held_out)]
    call = {"examples": digest(ids), "loss": label, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    state = State(model, folder, call)
    steps = math.ceil(len(examples) / batch_size)
    budget = Budget(model, [*examples, *held_out])
    model.train()
    with tqdm(total=epochs * steps, initial=state.step, desc=label, unit="step") as bar:
        while state.step < epochs * steps:
            epoch, nth = divmod(state.step, steps)
            order = np.random.default_rng([seed, epoch]).permutation(len(examples))
            batch = [examples[i] for i in order[nth * batch_size: (nth + 1) * batch_size]]
            rate = learning_rate(state.step, epochs * steps, lr)
            start = time.perf_counter()
            figures = take_step(state, batch, compute, rate, budget)
            seconds, tokens = time.perf_counter() - start, sum(example["tokens"] for example in batch)
            state.log({"step": state.step, "epoch": epoch + 1, "lr": rate, **figures, "tokens": tokens, "tokens_per_second": round(tokens / seconds),
                       "lines": [example.get("line") for example in batch]})
            bar.set_postfix_str(f"loss {figures['loss']:.3f}, {len(batch) / seconds:.1f} {unit}/s, {tokens / seconds:.0f} tokens/s", refresh=False)
            bar.update()
            if nth == steps - 1:
                measured = measure(model, held_out, compute, budget) if held_out else {}
                state.end_epoch({"epoch": epoch + 1, **{f"held_out_{name}": value for name, value in measured.items()}})
            if state.step % save_every == 0 or nth == steps - 1:
                state.save()
    model.eval()
    return state.finish()


def take_step(state, batch, compute, rate, budget):
    """One optimizer step on the mean loss of a batch, accumulated over passes: returns its figures."""
    weights, totals = list(state.weights.values()), {}

    def work(part):
        losses, figures = compute(part)
        if not torch.isfinite(losses).all():
            raise FloatingPointError(f"the loss at step {state.step + 1} is not finite: start again, in another folder, with a lower --lr")
        gradients = torch.autograd.grad(losses.sum() / len(batch), weights, materialize_grads=True)
        for weight, gradient in zip(weights, gradients):  # all of a pass or nothing: it may run out of memory before
            weight.grad += gradient
        return {"loss": losses.detach(), **figures}

    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for _, figures in budget.passes(work, share(batch)):
        add_means(totals, figures, len(batch))
    totals = add_up(totals)
    if world() > 1:
        flat = torch.cat([weight.grad.flatten() for weight in weights])
        dist.all_reduce(flat)
        for weight, gradient in zip(weights, flat.split([weight.numel() for weight in weights])):
            weight.grad = gradient.view_as(weight)
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient at step {state.step + 1} is not finite: start again, in another folder, with a lower --lr")
    state.optimizer.param_groups[0]["lr"] = rate
    state.optimizer.step()
    state.step += 1
    return {**totals, "grad_norm": norm}


@torch.no_grad()
def measure(model, examples, compute, budget):
    """Mean loss and figures over examples, without training on them."""
    model.eval()
    totals = {}
    for _, (losses, figures) in budget.passes(compute, share(examples)):
        if not torch.isfinite(losses).all():
            raise FloatingPointError("the loss on held-out examples is not finite: start again, in another folder, with a lower --lr")
        add_means(totals, {"loss": losses, **figures}, len(examples))
    model.train()
    return add_up(totals)


def add_means(totals, figures, count):
    for name, values in figures.items():
        totals[name] = totals.get(name, 0) + values.sum().item() / count


class State:
    """What training must not lose: adapter, optimizer, best epoch so far, log. One file holds it, so that it is never half written."""

    def __init__(self, model, folder, call):
        self.model, self.folder, self.file = model, folder, folder / "checkpoint.safetensors"
        self.weights = trainable(model)
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.0, weight_decay=0.0)
        self.step, self.records, self.best, self.best_weights = 0, [], None, {}
        self.call = {**call, "adapter": digest([[name, list(weight.shape)] for name, weight in self.weights.items()])}
        if self.file.exists():
            self.load()
        if rank() == 0:  # steps after the last checkpoint are taken again
            (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def load(self):
        try:
            tensors = load_file(self.file, device=str(self.model.device))
            with safe_open(self.file, "pt") as file:
                told = json.loads(file.metadata()["state"])
            if told.pop("checksum") != checksum(tensors, told):
                raise ValueError("its content is not what was written")
        except (SafetensorError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.file} is damaged ({error}): delete it, and this training starts again") from None
        other = [name for name, value in self.call.items() if told["call"].get(name) != value]
        if other:
            raise ValueError(f"{self.file} belongs to a training with other {', '.join(other)}: choose another folder")
        self.step, self.records, self.best = told["step"], told["records"], told["best"]
        for name, weight in self.weights.items():
            weight.data.copy_(tensors[f"weight.{name}"])
            moments = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {"step": torch.tensor(float(self.step)), **moments}
        self.best_weights = {name: tensors[f"best.{name}"] for name in self.weights if f"best.{name}" in tensors}

    def save(self):
        if rank() > 0:
            return
        tensors = {f"best.{name}": weight for name, weight in self.best_weights.items()}
        for name, weight in self.weights.items():
            tensors[f"weight.{name}"] = weight.detach()
            tensors |= {f"{key}.{name}": self.optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq")}
        told = {"call": self.call, "step": self.step, "records": self.records, "best": self.best}
        state = json.dumps(told | {"checksum": checksum(tensors, told)})
        beside = Path(f"{self.file}.part")  # safetensors' own save_file leaves a file of a random name when it is killed
        beside.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"state": state}))
        os.replace(beside, self.file)

    def log(self, record):
        self.records.append(record)
        if rank() == 0:
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
            weight.grad = None
        save_adapter(self.model, self.folder / "adapter")
        return self.best


def checksum(tensors, told):
    """What tells a dict of tensors, and what is told beside them, from others."""
    whole = hashlib.sha256(json.dumps(told).encode())
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return whole.hexdigest()


def digest(data):
    """A few hexadecimal digits that tell data from other data."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:8]


def token_ids(example):
    """The lists of token ids of a pair or of an SFT example, whichever it has."""
    return [example[key] for key in sorted(example) if key.endswith("_ids")]


def train_sft(model, examples, held_out, folder, *, epochs, batch_size, **settings):
    """Supervised fine-tuning. examples: dicts with "prompt_ids" and "answer_ids". See `train` for the rest."""
    def compute(part):
        answers = [example["answer_ids"] for example in part]
        return sft_loss(answer_logps(model, [example["prompt_ids"] for example in part], [[answer] for answer in answers]), answers), {}

    prepare(model, examples, held_out, folder, epochs, batch_size)
    return train(model, examples, held_out, compute, folder, epochs=epochs, batch_size=batch_size, label="SFT", unit="judgments", **settings)


def train_dpo(model, examples, held_out, folder, *, beta, epochs, batch_size, **settings):
    """DPO from the model as it is, which is also the reference. examples: dicts with "prompt_ids", "chosen_ids" and "rejected_ids", lists of ints,
    and perhaps "line" (default: the place in [*examples, *held_out], from 1); they receive "tokens", "ref_chosen" and "ref_rejected" as well.

    Reference log-probabilities go to folder/reference.jsonl, one line a pair in the order of [*examples, *held_out]. A call that resumes
    must come with the same model: the files know the pairs and the settings, but not the weights. See `train` for the rest.
    """
    def logps(part):
        return pair_logps(model, *([example[key] for example in part] for key in ("prompt_ids", "chosen_ids", "rejected_ids")))

    def compute(part):
        ref_chosen, ref_rejected = (torch.tensor([example[key] for example in part], dtype=torch.float64, device=model.device)
                                    for key in ("ref_chosen", "ref_rejected"))
        chosen, rejected = logps(part)
        losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
        figures = {"margin": chosen_rewards - rejected_rewards, "accuracy": (chosen_rewards > rejected_rewards).float(),
                   "chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards, "chosen_logp": chosen, "rejected_logp": rejected}
        return losses, {name: values.detach() for name, values in figures.items()}

    prepare(model, examples, held_out, folder, epochs, batch_size)
    reference(model, [*examples, *held_out], logps, Path(folder) / "reference.jsonl")
    return train(model, examples, held_out, compute, folder, epochs=epochs, batch_size=batch_size, label=f"DPO, beta {beta}", unit="pairs",
                 **settings)


def prepare(model, examples, held_out, folder, epochs, batch_size):
    """Check a training before anything is computed, make its folder, and give every example its "tokens" and, if it has none, a "line"."""
    if not examples or epochs < 1 or batch_size < 1:
        raise ValueError("examples must not be empty, and epochs and batch_size must be at least 1")
    if not trainable(model):
        raise ValueError("the model has no LoRA adapter to train: call add_lora first")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for line, example in enumerate([*examples, *held_out], 1):
        example["tokens"] = sum(map(len, token_ids(example)))
        example.setdefault("line", line)


@torch.no_grad()
def reference(model, examples, logps, file):
    """Give every example its "ref_chosen" and "ref_rejected", from the file as far as it goes, the rest from the model as it is."""
    lines, done = whole_lines(file), 0
    names = [digest(token_ids(example)) for example in examples]
    if [line.get("pair") for line in lines] != names[:len(lines)]:
        raise ValueError(f"{file} belongs to other pairs: choose another folder")
    if world() > 1:
        lines += shared_reference(model, examples[len(lines):], names[len(lines):], logps, file)

    def work(part):  # over passes that begin where they did in a process before this one, so that the last bits are the same too
        return zip(*(x.tolist() for x in logps(part))) if len(lines) < done + len(part) else ()

    model.eval()
    with open(file, "a") as out, tqdm(total=len(examples), desc="reference", unit="pair") as bar:
        for part, computed in Budget(model, examples).passes(work, examples):
            fresh = reference_lines(part, names[done:], computed)[max(0, len(lines) - done):]
            out.write("".join(json.dumps(line) + "\n" for line in fresh))
            out.flush()
            lines += fresh
            done += len(part)
            bar.update(len(part))
    for example, line in zip(examples, lines):
        example |= {"ref_chosen": line["ref_chosen"], "ref_rejected": line["ref_rejected"]}


def reference_lines(examples, names, computed):
    """Lines of reference.jsonl, one for each of what was computed."""
    lines = [{"line": example.get("line"), "pair": name, "ref_chosen": chosen, "ref_rejected": rejected}
             for example, name, (chosen, rejected) in zip(examples, names, computed)]
    if not all(math.isfinite(value) for line in lines for value in (line["ref_chosen"], line["ref_rejected"])):
        raise FloatingPointError("the model as it is gives log-probabilities that are not finite: choose another model, or other --bits")
    return lines


def shared_reference(model, examples, names, logps, file):
    """The lines that the file lacks, each process computing its share; written once all are there."""
    model.eval()
    mine = [pair for _, computed in Budget(model, examples).passes(logps, share(examples)) for pair in zip(*(x.tolist() for x in computed))]
    everyone = collect(mine)
    lines = reference_lines(examples, names, [everyone[i % world()][i // world()] for i in range(len(examples))])
    if rank() == 0:
        with open(file, "a") as out:
            out.write("".join(json.dumps(line) + "\n" for line in lines))
    collect(None)
    return lines


def whole_lines(file):
    """The records of a JSONL file; a torn last line is cut off the file, which may be missing."""
    text = file.read_bytes() if file.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(file, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise ValueError(f"{file} is damaged: delete it, and what it held is computed again") from None
