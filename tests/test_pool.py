"""The sampler's pool, its two kinds of attention, and the rows under way, on a CPU.

`kernel` below says in a loop what FlashAttention's kernel is documented and was seen to do, and NaN
where that leaves its output unwritten: so the numbers that a card gets are held here too.
`benchmarks/gpu.py --only correct` holds the kernel itself to the plain attention.
"""
import functools
import gc
import math
import random
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, FUZZ, PROMPTS, greedy_ids, random_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config

import harness.engine.plain_attention
import sampling
from sampling import (
    Batch,
    CannotCapture,
    Chat,
    Pass,
    Pool,
    Shape,
    StepGraphs,
    Stretches,
    kernel_attention,
    make_rows,
    plain_attention,
    shared_groups,
    shared_prefix,
    uncapturable,
)


def kernel(query, keys, values, at, begin, most, longest, dropout, causal, debug, *, scale,
           window_size_left, window_size_right, seqused_k):
    """torch.ops.aten._flash_attention_forward of sequences of several lengths."""
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (at, begin, seqused_k))
    assert len(at) == len(begin) == len(seqused_k) + 1 and (at.diff() >= 0).all()
    assert most > 1 or len(at) - 1 == len(query), "it would swap heads and queries"
    assert query.shape[-1] == keys.shape[-1] == values.shape[-1] and query.stride(-1) == 1
    assert at.diff().max() <= most and seqused_k.max() <= longest and (dropout, causal) == (0.0, 0)
    out = torch.full_like(query, math.nan)
    total = torch.full((query.shape[1], len(query)), math.nan, dtype=query.dtype)
    h = query.shape[1] // keys.shape[1]
    for i, length in enumerate(seqused_k.tolist()):
        for t in range(at[i], at[i + 1]):
            here = length - (at[i + 1] - t)  # the query's own place, if it is one of the last
            first = max(0, here - window_size_left) if window_size_left >= 0 else 0
            last = here + 1 + window_size_right if window_size_right >= 0 else length
            k, v = (x[begin[i] + first: begin[i] + max(first, last)].repeat_interleave(h, 1)
                    for x in (keys, values))
            scores = torch.einsum("hd,khd->hk", query[t], k) * scale
            total[:, t] = scores.logsumexp(-1) if len(k) else math.inf
            out[t] = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
    return out, total, None, None, None


@pytest.fixture(params=["plain", "plain, score by score", "kernel"])
def attention(request, monkeypatch):
    """Each way in which attention is computed: on a CPU, on older cards, on newer ones."""
    if request.param == "kernel":
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
        monkeypatch.setattr(sampling, "has_kernel", lambda query: True)
    if request.param == "plain, score by score":
        monkeypatch.setattr(harness.engine.plain_attention, "FUSED", math.inf)
    return kernel_attention if request.param == "kernel" else plain_attention


# ---- 1. attention to stretches

