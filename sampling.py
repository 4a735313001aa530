"""Batched, KV-cached sampling from any Hugging Face decoder-only model: load, encode a chat safely, draw. `python sampling.py MODEL "question"`

The n samples of one prompt share its keys and values: they are computed and stored once, and so is the common beginning of prompts that
follow each other (all comparisons of one answer). Each sample owns only its suffix. Attention runs over the two parts separately and joins
them exactly (the idea of Hydragen, Juravsky et al. 2024, arXiv 2402.05099), through transformers' registered attention functions.

A draw is a function of (seed, key of the prompt, number of the sample, step): one uniform number through the inverse distribution function.
Left out: sliding windows, soft-capped attention and encoder-decoders (refused by name, never sampled wrongly), beam search, stop strings.

    G groups of rows with a shared prefix      B rows, one per sample        T tokens fed at once       V vocabulary
    P longest prefix                           S longest suffix              H, Hkv heads, D their width
"""
import argparse
import hashlib
import json
import logging
import os
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on every import it recommends a package that nobody here needs
from huggingface_hub.utils import logging as hub_logging
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

hub_logging.set_verbosity_error()  # our own line says what could not be fetched
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft asks transformers for it


@dataclass(frozen=True)
class Sample:
    text: str           # what was written, control tokens left out
    tokens: list        # the ids drawn, the end token included
    finished: bool      # ended by itself; False: cut off after max_new_tokens


# ---- loading

def load(model, adapter=None, bits=None, device=None):
    """A frozen base model in eval mode, with its LoRA adapter if there is one, and its tokenizer.

    model: a hub name, a model folder, or an iteration's folder (runs/x/iter4) or adapter folder, which name their base themselves.
    bits: 4 (NF4 through bitsandbytes), 16 (bfloat16) or 32. Default: 4 on CUDA, 32 elsewhere. Safetensors only, no remote code.
    Raises ValueError for an adapter that does not fit key by key: a partly loaded adapter would silently do nothing.
    """
    folder = Path(model)
    if adapter is None:
        adapter = next((place for place in (folder / "adapter", folder) if (place / "adapter_config.json").is_file()), None)
        model = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path if adapter else model
        settings = folder.parent / "config.json"  # of a run: an adapter belongs to the precision it was trained in
        if adapter and bits is None and settings.is_file():
            bits = json.loads(settings.read_text()).get("settings", {}).get("bits")
    if adapter is not None and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise ValueError(f"adapter {adapter} has no adapter_model.safetensors")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    bits = bits or (4 if device == "cuda" else 32)
    dtype = torch.float32 if bits == 32 or (bits == 4 and device == "cpu") else torch.bfloat16
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    tokenizer = load_tokenizer(model)
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, quantization_config=nf4 if bits == 4 else None, device_map={"": device}, use_safetensors=True,
        trust_remote_code=False)
    network.requires_grad_(False)
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes would repack the weights when sampling, and gradients stop at those
    if adapter is not None:
        network = PeftModel.from_pretrained(network, str(adapter), ignore_mismatched_sizes=True)  # check_adapter does not ignore them
        check_adapter(network, adapter)
    return network.eval(), tokenizer


def load_tokenizer(model):
    """The model's tokenizer. Raises OSError, with what to do, if there is no such model: this is asked for before the weights are."""
    if (Path(model) / "summary.json").is_file():
        raise OSError(f"{model} is a run: name one of its iterations, as {model}/iter1")
    if str(model).count("/") > 1 and not Path(model).exists():  # hub names have one slash at most
        raise OSError(f"model {model}: there is no such folder")
    try:
        AutoConfig.from_pretrained(model, trust_remote_code=False)
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except OSError as error:
        raise OSError(f"model {model} cannot be loaded ({str(error).strip().splitlines()[0]}); name a model folder or a model of the hub; "
                      "for a gated one ask for access on its page, then run: hf auth login") from None


def check_adapter(model, folder):
    """Raise ValueError unless the adapter's file has exactly the keys and shapes of the model's LoRA weights."""
    expected = {name: tuple(weight.shape) for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"adapter {folder} does not fit the model: {len(wrong)} keys differ, the first is {wrong[0]}")


# ---- text to tokens

