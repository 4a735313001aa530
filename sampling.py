"""Batched, KV-cached sampling from any Hugging Face decoder-only model: load, encode a chat safely, draw. `python sampling.py MODEL "question"`

The n samples of one prompt share its keys and values: they are computed and stored once, and so is the common beginning of prompts that
follow each other (all comparisons of one answer). Each sample owns only its suffix. Attention runs over the two parts separately and joins
them exactly (the idea of Hydragen, Juravsky et al. 2024, arXiv 2402.05099), through transformers' registered attention functions.

A draw is a function of (seed, key of the prompt, number of the sample, step): one uniform number through the inverse distribution function.
Left out: sliding windows, soft-capped attention and encoder-decoders (refused by name, never sampled wrongly), beam search, stop strings.

    B rows, one per sample                     S longest suffix              T tokens of a prompt       V vocabulary
    G prefixes, each shared by R rows at most  P longest prefix              H heads, Hkv of keys and values, D their width
"""
import argparse
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import warnings
import weakref
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on every import it recommends a package that nobody here needs
from huggingface_hub.utils import logging as hub_logging
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each shape of attention anew, and shapes hardly ever repeat here
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)  # `load` says which weights are missing, without a table
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
    Raises ValueError for weights that are missing or do not fit, of the model or of the adapter key by key: a partly loaded adapter would
    silently do nothing; and for an adapter of a run that is not what the run has written.
    """
    folder = Path(model)
    if adapter is None:
        adapter = next((place for place in (folder / "adapter", folder) if (place / "adapter_config.json").is_file()), None)
        model = base_of(adapter) if adapter else model
        if adapter and bits is None:  # an adapter belongs to the precision it was trained in
            bits = read_record(folder.parent / "config.json").get("settings", {}).get("bits")
    if adapter is not None and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise ValueError(f"adapter {adapter} has no adapter_model.safetensors")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    bits = bits or (4 if device == "cuda" else 32)
    dtype = torch.float32 if bits == 32 or (bits == 4 and device == "cpu") else torch.bfloat16
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    tokenizer = load_tokenizer(model)
    place = {"": torch.cuda.current_device() if device == "cuda" else device}  # "cuda" is the first GPU to the threads that load
    try:
        network, told = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, quantization_config=nf4 if bits == 4 else None, device_map=place, use_safetensors=True,
            trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"model {model} cannot be loaded ({error})") from None
    if wrong := sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]])):  # transformers would draw these at random
        raise ValueError(f"model {model} cannot be loaded: {len(wrong)} of its weights are missing or of another shape, the first is {wrong[0]}")
    network.requires_grad_(False)
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes would repack the weights when sampling, and gradients stop at those
    if adapter is not None:
        network = PeftModel.from_pretrained(network, str(adapter), ignore_mismatched_sizes=True)  # check_adapter does not ignore them
        check_adapter(network, adapter)
    return network.eval(), tokenizer


def read_record(file):
    """The record in a JSON file, {} if there is no such file. Raises ValueError that names it if it holds something else."""
    try:
        record = json.loads(file.read_text()) if file.is_file() else {}
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{file}: not a JSON record; put it back from a copy")
    return record


def base_of(adapter):
    """The model an adapter was made on: a hub name, or a folder, which may be given as seen from any folder above the adapter."""
    try:
        name = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    except (TypeError, ValueError, KeyError):
        name = None
    if not isinstance(name, str):
        raise ValueError(f"adapter {adapter}: its adapter_config.json is damaged, or names no base model")
    places = [Path(name), *(above / name for above in Path(adapter).resolve().parents)]
    return str(next((place for place in places if (place / "config.json").is_file()), name))


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
    except Exception as error:  # damaged files of a tokenizer raise many kinds
        raise ValueError(f"model {model} cannot be loaded: its configuration or its tokenizer is damaged ({type(error).__name__}: {error})") from None


def check_adapter(model, folder):
    """Raise ValueError unless the adapter's file has exactly the keys and shapes of the model's LoRA weights, and is what a run wrote."""
    file = Path(folder) / "adapter_model.safetensors"
    sha256 = read_record(Path(folder).parent / "figures.json").get("adapter")
    if sha256 and hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"adapter {folder} is damaged: its content is not what was written; put it back from a copy")
    expected = {name: tuple(weight.shape) for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    with safe_open(file, "pt") as weights:
        found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"adapter {folder} does not fit the model: {len(wrong)} keys differ, the first is {wrong[0]}")


# ---- text to tokens

class Chat:
    """A tokenizer's chat template around texts that are data: nothing inside a text can become a control token.

    Templates that can leave thinking out are asked to (enable_thinking=False), and those that tell the date tell the same one every day.
    Raises ValueError if there is no template, or one that does not take plain texts, or one that opens a thought (<think>) before every
    answer: what is judged here is the answer. Where a template's marks are plain text and no tokens, a text can spell them.
    """

    SLOT = "Zq{}SLOTqZ"
    DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"  # or a run that goes on tomorrow would ask otherwise

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: choose an instruction-tuned model")
        self.tokenizer = tokenizer
        self.added = {text: i for text, i in tokenizer.get_added_vocab().items()  # Gemma adds line breaks, which control nothing
                      if i != tokenizer.unk_token_id and len(text.strip()) > 1}
        self.added_ids = set(self.added.values())
        self.pattern = re.compile("(" + "|".join(re.escape(text) for text in sorted(self.added, key=len, reverse=True)) + ")")
        told = self.render(2, add_generation_prompt=False)
        if "<think>" in self.render(1, add_generation_prompt=True).rpartition("</think>")[2]:
            raise ValueError("the chat template lets the model think aloud before every answer: choose a model that answers at once")
        self.end = next(iter(self.control(self.encode(told.split(self.SLOT.format(1))[-1]))), tokenizer.eos_token_id)
        self.frames = {}

    def render(self, count, add_generation_prompt):
        """The template around `count` turns, user's and assistant's in turn, with a slot in the place of each text."""
        turns = [{"role": ("user", "assistant")[i % 2], "content": f"\t{self.SLOT.format(i)}\t"} for i in range(count)]
        try:
            text = self.tokenizer.apply_chat_template(turns, chat_template=self.DAY + self.tokenizer.get_chat_template(), tokenize=False,
                                                      add_generation_prompt=add_generation_prompt, enable_thinking=False)
        except Exception as error:  # a template is a program, which may fail in any way
            raise ValueError(f"the chat template takes no plain chat of user and assistant ({error}): choose another model") from None
        if any(text.count(turn["content"].strip()) != 1 for turn in turns):
            raise ValueError("the chat template does not put each text of a chat in one place: choose another model")
        return text

    def frame(self, count):
        """What the template puts before, between and after `count` turns, and for each turn whether it strips it, as Llama-3's does."""
        if count not in self.frames:
            rest, pieces, trims = self.render(count, add_generation_prompt=True), [], []
            for slot in map(self.SLOT.format, range(count)):
                trims.append(f"\t{slot}\t" not in rest)
                before, rest = rest.split(slot if trims[-1] else f"\t{slot}\t")
                pieces.append(before)
            self.frames[count] = [*pieces, rest], trims
        return self.frames[count]

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
                whole = self.encode(piece)
                ids += [i for character in piece for i in self.encode(character)] if self.control(whole) else whole  # after a normalizer
        return ids

    def prompt(self, *turns):
        """Token ids of a chat that asks for an answer: the template's own, unless a text would bring control tokens with it.

        turns: texts, the user's and the assistant's in turn, the user's first and last. Raises ValueError for any others.
        """
        if len(turns) % 2 == 0 or not all(isinstance(text, str) for text in turns):
            raise ValueError("a chat must be texts, the user's first and last")
        (first, *others), trims = self.frame(len(turns))
        texts = [printable(text.strip() if trim else text) for text, trim in zip(turns, trims)]
        whole = self.encode(first + "".join(text + piece for text, piece in zip(texts, others)))
        first, *others = map(self.encode, [first, *others])
        if self.control(whole) == self.control(first + sum(others, [])):
            return whole
        return first + [i for text, piece in zip(texts, others) for i in self.text(text) + piece]

    def answer(self, text):
        """Token ids of an assistant's finished answer, the end token included."""
        return self.text(text) + [self.end]