def int32(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("kind", ["own", "prefix"])
@pytest.mark.parametrize("begin", [[40, 3, 7, 4], [1, 16, 31, 46]])  # the second needs no copy
def test_stretches_are_attended_to_as_by_hand(attention, window, kind, begin):
    """Out of order, one inside another, empty, and with no queries; softmax by hand."""
    at, length = [0, 1, 4, 4, 9], [7, 5, 0, 12]
    if kind == "prefix":
        length[0] = 0
    torch.manual_seed(0)
    query, keys, values = (torch.randn(n, heads, 8, dtype=torch.float64)
                           for n, heads in ((9, 4), (60, 2), (60, 2)))
    of = np.repeat(range(4), np.diff(at))
    seat = [length[i] + (t - at[i + 1] if kind == "own" else t - at[i]) for t, i in enumerate(of)]
    part, pool = Stretches(int32(at), 5, int32([*begin, 0]), int32(length)), Pool(60, 50)
    before = int32([begin[i] for i in of]), int32([length[i] for i in of])
    if kind == "own":
        before = int32([0] * 9), int32([0] * 9)
    pool.now = Pass(None, int32(seat), part, None, before)
    if kind == "prefix":
        pool.now.own, pool.now.prefix = None, part
    out, total = attention(query, keys, values, pool, part, 0.3, window)
    for t, i in enumerate(of):
        last = min(length[i], seat[t] + 1)
        first = max(0, seat[t] + 1 - window) if window else 0
        if first >= last:
            assert (total[t] == -math.inf).all() and out[t].isfinite().all()
            continue
        k, v = (x[begin[i] + first: begin[i] + last].repeat_interleave(2, 1)
                for x in (keys, values))
        scores = torch.einsum("hd,khd->hk", query[t], k) * 0.3
        torch.testing.assert_close(total[t, :, 0], scores.logsumexp(-1), rtol=0, atol=1e-9)
        torch.testing.assert_close(out[t], torch.einsum("hk,khd->hd", scores.softmax(-1), v),
                                   rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prefill", [2048, 1])
@pytest.mark.parametrize("capacity", [10**9, 200])
def test_logits_over_shared_prefixes_are_exact(name, prefill, capacity, tiny, attention,
                                               monkeypatch):
    """float64 to 1e-9, for all tokens of rows that come, go and are moved. Any mistake of mask,
    position or grouping is at least 1e-3.
    """
    monkeypatch.setitem(sampling.PREFILL_TOKENS, "cpu", prefill)
    config_class, settings = FAMILIES[name]
    model = random_model(config_class, tiny[1], dtype=torch.float64, **settings)
    prompts = [Chat(tiny[1]).prompt(text) for text in PROMPTS]
    rows = make_rows(prompts, 2, [[None] * 2] * len(prompts))
    groups = len({row.group for row in rows})
    assert 1 < groups < len(prompts), "some prompts must share a prefix and some must not"
    got, most, began = {row: [] for row in rows}, 0, {}
    moved = False
    with torch.no_grad(), shared_prefix(model):
        batch = Batch(model, rows, 6, capacity)
        batch.admit()
        while batch.rows:
            most = max(most, len(batch.rows))
            for row, logits in zip(list(batch.rows), batch.logits()):
                began.setdefault(row, row.begin)
                got[row].append(logits)
                row.drawn.append(10 * row.prompt + len(row.drawn))
                if len(row.drawn) == 2 + row.prompt % 5:
                    batch.leave(row)
            batch.admit()
            moved |= any(row.begin < began.get(row, 0) for row in batch.rows)
    assert (most < len(rows)) == (capacity == 200), "the second must let rows in one by one"
    assert moved, "the last rows must close the gaps of others"
    for row, logits in got.items():
        with torch.no_grad():
            plain = model(input_ids=torch.tensor([prompts[row.prompt]
                                                  + row.drawn])).logits[0, -len(logits) - 1: -1]
        assert len(logits) == 2 + row.prompt % 5
        assert torch.allclose(torch.stack(logits), plain, rtol=0, atol=1e-9)


def as_on_cuda(batch, shape, step=Batch.step):
    """A step whose shape is that of a graph: empty pieces, and the longest that there may be."""
    return step(batch, shape._replace(P=shape.P and shape.T, longest_piece=32))


def test_what_fills_a_graph_changes_nothing(llama, attention, monkeypatch):
    """Rows beyond those under way, and pieces without rows."""
    prompts = [Chat(llama[1]).prompt(text) for text in PROMPTS]
    settings = {"stops": {2}, "max_new_tokens": 8, "temperature": 0}
    expected, counts = sampling.sample_tokens(llama[0], prompts, 3, **settings), []
    monkeypatch.setattr(Batch, "step", as_on_cuda)
    monkeypatch.setattr(Batch, "rounded", lambda self, count: counts.append(count)
                        or min(self.most, -(-count // 4) * 4))
    assert sampling.sample_tokens(llama[0], prompts, 3, **settings) == expected
    assert any(count % 4 for count in counts)


def test_nothing_is_copied_for_rows_of_one_length(llama, monkeypatch):
    """Seven samples of each of 30 prompts: all that a step attends to is a view of the pool."""
    layout, copied = harness.engine.plain_attention.Layout, []
    rectangle = layout.rectangle
    monkeypatch.setattr(layout, "rectangle", lambda self, whole: copied.append(
        not self.view) or rectangle(self, whole))
    monkeypatch.setitem(sampling.ROWS, "cpu", 70)
    prompts = [[5, 6, 7, 8, 9 + i] for i in range(30)]
    monkeypatch.setattr(sampling, "shared_groups",
                        lambda prompts, n: [([i], 4) for i in range(len(prompts))])
    sampling.sample_tokens(llama[0], prompts, 7, stops={2}, max_new_tokens=12, temperature=1.0)
    assert copied and sum(copied) < 0.1 * len(copied)  # prefixes, when few groups are left


@pytest.mark.parametrize("n", [1, 2])
def test_a_long_prompt_does_not_pad_the_short_ones(llama, n, monkeypatch):
    """One of 80 tokens among 60 of 5: what is copied and computed stays within twice what is there.
    """
    layout, padded, needed = harness.engine.plain_attention.Layout, [0], [0]
    made = layout.__init__

    def count(self, stretches, *rest):
        made(self, stretches, *rest)
        padded[0] += self.query.shape[0] * (self.size[1] + self.query.shape[1])
        _, queries, _, length = stretches
        needed[0] += (length + queries).sum()
    monkeypatch.setattr(layout, "__init__", count)
    prompts = [[5, 6, 7, 8, 9 + i] for i in range(60)] + [list(range(5, 85))]
    drawn = sampling.sample_tokens(llama[0], prompts, n, stops={2}, max_new_tokens=6)
    assert padded[0] < 2.5 * needed[0]
    assert drawn[-1] == sampling.sample_tokens(llama[0], prompts[-1:], n, stops={2},
                                               max_new_tokens=6, keys=[60])[0]


def test_places_are_wanted_for_what_can_be_there(monkeypatch):
    """One prompt of 7,000 tokens among 1,000 of 101: not 512 times its size."""
    prompts = [[i] * 101 for i in range(1000)] + [[5] * 7000]
    rows = make_rows(prompts, 1, [[None]] * len(prompts))
    assert sampling.wanted_places(rows, 300, "cuda") == 1 + 511 * 401 + 7300


# ---- 2. the pool, and who stands in it

def test_a_pool_gives_what_it_has():
    """2,000 stretches taken and given back, from both ends: no place is lost or held twice."""
    rng, pool, held = random.Random(0), Pool(500, 60), {}
    for _ in range(2000):
        if held and rng.random() < 0.5:
            begin = rng.choice(list(held))
            pool.give_back(begin, held.pop(begin))
        else:
            size = rng.randint(1, 60)
            begin = pool.take(size, last=rng.random() < 0.5)
            if begin:
                held[begin] = size
            else:
                assert all(free < size for _, free in pool.free)
        places = [p for b, s in [*held.items(), *pool.free] for p in range(b, b + s)]
        assert sorted(places) == list(range(1, 500))
    for begin, size in held.items():
        pool.give_back(begin, size)
    assert pool.free == [(1, 499)]
    assert pool.take(9) == 1 and pool.take(9, last=True) == 491


token_lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)
nested = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2), st.integers(1, 6)), min_size=1,
                  max_size=8).map(
    # long common beginnings
    lambda parts: [[7] * shared + [other] * own for shared, other, own in parts])


@FUZZ
@given(token_lists | nested, st.integers(1, 4))
def test_groups_cover_the_prompts_in_order(prompts, n):
    """Every prompt once and in order; the shared part is a true prefix of each and never its last
    token; sharing never stores more.
    """
    groups = shared_groups(prompts, n)
    assert [i for members, _ in groups for i in members] == list(range(len(prompts)))
    for members, shared in groups:
        assert all(prompts[i][:shared] == prompts[members[0]][:shared] and shared < len(prompts[i])
                   for i in members)
    stored = sum(shared + n * sum(len(prompts[i]) - shared for i in members)
                 for members, shared in groups)
    assert stored <= sum(len(ids) - 1 + n for ids in prompts)


def test_comparisons_of_one_answer_share_their_beginning():
    """Twelve prompts of 100 shared and 10 own tokens: one group, 220 tokens to store instead of
    1320.
    """
    prompts = [[1] * 100 + [2 + i] * 10 for i in range(12)]
    assert shared_groups(prompts, 1) == [(list(range(12)), 100)]


def bookkeeping(rows, new, capacity, most, device="cpu"):
    """A Batch without a model: who stands where, and nothing is computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sampling.ROWS, device, most)
        patch.setattr(torch, "zeros", lambda *size, **kwargs: None)
        batch = Batch(SimpleNamespace(device=torch.device(device)), rows, new, capacity)
    batch.prefill = lambda parts: None
    return batch


@FUZZ
@given(token_lists | nested, st.integers(1, 4), st.integers(1, 5), st.integers(1, 80),
       st.integers(1, 6), st.randoms(use_true_random=False), st.sampled_from(["cpu", "cuda"]))
def test_every_sample_gets_places_of_its_own(prompts, n, new, capacity, most, rng, device):
    """Prefix and own tokens make the prompt. No two stretches meet, a prefix stays while it is
    needed, at least one row is under way, and in the end all places are free.
    """
    rows = make_rows(prompts, n, [range(n)] * len(prompts))
    batch, seen = bookkeeping(rows, new, capacity, most, device), []
    assert batch.pool.places <= max(capacity, 1 + sum(sampling.longest_parts(rows, new)))
    while True:
        batch.admit()
        if not batch.rows:
            break
        assert len(batch.rows) <= most
        held = [(row.begin, row.size) for row in batch.rows] + [
            (group.begin, group.size) for group in {row.group for row in batch.rows} if group.begin]
        places = [p for begin, size in held for p in range(begin, begin + size)]
        assert len(set(places)) == len(places) and 0 < min(places) <= max(places) < \
            batch.pool.places
        for row in batch.rows:
            assert row.group.prefix + row.own == prompts[row.prompt] and row.own
            assert row.size >= len(row.own) + new and row.group.size >= len(row.group.prefix)
            assert bool(row.group.begin) == bool(row.group.prefix)
        for row in rng.sample(batch.rows, rng.randint(1, len(batch.rows))):
            batch.leave(row)
            seen.append((row.prompt, row.number))
    assert sorted(seen) == [(i, number) for i in range(len(prompts)) for number in range(n)]
    assert batch.pool.free == [(1, batch.pool.places - 1)]


def test_a_few_long_prompts_do_not_make_the_others_places_large():
    """Four of 1000 tokens among a hundred of 10: when the four have ended, the hundred go together.
    """
    prompts = [[1] * 10] * 50 + [[2] * 1000] * 4 + [[3] * 10] * 50
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "shared_groups",
                      lambda prompts, n: [([i], 0) for i in range(len(prompts))])
        batch = bookkeeping(make_rows(prompts, 1, [[None]] * 104), 10, 4041, 256)
    batch.admit()
    assert {row.prompt for row in batch.rows} == {50, 51, 52, 53}
    for row in list(batch.rows):
        batch.leave(row)
    batch.admit()
    assert len(batch.rows) == 100


@FUZZ
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_gaps_are_closed_from_behind(stays):
    """What is left stands without a gap, each row where it was or before that."""
    rows = make_rows([[1]] * len(stays), 1, [[None]] * len(stays))
    batch = bookkeeping(rows, 3, 10**6, 256)
    batch.admit()
    before = {row: row.begin for row in rows}
    for row, stay in zip(rows, stays):
        if not stay:
            batch.leave(row)
    batch.admit()
    begins = sorted(row.begin for row in batch.rows)
    assert begins == [1 + 4 * i for i in range(sum(stays))]
    assert all(row.begin <= before[row] for row in batch.rows)


# ---- 3. graphs

def test_counts_are_rounded_up_on_cuda_alone():
    batch = bookkeeping(make_rows([[1]] * 1000, 1, [[None]] * 1000), 1, 10**6, 1000, "cuda")
    assert [batch.rounded(count) for count in (1, 2, 3, 4, 5, 7, 9, 13, 97, 512, 700, 900)] == [
        1, 2, 3, 4, 6, 8, 12, 16, 128, 512, 768, 1000]
    batch.device = torch.device("cpu")
    assert batch.rounded(65) == 65


class FakeCuda:
    """What StepGraphs uses of torch.cuda: a graph replays what ran while it was captured."""

    def __init__(self, monkeypatch):
        self.pools, self.captured, self.running = [], 0, []
        for name, value in {"CUDAGraph": self.graph_class, "graph_pool_handle": lambda: "pool",
                            "stream": lambda stream: nullcontext(), "graph": self.graph,
                            "current_stream": lambda: None}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool",
                            lambda device, pool: self.pools.append(pool), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool",
                            lambda device, pool: self.pools.append("released"), raising=False)

    def graph_class(self):
        return SimpleNamespace(replay=lambda: self.running.append("replay"))

    @contextmanager
    def graph(self, graph, pool=None):
        self.running.append("capture")
        yield
        self.captured += 1


TWO_ROWS = Shape(T=2, N=2, P=0, longest=1, longest_piece=32)


def test_a_shape_is_captured_once_and_replayed(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    graphs = StepGraphs(3)
    for _ in range(2):
        got = graphs.replay(TWO_ROWS, lambda: torch.arange(8.0).view(2, 4))
        assert torch.equal(got, torch.arange(8.0).view(2, 4))
    assert cuda.running == ["capture", "replay", "replay"] and not cuda.pools


@pytest.mark.parametrize("error, raised", [
    (RuntimeError("operation not permitted"), CannotCapture),
    (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError)])
def test_a_capture_that_fails_leaves_nothing_capturing(error, raised, monkeypatch):
    """PyTorch itself goes on to allocate in the graph's pool, and to draw as if in a capture."""
    cuda, calls = FakeCuda(monkeypatch), []

    def forward():
        calls.append(1)
        if len(calls) == 2:  # the first is before the capture
            raise error
        return torch.zeros(2, 4)
    with pytest.raises(raised):
        StepGraphs(3).replay(TWO_ROWS, forward)
    assert cuda.pools == ["pool", "released"]
    assert cuda.captured == 1  # of next to nothing: it ends the one that failed


def test_a_model_that_cannot_be_captured_is_told_once(monkeypatch, capsys):
    model, logits = torch.nn.Linear(1, 1), torch.zeros(2, 4)
    monkeypatch.setattr(StepGraphs, "replay", lambda *args: (_ for _ in ()).throw(
        CannotCapture("it asks for a number")))
    for _ in range(2):
        assert StepGraphs(3).run(model, TWO_ROWS, lambda: logits) is logits
    assert capsys.readouterr().err.count("without CUDA graphs, which is slower: it asks") == 1
    assert model in uncapturable


def test_a_models_graphs_go_with_its_batch(llama, monkeypatch):
    """By counting references. Graphs that garbage collection finds while another is captured spoil
    that one.
    """
    FakeCuda(monkeypatch)
    monkeypatch.setattr(Batch, "step", lambda self, shape: torch.zeros(2, 4))
    rows = make_rows([[1, 2, 3]], 2, [[np.zeros(4, dtype=np.float32)] * 2])
    gc.disable()
    try:
        batch = Batch(llama[0], rows, 4, 1000)
        batch.graphs.replay(TWO_ROWS, functools.partial(batch.step, TWO_ROWS))
        gone = weakref.ref(batch.graphs)
        del batch
        assert gone() is None
    finally:
        gc.enable()


def test_a_graph_reads_what_was_put_in_after_it_was_captured(llama):
    """All that differs between steps of one shape stands in one buffer, which is never replaced:
    the same call, after other rows were laid out, gives their logits.
    """
    prompts = [[1, 5, 6, 7, 8, i] for i in (9, 10)]
    rows = make_rows(prompts, 2, [[None] * 2] * 2)
    with torch.no_grad(), shared_prefix(llama[0]):
        batch = Batch(llama[0], rows, 4, 10**6)
        batch.admit()
        where = batch.numbers.data_ptr()
        first = batch.logits()
        numbers, shape = batch.lay([([r.token], r.begin, r.length, r.group) for r in batch.rows])
        for row in batch.rows:
            row.drawn.append(3 + row.number)
        second = batch.logits()
        assert batch.numbers.data_ptr() == where and not torch.equal(first, second)
        batch.numbers[:, : shape.T + 1] = torch.from_numpy(numbers)
        assert torch.equal(batch.step(shape), first)


# ---- 4. models that it does not fit

def test_values_of_another_width_are_sampled_plainly(tiny, capsys):
    """DeepSeek-V3's: no kernel takes them, and what it raises is no CannotShare."""
    model = random_model(DeepseekV3Config, tiny[1], q_lora_rank=8, kv_lora_rank=8,
                         qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, head_dim=8,
                         n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                         first_k_dense_replace=1, n_group=1, topk_group=1, num_key_value_heads=4)
    prompts = [[1, 5, 6, 7], [1, 5, 9]]
    drawn = sampling.sample_tokens(model, prompts, stops={*model.generation_config.eos_token_id},
                                   max_new_tokens=6, temperature=0)
    assert "values of another width" in capsys.readouterr().err
    assert drawn == [[greedy_ids(model, ids, 6)] for ids in prompts]
