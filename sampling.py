"""Batched, KV-cached sampling from any Hugging Face decoder-only model, and safe chats.

The n samples of a prompt share its keys and values, which are computed and stored once; so is the
common beginning of prompts that follow each other, as those of all comparisons of one answer do.
Each sample owns only its suffix. Attention runs over both parts separately and joins them exactly
(the idea of Hydragen, Juravsky et al. 2024, arXiv 2402.05099).

    B rows, one per sample under way     S tokens of the longest suffix     H heads of queries
    G prefixes that rows share           P tokens of the longest prefix     Hkv heads of keys
    R rows at most of one prefix         T tokens of a prompt's part        h = H / Hkv
    X rows or prefixes, Q queries, K keys of any number; V vocabulary       D a head's width

Models with layers that this does not fit, as recurrent ones, are sampled through their own caches
(`decode_plain`), which is slower and draws the same.

A draw is a function of (seed, key of the prompt, number of the sample, step): one uniform number
through the inverse of the distribution function. Left out: beam search, stop strings, encoders.
"""
if __name__ == "__main__":  # python sampling.py MODEL "question"
    import harness.early
    from harness.flags import conversation_arguments

    harness.early.begin(conversation_arguments)  # before the imports, which take seconds
    from harness.conversation import main

    raise SystemExit(main())
# isort: split
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import sys
import weakref
from collections import Counter, deque, namedtuple
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a package nobody needs
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from transformers import AttentionInterface

# cuDNN plans each shape of attention anew, and shapes hardly ever repeat here.
torch.backends.cuda.enable_cudnn_sdp(False)
ROWS = {"cpu": 256, "cuda": 512}  # samples under way: with more of them a step only takes longer
PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}  # prompt tokens computed at once, with padding
EMPTY = 1 / 16  # share of slots that may stand empty: filling them costs a forward pass


@dataclass(frozen=True)
class Sample:
    text: str       # what was written, without its stop token and other control tokens
    tokens: list    # the ids drawn, the end token included
    finished: bool  # ended by itself; False: cut off after max_new_tokens


# ---- text to tokens

class Chat:
    """A tokenizer's chat template around texts that are data: no text can make a control token.

    Templates that can leave thinking out are asked to, and those that tell the date tell the same
    one every day. Raises ValueError for a tokenizer without a template, and for a template that
    does not take plain texts, has no token that ends an answer, or lets the model think or choose
    a channel before every answer: what is judged here is the answer. Where a template's marks are
    plain text and no tokens, a text can spell them.
    """

    SLOT = "Zq{}SLOTqZ"  # stands where a text will
    DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
    NO_THOUGHT = re.compile(r"<think>\s*</think>\s*")  # how templates say that there is none

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: choose an instruction-tuned "
                             "model")
        self.tokenizer = tokenizer
        # Gemma adds line breaks, which control nothing.
        self.added = {text: i for text, i in tokenizer.get_added_vocab().items()
                      if i != tokenizer.unk_token_id and len(text.strip()) > 1}
        self.added_ids = set(self.added.values())
        longest_first = sorted(self.added, key=len, reverse=True)
        self.pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.frames, self.encode_once = {}, functools.cache(self.encode)  # the template's pieces
        (_, self.asked), _ = self.frame(1)
        (*before, after), (_, self.trims) = self.frame(2)
        self.check_thinking(before[1])
        # An answer stands between these; Mistral's template puts a space before it, for example.
        self.lead = before[1][len(self.asked):] if before[1].startswith(self.asked) else ""
        self.end = next(iter(self.control(self.encode(after))), tokenizer.eos_token_id)
        if self.end is None:
            raise ValueError("the chat template ends answers with no token, and the tokenizer has "
                             "no eos_token: choose another model")
        mark = tokenizer.convert_ids_to_tokens(self.end)
        self.tail = after.partition(mark)[0] if mark in after else ""  # Llama-2's is a space
        self.mark = mark * (mark in after)
        frame = self.encode(self.NO_THOUGHT.sub("", "".join([*before, after, self.asked])))
        self.marks = {self.end, *self.control(frame), *tokenizer.all_special_ids}

    def check_thinking(self, before):
        """Raise ValueError unless what the template puts before an answer asks for one at once.

        before: what stands before an answer that is there.
        """
        if "<think>" in self.asked.rpartition("</think>")[2]:
            raise ValueError("the chat template lets the model think aloud before every answer: "
                             "choose a model that answers at once")
        asked, without_thought, there = (self.control(self.encode(text)) for text in (
            self.asked, self.NO_THOUGHT.sub("", self.asked), before))
        if there not in (asked, without_thought):
            marks = self.tokenizer.decode([i for i in there if i not in asked] or asked)
            raise ValueError("the chat template puts other control tokens before an answer that "
                             f"is there than before one that is asked for ({marks}), so the model "
                             "thinks, or chooses a channel, before it answers: choose a model that "
                             "answers at once")

    def render(self, count):
        """The template around `count` turns, with a slot in the place of each text.

        It asks for an answer if the last turn is the user's.
        """
        turns = [{"role": ("user", "assistant")[i % 2], "content": f"\t{self.SLOT.format(i)}\t"}
                 for i in range(count)]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self.DAY + self.tokenizer.get_chat_template(), tokenize=False,
                add_generation_prompt=count % 2 == 1, enable_thinking=False)
        except Exception as error:  # a template is a program, which may fail in any way
            raise ValueError("the chat template takes no plain chat of user and assistant "
                             f"({error}): choose another model") from None
        if any(text.count(turn["content"].strip()) != 1 for turn in turns):
            raise ValueError("the chat template does not put each text of a chat in one place: "
                             "choose another model")
        return text

    def frame(self, count):
        """What the template puts before, between and after `count` turns: count + 1 texts.

        And for each turn whether the template strips its text, as Llama-3's does.
        """
        if count not in self.frames:
            rest, pieces, trims = self.render(count), [], []
            for slot in map(self.SLOT.format, range(count)):
                trims.append(f"\t{slot}\t" not in rest)
                before, rest = re.split(f"\t?{slot}\t?", rest)  # some strip one side only
                pieces.append(before)
            self.frames[count] = [*pieces, rest], trims
        return self.frames[count]

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def control(self, ids):
        """The control tokens among ids."""
        return [i for i in ids if i in self.added_ids]

    def encode_behind(self, before, text):
        """Token ids of a text where another one stands before it.

        SentencePiece would begin a text that stands alone with a space. Where both together are
        cut into other tokens than they are one by one, a line break stands in for the text before.
        """
        for start in (before, "\n"):
            known, whole = self.encode_once(start), self.encode(start + text)
            if whole[:len(known)] == known:
                return whole[len(known):]
        return self.encode(text)

    def cut(self, text):
        """A text in parts, so that each control token that it spells is cut in two."""
        parts = []
        while self.added and (token := self.pattern.search(text)):
            parts.append(text[:token.start() + 1])
            text = text[token.start() + 1:]
        return [*parts, text]

    def encode_parts(self, before, parts):
        """Token ids of the parts of a text that stands behind another one."""
        places = itertools.chain([before], itertools.repeat("\n"))
        return [i for place, part in zip(places, parts) for i in self.encode_behind(place, part)]

    def text(self, text, before="\n"):
        """Token ids of a text as data: control tokens in it are characters."""
        text = printable(text)
        ids = self.encode_parts(before, self.cut(text))
        # The tokenizer's normalizer may have made one of other characters.
        return self.encode_parts("\n", [*text]) if self.control(ids) else ids

    def chat(self, *turns):
        """Token ids of a chat, which asks for an answer if the user speaks last.

        turns: texts, the user's and the assistant's in turn. The ids are the template's own, but
        where a text spells a control token.
        """
        (first, *others), trims = self.frame(len(turns))
        texts = [printable(text.strip() if trim else text) for text, trim in zip(turns, trims)]
        parts = [first]
        for text, piece in zip(texts, others):
            begin, *rest = self.cut(text)
            parts = [*parts[:-1], parts[-1] + begin, *rest]
            parts[-1] += piece
        whole = self.encode(parts[0]) + self.encode_parts("\n", parts[1:])
        frame = sum(map(self.encode_once, others), self.encode_once(first))
        if self.control(whole) == self.control(frame):
            return whole
        ids = self.encode_once(first)  # a text and its neighbours, or the normalizer, have made one
        for before, text, piece in zip([first, *others], texts, others):
            ids = ids + self.text(text, before) + self.encode_behind("\n", piece)
        return ids

    def prompt(self, *turns):
        """Token ids of a chat that asks for an answer; the first and the last turn are the user's.

        Raises ValueError for any other turns.
        """
        if len(turns) % 2 == 0 or not all(isinstance(text, str) for text in turns):
            raise ValueError("a chat must be texts, the user's first and last")
        return self.chat(*turns)

    def answer(self, text):
        """Token ids of an assistant's finished answer, the end token included.

        They are what the template puts behind the prompt. What a model drew may be cut otherwise,
        even if it is the same text: train on the ids that were drawn (`Sample.tokens`).
        """
        text = self.lead + printable(text.strip() if self.trims else text) + self.tail
        *parts, last = self.cut(text)
        ids = self.encode_parts(self.asked, [*parts, last + self.mark])
        if self.control(ids) == [self.end] == ids[-1:]:
            return ids
        return self.text(text, self.asked) + [self.end]

    def written(self, ids):
        """The text of an answer's ids, without what the template puts there and control tokens."""
        text = self.tokenizer.decode([i for i in ids if i not in self.marks],
                                     clean_up_tokenization_spaces=False)
        return text.removeprefix(self.lead).removesuffix(self.tail)