def printable(text):
    """Text with a question mark in the place of each half of a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def visible(text):
    """Text for a terminal: what would steer it is shown as its code."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)


# ---- keys and values, shared and own

@dataclass
class Prefill:
    """Prompts' tokens that are being computed: T tokens for each of some prefixes or rows."""
    kind: str               # "prefix" or "suffix": what they become
    slots: torch.Tensor     # where they are to stand
    after: list             # slots of the prefixes that they come after
    mask: torch.Tensor      # (number of them, 1, T, P + T), what they see of those prefixes and of each other; None: no prefix, and causal


class SharedPrefixCache:
    """Keys and values of up to G shared prefixes and of up to B rows' own suffixes, in buffers that are made once.

    `cells` (G, R) lists the rows of each prefix, so that all its queries meet it in one matrix product, and `place` says where in there a
    row's result stands: if prefix 0 is that of rows 2 and 5, and prefix 1 that of row 0, cells is [[2, 5], [0, 0]] and place[5] is 1.
    """

    def __init__(self, groups, rows, prefix_size, suffix_size, device):
        def numbers(size):
            return torch.zeros(size, dtype=torch.long, device=device)

        self.prefix, self.suffix = {}, {}       # layer -> (keys, values): (G, Hkv, P, D) and (B, Hkv, S, D)
        self.prefix_size, self.suffix_size = (groups, prefix_size), (rows, suffix_size)
        self.prefix_length = numbers(groups + 1)                    # (G + 1,), the last is 0: of rows without a prefix
        self.token, self.length = numbers(rows), numbers(rows)      # (B,) the latest token, and the tokens before it in the suffix
        self.group, self.place = numbers(rows), numbers(rows)       # (B,)
        self.cells = numbers(groups * rows)                         # (G * R,)
        self.shape = (0, 0, 0, 0, 0)            # B, S, G, R, P of what is in use
        self.prefill = None                     # a Prefill; None: a step of all rows

    def buffers(self, kind, layer, key, value):
        """A layer's prefixes or suffixes, made at first use."""
        whole, (count, size) = getattr(self, kind), getattr(self, kind + "_size")
        if layer not in whole:
            whole[layer] = tuple(x.new_zeros(count, x.shape[1], size, x.shape[3]) for x in (key, value))
        return whole[layer]

    def move(self, kind, source, target, length):
        """Copy the first `length` tokens of one slot to another."""
        for whole in itertools.chain(*getattr(self, kind).values()):
            whole[target, :, :length] = whole[source, :, :length]

    def prepare(self):
        """What all layers need to know of this step: which positions of its suffix a row sees, which of its prefix, and whether it has one."""
        B, S, G, R, P = self.shape
        self.rows = torch.arange(B, device=self.length.device)
        self.own_bias = bias(torch.arange(S, device=self.length.device) <= self.length[:B, None])[:, None, None]  # (B, 1, 1, S)
        if P:
            seen = torch.arange(P, device=self.length.device) < self.prefix_length[:G, None]
            self.common_bias = bias(seen)[:, None, None]                                              # (G, 1, 1, P)
            self.prefix_bias = bias(self.group[:B] < self.prefix_size[0])[:, None, None, None]        # (B, 1, 1, 1)