class Chat:
    """A tokenizer's chat template around texts that are data: nothing inside a text can become a control token."""

    SLOT = "ZqSLOTqZ"

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: choose an instruction-tuned model")
        self.tokenizer = tokenizer
        self.added = {text: i for text, i in tokenizer.get_added_vocab().items()  # Gemma adds line breaks, which control nothing
                      if i != tokenizer.unk_token_id and len(text.strip()) > 1}
        self.added_ids = set(self.added.values())
        self.pattern = re.compile("(" + "|".join(re.escape(text) for text in sorted(self.added, key=len, reverse=True)) + ")")
        turns = [{"role": "user", "content": f" {self.SLOT} "}, {"role": "assistant", "content": self.SLOT}]
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        told = tokenizer.apply_chat_template(turns, tokenize=False)
        self.trims = f" {self.SLOT} " not in asked  # Llama-3's template strips what it is given
        self.before, self.after = asked.split(self.SLOT if self.trims else f" {self.SLOT} ")
        self.end = next(iter(self.control(self.encode(told.split(self.SLOT)[-1]))), tokenizer.eos_token_id)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def control(self, ids):
        """The control tokens among ids."""
        return [i for i in ids if i in self.added_ids]

    def text(self, text):
        """Token ids of a text as data. Control tokens in it are cut in two, so that they read as the characters they are."""
        ids = []
        for piece in self.pattern.split(printable(text)) if self.added else [printable(text)]:
            if piece in self.added:
                ids += self.text(piece[:1]) + self.text(piece[1:])
            elif piece:
                ids += self.encode(piece)
        return ids

    def prompt(self, text):
        """Token ids of a user turn that asks for an answer: the template's own, unless the text would bring control tokens with it."""
        text = printable(text.strip() if self.trims else text)
        before, after, whole = map(self.encode, (self.before, self.after, self.before + text + self.after))
        return whole if self.control(whole) == self.control(before + after) else before + self.text(text) + after

    def answer(self, text):
        """Token ids of an assistant's finished answer, the end token included."""
        return self.text(text) + [self.end]