def printable(text):
    """Text with a question mark for each half of a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


# ---- keys and values, shared and own

@dataclass
class Prefill:
    """Prompts' tokens that are being computed, T for each of X prefixes or rows."""
    kind: str             # "prefix" or "suffix": what they become
    slots: torch.Tensor   # (X,) where they are to stand
    after: list           # slots of the prefixes that they come after
    before: torch.Tensor  # (X, 1) these prefixes' lengths
    P: int                # the longest of them
    masks: dict = dataclasses.field(default_factory=dict)  # window -> what `mask` returns

    def mask(self, T, window):
        """What each token sees, (X, 1, T, P + T); None: all before it, and there is no prefix."""
        if not self.P and (window is None or T <= window):
            return None
        if window not in self.masks:
            here = torch.arange(T, device=self.before.device)
            there = torch.arange(self.P, device=self.before.device)
            distance = self.before[..., None] + here[:, None] - there      # (X, T, P)
            prefix = (there < self.before[..., None]) & near(distance, window)
            distance = here[:, None] - here                                # (T, T)
            own = ((distance >= 0) & near(distance, window)).expand(len(prefix), -1, -1)
            self.masks[window] = torch.cat([prefix, own], -1)[:, None]
        return self.masks[window]


Shape = namedtuple("Shape", "B S G R P")  # how much of the cache a step uses