def bias(seen):
    """What is added to scores of attention: 0 where something is seen, and elsewhere so little that the softmax is 0."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -1e30)


def attend_part(query, key, value, bias, scaling):
    """Attention over one part of the context: its output and the log of its softmax's denominator, which joins it to other parts."""
    scores = torch.add(bias, query @ key.transpose(-1, -2), alpha=scaling)
    shares = scores.softmax(-1)
    total = scores.amax(-1, keepdim=True) - shares.amax(-1, keepdim=True).log()  # cheaper than logsumexp, and the same
    return shares.to(value.dtype) @ value, total


def attend_prompts(query, key, value, prefill, shared, layer, scaling):
    """Store the keys and values of prompts' tokens, and attend to the prefixes they come after, if any, and to each other."""
    H, T, Hkv = query.shape[1], query.shape[2], key.shape[1]
    for whole, part in zip(shared.buffers(prefill.kind, layer, key, value), (key, value)):
        whole[prefill.slots, :, :T] = part
    if prefill.mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=H != Hkv)
    P = prefill.mask.shape[-1] - T
    key, value = (torch.cat([whole[prefill.after, :, :P], part], 2).repeat_interleave(H // Hkv, 1)  # fast kernels take a mask or H != Hkv
                  for whole, part in zip(shared.prefix[layer], (key, value)))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=prefill.mask, scale=scaling)


