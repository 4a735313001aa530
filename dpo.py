"""DPO and SFT with LoRA on a frozen base: losses, log-probabilities of answers, a training loop.

    symbol         name here                   meaning
    pi, pi_ref     policy, reference           the model that trains; the same as training began
    y_c, y_r       chosen, rejected            the better and the worse answer to the prompt x
    log pi(y|x)    policy_chosen, ...   (B,)   log-probabilities of the answer's tokens, summed
    beta           beta                        how dear it is to move away from the reference
    r(x, y)        chosen_rewards, ...  (B,)   beta (log pi(y|x) - log pi_ref(y|x))

    B pairs or answers      T tokens in a row      N answer tokens       V vocabulary
    H heads                 Hkv heads of keys      D a head's width      W the model's width

A prompt and its answers stand in one row, `prompt chosen rejected prompt chosen ...`. The prompt
is computed once, no answer sees another, and nothing is padded (prefix sharing, Wang and Hegde
2024, arXiv 2410.20305). Logits exist for answers only, a few hundred rows at a time. Models whose
layers do not fit a packed row, as recurrent ones, get one sequence a pass (`plain_logps`), which is
slower and exact as well. The reference needs no second model: its log-probabilities are computed
once, before the first step. Adapters never touch the base weights, so the base may be in 4 bits, on
CUDA or a CPU.

`train_dpo` and `train_sft` are generators: they yield what there is to say of each step, and write
no files. Under torch.distributed several processes share every batch. Left out: other losses, and
models that one GPU cannot hold.
"""
import itertools
import logging
import math
import sys
import time
import warnings
import weakref
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a package nobody needs
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from harness.engine.adapters import unadapted
from harness.engine.architecture import changes_of_logits, rotation_limit, windows_of
from harness.engine.cuda import has_kernel
from harness.engine.passes import Budget, token_count, train_without_noise
from harness.engine.processes import add_up, add_up_gradients, collect_shares, share, world

# cuDNN plans each shape of attention anew, and shapes hardly ever repeat here.
torch.backends.cuda.enable_cudnn_sdp(False)
# The new names of gradient checkpointing are unknown to older versions and to peft.
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing")

LOGIT_ROWS = 256  # answer tokens whose vocabulary-wide logits exist at the same time


# ---- the losses

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """DPO [E5] (Rafailov et al. 2023, eq. 7).

    All but beta are torch (B,): summed log-probabilities of the answers. Returns (losses,
    chosen_rewards, rejected_rewards), (B,) each; the rewards carry no gradient.
    """
    chosen_rewards = beta * (policy_chosen - ref_chosen)
    rejected_rewards = beta * (policy_rejected - ref_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)  # [E5]
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def sft_loss(answer_logps, answer_ids):
    """Mean negative log-probability per answer token, (B,); the prompt counts for nothing.

    answer_logps: torch (B,), summed; answer_ids: B lists of token ids.
    """
    return -answer_logps / torch.tensor([*map(len, answer_ids)], device=answer_logps.device)


# ---- prompts and their answers in one row

@dataclass
class PackLayout:
    """What stands where in a packed row, and how many layers have attended by it."""
    groups: list           # for each prompt its length and the lengths of its answers, in tokens
    device: torch.device
    layers: int = 0
    windows: int = 0       # how many of these see a window of the last tokens only

    @cached_property
    def pieces(self):
        """What `packed_kernel` is told of the prompts and answers, in order.

        (at, seen, begin, most, longest): piece i is the tokens at[i] to at[i + 1], of which there
        are `most` at most, and sees the tokens seen[begin[i]] to seen[begin[i + 1]], `longest` at
        most. A prompt of 2 and an answer of 1: at 0 2 3, seen 0 1 0 1 2, begin 0 2 5.
        """
        at, seen, begin = [0], [], [0]
        for prompt, *answers in self.groups:
            first = range(at[-1], at[-1] + prompt)
            for before, length in [((), prompt), *((first, answer) for answer in answers)]:
                seen += [*before, *range(at[-1], at[-1] + length)]
                at.append(at[-1] + length)
                begin.append(len(seen))
        tensors = (torch.tensor(x, dtype=torch.int32, device=self.device)
                   for x in (at, seen, begin))
        return *tensors, *(max(y - x for x, y in itertools.pairwise(ends)) for ends in (at, begin))