def printable(text):
    """Text with a question mark in the place of each half of a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


# ---- keys and values, shared and own

class SharedPrefixCache:
    """Keys and values of G shared prefixes and of B rows' own suffixes; each row belongs to one group.

    `slot` places the rows in a (G, R) grid, so that all queries of a group meet its prefix in one matrix product.
    """

    def __init__(self, prefixes, group, suffix_size, device):
        self.prefix_length = torch.tensor([len(ids) for ids in prefixes], device=device)  # (G,)
        self.group = torch.tensor(group, device=device)                                   # (B,)
        self.suffix_size = suffix_size
        self.prefix, self.suffix = {}, {}   # layer -> (keys, values): (G, Hkv, P, D) and (B, Hkv, S, D)
        self.chunk = slice(0, 0)            # the groups whose prefix is being computed
        self.at = None                      # (B, T) where in their suffix the tokens at hand stand; None: computing prefixes
        self.arrange()

    def arrange(self):
        counts = torch.bincount(self.group, minlength=len(self.prefix_length))
        self.grid = (len(counts), int(counts.max()))
        first = counts.cumsum(0) - counts
        order = self.group.argsort(stable=True)
        nth = torch.empty_like(order)
        nth[order] = torch.arange(len(order), device=order.device)
        self.slot = self.group * self.grid[1] + nth - first[self.group]                   # (B,)

    def keep(self, rows):
        """Forget all rows but these."""
        self.group = self.group[rows]
        for layer in self.suffix:  # one by one: all layers' old and new suffixes at once may not fit
            self.suffix[layer] = tuple(x[rows] for x in self.suffix[layer])
        self.arrange()

    def store_prefix(self, layer, key, value):
        if layer not in self.prefix:
            size = (len(self.prefix_length), key.shape[1], int(self.prefix_length.max()))
            self.prefix[layer] = tuple(x.new_zeros(*size, x.shape[3]) for x in (key, value))
        for whole, part in zip(self.prefix[layer], (key, value)):
            whole[self.chunk, :, : part.shape[2]] = part

    def store_suffix(self, layer, key, value):
        """Write the T new tokens of every row and return its whole suffix so far, (B, Hkv, S, D) twice."""
        if layer not in self.suffix:
            size = (len(self.group), key.shape[1], self.suffix_size)
            self.suffix[layer] = tuple(x.new_zeros(*size, x.shape[3]) for x in (key, value))
        rows = torch.arange(len(self.group), device=key.device)[:, None]
        for whole, part in zip(self.suffix[layer], (key, value)):
            whole[rows, :, self.at] = part.transpose(1, 2)
        return tuple(x[:, :, : self.length] for x in self.suffix[layer])

    def feed(self, at):
        self.at, self.length = at, int(at.max()) + 1


def attend_part(query, key, value, seen, scaling):
    """Attention over one part of the context: its output and the log of its softmax's denominator, which joins it to other parts."""
    scores = query @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    shares = scores.softmax(-1)
    total = scores.amax(-1, keepdim=True) - shares.amax(-1, keepdim=True).log()  # cheaper than logsumexp, and the same
    return shares.to(value.dtype) @ value, total


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, *, shared, **kwargs):
    """transformers' attention interface: query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D)."""
    for option in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise ValueError(f"{module.config.model_type} attends with {option}, which this sampler does not do: choose another model")
    layer, (B, H, T, D), Hkv = module.layer_idx, query.shape, key.shape[1]
    if shared.at is None:
        shared.store_prefix(layer, key, value)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=H != Hkv)
        return out.transpose(1, 2), None

    keys, values = shared.store_suffix(layer, key, value)
    query = query.reshape(B, Hkv, H // Hkv * T, D)  # the heads that share keys and values, side by side
    seen = torch.arange(keys.shape[2], device=query.device) <= shared.at[..., None]       # (B, T, S)
    own, own_total = attend_part(query, keys, values, seen.repeat(1, H // Hkv, 1)[:, None], scaling)

    keys, values = shared.prefix[layer]
    G, R = shared.grid
    grid = query.new_zeros(G * R, *query.shape[1:])
    grid[shared.slot] = query
    grid = grid.view(G, R, Hkv, -1, D).transpose(1, 2).reshape(G, Hkv, -1, D)
    seen = torch.arange(keys.shape[2], device=query.device) < shared.prefix_length[:, None]
    common, common_total = (
        x.view(G, Hkv, R, -1, x.shape[-1]).transpose(1, 2).reshape(G * R, Hkv, -1, x.shape[-1])[shared.slot]
        for x in attend_part(grid, keys, values, seen[:, None, None], scaling))

    share = (own_total - common_total).sigmoid()  # of one softmax over both parts, what falls to the own one
    out = own * share.to(own.dtype) + common * (1 - share).to(own.dtype)
    return out.reshape(B, H, T, -1).transpose(1, 2), None


AttentionInterface.register("shared_prefix", shared_prefix_attention)


@contextmanager
def shared_prefix(model):
    """Let the model attend through a SharedPrefixCache, and put its own attention back afterwards."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    before = base.config._attn_implementation
    base.set_attn_implementation("shared_prefix")  # older models keep their own
    kinds = set(getattr(base.config, "layer_types", None) or ["full_attention"])
    try:
        if base.config._attn_implementation != "shared_prefix" or kinds != {"full_attention"} or base._is_stateful:
            raise ValueError(f"{base.config.model_type} has layers other than full attention, which this sampler does not do: choose another model")
        yield
    finally:
        base.set_attn_implementation(before)


# ---- drawing

def uniforms(seed, key, number, count):
    """`count` uniform numbers in [0, 1) that depend on (seed, key, number) alone, on every machine the same."""
    digest = hashlib.blake2b(json.dumps([seed, key, number]).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count, dtype=np.float32)


def nucleus_edge(top, top_p):
    """The least probability in the nucleus, (B,): a token is in as long as those before it fall short of top_p. top (B, N), descending."""
    return top.masked_fill(top.cumsum(-1) - top >= top_p, 1).amin(-1)


def draw(logits, uniform, temperature, top_p):
    """One token per row. logits (B, V), uniform (B,) -> (B,). Nucleus: the fewest tokens whose probability reaches top_p.

    Tokens as likely as the last of these are in as well: which of them a sort puts first is chance. The nucleus mostly lies in the likeliest
    64 tokens, which spares sorting the vocabulary; if it may not for some row, all is sorted. Its tokens are then taken in the order of
    their ids, since an order of nearly equal probabilities would hang on rounding.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    top, ids = probs.topk(min(64, probs.shape[-1]))
    if bool((top[:, -1] >= nucleus_edge(top, top_p)).any()):
        top, ids = probs.sort(dim=-1, descending=True)
    top = top * (top >= nucleus_edge(top, top_p)[:, None])
    ids, by_id = ids.sort(dim=-1)
    mass = top.gather(-1, by_id).cumsum(-1)
    total = mass[:, -1:]
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return ids.gather(-1, (mass <= target).sum(-1, keepdim=True))[:, 0]


# ---- batches

def shared_groups(prompts, n):
    """Split consecutive prompts (token ids) into groups with a common beginning, wherever that is at least half of each and leaves
    fewer tokens to store: a short beginning is not worth the slower way in which a row's own tokens are computed.

    Returns a list of (indices, length of the shared beginning). The last token of a prompt is never shared: it is what a row starts from.
    """
    groups = []
    for i, ids in enumerate(prompts):
        alone = len(ids) - 1 + n
        if groups:
            members, shared = groups[-1]
            common = len(os.path.commonprefix([prompts[members[0]][:shared], ids[:-1]]))
            total = sum(len(prompts[j]) for j in members)
            apart = shared + n * (total - len(members) * shared) + alone
            together = common + n * (total + len(ids) - (len(members) + 1) * common)
            if together < apart and 2 * common >= max(len(prompts[j]) for j in [*members, i]):
                groups[-1] = (members + [i], common)
                continue
        groups.append(([i], len(ids) - 1))
    return groups


def batches(prompts, n, max_new_tokens, capacity):
    """Fill batches with (shared prefix, rows) until the next would pass `capacity` tokens; a row is (prompt, sample, its own tokens)."""
    batch, used = [], 0
    for members, shared in shared_groups(prompts, n):
        open_group = False
        for i, number in ((i, number) for i in members for number in range(n)):
            own = prompts[i][shared:]
            need = len(own) + max_new_tokens + (0 if open_group else shared)
            if batch and used + need > capacity:
                yield batch
                batch, used, open_group = [], 0, False
            if not open_group:
                batch.append((prompts[i][:shared], []))
                used += shared
                open_group = True
            batch[-1][1].append((i, number, own))
            used += len(own) + max_new_tokens
    if batch:
        yield batch


def cache_capacity(model):
    """How many tokens' keys and values fit: in half of what PyTorch does not use on CUDA, in 1 GiB elsewhere."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * (config.num_key_value_heads or config.num_attention_heads) * width * model.dtype.itemsize
    if model.device.type != "cuda":
        return 2**30 // size
    torch.cuda.empty_cache()  # what PyTorch keeps for later counts as taken
    return torch.cuda.mem_get_info(model.device)[0] // 2 // size


def padded(rows, device):
    width = max(map(len, rows))
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)


PREFILL_TOKENS = 16384  # tokens of prefixes computed at once
PREFILL_SIZE = 2**28    # attention scores, or logits, of rows' own tokens that exist at once


def start(model, batch, max_new_tokens):
    """Compute the prefixes and the rows' own tokens: returns (cache, logits (B, V), lengths of the suffixes (B,))."""
    device = model.device
    prefixes = [prefix for prefix, _ in batch]
    own = [ids for _, rows in batch for *_, ids in rows]
    group = [g for g, (_, rows) in enumerate(batch) for _ in rows]
    cache = SharedPrefixCache(prefixes, group, max(map(len, own)) + max_new_tokens, device)
    step = max(1, PREFILL_TOKENS // max(map(len, prefixes)))
    for first in range(0, len(prefixes), step):
        cache.chunk = slice(first, first + step)
        ids = padded(prefixes[cache.chunk], device)
        positions = torch.arange(ids.shape[1], device=device)[None].expand_as(ids)
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1, shared=cache)
    ids = padded(own, device)
    lengths = torch.tensor([len(row) for row in own], device=device)
    config, (G, R) = model.config, cache.grid
    width = config.num_attention_heads * (max(map(len, prefixes)) + cache.suffix_size)
    logits, step = None, max(1, PREFILL_SIZE // (G * R * max(width, config.vocab_size)))
    for first in range(0, ids.shape[1], step):
        part = ids[:, first: first + step]
        cache.feed(torch.arange(first, first + part.shape[1], device=device)[None].expand_as(part))
        at = lengths - 1 - first  # where in this part a row ends, if it does
        last, which = at.clamp(0, part.shape[1] - 1).unique(return_inverse=True)
        positions = cache.prefix_length[cache.group][:, None] + cache.at
        here = model(input_ids=part, position_ids=positions, use_cache=False, logits_to_keep=last, shared=cache).logits
        here = here[torch.arange(len(own), device=device), which]
        logits = here if first == 0 else torch.where((at >= 0)[:, None], here, logits)
    return cache, logits, lengths


def decode(model, batch, stops, uniform, max_new_tokens, temperature, top_p):
    """Draw until every row has ended: returns a list of token ids per row, in the order of the batch."""
    cache, logits, lengths = start(model, batch, max_new_tokens)
    uniform = torch.from_numpy(uniform).to(model.device)  # (B, max_new_tokens)
    stops = torch.tensor(sorted(stops), device=model.device)
    drawn = torch.full(uniform.shape, -1, device=model.device)
    rows = torch.arange(len(drawn), device=model.device)  # the rows still in the cache, finished ones among them for a while
    done = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    for step in range(max_new_tokens):
        token = draw(logits, uniform[rows, step], temperature, top_p)
        drawn[rows, step] = torch.where(done, -1, token)
        done = done | torch.isin(token, stops)
        left = int((~done).sum())
        if left == 0 or step + 1 == max_new_tokens:
            break
        if left <= 0.75 * len(rows):
            alive = (~done).nonzero()[:, 0]
            cache.keep(alive)
            rows, token, lengths, done = rows[alive], token[alive], lengths[alive], done[alive]
        cache.feed(lengths[:, None])
        positions = (cache.prefix_length[cache.group] + lengths)[:, None]
        logits = model(input_ids=token[:, None], position_ids=positions, use_cache=False, shared=cache).logits[:, -1]
        lengths = lengths + 1
    return [[token for token in row if token >= 0] for row in drawn.tolist()]


def stop_tokens(model, tokenizer):
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in [*configured, tokenizer.eos_token_id, Chat(tokenizer).end] if token is not None}


@torch.no_grad()
def sample(model, tokenizer, prompts, n=1, *, max_new_tokens, temperature=0.8, top_p=0.95, seed=0, keys=None, capacity=None):
    """n answers to each prompt.

    prompts: user texts; the chat template is applied here. temperature 0 is greedy. seed: anything JSON can hold.
    keys: one per prompt (default: its index); draws depend on (seed, key, number of the sample) and on nothing else.
    capacity: how many tokens' keys and values a batch may hold (default: see `cache_capacity`).
    Returns for each prompt a list of n Samples. Raises ValueError for settings out of range.
    """
    keys = list(range(len(prompts))) if keys is None else keys
    if n < 1 or max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1 or len(keys) != len(prompts):
        raise ValueError("sample needs n >= 1, max_new_tokens >= 1, temperature >= 0, top_p in (0, 1] and one of keys per prompt")
    chat, stops = Chat(tokenizer), stop_tokens(model, tokenizer)
    ids = [chat.prompt(text) for text in prompts]
    longest, context = max(map(len, ids), default=0) + max_new_tokens, getattr(model.config, "max_position_embeddings", None)
    if context and longest > context:
        raise ValueError(f"a prompt of {longest - max_new_tokens} tokens and {max_new_tokens} new ones exceed the model's context of {context}: "
                         "shorten the prompts or the answers")
    samples = [[None] * n for _ in prompts]
    with shared_prefix(model):
        for batch in batches(ids, n, max_new_tokens, capacity or cache_capacity(model)):
            places = [(i, number) for _, rows in batch for i, number, _ in rows]
            uniform = np.stack([uniforms(seed, keys[i], number, max_new_tokens) for i, number in places])
            drawn = decode(model, batch, stops, uniform, max_new_tokens, temperature, top_p)
            for (i, number), tokens in zip(places, drawn):
                samples[i][number] = Sample(tokenizer.decode(tokens, skip_special_tokens=True), tokens, tokens[-1] in stops)
    return samples


def main():
    parser = argparse.ArgumentParser(description="Ask a model one question.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help="a hub name, a model folder, or an iteration of a run (runs/x/iter4)")
    parser.add_argument("question")
    parser.add_argument("--n", type=int, default=1, help="how many answers")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95, help="probability mass of the nucleus")
    parser.add_argument("--bits", type=int, choices=[4, 16, 32], help="4 on CUDA, 32 elsewhere")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    args = parser.parse_args()
    try:
        model, tokenizer = load(args.model, bits=args.bits)
        answers = sample(model, tokenizer, [args.question], args.n, max_new_tokens=args.max_new_tokens,
                         temperature=args.temperature, top_p=args.top_p, seed=args.seed)[0]
    except (OSError, ValueError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    for answer in answers:
        print(answer.text + ("" if answer.finished else f" [cut off after {len(answer.tokens)} tokens]"))


if __name__ == "__main__":
    main()