def attend_step(query, key, value, shared, layer, scaling):
    """Store each row's latest token, and attend to the row's suffix and to its prefix."""
    (B, S, G, R, P), H, Hkv = shared.shape, query.shape[1], key.shape[1]
    suffix = shared.buffers("suffix", layer, key, value)
    for whole, part in zip(suffix, (key, value)):
        whole[shared.rows, :, shared.length[:B]] = part[:, :, 0]
    query = query.view(B, Hkv, H // Hkv, -1)  # the heads that share keys and values, side by side
    keys, values = (whole[:B, :, :S] for whole in suffix)
    if P == 0:
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=shared.own_bias.to(query.dtype), scale=scaling)
    else:
        out, own_total = attend_part(query, keys, values, shared.own_bias, scaling)
        keys, values = (whole[:G, :, :P] for whole in shared.prefix[layer])
        cells = query[shared.cells[: G * R]].view(G, R, *query.shape[1:]).transpose(1, 2).flatten(2, 3)  # (G, Hkv, R * H / Hkv, D)
        common, common_total = (x.view(G, Hkv, R, H // Hkv, -1).transpose(1, 2).flatten(0, 1)[shared.place[:B]]
                                for x in attend_part(cells, keys, values, shared.common_bias, scaling))
        share = (own_total - common_total - shared.prefix_bias).sigmoid()  # of one softmax over both parts, what falls to the own one
        out = common.lerp(out, share.to(out.dtype))
    return out.reshape(B, H, 1, -1)


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, *, shared=None, **kwargs):
    """transformers' attention interface: query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D)."""
    for option in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise ValueError(f"{module.config.model_type} attends with {option}, which this sampler does not do: choose another model")
    if shared is None:
        raise ValueError(f"{module.config.model_type} does not hand the sampler's cache on to its layers: choose another model")
    if shared.prefill:
        out = attend_prompts(query, key, value, shared.prefill, shared, module.layer_idx, scaling)
    else:
        out = attend_step(query, key, value, shared, module.layer_idx, scaling)
    return out.transpose(1, 2), None


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
            raise ValueError(f"{base.config.model_type} attends in a way that this sampler does not do: choose another model")
        yield
    finally:
        base.set_attn_implementation(before)


@contextmanager
def merged(model):
    """Add the LoRA adapter to 32-bit weights while sampling, and put the very same weights back: two small products less per layer.

    In 16 and 4 bits it stays beside the weights: a change below their last bit would be rounded away, and the model that samples would not
    be the one that is trained.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and not module.merged and not any(module.lora_bias.values())
              and type(module.get_base_layer()) is torch.nn.Linear and module.get_base_layer().weight.dtype == torch.float32
              and module.get_base_layer().weight is not model.get_input_embeddings().weight]
    kept = [layer.get_base_layer().weight.clone() for layer in layers]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer, weight in zip(layers, kept):
            layer.get_base_layer().weight.copy_(weight)
            layer.merged_adapters.clear()


# ---- drawing

def uniforms(seed, key, number, count):
    """`count` uniform numbers in [0, 1) that depend on (seed, key, number) alone, on every machine the same."""
    digest = hashlib.blake2b(json.dumps([seed, key, number]).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count, dtype=np.float32)


def nucleus_edge(top, top_p):
    """The least probability in the nucleus, (B, 1): a token is in as long as those before it fall short of top_p. top (B, N), descending."""
    return top.masked_fill(top.cumsum(-1) - top >= top_p, 1).amin(-1, keepdim=True)


def inverse_cdf(mass, uniform):
    """Where the uniform number falls, (B,), among shares of the mass (B, N) in the order in which they stand."""
    mass = mass.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return (mass <= target).sum(-1)


def draw(logits, uniform, temperature, top_p):
    """One token per row. logits (B, V), uniform (B,) -> (B,). Nucleus: the fewest tokens whose probability reaches top_p.

    Tokens as likely as the last of these are in as well: which of them a sort puts first is chance. The nucleus mostly lies in the likeliest
    64 tokens, which spares sorting the vocabulary; only rows where it may not are sorted. Its tokens are then taken in the order of their
    ids, since an order of nearly equal probabilities would hang on rounding.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    top, ids = probs.topk(min(64, probs.shape[-1]))
    edge = nucleus_edge(top, top_p)
    ids, by_id = ids.sort(dim=-1)
    token = ids.gather(-1, inverse_cdf((top * (top >= edge)).gather(-1, by_id), uniform)[:, None])[:, 0]
    wide = (top[:, -1:] >= edge)[:, 0].nonzero()[:, 0]  # waits for the GPU, as the look at what ended does in any case
    if len(wide) and top.shape[-1] < probs.shape[-1]:
        probs = probs[wide]
        ordered = probs.sort(dim=-1, descending=True).values if probs.is_cuda else torch.from_numpy(np.sort(probs.numpy())).flip(-1)
        token[wide] = inverse_cdf(probs * (probs >= nucleus_edge(ordered, top_p)), uniform[wide])
    return token