class CannotPack(Exception):
    """A model's layers do not fit a packed row."""


def packed_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, *,
                     layout=None, sliding_window=None, **kwargs):
    """transformers' attention interface; without a layout it is sdpa.

    query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D). An answer attends to its
    prompt and to itself. Each of these is a plain causal attention, which fast kernels take, and
    what no token may see is never computed. Raises CannotPack.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      dropout=dropout, **kwargs)
    for option in ("softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise CannotPack(f"attends with {option}")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{module.config.model_type} attends in both directions: choose another "
                         "model")
    layout.layers += 1
    layout.windows += bool(sliding_window)
    if torch.is_autocast_enabled(query.device.type):  # the kernel is not on autocast's list
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type))
                             for x in (query, key, value))
    fits = has_kernel(query) and value.shape[-1] == query.shape[-1]
    see = packed_kernel if fits else piecewise_attention
    return see(query, key, value, layout, scaling, sliding_window), None


def packed_kernel(query, key, value, layout, scaling, window):
    """`packed_attention` in one call of FlashAttention's kernel.

    It aligns the last query of a piece with its last key.
    """
    at, seen, begin, most, longest = layout.pieces
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))     # (T, H or Hkv, D)
    key, value = (x.index_select(0, seen) for x in (key, value))
    out, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, at, begin, most, longest, 0.0, False, False, scale=scaling,
        window_size_left=window - 1 if window else -1, window_size_right=0)
    return out[None]


def piecewise_attention(query, key, value, layout, scaling, window):
    """`packed_attention` in one call for each prompt and each answer."""
    lengths = list(itertools.chain(*layout.groups))  # of all pieces of the row, in order
    pieces = zip(*(x.split(lengths, 2) for x in (query, key, value)))
    out = []
    for _, *answers in layout.groups:
        q, prompt_k, prompt_v = next(pieces)  # (1, H or Hkv, length of the prompt, D)
        out.append(causal_attention(q, prompt_k, prompt_v, scaling, window))
        for _ in answers:
            q, k, v = next(pieces)            # (1, H or Hkv, length of the answer, D)
            k, v = torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2)
            out.append(causal_attention(q, k, v, scaling, window))
    return torch.cat(out, 2).transpose(1, 2)


def causal_attention(query, key, value, scaling, window):
    """The last Q of K tokens attend to those before them, at most `window` with themselves.

    query (1, H, Q, D), key and value (1, Hkv, K, D) -> (1, H, Q, D).
    """
    Q, K = query.shape[2], key.shape[2]
    mask = None if Q == K else causal_lower_right(Q, K)
    if window and window < K:
        here = torch.arange(K, device=key.device)
        distance = here[K - Q:, None] - here  # (Q, K)
        mask = (distance >= 0) & (distance < window)
        # Fast kernels take either a mask or fewer heads of keys than of queries, not both.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask,
                                          is_causal=mask is None, scale=scaling,
                                          enable_gqa=query.shape[1] != key.shape[1])


AttentionInterface.register("packed_answers", packed_attention)
AttentionMaskInterface.register("packed_answers", sdpa_mask)


fits_packing = weakref.WeakKeyDictionary()  # model -> what `probe_packing` found


def probe_packing(model):
    """Whether packed rows give this model's own log-probabilities. If not, it says so, once."""
    if model not in fits_packing:
        before, training = model.config._attn_implementation, model.training
        model.set_attn_implementation("packed_answers")  # older models keep their own
        try:
            try_packing(model.eval())
            fits_packing[model] = True
        except CannotPack as error:
            fits_packing[model] = False
            print(f"{model.config.model_type} {error}: it trains on one sequence a pass, which is "
                  "slower", file=sys.stderr)
        finally:
            model.train(training)
            model.set_attn_implementation(before)
    return fits_packing[model]