class SharedPrefixCache:
    """Keys and values of up to G shared prefixes and of up to B rows' own suffixes.

    All queries of a prefix meet it in one matrix product. So `rows_of_prefix` (G, R) lists the rows
    of each prefix, and `cell_of_row` says where in there a row's result stands. If prefix 0 is that
    of rows 2 and 5, and prefix 1 that of row 3, rows_of_prefix is [[2, 5], [3, 0]], where the 0
    fills an empty cell; cell_of_row[5] is 1 and cell_of_row[3] is 2.
    """

    def __init__(self, groups, rows, prefix_size, suffix_size, device):
        def numbers(size):
            return torch.zeros(size, dtype=torch.long, device=device)

        self.prefix = {}  # layer -> (keys, values), each (G, Hkv, P, D); made at first use
        self.suffix = {}  # layer -> (keys, values), each (B, Hkv, S, D)
        self.prefix_size, self.suffix_size = (groups, prefix_size), (rows, suffix_size)
        self.prefix_length = numbers(groups + 1)  # (G + 1,), the last is 0: no prefix
        self.token = numbers(rows)                # (B,) the latest token
        self.length = numbers(rows)               # (B,) tokens before it in the suffix
        self.group = numbers(rows)                # (B,) the row's prefix
        self.cell_of_row = numbers(rows)          # (B,)
        self.rows_of_prefix = numbers(groups * rows)  # (G * R,)
        self.shape = Shape(0, 0, 0, 0, 0)         # what is in use
        self.windows = {}                         # layer -> how far back it sees; None: all
        self.prefill = None                       # a Prefill; None: a step of all rows
        self.masks = {}                           # (window, h) -> what `biases` returns

    def buffers(self, kind, layer, key, value):
        """The keys and values of a layer's prefixes or suffixes."""
        whole, (count, size) = getattr(self, kind), getattr(self, kind + "_size")
        if layer not in whole:
            whole[layer] = tuple(x.new_zeros(count, x.shape[1], size, x.shape[3])
                                 for x in (key, value))
        return whole[layer]

    def move(self, kind, source, target, length):
        """Copy the first `length` tokens of one slot to another."""
        for whole in itertools.chain(*getattr(self, kind).values()):
            whole[target, :, :length] = whole[source, :, :length]

    def prepare(self):
        """What all layers need to know of this step: who sees what."""
        B, P, device = self.shape.B, self.shape.P, self.length.device
        self.rows, self.masks = torch.arange(B, device=device), {}
        self.position = self.prefix_length[self.group[:B]] + self.length[:B]         # (B,)
        if P:
            has_prefix = self.group[:B] < self.prefix_size[0]                        # (B,)
            self.prefix_bias = bias(has_prefix)[:, None, None, None]                 # (B, 1, 1, 1)

    def biases(self, window, h):
        """Biases of a step's own and common scores in layers that see `window` tokens back.

        None: all. (B, 1, 1, S) and (G, 1, 1 or R * h, P), None where no row has a prefix.
        """
        if (window, h) not in self.masks:
            B, S, G, R, P = self.shape
            steps = torch.arange(max(S, P), device=self.length.device)
            distance = self.length[:B, None] - steps[:S]                             # (B, S)
            own = bias((distance >= 0) & near(distance, window))[:, None, None]
            common = (steps[:P] < self.prefix_length[:G, None])[:, None]             # (G, 1, P)
            if window and P:  # how far the prefix is in sight depends on the row
                cells = self.position[self.rows_of_prefix[: G * R]].view(G, R, 1)
                common = (common & near(cells - steps[:P], window)).repeat_interleave(h, 1)
            self.masks[window, h] = own, bias(common)[:, None] if P else None
        return self.masks[window, h]

    def by_prefix(self, query):
        """Queries (B, Hkv, h, D) of rows, put side by side by their prefix."""
        G, R = self.shape.G, self.shape.R
        cells = query[self.rows_of_prefix[: G * R]]       # (G * R, Hkv, h, D)
        cells = cells.view(G, R, *query.shape[1:])        # (G, R, Hkv, h, D)
        return cells.transpose(1, 2).flatten(2, 3)        # (G, Hkv, R * h, D)

    def by_row(self, results, h):
        """What `by_prefix` queries gave, (G, Hkv, R * h, any), put back in the order of rows."""
        cells = results.unflatten(2, (self.shape.R, h))  # (G, Hkv, R, h, any)
        cells = cells.transpose(1, 2).flatten(0, 1)       # (G * R, Hkv, h, any)
        return cells[self.cell_of_row[: self.shape.B]]    # (B, Hkv, h, any)


def near(distance, window):
    """Whether a token so many places back is in sight. window None: all are."""
    return distance < (window or math.inf)