# ---- rows and their slots

@dataclass(eq=False)
class Group:
    """Rows whose prompts begin alike."""
    prefix: list        # token ids; empty: a row by itself
    slot: int = None    # where in the cache the prefix stands; None: nowhere


@dataclass(eq=False)
class Row:
    """A sample under way."""
    prompt: int         # index of the prompt
    number: int         # of the sample, 0 to n - 1
    group: Group
    own: list           # the prompt's token ids after the prefix
    uniform: np.ndarray  # one number per token
    drawn: list = dataclasses.field(default_factory=list)

    @property
    def token(self):
        """The latest token: the next to be fed."""
        return self.drawn[-1] if self.drawn else self.own[-1]

    @property
    def length(self):
        """Tokens of the suffix that are in the cache."""
        return len(self.own) - 1 + len(self.drawn)


def shared_groups(prompts, n):
    """Split consecutive prompts (token ids) into groups with a common beginning, wherever that is at least half of each and leaves
    fewer tokens to store: a short beginning is not worth the slower way in which a row's own tokens are computed.

    Returns a list of (indices, length of the shared beginning). The last token of a prompt is never shared: it is what a row starts from.
    A prompt that is sampled once and shares nothing has no prefix.
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
    return [(members, 0 if n == len(members) == 1 else shared) for members, shared in groups]


ROWS = {"cpu": 256, "cuda": 512}  # samples under way at once: beyond this a step's time grows with them
PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}  # prompt tokens computed at once, padding included
EMPTY = 1 / 16                    # share of slots that may stand empty before others move in: each time costs a pass over the weights


def make_rows(prompts, n, numbers):
    """The rows of n samples of each prompt, group by group, longest prompts first. numbers[i][k]: the uniform numbers of sample k of prompt i."""
    groups = []
    for members, shared in shared_groups(prompts, n):
        group = Group(prompts[members[0]][:shared])
        rows = [Row(i, k, group, prompts[i][shared:], numbers[i][k]) for i in members for k in range(n)]
        groups.append(sorted(rows, key=lambda row: -len(row.own)))
    return [row for rows in sorted(groups, key=lambda rows: -prompt_length(rows[0])) for row in rows]


def cache_capacity(model):
    """How many tokens' keys and values fit: in three quarters of what PyTorch does not use on CUDA, in 1 GiB elsewhere."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * width * model.dtype.itemsize
    if model.device.type != "cuda":
        return 2**30 // size
    torch.cuda.empty_cache()  # what PyTorch keeps for later counts as taken
    return torch.cuda.mem_get_info(model.device)[0] * 3 // 4 // size


def slot_counts(rows, max_new_tokens, capacity, most):
    """How many (rows, prefixes) fit into a cache of `capacity` tokens; at least one row.

    Were all samples of one length, rows / groups of them would share each prefix at any time. There is room for twice as many prefixes, since
    the last samples of a group may take long while their neighbours' slots are given to other groups.
    """
    groups = len({row.group for row in rows if row.group.prefix})
    prefix, suffix = cache_sizes(rows, max_new_tokens)
    per_row = min(1, 2 * groups / len(rows))
    count = max(1, min(len(rows), most, int((capacity - prefix) / (suffix + prefix * per_row))))
    return count, min(groups, count, 1 + int(count * per_row))


def cache_sizes(rows, max_new_tokens):
    """The longest (prefix, suffix) of these rows, in tokens."""
    return max(len(row.group.prefix) for row in rows), max(len(row.own) for row in rows) + max_new_tokens


def first_wave(rows, max_new_tokens, capacity, most):
    """Of rows, longest prompts first, those that share a cache: up to the group whose prompts are half as long as the longest, if the rows
    before it fill the slots, so that a few long prompts do not make the slots of all others large."""
    for count in range(1, len(rows)):
        if rows[count].group is not rows[count - 1].group and 2 * prompt_length(rows[count]) < prompt_length(rows[0]):
            return rows[:count] if count >= slot_counts(rows[:count], max_new_tokens, capacity, most)[0] else rows[: count + most]
    return rows