@torch.no_grad()
def try_packing(model):
    """Raise CannotPack unless a row of a prompt and two answers gives a plain pass's logits."""
    config = model.config.get_text_config()
    windows = windows_of(config)
    taken = model.config._attn_implementation == "packed_answers"
    if not taken or model._is_stateful or windows is None:
        raise CannotPack("attends in ways of its own")
    rounding = 0.03 if model.dtype.itemsize < 4 else 1e-3
    # One of five tries must agree: in 16 bits rounding alone moves the logits of some tokens far.
    for ids in config.vocab_size * torch.arange(1, 16).view(5, 1, 3) // 16:
        layout, row = PackLayout([[1, 1, 1]], model.device), ids.to(model.device)
        positions = torch.tensor([[0, 1, 1]], device=model.device)
        hidden = packed_hidden(model, row, positions, layout)
        if layout.layers != config.num_hidden_layers:
            raise CannotPack("does not hand a row's layout on to all its layers")
        if layout.windows != windows:
            raise CannotPack("does not tell its layers how far back they see")
        ours = [final_logits(model, hidden[[0, nth]]) for nth in (1, 2)]
        plain = [model(input_ids=row[:, [0, nth]], use_cache=False).logits[0] for nth in (1, 2)]
        if all((x - y).norm() <= rounding * y.norm() for x, y in zip(ours, plain)):
            return
    raise CannotPack("gives other logits so than by a plain pass")


def pack(prompt_ids, answers):
    """One row of token ids, prompt after prompt, each followed by its answers.

    Returns lists (ids, positions, sources, targets, owners): the answer token targets[i] is
    predicted from where ids[sources[i]] stands, and belongs to answer number owners[i].
    """
    ids, positions, sources, targets, owners = [], [], [], [], []
    for prompt, group in zip(prompt_ids, answers):
        ids += prompt
        positions += range(len(prompt))
        last = len(ids) - 1  # the prompt's last token predicts the first one of all its answers
        for answer in group:
            sources += [last, *range(len(ids), len(ids) + len(answer) - 1)]
            targets += answer
            owners += [owners[-1] + 1 if owners else 0] * len(answer)
            ids += answer
            positions += range(len(prompt), len(prompt) + len(answer))
    return ids, positions, sources, targets, owners


# ---- log-probabilities of answers