def bias(seen):
    """What is added to attention's scores: 0 where something is seen, elsewhere -1e30."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -1e30)


def attend_part(query, key, value, bias, scaling):
    """Attention over one part of the context.

    query (X, Hkv, Q, D), key and value (X, Hkv, K, D) -> its output (X, Hkv, Q, D) and the log of
    its softmax's denominator (X, Hkv, Q, 1), by which it is joined to other parts.
    """
    scores = torch.add(bias, query @ key.transpose(-1, -2), alpha=scaling)  # (X, Hkv, Q, K)
    shares = scores.softmax(-1)
    # The same as logsumexp, and cheaper: the largest share is exp(largest score - total).
    total = scores.amax(-1, keepdim=True) - shares.amax(-1, keepdim=True).log()
    return shares.to(value.dtype) @ value, total


def attend_prompts(query, key, value, shared, layer, scaling, window):
    """Store prompts' keys and values; attend to the prefixes they come after and to each other.

    query (X, H, T, D), key and value (X, Hkv, T, D) -> (X, H, T, D), X prefixes or rows.
    """
    prefill, h, T = shared.prefill, query.shape[1] // key.shape[1], query.shape[2]
    whole_k, whole_v = shared.buffers(prefill.kind, layer, key, value)
    whole_k[prefill.slots, :, :T] = key
    whole_v[prefill.slots, :, :T] = value
    mask, P = prefill.mask(T, window), prefill.P
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                              enable_gqa=h > 1)
    if P:
        prefix_k, prefix_v = shared.prefix[layer]
        key = torch.cat([prefix_k[prefill.after, :, :P], key], 2)  # (X, Hkv, P + T, D)
        value = torch.cat([prefix_v[prefill.after, :, :P], value], 2)
    # Fast kernels take either a mask or fewer heads of keys than of queries, not both.
    key, value = (x.repeat_interleave(h, 1) for x in (key, value))  # (X, H, P + T, D)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def attend_step(query, key, value, shared, layer, scaling, window):
    """Store each row's latest token, and attend to the row's suffix and to its prefix.

    query (B, H, 1, D), key and value (B, Hkv, 1, D) -> (B, H, 1, D).
    """
    B, S, G, R, P = shared.shape
    H, Hkv = query.shape[1], key.shape[1]
    h = H // Hkv  # heads of queries that share one of keys
    suffix_k, suffix_v = shared.buffers("suffix", layer, key, value)
    suffix_k[shared.rows, :, shared.length[:B]] = key[:, :, 0]
    suffix_v[shared.rows, :, shared.length[:B]] = value[:, :, 0]
    query = query.view(B, Hkv, h, -1)                             # (B, Hkv, h, D)
    keys, values = suffix_k[:B, :, :S], suffix_v[:B, :, :S]        # (B, Hkv, S, D)
    own_bias, common_bias = shared.biases(window, h)
    if P == 0:
        mask = own_bias.to(query.dtype)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
        return out.reshape(B, H, 1, -1)
    own, own_total = attend_part(query, keys, values, own_bias, scaling)
    keys, values = (whole[:G, :, :P] for whole in shared.prefix[layer])  # (G, Hkv, P, D)
    common, common_total = (
        shared.by_row(x, h) for x in attend_part(shared.by_prefix(query), keys, values,
                                                  common_bias, scaling))
    # One softmax over both parts is (e^own_total own + e^common_total common) divided by
    # (e^own_total + e^common_total): the share of `own` is the sigmoid of the totals' difference.
    # For a row without a prefix, where prefix_bias is -1e30, it is 1.
    share = (own_total - common_total - shared.prefix_bias).sigmoid()    # (B, Hkv, h, 1)
    return common.lerp(own, share.to(own.dtype)).reshape(B, H, 1, -1)


class CannotShare(Exception):
    """A model's layers do not fit the attention to shared prefixes."""


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, *,
                            shared=None, sliding_window=None, **kwargs):
    """transformers' attention interface.

    query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D). Raises CannotShare.
    """
    for option in ("softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise CannotShare(f"attends with {option}")
    if shared is None:
        raise CannotShare("does not hand this sampler's cache on to its layers")
    if attention_mask is not None:
        raise CannotShare("masks tokens in a way of its own")
    shared.windows[module.layer_idx] = sliding_window
    attend = attend_prompts if shared.prefill else attend_step
    out = attend(query, key, value, shared, module.layer_idx, scaling, sliding_window)
    return out.transpose(1, 2), None


AttentionInterface.register("shared_prefix", shared_prefix_attention)


def base_model(model):
    """A model without its adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def shared_prefix(model):
    """Let the model attend through a SharedPrefixCache, and put its own attention back after."""
    before = model.config._attn_implementation
    model.set_attn_implementation("shared_prefix")  # older models keep their own
    try:
        yield
    finally:
        model.set_attn_implementation(before)


token_bytes = weakref.WeakKeyDictionary()  # model -> what `shared_bytes` found


@torch.no_grad()
def shared_bytes(model):
    """Bytes of a token's keys and values. None: the model cannot share prefixes, said once.

    It can if it is made of attention layers alone, all of which take our function.
    """
    if model not in token_bytes:
        try:
            with shared_prefix(model):
                size, ours = try_layers(model)
            ids = torch.tensor([[2, 1]], device=model.device)
            plain = model(input_ids=ids, use_cache=False).logits[0, -1].float()
            rounding = 0.03 if model.dtype.itemsize < 4 else 1e-3
            if (ours - plain).norm() > rounding * plain.norm():
                raise CannotShare("gives other logits so than by a plain pass")
            token_bytes[model] = size
        except CannotShare as error:
            token_bytes[model] = None
            print(f"{model.config.model_type} {error}: it is sampled through its own cache, which "
                  "is slower", file=sys.stderr)
    return token_bytes[model]


def windows_of(config):
    """How many layers see a window of the last tokens; None: some do something else."""
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers
    known = set(kinds) <= {"full_attention", "sliding_attention"}
    return kinds.count("sliding_attention") if known else None


@torch.no_grad()
def try_layers(model):
    """Let two tokens through a SharedPrefixCache: (the bytes of one, the second's logits).

    Raises CannotShare.
    """
    config = model.config.get_text_config()
    windows = windows_of(config)
    taken = model.config._attn_implementation == "shared_prefix"
    if not taken or model._is_stateful or windows is None:
        raise CannotShare("attends in ways of its own")
    ids, here = torch.tensor([[[2, 1]], [[0, 1]]], device=model.device)
    cache = SharedPrefixCache(0, 1, 0, 2, model.device)
    cache.prefill = Prefill("suffix", here[0, :1], [0], here[:, :1], 0)
    model(input_ids=ids[:, :1], position_ids=here[:, :1], use_cache=False, shared=cache)
    cache.prefill, cache.shape = None, Shape(B=1, S=2, G=0, R=0, P=0)
    put(cache.length, [1])
    cache.prepare()
    step = model(input_ids=ids[:, 1:], position_ids=here[:, 1:], use_cache=False, shared=cache)
    if len(cache.suffix) != config.num_hidden_layers:
        raise CannotShare("has layers that do not attend")
    if sum(map(bool, cache.windows.values())) != windows:
        raise CannotShare("does not tell its layers how far back they see")
    size = sum(x.nbytes for x in itertools.chain(*cache.suffix.values())) // 2
    return size, step.logits[0, -1].float()


@contextmanager
def prepared(model, spare=0):
    """Bring weights into a form that is quick to sample with, and put them back after it.

    An adapter of 32-bit weights is added to them, and the very same weights are put back. In 16 and
    4 bits it stays beside them: a change below their last bit would be rounded away, and another
    model would sample than trains; and it computes in 16 bits, as in training. 4-bit weights are
    expanded, as many layers as `spare` bytes hold: once, and not at every call.
    """
    users = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    with torch.no_grad(), ExitStack() as undo:
        for name, weight in model.named_parameters():
            if model.dtype == torch.bfloat16 and re.search("lora_(embedding_)?[AB]", name):
                undo.callback(setattr, weight, "data", weight.data)
                weight.data = weight.data.to(model.dtype)
        for module in list(model.modules()):
            size = expanded_bytes(module, model.dtype)
            if isinstance(module, LoraLayer) and can_merge(module, users):
                weight = module.get_base_layer().weight
                undo.callback(module.merged_adapters.clear)
                undo.callback(weight.copy_, weight.clone())
                module.merge()
            elif 0 < size <= spare:
                weight = dequantize_module_weight(module).to(model.dtype)
                undo.callback(vars(module).pop, "forward", None)
                module.forward = functools.partial(F.linear, weight=weight, bias=module.bias)
                spare -= size
        yield


def can_merge(layer, users):
    """Whether a LoRA layer lies on a plain 32-bit matrix that nothing else uses.

    The head may be the embedding, and some models share layers. users: how many use a weight.
    """
    base = layer.get_base_layer()
    if layer.merged or any(layer.lora_bias.values()) or type(base) is not torch.nn.Linear:
        return False
    return base.weight.dtype == torch.float32 and users[id(base.weight)] == 1


def expanded_bytes(module, dtype):
    """Bytes of a 4-bit layer's weights in the dtype it computes in; 0: it is no such layer."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    # PEFT's wrapper of a 4-bit layer has its weight too, but no compute_dtype.
    if state is None or getattr(module, "compute_dtype", None) != dtype:
        return 0
    return state.shape.numel() * dtype.itemsize


# ---- drawing

NO_TOKEN = -1


def uniforms(seed, key, number, count):
    """`count` uniform numbers in [0, 1), on every machine the same for (seed, key, number)."""
    name = json.dumps([seed, key, number]).encode()
    digest = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=digest)).random(count, dtype=np.float32)


