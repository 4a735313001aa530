"""Batched, KV-cached sampling from any Hugging Face decoder-only model.

The n samples of a prompt share its keys and values, which are computed and stored once; so is the
common beginning of prompts that follow each other, as those of all comparisons of one answer do.
All keys and values stand in one pool of places. A prefix, which rows share, is a stretch of it;
each row has a stretch for its own tokens. Attention runs over both separately and joins them
exactly (the idea of Hydragen, Juravsky et al. 2024, arXiv 2402.05099).

    B rows, one per sample under way    T new tokens in a pass    H heads of queries, Hkv of keys
    N stretches, P pieces of prefixes   V tokens there are        h = H / Hkv    D a head's width

Models with layers that this does not fit, as recurrent ones, are sampled through their own caches
(`decode_plain`), which is slower and draws the same. A draw is a function of (seed, key of the
prompt, number of the sample, step): one uniform number through the inverse of the distribution
function. Left out: beam search, stop strings, encoders.
"""
if __name__ == "__main__":  # python sampling.py MODEL "question"
    import harness.startup
    from harness.commands.flags import conversation_arguments

    harness.startup.begin(conversation_arguments)  # before the imports, which take seconds
    from harness.commands.conversation import main

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
import sys
import weakref
from collections import deque, namedtuple
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a package nobody needs
from peft import PeftModel
from transformers import AttentionInterface

from harness.engine.architecture import rotation_limit, windows_of
from harness.engine.chat import Chat
from harness.engine.cuda import has_kernel, out_of_memory
from harness.engine.plain_attention import plain_attention
from harness.engine.weights import prepared

# cuDNN plans each shape of attention anew, and in `decode_plain` they hardly ever repeat.
torch.backends.cuda.enable_cudnn_sdp(False)
ROWS = {"cpu": 256, "cuda": 512}  # samples under way: with more of them a step only takes longer
PIECE = {"cpu": 256, "cuda": 32}  # rows that meet their prefix together: with 4 heads 128 queries
PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}  # prompt tokens computed at once
TOP = {"cpu": 24, "cuda": 64}  # tokens among which the nucleus is looked for first
NO_TOKEN = -1  # what `draw` gives where a model's logits are no numbers
EMPTY = 1 / 16  # share of rows that may be missing: letting others in costs a forward pass


@dataclass(frozen=True)
class Sample:
    text: str       # what was written, without its stop token and other control tokens
    tokens: list    # the ids drawn, the end token included
    finished: bool  # ended by itself; False: cut off after max_new_tokens


# ---- rows and the prefixes they share

@dataclass(eq=False)
class Group:
    """Rows whose prompts begin alike."""
    prefix: list    # token ids; empty: a row by itself
    begin: int = 0  # where in the pool the prefix stands, on `size` places; 0: nowhere
    size: int = 0
    rows: int = 0   # how many are under way


@dataclass(eq=False)
class Row:
    """A sample under way."""
    prompt: int          # index of the prompt
    number: int          # of the sample, 0 to n - 1
    group: Group
    own: list            # the prompt's token ids after the prefix
    uniform: np.ndarray  # one number per token
    drawn: list = dataclasses.field(default_factory=list)
    begin: int = 0       # where in the pool its own tokens stand, on `size` places; 0: nowhere
    size: int = 0

    @property
    def token(self):
        """The latest token: the next to be fed."""
        return self.drawn[-1] if self.drawn else self.own[-1]

    @property
    def length(self):
        """Its own tokens that are in the pool."""
        return len(self.own) - 1 + len(self.drawn)

    @property
    def prompt_length(self):
        return len(self.group.prefix) + len(self.own)