def prompt_length(row):
    return len(row.group.prefix) + len(row.own)


class Slots:
    """The rows under way and their cache. rows[b] is the Row in slot b, groups[g] the Group whose prefix is in slot g; None: empty."""

    def __init__(self, model, rows, max_new_tokens, capacity):
        self.model, self.device = model, model.device
        self.most_rows, self.most_groups = slot_counts(rows, max_new_tokens, capacity, ROWS[self.device.type])
        self.cache = SharedPrefixCache(self.most_groups, self.most_rows, *cache_sizes(rows, max_new_tokens), self.device)
        self.waiting, self.rows, self.groups = deque(rows), [], []
        for row in rows:
            row.group.slot = None if row.group.prefix else self.most_groups  # where prefix_length is 0
        self.graphs, self.out, self.pool = {}, None, None

    def fill(self):
        """Let waiting rows into empty slots and compute their prompts; slots that stay empty are taken by the last rows. False: no rows left."""
        rows, groups = self.rows, self.groups
        if self.waiting:
            rows += [None] * (self.most_rows - len(rows))
        empty = [b for b, row in enumerate(rows) if row is None]
        if len(empty) < max(1, EMPTY * len(rows)):
            return True
        needed = {row.group for row in [*rows, *itertools.islice(self.waiting, 1)] if row}  # a group's rows wait in one piece
        groups[:] = [group if group in needed else None for group in groups]
        new_rows, new_groups = [], []
        while empty and self.waiting:
            row, group = self.waiting[0], self.waiting[0].group
            if group.slot is None:
                if None not in groups and len(groups) == self.most_groups:
                    break  # until a group has ended
                if None not in groups:
                    groups.append(None)
                group.slot = groups.index(None)
                groups[group.slot] = group
                new_groups.append(group)
            rows[empty[0]] = row
            new_rows.append((empty.pop(0), self.waiting.popleft()))
        for b, source in close_gaps(rows):  # all behind the new ones
            self.cache.move("suffix", source, b, rows[b].length)
        for g, source in close_gaps(groups):
            self.cache.move("prefix", source, g, len(groups[g].prefix))
            groups[g].slot = g
        self.prefill("prefix", [(group.slot, group.prefix, None) for group in new_groups])
        self.prefill("suffix", [(b, row.own[:-1], row.group) for b, row in new_rows if len(row.own) > 1])
        self.arrange()
        return bool(rows)

    def prefill(self, kind, parts):
        """Compute and store the keys and values of prompts' tokens. parts: (slot, token ids, the group they come after or None)."""
        parts, most = sorted(parts, key=lambda part: -len(part[1])), PREFILL_TOKENS[self.device.type]
        while parts:
            T = len(parts[0][1])
            P = max(len(group.prefix) if group else 0 for *_, group in parts)
            count = max(1, min(most // T, 4 * most // (P + T)))  # each has a copy of its prefix for a while
            slots, ids, groups = zip(*parts[:count])
            parts = parts[count:]
            lengths, before = (torch.tensor(x, device=self.device)[:, None] for x in
                               ([len(row) for row in ids], [len(group.prefix) if group else 0 for group in groups]))
            ids = torch.tensor([list(row) + [0] * (T - len(row)) for row in ids], device=self.device)
            mask, here = None, torch.arange(T, device=self.device)
            if P:
                common = torch.arange(P, device=self.device) < before                                # (count, P)
                mask = torch.cat([common[:, None].expand(-1, T, -1), (here <= here[:, None]).expand(len(ids), -1, -1)], -1)[:, None]
            after = [group.slot if group and group.prefix else 0 for group in groups]
            self.cache.prefill = Prefill(kind, torch.tensor(slots, device=self.device), after, mask)
            self.model(input_ids=ids, position_ids=before + here.minimum(lengths - 1), use_cache=False, logits_to_keep=1, shared=self.cache)
            self.cache.prefill = None

    def arrange(self):
        """Tell the cache which prefix each row follows."""
        cache, members = self.cache, [[] for _ in self.groups]
        for b, row in enumerate(self.rows):
            if row.group.prefix:
                members[row.group.slot].append(b)
        self.R = self.rounded(max(map(len, members), default=0), self.most_rows)
        place = [0] * len(self.rows)
        for g, bs in enumerate(members):
            for nth, b in enumerate(bs):
                place[b] = g * self.R + nth
        put(cache.group, [row.group.slot for row in self.rows])
        put(cache.place, place)
        put(cache.cells, [b for bs in members for b in bs + [0] * (self.R - len(bs))])
        put(cache.prefix_length, [len(group.prefix) if group else 0 for group in self.groups])

    def rounded(self, size, most, steps=1):
        """On CUDA up to the next power of two, or of `steps` sizes between two of them, so that few graphs are captured."""
        grain = 1 if self.device.type == "cpu" or size < 2 else max(1, (1 << (size - 1).bit_length()) // (2 * steps))
        return min(most, -(-size // grain) * grain)

    def logits(self):
        """Logits (B, V) after the latest token of each row, which goes into the cache."""
        cache, (G, P), (B, S) = self.cache, self.cache.prefix_size, self.cache.suffix_size
        put(cache.token, [row.token if row else 0 for row in self.rows])
        put(cache.length, [row.length if row else 0 for row in self.rows])
        longest = max((len(group.prefix) for group in self.groups if group), default=0), 1 + max(row.length for row in self.rows if row)
        cache.shape = (self.rounded(len(self.rows), B), self.rounded(longest[1], S, steps=4), self.rounded(len(self.groups), G), self.R,
                       self.rounded(longest[0], P))
        eager = self.device.type == "cpu" or self.model in uncapturable
        return (self.forward() if eager else self.replay())[: len(self.rows)]

    def forward(self):
        cache, B = self.cache, self.cache.shape[0]
        cache.prepare()
        positions = cache.prefix_length[cache.group[:B]] + cache.length[:B]
        return self.model(input_ids=cache.token[:B, None], position_ids=positions[:, None], use_cache=False, shared=cache).logits[:, -1]

    def replay(self):
        """`forward` by a CUDA graph, one for each shape, so that the GPU need not wait for Python to name a thousand kernels."""
        shape = self.cache.shape
        if shape not in self.graphs:
            logits = self.forward()  # libraries set themselves up, which they may not during a capture
            if self.out is None:
                self.out, self.pool = logits.new_empty(self.cache.suffix_size[0], logits.shape[-1]), torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self.pool):  # the first puts the stream back
                    self.out[: len(logits)] = self.forward()  # one buffer for all graphs
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                print(f"this model samples without CUDA graphs, which is slower: {str(error).splitlines()[0]}", file=sys.stderr)
                uncapturable.add(self.model)
                return self.forward()
            self.graphs[shape] = graph
        self.graphs[shape].replay()
        return self.out[: shape[0]]


uncapturable = weakref.WeakSet()  # models whose step no CUDA graph can hold


def out_of_memory(error):
    """Whether this is CUDA's want of memory, which libraries report in their own ways."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in ("out of memory", "ALLOC_FAILED"))


def put(buffer, values):
    buffer[: len(values)] = torch.tensor(values, device=buffer.device)
    buffer[len(values):] = 0  # slots that are not in use point at something that is there


def close_gaps(items):
    """Move the last items into the gaps (None) before them: returns the moves, (to, from)."""
    moves = []
    for gap in range(len(items)):
        while items and items[-1] is None:
            items.pop()
        if gap >= len(items):
            break
        if items[gap] is None:
            moves.append((gap, len(items) - 1))
            items[gap] = items.pop()
    return moves


def decode(model, rows, stops, max_new_tokens, temperature, top_p, capacity):
    """Draw until every row has ended, and yield each as it does."""
    slots = Slots(model, rows, max_new_tokens, capacity)
    while slots.fill():
        uniform = torch.tensor([row.uniform[len(row.drawn)] if row else 0 for row in slots.rows], device=model.device)
        drawn = draw(slots.logits(), uniform, temperature, top_p).tolist()
        for b, (row, token) in enumerate(zip(slots.rows, drawn)):
            if row:
                row.drawn.append(token)
                if token in stops or len(row.drawn) == max_new_tokens:
                    slots.rows[b] = None
                    yield row


class PromptTooLong(ValueError):
    """Prompts that leave no room for their answers in the model's context; `places` are their indices."""

    def __init__(self, message, places):
        super().__init__(message)
        self.places = places


def stop_tokens(model, tokenizer):
    """The set of token ids that end a chat model's answer: by its configuration, its tokenizer and its chat template."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in [*configured, tokenizer.eos_token_id, Chat(tokenizer).end] if token is not None}


@torch.no_grad()
def sample_tokens(model, prompts, n=1, *, stops, max_new_tokens, temperature=0.8, top_p=0.95, seed=0, keys=None, capacity=None, on_end=None,
                  skip_too_long=False):
    """n continuations of each prompt, token ids to token ids; `sample` does the same for texts and explains the rest.

    prompts: lists of token ids, as `Chat(tokenizer).prompt(text)` gives them. stops: a set of ids that end a sample, and belong to it, as
    `stop_tokens` gives it. on_end(i, number, ids): called as each sample ends. Returns for each prompt n lists of token ids.
    """
    if not all(isinstance(ids, (list, tuple)) and ids and all(isinstance(token, int) for token in ids) for ids in prompts):
        raise ValueError("prompts must be lists of token ids, none of them empty")
    keys = list(range(len(prompts))) if keys is None else keys
    if n < 1 or max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1 or len(keys) != len(prompts):
        raise ValueError("sample needs n >= 1, max_new_tokens >= 1, temperature >= 0, top_p in (0, 1] and one of keys per prompt")
    context = getattr(model.config, "max_position_embeddings", None)
    too_long = [i for i, ids in enumerate(prompts) if context and len(ids) + max_new_tokens > context]
    if too_long and not skip_too_long:
        longest = max(len(prompts[i]) for i in too_long)
        raise PromptTooLong(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {context}: "
                            "shorten the prompts or the answers", too_long)
    samples = [[None] * n for _ in prompts]
    for i, number in itertools.product(too_long, range(n)):
        samples[i][number] = []
        if on_end:
            on_end(i, number, [])
    rows = make_rows(prompts, n, [[uniforms(seed, key, number, max_new_tokens) for number in range(n)] for key in keys])
    rows = [row for row in rows if samples[row.prompt][row.number] is None]
    with shared_prefix(model), merged(model):
        capacity = capacity or cache_capacity(model)
        while rows:
            wave = first_wave(rows, max_new_tokens, capacity, ROWS[model.device.type])
            try:
                for row in decode(model, wave, stops, max_new_tokens, temperature, top_p, capacity):
                    samples[row.prompt][row.number] = row.drawn
                    if on_end:
                        on_end(row.prompt, row.number, row.drawn)
            except RuntimeError as error:
                if not out_of_memory(error) or capacity < sum(cache_sizes(wave, max_new_tokens)):
                    raise  # in the second case there is no room for one row at a time
                capacity //= 2
                print(f"out of memory: sampling goes on with a cache half as large, {capacity} tokens", file=sys.stderr)
            rows = [row for row in rows if samples[row.prompt][row.number] is None]
            for row in rows:
                row.drawn = []
    return samples


def sample(model, tokenizer, prompts, n=1, *, max_new_tokens, temperature=0.8, top_p=0.95, seed=0, keys=None, capacity=None, on_end=None,
           skip_too_long=False):
    """n answers to each prompt.

    prompts: user texts, or lists of texts, the user's and the assistant's in turn; the chat template is applied here.
    temperature 0 is greedy. seed: anything JSON can hold. keys: one per prompt (default: its index); the uniform numbers behind a draw
    depend on (seed, key, number of the sample) and on nothing else, the draw itself on the rounding of logits as well.
    capacity: how many tokens' keys and values the cache may hold (default: see `cache_capacity`); halved when CUDA runs out of memory.
    on_end(i, number, sample): called as each sample ends, in no particular order.
    skip_too_long: samples of a prompt that leaves no room for them in the context have no tokens, cut off at once; the others are drawn.
    Returns for each prompt a list of n Samples. Raises PromptTooLong, unless such are skipped, and ValueError for settings out of range.
    """
    chat, stops = Chat(tokenizer), stop_tokens(model, tokenizer)
    samples = [[None] * n for _ in prompts]
    turns = [[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]

    def finish(i, number, ids):
        samples[i][number] = Sample(tokenizer.decode(ids, skip_special_tokens=True), ids, bool(ids) and ids[-1] in stops)
        if on_end:
            on_end(i, number, samples[i][number])

    sample_tokens(model, [chat.prompt(*texts) for texts in turns], n, stops=stops, max_new_tokens=max_new_tokens, temperature=temperature,
                  top_p=top_p, seed=seed, keys=keys, capacity=capacity, on_end=finish, skip_too_long=skip_too_long)
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
        print(visible(answer.text) + ("" if answer.finished else f" [cut off after {len(answer.tokens)} tokens]"))


if __name__ == "__main__":
    main()