def nucleus_edge(top, top_p):
    """The least probability in the nucleus, (B, 1). top (B, N): descending probabilities.

    A token is in as long as those before it fall short of top_p.
    """
    before = top.cumsum(-1) - top  # (B, N)
    return top.masked_fill(before >= top_p, 1).amin(-1, keepdim=True)


def inverse_cdf(mass, uniform):
    """Where the uniform number (B,) falls among shares of the mass (B, N), in their order: (B,)."""
    mass = mass.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]                                    # (B, 1)
    below_total = total.nextafter(torch.zeros_like(total))
    target = torch.minimum(uniform[:, None] * total, below_total)
    return (mass <= target).sum(-1)


def draw(logits, uniform, temperature, top_p):
    """One token per row: logits (B, V), uniform (B,) -> (B,), NO_TOKEN where logits are not finite.

    The nucleus is the fewest tokens whose probability reaches top_p; those as likely as the last
    of these are in as well, since it is chance which of them a sort puts first. It mostly lies in
    the likeliest 64 tokens; only rows where it may not are sorted. Its tokens are taken in the
    order of their ids: an order of nearly equal probabilities would hang on rounding.
    """
    if temperature == 0:
        likeliest, token = logits.max(-1)
        return token.masked_fill(~likeliest.isfinite(), NO_TOKEN)
    probs = (logits.float() / temperature).softmax(-1)      # (B, V)
    top, ids = probs.topk(min(64, probs.shape[-1]))         # (B, 64)
    edge = nucleus_edge(top, top_p)                         # (B, 1)
    ids, by_id = ids.sort(dim=-1)
    nucleus = (top * (top >= edge)).gather(-1, by_id)       # (B, 64), 0 outside of it
    token = ids.gather(-1, inverse_cdf(nucleus, uniform)[:, None])[:, 0]
    wide = (top[:, -1] >= edge[:, 0]).nonzero()[:, 0]       # rows whose nucleus may be larger
    if len(wide) and top.shape[-1] < probs.shape[-1]:
        token[wide] = draw_by_sorting(probs[wide], uniform[wide], top_p)
    return token.masked_fill(top[:, 0].isnan(), NO_TOKEN)


def checked(tokens):
    """What `draw` gave, as a list. Raises ValueError if a model's logits were no numbers."""
    tokens = tokens.tolist()
    if NO_TOKEN in tokens:
        raise ValueError("the model's logits are not finite: choose another model, or other --bits")
    return tokens


def draw_by_sorting(probs, uniform, top_p):
    """What `draw` does, without its haste: probabilities (B, V), uniform (B,) -> (B,)."""
    if probs.is_cuda:
        ranked = probs.sort(dim=-1, descending=True).values
    else:  # NumPy sorts several times faster than PyTorch
        ranked = torch.from_numpy(np.sort(probs.numpy())).flip(-1)
    return inverse_cdf(probs * (probs >= nucleus_edge(ranked, top_p)), uniform)


# ---- rows and the prefixes they share

@dataclass(eq=False)
class Group:
    """Rows whose prompts begin alike."""
    prefix: list      # token ids; empty: a row by itself
    slot: int = None  # where in the cache the prefix stands; None: nowhere


@dataclass(eq=False)
class Row:
    """A sample under way."""
    prompt: int          # index of the prompt
    number: int          # of the sample, 0 to n - 1
    group: Group
    own: list            # the prompt's token ids after the prefix
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

    @property
    def prompt_length(self):
        return len(self.group.prefix) + len(self.own)


def shared_groups(prompts, n):
    """Split consecutive prompts (token ids) into groups with a common beginning.

    Returns a list of (indices, length of the shared beginning). A prompt joins the group before it
    where the common beginning is at least half of each prompt, and fewer tokens are stored so: a
    short beginning is not worth the slower way in which a row's own tokens are computed. The last
    token of a prompt is never shared, as it is what a row starts from. A prompt that is sampled
    once and shares nothing has no prefix.
    """
    groups = []
    for i, ids in enumerate(prompts):
        if groups:
            members, shared = groups[-1]
            group = [prompts[j] for j in members]
            common = len(os.path.commonprefix([group[0][:shared], ids[:-1]]))
            together = stored_tokens([*group, ids], common, n)
            apart = stored_tokens(group, shared, n) + stored_tokens([ids], len(ids) - 1, n)
            if together < apart and 2 * common >= max(map(len, [*group, ids])):
                groups[-1] = ([*members, i], common)
                continue
        groups.append(([i], len(ids) - 1))
    return [(members, 0 if n == len(members) == 1 else shared) for members, shared in groups]


def stored_tokens(prompts, shared, n):
    """Tokens that n samples of each prompt store of them: the shared beginning once."""
    return shared + n * sum(len(ids) - shared for ids in prompts)


def make_rows(prompts, n, numbers):
    """The rows of n samples of each prompt, group by group, those of the longest prompts first.

    numbers[i][k]: the uniform numbers of sample k of prompt i.
    """
    groups = []
    for members, shared in shared_groups(prompts, n):
        group = Group(prompts[members[0]][:shared])
        rows = [Row(i, k, group, prompts[i][shared:], numbers[i][k])
                for i in members for k in range(n)]
        groups.append(sorted(rows, key=lambda row: -len(row.own)))
    groups.sort(key=lambda rows: -rows[0].prompt_length)
    return [row for rows in groups for row in rows]


def cache_bytes(model):
    """How many bytes a cache may have: 3/4 of free CUDA memory, elsewhere 1 GiB."""
    if model.device.type != "cuda":
        return 2**30
    torch.cuda.empty_cache()  # what PyTorch keeps for later counts as taken
    return torch.cuda.mem_get_info(model.device)[0] * 3 // 4


def bytes_per_token(model):
    """Bytes of a token's keys and values, guessed for a model with a cache of its own kind."""
    config = model.config.get_text_config()
    return (shared_bytes(base_model(model))
            or 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize)


def cache_sizes(rows, max_new_tokens):
    """The longest (prefix, suffix) of these rows, in tokens."""
    prefix = max(len(row.group.prefix) for row in rows)
    return prefix, max(len(row.own) for row in rows) + max_new_tokens