def shared_groups(prompts, n):
    """Split consecutive prompts (token ids) into groups with a common beginning.

    Returns a list of (indices, length of the shared beginning). A prompt joins the group before it
    where the common beginning is at least half of each prompt, and fewer tokens are stored so: a
    short beginning is not worth a second part of attention for all that stands behind it. The last
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


def longest_parts(rows, max_new_tokens):
    """Tokens of the longest prefix, and of the longest row without its prefix."""
    return (max(len(row.group.prefix) for row in rows),
            max(len(row.own) for row in rows) + max_new_tokens)


def even(sizes, device):
    """The sizes of stretches that need so many places; device: "cpu" or "cuda".

    On a CPU all get as many as the largest, unless that would more than double them: stretches at
    equal distances need not be copied there.
    """
    alike = device == "cpu" and max(sizes) * len(sizes) <= 2 * sum(sizes)
    return [max(sizes)] * len(sizes) if alike else sizes


def wanted_places(rows, max_new_tokens, device):
    """Places for as many of these rows as there may be at a time, and for their prefixes.

    For twice the prefixes that they would need if all samples were of one length: the last samples
    of a group may take long while others move in beside them.
    """
    own = even([len(row.own) + max_new_tokens for row in rows], device)
    prefixes = even([len(group.prefix) for group in {row.group for row in rows}], device)
    count = min(ROWS[device], len(rows))
    groups = 1 + int(count * min(1, 2 * len(prefixes) / len(rows)))
    return 1 + sum(sorted(own)[-count:]) + sum(sorted(prefixes)[-groups:])


def cache_bytes(model):
    """How many bytes a cache may have: 3/4 of free CUDA memory, elsewhere 1 GiB."""
    if model.device.type != "cuda":
        return 2**30
    torch.cuda.empty_cache()  # what PyTorch keeps for later counts as taken
    return torch.cuda.mem_get_info(model.device)[0] * 3 // 4


# ---- the pool: keys and values of all rows and prefixes

Stretches = namedtuple("Stretches", "at most begin length")
# Queries at[i] to at[i + 1], `most` at most, see the length[i] places that begin at begin[i]. All
# int32, N + 1 numbers in at and begin, as the kernel wants it; the last of begin means nothing.


@dataclass
class Pass:
    """What a forward pass over T new tokens is told: whose they are, and where they go."""
    place: torch.Tensor     # (T,) where each token's keys and values are stored
    position: torch.Tensor  # (T,) how many tokens of its row stand before it
    own: Stretches          # the rows' own tokens, the new ones included
    prefix: Stretches       # the prefixes of pieces of consecutive rows; None: no row has any
    before: tuple           # (T,) where each token's prefix begins, (T,) its length
    layouts: dict = dataclasses.field(default_factory=dict)  # what plain PyTorch makes of these


class Pool:
    """Places for tokens' keys and values. A prefix and a row are each a stretch of places.

    Place 0 is nobody's: what only fills a batch is stored there.
    """

    def __init__(self, places, longest):
        self.places, self.longest = places, longest  # the longest row with its prefix, in tokens
        self.free = [(1, places - 1)]  # (begin, size), in order
        self.layers = {}   # layer -> (keys, values), each (places, Hkv, D); made at first use
        self.windows = {}  # layer -> how far back it sees; None: all
        self.now = None    # the present Pass

    def take(self, size, last=False):
        """Where `size` free places begin, the first ones or the last ones; 0: there are none."""
        for i in reversed(range(len(self.free))) if last else range(len(self.free)):
            begin, free = self.free[i]
            if free >= size:
                rest = (begin, free - size) if last else (begin + size, free - size)
                self.free[i: i + 1] = [rest] if free > size else []
                return begin + (free - size) * last
        return 0

    def give_back(self, begin, size):
        merged = []
        for begin, size in sorted([*self.free, (begin, size)]):
            if merged and sum(merged[-1]) == begin:
                begin, size = merged[-1][0], merged.pop()[1] + size
            merged.append((begin, size))
        self.free = merged

    def store(self, layer, key, value):
        """Store the new tokens' (T, Hkv, D); the layer's keys and values, (places, Hkv, D)."""
        if layer not in self.layers:
            self.layers[layer] = tuple(  # each head's lie together
                x.new_zeros(x.shape[1], self.places, x.shape[2]).transpose(0, 1)
                for x in (key, value))
        for whole, new in zip(self.layers[layer], (key, value)):
            whole.index_copy_(0, self.now.place, new)
        return self.layers[layer]


# ---- attention

def attend(query, key, value, pool, layer, scaling, window):
    """Store new tokens; each sees its row's tokens up to itself, and its row's prefix.

    query (T, H, D), key and value (T, Hkv, D) -> (T, H, D). In a step each row has one new token.
    """
    keys, values = pool.store(layer, key, value)                         # (places, Hkv, D)
    see = kernel_attention if has_kernel(query) else plain_attention
    window = window if window and window < pool.longest else None
    own, own_total = see(query, keys, values, pool, pool.now.own, scaling, window)
    if pool.now.prefix is None:
        return own
    common, common_total = see(query, keys, values, pool, pool.now.prefix, scaling, window)
    # One softmax over both parts is (e^own_total own + e^common_total common) divided by
    # (e^own_total + e^common_total): the share of `own` is the sigmoid of the totals' difference.
    return common.lerp(own, (own_total - common_total).sigmoid().to(own.dtype))


def kernel_attention(query, keys, values, pool, part, scaling, window):
    """Attention of queries to a stretch each: (T, H, D), and the log of its softmax's denominator.

    query (T, H, D), keys and values (places, Hkv, D), part: pool.now's own or prefix. The log is
    (T, H, 1), -inf where a query sees nothing. FlashAttention's kernel reads from the device where
    stretches begin and how long they are, so a graph serves others as well. Only without a window
    it takes the fast way for single queries. It is called below torch.nn.attention.varlen, which
    has no seqused_k in PyTorch 2.11.
    """
    at, most, begin, length = part
    h, left, right, own = query.shape[1] // keys.shape[1], -1, -1, part is pool.now.own
    packed = not own and not window
    if packed:  # heads that share keys are further queries of the same prefix
        query = query.unflatten(1, (-1, h)).transpose(1, 2).flatten(0, 1)       # (T * h, Hkv, D)
        at, most = at * h, most * h
    elif own and most > 1:
        left, right = window - 1 if window else -1, 0
    elif window:  # each token has a stretch of its own, which begins where its sight does
        begin, length = (begin[:-1], length) if own else pool.now.before
        seat = length - 1 if own else pool.now.position
        hidden = (seat - window + 1).clamp(min=0).minimum(length)
        at = torch.arange(len(length) + 1, dtype=torch.int32, device=query.device)
        most, begin, length = 1, F.pad(begin + hidden, (0, 1)), length - hidden
    out, total, *_ = torch.ops.aten._flash_attention_forward(
        query, keys, values, at, begin, most, pool.longest, 0.0, False, False, scale=scaling,
        window_size_left=left, window_size_right=right, seqused_k=length)
    total = total.T[..., None]                                                  # it says (H, T)
    total = total.masked_fill(total == math.inf, -math.inf)                     # inf: no keys
    if packed:
        out, total = (x.unflatten(0, (-1, h)).transpose(1, 2).flatten(1, 2) for x in (out, total))
    return out, total


# ---- the model's layers

class CannotShare(Exception):
    """A model's layers do not fit the attention to shared prefixes."""


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, *,
                            pool=None, sliding_window=None, **kwargs):
    """transformers' attention interface.

    query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D). Raises CannotShare.
    """
    for option in ("softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise CannotShare(f"attends with {option}")
    if value.shape[-1] != query.shape[-1]:
        raise CannotShare("has values of another width than keys")
    if pool is None:
        raise CannotShare("does not hand this sampler's cache on to its layers")
    if attention_mask is not None:
        raise CannotShare("masks tokens in a way of its own")
    pool.windows[module.layer_idx] = sliding_window
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(query, key, value, pool, module.layer_idx, scaling, sliding_window)[None], None


AttentionInterface.register("shared_prefix", shared_prefix_attention)


def base_model(model):
    """A model without its adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def shared_prefix(model):
    """Let the model attend through a Pool, and put its own attention back after."""
    before = model.config._attn_implementation
    model.set_attn_implementation("shared_prefix")  # older models keep their own
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# ---- a step as a CUDA graph

class CannotCapture(Exception):
    """No CUDA graph can hold this model's step."""


uncapturable = weakref.WeakSet()  # models of which that is known


class StepGraphs:
    """A step as CUDA graphs, one per Shape: the GPU need not wait for Python.

    What a step reads must stand at the same place each time. This must go when the sampler's Batch
    does, so it holds nothing of that: a graph that the garbage collector finds while another one is
    captured would spoil it.
    """

    def __init__(self, rows):
        self.rows, self.graphs, self.out, self.pool = rows, {}, None, None

    def run(self, model, shape, forward):
        """forward()'s logits (B, V), by a graph unless no graph can hold this model's step."""
        if model not in uncapturable:
            try:
                return self.replay(shape, forward)
            except CannotCapture as error:
                print(f"this model samples without CUDA graphs, which is slower: {error}",
                      file=sys.stderr)
                uncapturable.add(model)
        return forward()

    def replay(self, shape, forward):
        """What forward() would return, (B, V). Raises CannotCapture."""
        if shape not in self.graphs:
            self.graphs[shape] = self.capture(forward)
        self.graphs[shape].replay()
        return self.out[: shape.T]

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


# ---- drawing

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
    the likeliest few tokens; only rows where it may not are sorted. Its tokens are taken in the
    order of their ids: an order of nearly equal probabilities would hang on rounding.
    """
    if temperature == 0:
        likeliest, token = logits.max(-1)
        return token.masked_fill(~likeliest.isfinite(), NO_TOKEN)
    probs = (logits.float() / temperature).softmax(-1)      # (B, V)
    top, ids = probs.topk(min(TOP[probs.device.type], probs.shape[-1]))  # (B, N)
    edge = nucleus_edge(top, top_p)                         # (B, 1)
    ids, by_id = ids.sort(dim=-1)
    nucleus = (top * (top >= edge)).gather(-1, by_id)       # (B, N), 0 outside of it
    token = ids.gather(-1, inverse_cdf(nucleus, uniform)[:, None])[:, 0]
    wide = (top[:, -1] >= edge[:, 0]).nonzero()[:, 0]       # rows whose nucleus may be larger
    if len(wide) and top.shape[-1] < probs.shape[-1]:
        token[wide] = draw_by_sorting(probs[wide], uniform[wide], top_p)
    return token.masked_fill(top[:, 0].isnan(), NO_TOKEN)


def checked(tokens):
    """Drawn tokens as a list of ids. Raises ValueError if a model's logits were no numbers."""
    tokens = tokens.tolist()
    if NO_TOKEN in tokens:
        raise ValueError("the model's logits are not finite: choose another model, or other --bits")
    return tokens


def draw_by_sorting(probs, uniform, top_p):
    """Tokens by the whole distribution, sorted: probabilities (B, V), uniform (B,) -> ids (B,)."""
    if probs.is_cuda:
        ranked = probs.sort(dim=-1, descending=True).values
    else:  # NumPy sorts several times faster than PyTorch
        ranked = torch.from_numpy(np.sort(probs.numpy())).flip(-1)
    return inverse_cdf(probs * (probs >= nucleus_edge(ranked, top_p)), uniform)


# ---- the rows under way

Shape = namedtuple("Shape", "T N P longest longest_piece")  # what a graph is captured for
NO_GROUP = Group([])  # of what has no prefix


class Batch:
    """The rows under way, side by side with those of their prefix, and the pool they stand in."""

    def __init__(self, model, rows, max_new_tokens, capacity):
        self.model, self.device, kind = model, model.device, model.device.type
        self.most = min(ROWS[kind], len(rows))
        self.waiting, self.rows = deque(rows), []
        places = min(capacity, wanted_places(rows, max_new_tokens, kind))
        self.pool = Pool(max(places, 1 + sum(longest_parts(rows, max_new_tokens))),
                         max(row.prompt_length for row in rows) + max_new_tokens)
        groups = list({row.group for row in rows})
        for row, size in zip(rows, even([len(row.own) + max_new_tokens for row in rows], kind)):
            row.begin, row.size = 0, size
        for group, size in zip(groups, even([len(group.prefix) for group in groups], kind)):
            group.begin, group.size, group.rows = 0, size, 0
        self.shared = any(group.prefix for group in groups)
        # What a step reads, so that its graph finds it at the same place.
        self.numbers = torch.zeros(11, self.most + 1, dtype=torch.int32, device=self.device)
        self.graphs = StepGraphs(self.most)

    def admit(self):
        """Let waiting rows in, as many as there are places for, and compute their prompts."""
        if not self.waiting and self.device.type == "cpu":
            self.close_gaps()
        free = self.most - len(self.rows)
        if not self.waiting or free < max(1, EMPTY * self.most):
            return
        new, groups = [], []
        while self.waiting and len(new) < free and self.seat(self.waiting[0], groups):
            new.append(self.waiting.popleft())
        self.prefill([(group.prefix, group.begin, 0, NO_GROUP) for group in groups])
        self.prefill([(row.own[:-1], row.begin, 0, row.group) for row in new if len(row.own) > 1])
        self.rows = sorted(self.rows + new, key=lambda row: row.group.begin)

    def seat(self, row, groups):
        """Give a row its places, and its group if that has none: whether there are any."""
        group = row.group
        new = bool(group.prefix) and not group.begin
        if new:
            group.begin = self.pool.take(group.size, last=True)
        row.begin = self.pool.take(row.size) if group.begin or not group.prefix else 0
        if row.begin:
            group.rows += 1
            if new:
                groups.append(group)
        elif new:  # it waits with its first row
            self.release(group)
        return bool(row.begin)

    def leave(self, row):
        """A row has ended. Its prefix goes with the last of its group, unless another one waits."""
        self.rows.remove(row)
        self.pool.give_back(row.begin, row.size)
        row.group.rows -= 1
        if not row.group.rows and not (self.waiting and self.waiting[0].group is row.group):
            self.release(row.group)

    def release(self, group):
        if group.begin:
            self.pool.give_back(group.begin, group.size)
        group.begin = 0

    def close_gaps(self):
        """Move the last rows into gaps before them: a view spans gaps too, and computes them."""
        for row in sorted(self.rows, key=lambda row: -row.begin):
            begin = self.pool.take(row.size)
            if begin > row.begin:
                self.pool.give_back(begin, row.size)
            if not 0 < begin < row.begin:
                return
            for whole in itertools.chain(*self.pool.layers.values()):
                whole[begin: begin + row.length] = whole[row.begin: row.begin + row.length]
            self.pool.give_back(row.begin, row.size)
            row.begin = begin

    def prefill(self, parts):
        """Compute and store the keys and values of prompts' tokens, in parts as `lay` takes."""
        while parts:
            longest = np.maximum.accumulate([len(ids) for ids, *_ in parts])
            padded = longest * np.arange(1, len(parts) + 1)  # as in plain attention
            count = max(1, (padded <= PREFILL_TOKENS[self.device.type]).sum())
            numbers, shape = self.lay(parts[:count])
            # Without the head; told to keep one token's logits, Gemma 4 would skip others' layers.
            self.run(base_model(self.model).base_model,
                     torch.from_numpy(numbers).to(self.device), shape)
            parts = parts[count:]

    def logits(self):
        """Logits (B, V) after the latest token of each row, which goes into the pool."""
        B = len(self.rows)
        parts = [([row.token], row.begin, row.length, row.group) for row in self.rows]
        numbers, shape = self.lay(parts + [([0], 0, 0, NO_GROUP)] * (self.rounded(B) - B))
        self.numbers[:, : shape.T + 1] = torch.from_numpy(numbers)
        if self.device.type == "cpu" or not self.pool.now or self.pool.now.layouts:
            return self.step(shape)[:B]  # plain attention reads lengths on the host: no graph can
        # Of its graphs only the number of rows differs.
        shape = shape._replace(P=shape.T * self.shared, longest_piece=PIECE[self.device.type])
        return self.graphs.run(self.model, shape, functools.partial(self.step, shape))[:B]

    def step(self, shape):
        return self.run(self.model, self.numbers, shape).logits[0]

    def lay(self, parts):
        """What a Pass is made of, (11, T + 1) int32, and its Shape.

        parts: (new token ids, where their row or prefix begins in the pool, how many of its tokens
        are there, the Group whose prefix they come after). Consecutive ones after the same prefix
        are a piece, up to PIECE of them. Rows 0 to 4: of each token its id, place, position, where
        its prefix begins, and how long that is; 5 to 7: each part's Stretches; 8 to 10: each
        piece's.
        """
        N, counts = len(parts), np.array([len(ids) for ids, *_ in parts])
        begin, stored, prefix, before = np.array([
            (begin, stored, group.begin, len(group.prefix)) for _, begin, stored, group in parts]).T
        at = np.append(0, counts.cumsum())
        of, T = np.repeat(np.arange(N), counts), at[-1]            # (T,) the part of each token
        here = stored[of] + np.arange(T) - at[of]                  # (T,) where in its stretch
        # of each part the first one after the same prefix
        first = np.maximum.accumulate(np.arange(N) * (np.diff(prefix, prepend=-1) != 0))
        pieces = np.flatnonzero((np.arange(N) - first) % PIECE[self.device.type] == 0)
        numbers, P = np.zeros((11, T + 1), dtype=np.int32), len(pieces)
        numbers[:5, :T] = (list(itertools.chain(*(ids for ids, *_ in parts))), begin[of] + here,
                           before[of] + here, prefix[of], before[of])
        numbers[5:8, :N] = at[:-1], begin, stored + counts
        numbers[8:, :P] = at[pieces], prefix[pieces], before[pieces]
        numbers[5, N:] = numbers[8, P:] = T                        # pieces beyond those are empty
        return numbers, Shape(int(T), N, P if before.any() else 0, int(counts.max()),
                              int(np.diff(numbers[8, : P + 1]).max()))

    def run(self, network, numbers, shape):
        """A forward pass over what `lay` has laid out."""
        T, N, P, longest, longest_piece = shape
        token, place, position, *before, at, begin, length, piece_at, after, after_length = numbers
        self.pool.now = Pass(
            place[:T].long(), position[:T], Stretches(at[: N + 1], longest, begin[: N + 1],
                                                      length[:N]),
            Stretches(piece_at[: P + 1], longest_piece, after[: P + 1], after_length[:P])
            if P else None, [x[:T] for x in before])
        return network(input_ids=token[None, :T].long(), use_cache=False, pool=self.pool,
                       position_ids=position[None, :T].long())

    def rounded(self, count):
        """On CUDA counts are rounded up to 2^k or 3 * 2^k, so that few graphs are captured."""
        if self.device.type == "cpu":
            return count
        power = 1 << (count - 1).bit_length()
        return min(self.most, 3 * power // 4 if 4 * count <= 3 * power else power)


# ---- which models can be sampled so

token_bytes = weakref.WeakKeyDictionary()  # model -> what `probe_sharing` found


def probe_sharing(model):
    """Bytes of a token's keys and values. None: the model cannot share prefixes, said once."""
    if model not in token_bytes:
        try:
            token_bytes[model] = try_layers(model)
        except CannotShare as error:
            token_bytes[model] = None
            print(f"{model.config.model_type} {error}: it is sampled through its own cache, which "
                  "is slower", file=sys.stderr)
    return token_bytes[model]


@torch.no_grad()
def try_layers(model):
    """Bytes of a token's keys and values, after a step of a few rows as in `decode`, whose logits
    must be those of plain passes. One of five tries must give them: in 16 bits rounding alone moves
    the logits of some tokens far, and a wrong way agrees on none.

    Raises CannotShare.
    """
    config = model.config.get_text_config()
    windows = windows_of(config)
    if windows is None:
        raise CannotShare("attends in ways of its own")
    rounding = 0.03 if model.dtype.itemsize < 4 else 1e-3
    for ids in (config.vocab_size * np.arange(1, 21).reshape(5, 4) // 21).tolist():
        batch, ours = try_rows(model, *ids)
        layers = batch.pool.layers
        if len(layers) != config.num_hidden_layers:
            raise CannotShare("has layers that do not attend")
        if sum(map(bool, batch.pool.windows.values())) != windows:
            raise CannotShare("does not tell its layers how far back they see")
        plain = [model(input_ids=torch.tensor([row.group.prefix + row.own], device=model.device),
                       use_cache=False).logits[0, -1].float() for row in batch.rows]
        if all((x - y).norm() <= rounding * y.norm() for x, y in zip(ours.float(), plain)):
            return sum(x.nbytes for x in itertools.chain(*layers.values())) // batch.pool.places
    raise CannotShare("gives other logits so than by a plain pass")


def try_rows(model, a, b, c, d):
    """A Batch of two rows that share a prefix and one by itself, of these tokens; its logits."""
    shared, alone = Group([a, b]), Group([])
    rows = [Row(0, 0, shared, [c], ()), Row(1, 0, alone, [a, c], ()), Row(2, 0, shared, [b, d], ())]
    with shared_prefix(model):
        if model.config._attn_implementation != "shared_prefix" or model._is_stateful:
            raise CannotShare("attends in ways of its own")
        batch = Batch(model, rows, 2, sys.maxsize)
        batch.admit()
        return batch, batch.logits()


# ---- the loop

Drawing = namedtuple("Drawing", "stops max_new_tokens temperature top_p on_token")  # see `sample`


def advance(rows, logits, how):
    """Draw the next token of each row, by logits (B, V): the rows that end with it."""
    uniform = np.array([row.uniform[len(row.drawn)] for row in rows], dtype=np.float32)
    uniform = torch.from_numpy(uniform).to(logits.device)
    for row, token in zip(rows, checked(draw(logits, uniform, how.temperature, how.top_p))):
        row.drawn.append(token)
        if how.on_token:
            how.on_token(row.prompt, row.number, row.drawn)
    return [row for row in rows if row.token in how.stops or len(row.drawn) == how.max_new_tokens]


def decode(model, rows, how, capacity):
    """Draw until every row has ended, and yield each as it does."""
    batch = Batch(model, rows, how.max_new_tokens, capacity)
    batch.admit()
    while batch.rows:
        for row in advance(batch.rows, batch.logits(), how):
            batch.leave(row)
            yield row
        batch.admit()


def decode_plain(model, rows, how, capacity):
    """`decode` for any decoder, through its own cache: prompts of one length at a time."""
    rows = sorted(rows, key=lambda row: -row.prompt_length)
    for length, same in itertools.groupby(rows, key=lambda row: row.prompt_length):
        most = max(1, min(ROWS[model.device.type], capacity // (length + how.max_new_tokens)))
        while some := list(itertools.islice(same, most)):
            yield from decode_together(model, some, how)


def decode_together(model, rows, how):
    """Draw for rows whose prompts are of one length, without padding; yield each as it ends."""
    kept = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    ids = torch.tensor([row.group.prefix + row.own for row in rows], device=model.device)
    cache, going_on = {}, list(range(len(rows)))
    while going_on:
        out = model(input_ids=ids, use_cache=True, **cache, **kept)
        cache = {name: out[name] for name in ("past_key_values", "cache_params")  # Mamba's name
                 if name in out}
        if not cache:
            raise ValueError(f"{model.config.model_type} keeps no cache: choose another model")
        ended = advance([rows[b] for b in going_on], out.logits[going_on, -1], how)
        yield from ended
        going_on = [b for b in going_on if rows[b] not in ended]
        ids = torch.tensor([[row.token] for row in rows], device=model.device)


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


@torch.no_grad()
def sample_tokens(model, prompts, n=1, *, stops, max_new_tokens, temperature=0.8, top_p=0.95,
                  seed=0, keys=None, capacity=None, on_end=None, on_token=None,
                  skip_too_long=False):
    """n continuations of each prompt, token ids to token ids; the other settings as in `sample`.

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
    rows = [row for row in make_rows(prompts, n, [[uniforms(seed, key, number, max_new_tokens)
                                                   for number in range(n)] for key in keys])
            if samples[row.prompt][row.number] is None]
    longest = max((row.prompt_length for row in rows), default=0) + max_new_tokens
    config, size = model.config.get_text_config(), probe_sharing(base_model(model))
    shared = size is not None and longest <= rotation_limit(config)
    # Bytes of a token's keys and values, guessed for a model with a cache of its own kind.
    size = size or 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    wanted = min(capacity or sys.maxsize,
                 wanted_places(rows, max_new_tokens, model.device.type) if rows else 0)
    how = Drawing(stops, max_new_tokens, temperature, top_p, on_token)
    way = decode if shared else decode_plain
    with shared_prefix(base_model(model)) if shared else nullcontext(), \
            prepared(model, spare=cache_bytes(model) - wanted * size):
        capacity = capacity or cache_bytes(model) // size
        while rows := [row for row in rows if samples[row.prompt][row.number] is None]:
            try:
                for row in way(model, rows, how, capacity):
                    end(row.prompt, row.number, row.drawn)
            except RuntimeError as error:
                one_row = sum(longest_parts(rows, max_new_tokens))
                if not out_of_memory(error) or capacity < one_row:
                    raise
                capacity = min(capacity, wanted) // 2
                print("out of memory: sampling goes on with a cache half as large, "
                      f"{capacity} tokens", file=sys.stderr)
                for row in rows:  # those that have not ended begin again
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
    samples without tokens, cut off at once; else it raises PromptTooLong, before any is drawn. It
    raises ValueError for settings out of range.
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