def answer_logps(model, prompt_ids, answers):
    """log p(answer | prompt), summed over the answer's tokens.

    prompt_ids: lists of token ids; answers: for each of them a list of lists of token ids, any
    number. Returns torch (number of answers,), prompt after prompt, in float64: of a sum of 4,000
    nats float32 keeps no more than three decimals, and the loss is a difference of such sums.
    Raises ValueError for an empty prompt, from which no first token could be predicted, for an
    empty answer, and for token ids that the model does not have.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_ids(base, prompt_ids, answers)
    longest = max((len(prompt) + len(answer) for prompt, group in zip(prompt_ids, answers)
                   for answer in group))
    fits = longest <= rotation_limit(base.config.get_text_config())
    way = packed_logps if fits and probe_packing(base) else plain_logps
    # Without autocast each adapter of a 16-bit model would keep a copy of its input in float32.
    half = base.dtype == torch.bfloat16
    with torch.autocast(model.device.type, base.dtype, enabled=half), \
            disable_input_dtype_casting(base, active=half):
        return way(base, prompt_ids, answers)


def packed_logps(model, prompt_ids, answers):
    """`answer_logps` with all prompts and answers in one row."""
    packed = pack(prompt_ids, answers)
    layout = PackLayout([[len(prompt), *map(len, group)]
                         for prompt, group in zip(prompt_ids, answers)], model.device)
    ids, positions, sources, targets, owners = (torch.tensor(x, device=model.device)
                                                for x in packed)  # (T,) (T,) (N,) (N,) (N,)
    if model.config._attn_implementation != "packed_answers":
        model.set_attn_implementation("packed_answers")  # for good: backward passes need it too
    hidden = packed_hidden(model, ids[None], positions[None], layout)[sources]  # (N, W)
    chunks = math.ceil(len(targets) / LOGIT_ROWS)
    logps = torch.cat([head_logps(model, h, t) for h, t in
                       zip(hidden.chunk(chunks), targets.chunk(chunks))])       # (N,)
    sums = logps.new_zeros(sum(map(len, answers)), dtype=torch.float64)
    return sums.index_add(0, owners, logps.double())


def packed_hidden(model, ids, positions, layout):
    """What the head would be given: ids and positions (1, T) -> (T, W)."""
    return model.base_model(input_ids=ids, position_ids=positions,
                            attention_mask=torch.ones_like(ids), use_cache=False,
                            layout=layout).last_hidden_state[0]


def plain_logps(model, prompt_ids, answers):
    """`answer_logps` with one forward pass for each answer, for any decoder."""
    sums = []
    for prompt, group in zip(prompt_ids, answers):
        for answer in group:
            ids = torch.tensor([[*prompt, *answer[:-1]]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(answer):]
            targets = torch.tensor(answer, device=model.device)[:, None]
            sums.append(normalized(logits).gather(-1, targets).double().sum())
    return torch.stack(sums)


def pair_logps(model, prompt_ids, chosen_ids, rejected_ids):
    """Summed log-probabilities of chosen and rejected answers, each behind its prompt.

    Three lists of B lists of token ids -> two torch (B,), float64.
    """
    if not len(prompt_ids) == len(chosen_ids) == len(rejected_ids):
        raise ValueError("prompt_ids, chosen_ids and rejected_ids must have the same length")
    logps = answer_logps(model, prompt_ids, list(zip(chosen_ids, rejected_ids)))  # (2 B,)
    return logps.view(-1, 2).unbind(1)


def check_ids(model, prompt_ids, answers):
    """Raise ValueError unless these are prompts and their answers in token ids of the model."""
    if len(prompt_ids) != len(answers):
        raise ValueError("prompt_ids and answers must have the same length")
    texts = [*prompt_ids, *itertools.chain(*answers)]
    if not all(map(len, texts)) or not any(map(len, answers)):
        raise ValueError("prompt_ids and answers must not be empty")
    vocabulary = model.get_input_embeddings().num_embeddings
    if min(map(min, texts)) < 0 or max(map(max, texts)) >= vocabulary:
        raise ValueError(f"prompt_ids and answers must be token ids from 0 to {vocabulary - 1}")


def head_logps(model, hidden, targets):
    """Log-probability of each target, in fp32 or better: hidden (N, W), targets (N,) -> (N,).

    The (N, V) logits do not outlive the call.
    """
    head = model.get_output_embeddings()
    plain = not any(changes_of_logits(model.config.get_text_config()))
    if plain and type(head) is torch.nn.Linear and not head.weight.requires_grad:
        return FrozenHead.apply(hidden, head, targets)
    return checkpoint(token_logps, model, hidden, targets, use_reentrant=False)


def token_logps(model, hidden, targets):
    logps = normalized(final_logits(model, hidden))
    return logps.gather(-1, targets[:, None])[:, 0]


def final_logits(model, hidden):
    """A model's logits from its last layer's output: hidden (N, W) -> (N, V)."""
    cap, divisor, factor = changes_of_logits(model.config.get_text_config())
    logits = model.get_output_embeddings()(hidden) / (divisor or 1) * (factor or 1)
    return cap * (logits / cap).tanh() if cap else logits


def normalized(logits):
    """Log-probabilities of all tokens, (N, V), in fp32 or better."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class FrozenHead(torch.autograd.Function):
    """`token_logps` of a plain head that does not train.

    The gradient is taken while the logits are there, which then need not be computed again.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets):
        every = normalized(head_product(head, hidden))  # (N, V)
        logps = every.gather(-1, targets[:, None])[:, 0]
        if ctx.needs_input_grad[0]:
            shares = every.exp_()  # d log p(target) / d logits = 1[target] - shares
            shares[torch.arange(len(targets), device=targets.device), targets] -= 1
            ctx.save_for_backward(shares.to(hidden.dtype) @ head.weight)  # (N, W)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return (-grad[:, None] * slope).to(slope.dtype), None, None


def head_product(head, hidden):
    """Logits (N, V) of a plain head; on CUDA in float32, which its kernels add up in anyway."""
    if hidden.is_cuda and head.bias is None and head.weight.dtype == torch.bfloat16:
        return torch.mm(hidden.bfloat16(), head.weight.T, out_dtype=torch.float32)
    return head(hidden)


# ---- the adapter

def add_lora(model, rank):
    """Wrap a frozen model with a fresh LoRA adapter on all linear layers but the head.

    A fresh adapter changes nothing yet. Left out are what sees pictures or hears, routers, which
    return more than a product, and matrices that Mamba's kernels read themselves.
    """
    left_out = unadapted(model)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0,
                        target_modules="all-linear", task_type="CAUSAL_LM",
                        exclude_modules=left_out or None)
    model = get_peft_model(model, config)
    config.target_modules = sorted(config.target_modules)  # a set is written in any order
    config.exclude_modules = left_out or None
    return model


def trainable(model):
    """The LoRA weights by name, in a fixed order, set to require gradients."""
    return {name: weight.requires_grad_(True) for name, weight in model.named_parameters()
            if "lora_" in name}


# ---- training

class State:
    """What training must not lose: the adapter, the optimizer, the best epoch so far."""

    def __init__(self, model):
        self.weights = trainable(model)
        if not self.weights:
            raise ValueError("the model has no LoRA adapter to train: call add_lora first")
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.0, weight_decay=0.0)
        self.step, self.epoch = 0, 0  # steps taken, epochs measured
        self.best, self.best_weights = None, {}

    def end_epoch(self, record):
        """Remember the adapter if its epoch is the best, the last one if nothing is held out."""
        self.epoch += 1
        comparable = self.best is not None and "held_out_loss" in record
        if not comparable or record["held_out_loss"] <= self.best["held_out_loss"]:
            self.best = record
            self.best_weights = {name: weight.detach().clone()
                                 for name, weight in self.weights.items()}


def train_sft(model, examples, held_out=(), **settings):
    """Supervised fine-tuning; yields figures of steps and of epochs. settings: as in `train`.

    examples, held_out: dicts with "prompt_ids" and "answer_ids", lists of token ids.
    """
    def compute(part):
        prompts = [example["prompt_ids"] for example in part]
        answers = [example["answer_ids"] for example in part]
        logps = answer_logps(model, prompts, [[answer] for answer in answers])
        return sft_loss(logps, answers), {}

    yield from train(model, examples, held_out, compute, **settings)


def train_dpo(model, examples, held_out=(), *, beta, **settings):
    """DPO from the model as it is, which is also the reference; yields figures of steps and epochs,
    such as {"step": 3, "loss": 0.62, "margin": 0.16, ...}. settings: as in `train`.

    examples, held_out: dicts with "prompt_ids", "chosen_ids" and "rejected_ids", lists of token
    ids, and with "ref_chosen" and "ref_rejected" from `reference`, which is called if they have
    none.
    """
    def compute(part):
        ref_chosen, ref_rejected = (
            torch.tensor([example[name] for example in part], dtype=torch.float64,
                         device=model.device) for name in ("ref_chosen", "ref_rejected"))
        policy_chosen, policy_rejected = logps_of(model, part)
        losses, chosen_rewards, rejected_rewards = dpo_loss(policy_chosen, policy_rejected,
                                                            ref_chosen, ref_rejected, beta)
        figures = {"margin": chosen_rewards - rejected_rewards,
                   "accuracy": (chosen_rewards > rejected_rewards).float(),
                   "chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards,
                   "chosen_logp": policy_chosen.detach(),
                   "rejected_logp": policy_rejected.detach()}
        return losses, figures

    every = [*examples, *held_out]
    if not all("ref_chosen" in example for example in every):
        reference(model, every)
    yield from train(model, examples, held_out, compute, **settings)


def logps_of(model, pairs):
    """Log-probabilities of pairs {"prompt_ids", "chosen_ids", "rejected_ids"}: two torch (B,)."""
    return pair_logps(model, *([pair[name] for pair in pairs]
                               for name in ("prompt_ids", "chosen_ids", "rejected_ids")))


@torch.no_grad()
def reference(model, pairs):
    """Give every pair its "ref_chosen" and "ref_rejected", log-probabilities by the model as it is.

    Raises FloatingPointError if they are not finite.
    """
    model.eval()
    mine = []
    with tqdm(total=len(pairs), desc="reference", unit="pair") as bar:
        passes = Budget(model, pairs).passes(lambda part: logps_of(model, part), share(pairs))
        for part, (chosen, rejected) in passes:
            mine += zip(chosen.tolist(), rejected.tolist())
            bar.update(world() * len(part))
    for pair, (chosen, rejected) in zip(pairs, collect_shares(mine), strict=True):
        if not math.isfinite(chosen) or not math.isfinite(rejected):
            raise FloatingPointError("the model as it is gives log-probabilities that are not "
                                     "finite: choose another model, or other --bits")
        pair |= {"ref_chosen": chosen, "ref_rejected": rejected}


def learning_rate(step, total, peak, warmup=0.1):
    """Linear warm-up over the first tenth of the steps, then a cosine down to zero."""
    start = max(1, round(warmup * total))
    if step < start:
        return peak * (step + 1) / start
    progress = (step - start) / max(1, total - start)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def train(model, examples, held_out, compute, *, epochs, batch_size, lr, seed=0, state=None):
    """Train the model's adapter, and leave in the model what the best epoch made of it.

    compute(list of examples) returns (losses (B,), figures: name -> (B,)). Yields a record, a dict
    of figures, after each step and after each epoch; an epoch's has "held_out_loss" if anything is
    held out. The best epoch has the lowest, or is the last one. AdamW without decay, a cosine
    schedule with warm-up, gradients clipped to norm 1; `seed` orders the examples.

    state: a State to go on from, None for a new one. It may be saved after any record; a training
    that goes on from it ends, on a CPU, with the same bits as one that never stopped.
    Raises FloatingPointError when a loss or a gradient is not finite.
    """
    if not examples or epochs < 1 or batch_size < 1:
        raise ValueError("examples must not be empty, and epochs and batch_size must be at least 1")
    state = state or State(model)
    steps = math.ceil(len(examples) / batch_size)  # per epoch
    budget = Budget(model, [*examples, *held_out])
    while state.epoch < epochs:
        train_without_noise(model)
        order = np.random.default_rng([seed, state.epoch]).permutation(len(examples))
        for nth in range(state.step - state.epoch * steps, steps):
            batch = [examples[i] for i in order[nth * batch_size: (nth + 1) * batch_size]]
            rate = learning_rate(state.step, epochs * steps, lr)
            start = time.perf_counter()
            figures = take_step(state, batch, compute, rate, budget)
            seconds, tokens = time.perf_counter() - start, sum(map(token_count, batch))
            yield {"step": state.step, "epoch": state.epoch + 1, "lr": rate, **figures,
                   "tokens": tokens, "tokens_per_second": round(tokens / seconds),
                   "lines": [example.get("line") for example in batch]}
        model.eval()
        measured = measure(held_out, compute, budget).items()
        record = {"epoch": state.epoch + 1, **{f"held_out_{name}": x for name, x in measured}}
        state.end_epoch(record)
        yield record
    for name, weight in state.weights.items():
        weight.data.copy_(state.best_weights[name])
        weight.grad = None
    model.eval()


def take_step(state, batch, compute, rate, budget):
    """One optimizer step on the mean loss of a batch, in as many passes as needed: its figures."""
    weights, totals = list(state.weights.values()), {}

    def work(part):
        losses, figures = compute(part)
        check_finite(losses, f"loss at step {state.step + 1}")
        gradients = torch.autograd.grad(losses.sum() / len(batch), weights, materialize_grads=True)
        # Only now, that the whole pass has gone through: it may have run out of memory before.
        for weight, gradient in zip(weights, gradients):
            weight.grad += gradient
        return {"loss": losses.detach(), **figures}

    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for _, figures in budget.passes(work, share(batch)):
        add_means(totals, figures, len(batch))
    totals = add_up(totals)
    add_up_gradients(weights)
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
    check_finite(norm, f"gradient at step {state.step + 1}")
    state.optimizer.param_groups[0]["lr"] = rate
    state.optimizer.step()
    state.step += 1
    return {**totals, "grad_norm": norm.item()}


@torch.no_grad()
def measure(examples, compute, budget):
    """Mean loss and figures over examples, without training on them."""
    totals = {}
    for _, (losses, figures) in budget.passes(compute, share(examples)):
        check_finite(losses, "loss on held-out examples")
        add_means(totals, {"loss": losses, **figures}, len(examples))
    return add_up(totals)


def add_means(totals, figures, count):
    """Add a pass's part of the means over `count` examples: figures are tensors by name."""
    for name, values in figures.items():
        totals[name] = totals.get(name, 0) + values.sum().item() / count


def check_finite(values, what):
    if not torch.isfinite(values).all():
        raise FloatingPointError(f"the {what} is not finite: start again, in another folder, with "
                                 "a lower --lr")