def slot_counts(rows, max_new_tokens, capacity, most):
    """How many (rows, prefixes) fit into a cache of `capacity` tokens; at least one row.

    There is room for twice as many prefixes as rows would need if all samples were of one length,
    since the last samples of a group may take long while others move in beside them.
    """
    groups = len({row.group for row in rows if row.group.prefix})
    prefix, suffix = cache_sizes(rows, max_new_tokens)
    prefixes_per_row = min(1, 2 * groups / len(rows))
    count = int((capacity - prefix) / (suffix + prefix * prefixes_per_row))
    count = max(1, min(len(rows), most, count))
    return count, min(groups, count, 1 + int(count * prefixes_per_row))


def wanted_tokens(rows, max_new_tokens, most):
    """Tokens of the largest cache that these rows could fill."""
    count, groups = slot_counts(rows, max_new_tokens, sys.maxsize, most)
    prefix, suffix = cache_sizes(rows, max_new_tokens)
    return groups * prefix + count * suffix


def first_wave(rows, max_new_tokens, capacity, most):
    """Of rows, longest prompts first, those that share a cache.

    They end before the group whose prompts are half as long as the longest, if those before it
    fill the slots: a few long prompts shall not make the slots of all others large.
    """
    for count in range(1, len(rows)):
        new_group = rows[count].group is not rows[count - 1].group
        if new_group and 2 * rows[count].prompt_length < rows[0].prompt_length:
            slots, _ = slot_counts(rows[:count], max_new_tokens, capacity, most)
            return rows[:count] if count >= slots else rows[: count + most]
    return rows


# ---- the rows under way

class Slots:
    """The rows under way and their cache.

    rows[b] is the Row in slot b, groups[g] the Group whose prefix is in slot g; None: empty.
    """

    def __init__(self, model, rows, max_new_tokens, capacity):
        self.model, self.device = model, model.device
        self.most_rows, self.most_groups = slot_counts(rows, max_new_tokens, capacity,
                                                       ROWS[self.device.type])
        self.cache = SharedPrefixCache(self.most_groups, self.most_rows,
                                       *cache_sizes(rows, max_new_tokens), self.device)
        self.waiting, self.rows, self.groups = deque(rows), [], []
        for row in rows:
            row.group.slot = None if row.group.prefix else self.most_groups  # prefix_length 0
        self.graphs = StepGraphs(self.most_rows)

    def admit(self):
        """Let waiting rows into empty slots, and compute their prompts.

        New rows and prefixes take the first empty slots; the last ones fill those that stay empty.
        When all rows have ended and none wait, `rows` is empty.
        """
        if self.waiting:
            self.rows += [None] * (self.most_rows - len(self.rows))
        if self.rows.count(None) < max(1, EMPTY * len(self.rows)):
            return
        new_rows, new_groups = self.seat()
        for b, source in close_gaps(self.rows):
            self.cache.move("suffix", source, b, self.rows[b].length)
        for g, source in close_gaps(self.groups):
            self.cache.move("prefix", source, g, len(self.groups[g].prefix))
            self.groups[g].slot = g
        self.prefill("prefix", [(group.slot, group.prefix, None) for group in new_groups])
        self.prefill("suffix", [(b, row.own[:-1], row.group) for b, row in new_rows
                                if len(row.own) > 1])
        self.arrange()

    def seat(self):
        """Give waiting rows and their groups slots: the new (slot, row) pairs, the new groups."""
        # A group's rows wait one after the other, so it is needed if the first one waiting has it.
        needed = {row.group for row in [*self.rows, *itertools.islice(self.waiting, 1)] if row}
        self.groups = [group if group in needed else None for group in self.groups]
        self.groups += [None] * (self.most_groups - len(self.groups))
        new_rows, new_groups = [], []
        for b, row in enumerate(self.rows):
            if row is not None or not self.waiting:
                continue
            group = self.waiting[0].group
            if group.slot is None:
                if None not in self.groups:
                    break  # until a group has ended
                group.slot = self.groups.index(None)
                self.groups[group.slot] = group
                new_groups.append(group)
            self.rows[b] = self.waiting.popleft()
            new_rows.append((b, self.rows[b]))
        return new_rows, new_groups

    def prefill(self, kind, parts):
        """Compute and store the keys and values of prompts' tokens.

        parts: (slot, token ids, the group they come after or None).
        """
        parts = sorted(parts, key=lambda part: -len(part[1]))
        while parts:
            T = len(parts[0][1])
            P = max(len(group.prefix) if group else 0 for *_, group in parts)
            # Each has a copy of its prefix for a while, which is bounded as well.
            most = PREFILL_TOKENS[self.device.type]
            count = max(1, min(most // T, 4 * most // (P + T)))
            self.prefill_pass(kind, T, P, *zip(*parts[:count]))
            parts = parts[count:]

    def prefill_pass(self, kind, T, P, slots, ids, groups):
        """One forward pass over X parts of at most T tokens, after prefixes of at most P."""
        def tensor(values):
            return torch.tensor(values, device=self.device)

        lengths = tensor([len(row) for row in ids])[:, None]                             # (X, 1)
        before = tensor([len(group.prefix) if group else 0 for group in groups])[:, None]  # (X, 1)
        ids = tensor([list(row) + [0] * (T - len(row)) for row in ids])                  # (X, T)
        here = torch.arange(T, device=self.device)                                       # (T,)
        after = [group.slot if group and group.prefix else 0 for group in groups]
        self.cache.prefill = Prefill(kind, tensor(slots), after, before, P)
        # Without the head; told to keep one token's logits, Gemma 4 would skip the others' layers.
        base_model(self.model).base_model(
            input_ids=ids, position_ids=before + here.minimum(lengths - 1), use_cache=False,
            shared=self.cache)
        self.cache.prefill = None

    def arrange(self):
        """Tell the cache which prefix each row follows."""
        members = [[] for _ in self.groups]  # the rows of each
        for b, row in enumerate(self.rows):
            if row.group.prefix:
                members[row.group.slot].append(b)
        self.R = self.rounded(max(map(len, members), default=0), self.most_rows, steps=4)
        cell_of_row, rows_of_prefix = [0] * len(self.rows), []
        for g, rows in enumerate(members):
            for nth, b in enumerate(rows):
                cell_of_row[b] = g * self.R + nth
            rows_of_prefix += rows + [0] * (self.R - len(rows))
        put(self.cache.group, [row.group.slot for row in self.rows])
        put(self.cache.cell_of_row, cell_of_row)
        put(self.cache.rows_of_prefix, rows_of_prefix)
        put(self.cache.prefix_length,
            [len(group.prefix) if group else 0 for group in self.groups])

    def rounded(self, size, most, least=1, steps=1):
        """On CUDA a size is rounded up, so that few graphs are captured; at most `most`.

        It becomes `least`, a power of two, or one of `steps` sizes from one such to the next: with
        4 steps 80, 96, 112 and 128 follow 64.
        """
        if self.device.type == "cpu" or size == 0:
            return min(most, size)
        size = max(size, least)
        power = 1 << (size - 1).bit_length()  # the next power of two
        grain = max(1, power // (2 * steps))
        return min(most, -(-size // grain) * grain)

    def logits(self):
        """Logits (B, V) after the latest token of each row, which goes into the cache."""
        cache = self.cache
        put(cache.token, [row.token if row else 0 for row in self.rows])
        put(cache.length, [row.length if row else 0 for row in self.rows])
        prefix = max((len(group.prefix) for group in self.groups if group), default=0)
        suffix = 1 + max(row.length for row in self.rows if row)
        (G, P), (B, S) = cache.prefix_size, cache.suffix_size
        cache.shape = Shape(
            B=self.rounded(len(self.rows), B, 16), S=self.rounded(suffix, S, 64, steps=4),
            G=self.rounded(len(self.groups), G, 8), R=self.R,
            P=self.rounded(prefix, P, 64, steps=4))
        if self.device.type != "cpu" and self.model not in uncapturable:
            try:
                return self.graphs.replay(cache.shape, self.forward)[: len(self.rows)]
            except CannotCapture as error:
                print(f"this model samples without CUDA graphs, which is slower: {error}",
                      file=sys.stderr)
                uncapturable.add(self.model)
        return self.forward()[: len(self.rows)]

    def forward(self):
        cache = self.cache
        cache.prepare()
        return self.model(input_ids=cache.token[: cache.shape.B, None],
                          position_ids=cache.position[:, None], use_cache=False,
                          shared=cache).logits[:, -1]


class CannotCapture(Exception):
    """No CUDA graph can hold this model's step."""


uncapturable = weakref.WeakSet()  # models of which that is known


class StepGraphs:
    """A step as CUDA graphs, one per shape of the cache: the GPU need not wait for Python.

    It must go when its Slots do, so it holds nothing of them: a graph that the garbage collector
    finds while another one is captured would spoil that.
    """

    def __init__(self, rows):
        self.rows, self.graphs, self.out, self.pool = rows, {}, None, None

    def replay(self, shape, forward):
        """What forward() would return, (B, V). Raises CannotCapture."""
        if shape not in self.graphs:
            self.graphs[shape] = self.capture(forward)
        self.graphs[shape].replay()
        return self.out[: shape.B]

    def capture(self, forward):
        logits = forward()  # libraries set themselves up, which they may not in a capture
        if self.out is None:  # one buffer for all graphs
            self.out = logits.new_empty(self.rows, logits.shape[-1])
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context sets the stream back if the capture fails.
            with torch.cuda.stream(torch.cuda.current_stream()), \
                    torch.cuda.graph(graph, pool=self.pool):
                self.out[: len(logits)] = forward()
        except RuntimeError as error:
            end_capture(logits.device, self.pool)
            if out_of_memory(error):
                raise
            raise CannotCapture(str(error).splitlines()[0]) from None
        return graph


def end_capture(device, pool):
    """After a capture that failed: PyTorch would go on to allocate, and to draw, as if in one."""
    with suppress(RuntimeError):  # it has ended
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # ends what the failed one began
        torch.zeros(1, device=device)


def out_of_memory(error):
    """Whether this is CUDA's want of memory, which libraries report in their own ways."""
    signs = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in signs)


def put(buffer, values):
    """Fill a buffer; places that are not in use are 0, a valid index."""
    buffer[: len(values)] = torch.tensor(values, device=buffer.device)
    buffer[len(values):] = 0


def close_gaps(items):
    """Move the last items into the gaps (None) before them: the moves, (to, from)."""
    moves = []
    for gap in range(len(items)):
        while items and items[-1] is None:
            items.pop()
        if gap < len(items) and items[gap] is None:
            moves.append((gap, len(items) - 1))
            items[gap] = items.pop()
    return moves


# ---- sampling

def decode(model, rows, stops, max_new_tokens, temperature, top_p, capacity, on_token):
    """Draw until every row has ended, and yield each as it does."""
    slots = Slots(model, rows, max_new_tokens, capacity)
    slots.admit()
    while slots.rows:
        uniform = torch.tensor([row.uniform[len(row.drawn)] if row else 0 for row in slots.rows],
                               device=model.device)
        tokens = checked(draw(slots.logits(), uniform, temperature, top_p))
        for b, (row, token) in enumerate(zip(slots.rows, tokens)):
            if row is None:
                continue
            row.drawn.append(token)
            if on_token:
                on_token(row.prompt, row.number, row.drawn)
            if token in stops or len(row.drawn) == max_new_tokens:
                slots.rows[b] = None
                yield row
        slots.admit()


def decode_plain(model, rows, stops, max_new_tokens, temperature, top_p, capacity, on_token):
    """`decode` for any decoder, through its own cache: prompts of one length at a time."""
    rows = sorted(rows, key=lambda row: -row.prompt_length)
    for length, same in itertools.groupby(rows, key=lambda row: row.prompt_length):
        most = max(1, min(ROWS[model.device.type], capacity // (length + max_new_tokens)))
        while some := list(itertools.islice(same, most)):
            yield from decode_together(model, some, stops, max_new_tokens, temperature, top_p,
                                       on_token)


def decode_together(model, rows, stops, max_new_tokens, temperature, top_p, on_token):
    """Draw for rows whose prompts are of one length, without padding; yield each as it ends."""
    kept = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    ids = torch.tensor([row.group.prefix + row.own for row in rows], device=model.device)
    cache, ended = {}, set()
    for step in range(max_new_tokens):
        out = model(input_ids=ids, use_cache=True, **cache, **kept)
        cache = {name: out[name] for name in ("past_key_values", "cache_params")  # Mamba's name
                 if name in out}
        if not cache:
            raise ValueError(f"{model.config.model_type} keeps no cache: choose another model")
        uniform = torch.tensor([row.uniform[step] for row in rows], device=model.device)
        tokens = draw(out.logits[:, -1], uniform, temperature, top_p)
        for row, token in zip(rows, checked(tokens)):
            if row in ended:
                continue
            row.drawn.append(token)
            if on_token:
                on_token(row.prompt, row.number, row.drawn)
            if token in stops or len(row.drawn) == max_new_tokens:
                ended.add(row)
                yield row
        if len(ended) == len(rows):
            return
        ids = tokens[:, None]


class PromptTooLong(ValueError):
    """Prompts leave no room for answers in the model's context; `places` are their indices."""

    def __init__(self, message, places):
        super().__init__(message)
        self.places = places


def stop_tokens(model, tokenizer):
    """The ids that end an answer: by the model's configuration, its tokenizer, its template."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {*configured, tokenizer.eos_token_id, Chat(tokenizer).end} - {None}


def check_request(model, prompts, n, max_new_tokens, temperature, top_p, keys):
    """Raise ValueError unless this can be sampled."""
    if not all(isinstance(ids, (list, tuple)) and ids and all(isinstance(i, int) for i in ids)
               for ids in prompts):
        raise ValueError("prompts must be lists of token ids, none of them empty")
    if max(map(max, prompts), default=0) >= model.get_input_embeddings().num_embeddings:
        raise ValueError("prompts have token ids that the model does not have: whose tokenizer?")
    in_range = n >= 1 and max_new_tokens >= 1 and temperature >= 0 and 0 < top_p <= 1
    if not in_range or len(keys) != len(prompts):
        raise ValueError("sample needs n >= 1, max_new_tokens >= 1, temperature >= 0, top_p in "
                         "(0, 1] and one of keys per prompt")


def too_long_prompts(model, prompts, max_new_tokens, skip):
    """Indices of the prompts without room in the context; PromptTooLong unless to be skipped."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    too_long = [i for i, ids in enumerate(prompts)
                if context and len(ids) + max_new_tokens > context]
    if too_long and not skip:
        longest = max(len(prompts[i]) for i in too_long)
        raise PromptTooLong(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed "
                            f"the model's context of {context}: shorten the prompts or the "
                            "answers", too_long)
    return too_long


def rotation_limit(config):
    """The longest sequence, in tokens, beside which the others of its pass rotate as alone."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return math.inf
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


@torch.no_grad()
def sample_tokens(model, prompts, n=1, *, stops, max_new_tokens, temperature=0.8, top_p=0.95,
                  seed=0, keys=None, capacity=None, on_end=None, on_token=None,
                  skip_too_long=False):
    """n continuations of each prompt, token ids to token ids. See `sample` for the rest.

    prompts: lists of token ids, as `Chat.prompt` gives them. stops: a set of ids that end a
    sample, and belong to it, as `stop_tokens` gives it. on_end(i, number, ids) is called as each
    sample ends, on_token the same as each token is drawn. Returns for each prompt n lists of ids.
    """
    keys = list(range(len(prompts))) if keys is None else keys
    check_request(model, prompts, n, max_new_tokens, temperature, top_p, keys)
    too_long = too_long_prompts(model, prompts, max_new_tokens, skip_too_long)
    samples = [[None] * n for _ in prompts]

    def end(i, number, ids):
        samples[i][number] = ids
        if on_end:
            on_end(i, number, ids)

    for i, number in itertools.product(too_long, range(n)):
        end(i, number, [])
    rows = make_rows(prompts, n, [[uniforms(seed, key, number, max_new_tokens)
                                   for number in range(n)] for key in keys])
    longest = max(map(len, prompts), default=0) + max_new_tokens
    shared = (shared_bytes(base_model(model)) is not None
              and longest <= rotation_limit(model.config.get_text_config()))
    size = bytes_per_token(model)
    wanted = min(capacity or sys.maxsize,
                 wanted_tokens(rows, max_new_tokens, ROWS[model.device.type]) if rows else 0)
    with shared_prefix(base_model(model)) if shared else nullcontext(), \
            prepared(model, spare=cache_bytes(model) - wanted * size):
        capacity = capacity or cache_bytes(model) // size
        while rows := [row for row in rows if samples[row.prompt][row.number] is None]:
            wave = first_wave(rows, max_new_tokens, capacity, ROWS[model.device.type])
            try:
                way = decode if shared else decode_plain
                for row in way(model, wave, stops, max_new_tokens, temperature, top_p, capacity,
                               on_token):
                    end(row.prompt, row.number, row.drawn)
            except RuntimeError as error:
                one_row = sum(cache_sizes(wave, max_new_tokens))
                if not out_of_memory(error) or capacity < one_row:
                    raise
                capacity //= 2
                print("out of memory: sampling goes on with a cache half as large, "
                      f"{capacity} tokens", file=sys.stderr)
                for row in wave:  # those that have not ended begin again
                    row.drawn = []
    return samples


def sample(model, tokenizer, prompts, n=1, *, max_new_tokens, temperature=0.8, top_p=0.95, seed=0,
           keys=None, capacity=None, on_end=None, on_token=None, skip_too_long=False):
    """n answers to each prompt: a list of n Samples for each.

    prompts: user texts, or lists of texts, the user's and the assistant's in turn; the chat
    template is applied here. temperature 0 is greedy. seed: anything JSON can hold. keys: one per
    prompt (default: its index); the uniform numbers behind a draw depend on (seed, key, number of
    the sample) and on nothing else, the draw itself on the rounding of logits as well.
    capacity: how many tokens' keys and values the cache may hold (default: what `cache_bytes`
    holds); halved when CUDA runs out of memory. on_end(i, number, sample) is called as each sample
    ends, in no particular order, and on_token(i, number, ids) as each token is drawn, with all of
    the sample's so far. skip_too_long: a prompt that leaves no room in the context gets
    samples without tokens, cut off at once; else it raises PromptTooLong, before any is drawn.
    Raises ValueError for settings out of range.
    """
    chat, stops = Chat(tokenizer), stop_tokens(model, tokenizer)
    ids = [chat.prompt(*([p] if isinstance(p, str) else p)) for p in prompts]
    samples = [[None] * n for _ in prompts]

    def end(i, number, drawn):
        finished = bool(drawn) and drawn[-1] in stops
        text = chat.written(drawn[:-1] if finished else drawn)
        samples[i][number] = Sample(text, drawn, finished)
        if on_end:
            on_end(i, number, samples[i][number])

    sample_tokens(model, ids, n, stops=stops, max_new_tokens=max_new_tokens,
                  temperature=temperature, top_p=top_p, seed=seed, keys=keys, capacity=capacity,
                  on_end=end, on_token=on_token, skip_too_long=skip_too_long)
    return samples
