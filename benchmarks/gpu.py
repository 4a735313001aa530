"""What a CUDA GPU does with this code: `python benchmarks/gpu.py`

Stages, the most important first; each is a process of its own under a time limit, and writes every
figure to OUT/gpu.jsonl at once, so that nothing is lost where it is cut. The same command goes on
with what is missing; --tables prints what is there as Markdown. The models have random weights in
Llama-3's shape, but for --model. --small does it all with small models on any machine, to see that
the script runs.

    correct    what is computed on CUDA against a CPU in float32; ways of ours against each other
    tiny       the tiny world, killed once on its way
    real       benchmarks/real_model.py with --model, a folder
    nf4, bf16  sampling and DPO of a model of 8B in these
    shared     from where on attention to shared prefixes pays
    host       what Python does in a step
    plan       what --plan says of the paper's schedule, with --model
"""
import argparse
import contextlib
import gc
import io
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import transformers.utils

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a package nobody needs
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TrainerCallback,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dpo
import sampling
from benchmarks.dpo import trl_trainer
from benchmarks.sampling import continuous, generate, ours
from harness.engine import adapters, passes
from harness.engine.weights import expanded_bytes
from sampling import (
    Batch,
    Group,
    Pass,
    Pool,
    StepGraphs,
    Stretches,
    sample_tokens,
    uncapturable,
)

transformers.utils.logging.set_verbosity_error()
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LIMITS = {"correct": 150, "tiny": 400, "real": 600, "nf4": 200, "bf16": 150, "shared": 60,
          "host": 60, "plan": 120}  # seconds


# ---- measuring

def seconds(work):
    """How long work() takes, and what it returns."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak(taken=0):
    """Most memory held since `seconds` began, in GB of 1e9 bytes, beside what was `taken`."""
    return round((torch.cuda.max_memory_allocated() - taken) / 1e9, 2) if CUDA else None


@contextmanager
def card_of(size=None, free=None):
    """A card of `size` GB, or with `free` GB left: the rest is taken. How many bytes that is."""
    gc.collect()
    taken = 0
    if CUDA:
        torch.cuda.empty_cache()
        left, whole = torch.cuda.mem_get_info()
        taken = int(left - free * 1e9 if free else whole - size * 1e9 if size else 0)
        if not 0 <= taken < left:
            raise MemoryError(f"{(whole - left) / 1e9:.1f} GB are in use")
    ballast = torch.empty(taken, dtype=torch.uint8, device=DEVICE)
    yield taken
    del ballast


def machine(small):
    """Bandwidth in bytes per second and matrix rate in FLOP per second, measured."""
    a = torch.zeros(2**24 if small else 2**30, device=DEVICE)
    m = torch.randn(512 if small else 8192, 512 if small else 8192, device=DEVICE,
                    dtype=torch.bfloat16)
    b = torch.empty_like(a)
    for _ in range(2):  # the second counts
        copying, _ = seconds(lambda: [b.copy_(a) for _ in range(10)])
        multiplying, _ = seconds(lambda: [m @ m for _ in range(10)])
    return 20 * a.numel() * 4 / copying, 20 * m.shape[0]**3 / multiplying


# ---- models and data

def random_llama(small):
    """Llama-3-8B's shape, weights at random, in bfloat16."""
    torch.manual_seed(0)
    shape = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512,
             "num_hidden_layers": 2, "num_attention_heads": 4} if small else {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32}
    config = LlamaConfig(**shape, num_key_value_heads=shape["num_attention_heads"] // 4,
                         max_position_embeddings=8192, rope_theta=500000.0,
                         pad_token_id=0, bos_token_id=None, eos_token_id=None)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    # as sure of the next token as a trained model: else any nucleus is half the vocabulary
    model.requires_grad_(False).lm_head.weight.mul_(8)
    return model.eval()


def quantized(model):
    """A model with its linear layers in NF4, as transformers would load them."""
    import bitsandbytes
    for name, old in [(name, module) for name, module in model.named_modules()
                      if type(module) is torch.nn.Linear and name != "lm_head"]:
        new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=False,
                                         compute_dtype=model.dtype, quant_type="nf4", device="meta")
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False,
                                                quant_type="nf4", compress_statistics=True)
        new.support_avx512bf16_for_cpu = False
        model.set_submodule(name, new.to(DEVICE))
    # as transformers would say, so that PEFT takes its adapters for such layers
    model.is_loaded_in_4bit = True
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return model


def big(bits, small):
    """What a run samples from and trains: a random Llama with an adapter that does something."""
    model = random_llama(small)
    return with_adapter(quantized(model) if bits == 4 else model, 16)


def with_adapter(model, rank):
    model = dpo.add_lora(model, rank)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-3)
    return model.eval()


def tokens(model, count, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, model.config.vocab_size, (count, length),
                         generator=generator).tolist()


def pairs(model, prompt, answer, count):
    """Token ids as train_dpo takes them, of different lengths: from these down."""
    columns = [[ids[: length - i % (length // 2)]
                for i, ids in enumerate(tokens(model, count, length, seed))]
               for seed, length in enumerate((prompt, answer, answer))]
    return [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row)) for row in zip(*columns)]


# ---- correct

def small_models():
    """{name: model on a CPU in float32}: full attention, windows, and the tiny world's."""
    shape = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512,
             "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
             "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**shape))
    mistral = MistralForCausalLM(MistralConfig(**shape, sliding_window=24))
    for model in (llama, mistral):
        model.lm_head.weight.data.mul_(8)
    tiny = AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    return {"Llama": llama, "windows": mistral, "tiny world": tiny}


def same(a, b):
    """The share of samples that are the same."""
    rows = [(x, y) for p, q in zip(a, b) for x, y in zip(p, q)]
    return round(sum(x == y for x, y in rows) / len(rows), 3)


def draws(model):
    """Samples of prompts that share a beginning, and of others; some end early."""
    common = tokens(model, 1, 60)[0]
    prompts = [common + own for own in tokens(model, 12, 20)] + tokens(model, 6, 40, seed=2)
    stops = set(range(0, model.config.vocab_size, 50))
    return sample_tokens(model, prompts, 5, stops=stops, max_new_tokens=60, temperature=1.0)


@contextmanager
def plain_steps(model):
    """Without CUDA graphs."""
    uncapturable.add(model)
    try:
        yield
    finally:
        uncapturable.discard(model)


def greedy_agreement(model):
    """Greedy tokens until one differs from generate's, of 30: rounding may part them."""
    prompts = tokens(model, 6, 40)
    mine = sample_tokens(model, prompts, stops=(), max_new_tokens=30, temperature=0)
    ids = torch.tensor(prompts, device=DEVICE)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            eos_token_id=None, max_new_tokens=30, pad_token_id=0)[:, 40:].tolist()
    return [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), 30)
            for (x,), y in zip(mine, theirs)]


def answer_figures(model, examples):
    """Log-probabilities of pairs, and the gradient of their sum."""
    weights = list(dpo.trainable(model).values())
    logps = torch.cat(dpo.logps_of(model, examples))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), weights)])
    return logps.detach().cpu().double(), gradient.cpu().double()


def off(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def correct(note, args):
    for name, model in small_models().items():
        model = with_adapter(model.requires_grad_(False), 4)
        examples = pairs(model, 70, 50, 6)
        on_cpu, reference = draws(model), answer_figures(model, examples)
        for form in ("float32", "bfloat16", "NF4"):
            model = model.to(DEVICE, torch.float32 if form == "float32" else torch.bfloat16)
            for weight in dpo.trainable(model).values():
                weight.data = weight.data.float()
                weight.requires_grad_(False)
            if form == "NF4":
                model = with_adapter(quantized(model.unload()), 4)
            drawn = draws(model)
            with plain_steps(model):
                plain = draws(model)
            figures = {"graphs and plain steps": same(drawn, plain),
                       "again": same(drawn, draws(model)),
                       "greedy until it differs from generate's": greedy_agreement(model)}
            logps, gradient = answer_figures(model, examples)
            if form != "float32":
                with adapters.lean_layers(model, norms=True):
                    figures["gradient by lean layers off PEFT's, of its norm"] = off(
                        answer_figures(model, examples)[1], gradient)
            if form == "NF4":
                with not_expanded():
                    figures["expanded and not"] = same(drawn, draws(model))
            else:
                figures["draws as on a CPU in float32"] = same(drawn, on_cpu)
                with piecewise():
                    by_pieces = answer_figures(model, examples)[1]
                figures |= {
                    "gradient off that of attention piece by piece, of its norm":
                        off(gradient, by_pieces),
                    "log-probabilities off, nats": (logps - reference[0]).abs().max().item(),
                    "gradient off, of its norm": off(gradient, reference[1])}
            note(f"{name}, {form}", **figures)
    note("FlashAttention's kernel off plain attention", **kernel_figures())
    model = small_models()["Llama"].to(DEVICE, torch.bfloat16).requires_grad_(False)
    note("the head's product", **head_figures(model))
    for work in (failed_capture, halved_cache, smaller_passes) if CUDA else ():
        note(work.__name__.replace("_", " "), **work())


def kernel_figures():
    """The largest differences, over stretches in no order, one inside another, and empty ones."""
    torch.manual_seed(0)
    places, figures = 4000, {}
    keys, values = (torch.randn(2, places, 128, device=DEVICE).bfloat16().transpose(0, 1)
                    for _ in range(2))
    if not sampling.has_kernel(keys):
        return {"this machine": "has no such kernel"}
    for kind, most, window in (("own", 1, None), ("own", 1, 60), ("own", 50, None),
                               ("own", 50, 60), ("prefix", 30, None), ("prefix", 30, 60)):
        counts = torch.randint(1, most + 1, (40,))
        length = torch.randint(0, 300, (40,)) * (torch.rand(40) > 0.2) + counts * (kind == "own")
        begin = torch.randint(0, places - 350, (41,))
        of = torch.arange(40).repeat_interleave(counts)
        at = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        seat = length[of] + torch.arange(len(of)) - at[of] - counts[of] * (kind == "own")
        before = [x[of] * (kind == "prefix") for x in (begin, length)]
        at, begin, length, seat, *before = (x.int().to(DEVICE)
                                            for x in (at, begin, length, seat, *before))
        query = torch.randn(len(of), 8, 128, device=DEVICE).bfloat16()
        part, pool = Stretches(at, most, begin, length), Pool(places, 350)
        pool.now = Pass(None, seat, part if kind == "own" else None,
                        part if kind == "prefix" else None, before)
        (out, total), (plain, plain_total) = (
            see(*(x.to(dtype) for x in (query, keys, values)), pool, part, 0.1, window)
            for see, dtype in ((sampling.kernel_attention, torch.bfloat16),
                               (sampling.plain_attention, torch.float32)))
        blind = plain_total.isinf()[..., 0]
        figures[f"{kind}, {most} a stretch, window {window}"] = {
            "output": (out - plain)[~blind].abs().max().item(),
            "log": (total - plain_total)[~blind].abs().max().item(),
            "blind alike": bool((total.isinf()[..., 0] == blind).all()),
            "finite": bool(out.isfinite().all())}
    return figures


def piecewise():
    """Training attends to a row's prompts and answers one after the other, without the kernel."""
    return mock.patch.object(dpo, "has_kernel", lambda query: False)


def by_peft():
    """Training takes LoRA layers as PEFT computes them, and norms as transformers does."""
    return mock.patch.object(passes, "lean_layers", lambda model, norms: nullcontext())


@contextmanager
def not_expanded():
    """4-bit weights stay as they are."""
    before = sampling.prepared
    sampling.prepared = lambda model, **_: before(model)
    try:
        yield
    finally:
        sampling.prepared = before


def head_figures(model):
    """How far log-probabilities are from those of the same hidden states in float32, in nats."""
    hidden = torch.randn(2000, model.config.hidden_size, device=DEVICE).bfloat16()
    head, ids = model.lm_head, torch.arange(2000, device=DEVICE)
    exact = (hidden.double() @ head.weight.double().T).log_softmax(-1).gather(-1, ids[:, None])
    figures = {}
    for name, logits in {"product in bfloat16": head(hidden),
                         "as we do": dpo.head_product(head, hidden)}.items():
        got = dpo.normalized(logits).gather(-1, ids[:, None])
        figures[f"{name}: off by (root mean square)"] = (got - exact).pow(2).mean().sqrt().item()
    return figures


def failed_capture():
    """A layer that asks for a number, as no graph can: what comes after?"""
    model = with_adapter(small_models()["Llama"].to(DEVICE, torch.bfloat16)
                         .requires_grad_(False), 4)
    expected = draws(model)
    layer = sampling.base_model(model).model.layers[1]
    hook = layer.register_forward_hook(lambda module, given, out: (out, given[0].sum().item())[0])
    drawn, known = draws(model), model in uncapturable
    hook.remove()
    torch.cuda.empty_cache()
    torch.randn(3, device=DEVICE)
    other = small_models()["Llama"].to(DEVICE, torch.bfloat16)
    draws(other)
    gc.collect()
    torch.cuda.empty_cache()
    kept = [segment for segment in torch.cuda.memory_snapshot()
            if segment["segment_pool_id"] != (0, 0)]
    return {"draws": same(drawn, expected), "said so": known,
            "another model's graphs": other not in uncapturable,
            "bytes kept by graphs": sum(segment["total_size"] for segment in kept)}


def halved_cache():
    """Sampling with a cache that does not fit into 0.25 GB of free memory."""
    model = small_models()["Llama"].to(DEVICE)
    prompts = tokens(model, 300, 400)

    def work(capacity=None):
        return sample_tokens(model, prompts, 2, stops=(), max_new_tokens=30, temperature=1.0,
                             capacity=capacity)
    expected = work()
    said = io.StringIO()
    with card_of(free=0.25), contextlib.redirect_stderr(said):
        drawn = work(capacity=2**20)
    return {"draws": same(drawn, expected), "said": said.getvalue().splitlines()}


def smaller_passes():
    """Training where a pass as large as planned does not fit."""
    model = with_adapter(small_models()["Llama"].to(DEVICE, torch.bfloat16)
                         .requires_grad_(False), 4)
    examples, figures = pairs(model, 400, 300, 16), {}
    for name, free in {"as planned": passes.free_memory, "too hopeful": lambda: 10**12}.items():
        said = io.StringIO()
        with mock.patch.object(passes, "free_memory", free), card_of(free=0.35), \
                contextlib.redirect_stderr(said):
            records = list(dpo.train_dpo(model, [dict(e) for e in examples], beta=0.1, epochs=1,
                                         batch_size=16, lr=0.0))
        figures[f"loss, {name}"] = records[0]["loss"]
        figures[f"said, {name}"] = [line for line in said.getvalue().splitlines()
                                    if line.startswith("out of")]
    return figures


# ---- tiny, real, plan

def tiny(note, args):
    """The tiny world, killed in its second iteration and gone on with."""
    out = args.out / "tiny"
    small = ["--prompts-per-iter", "12", "--iters", "2", "--judgments", "3", "--epochs", "1"]
    command = [sys.executable, str(ROOT / "metareward.py"), "--model", "tiny", "--out", str(out),
               *(small if args.small else [])]
    start = time.perf_counter()
    with open(args.out / "tiny.log", "a") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log)
        while first.poll() is None and not (out / "iter2" / "responses.jsonl").exists():
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        subprocess.run(command, stdout=log, stderr=log, check=True)
    records = json.loads((out / "summary.json").read_text())
    note("tiny world", **{
        "true score": [round(record["actor"]["truth"], 2) for record in records],
        "judge right": [round(record["judge"]["truth_agreement"], 3) for record in records],
        "seconds": round(time.perf_counter() - start)})


def real(note, args):
    """Reward by the truth, and the whole method after the warm start."""
    for kinds in (["checks", "control"], ["judge", "no-meta-judge"]):
        done = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / "real_model.py"), "--model", args.model,
             "--out", str(args.out / "real"), "--seeds", "0", "--kinds", *kinds],
            stdout=subprocess.PIPE, text=True)
        note(" and ".join(kinds), printed=done.stdout.splitlines())


def plan(note, args):
    """--plan of the paper's schedule on this card, and on smaller ones."""
    for size in (None, 80, 24) if CUDA else (None,):
        try:
            with card_of(size):
                done = subprocess.run([sys.executable, str(ROOT / "metareward.py"), "--plan",
                                       "--model", args.model], stdout=subprocess.PIPE, text=True)
            note(f"{size or 'all'} GB", printed=done.stdout.splitlines())
        except MemoryError as error:  # a smaller card
            note(f"{size} GB", error=str(error))


# ---- sampling

def matrix_flops(model, without=()):
    """FLOP of a token's matrix products, but for layers whose names have one of these in them."""
    return 2 * sum(m.in_features * m.out_features for name, m in model.named_modules()
                   if hasattr(m, "in_features") and not hasattr(m, "base_layer")
                   and not any(part in name for part in without))


def limit(model, prompts, n, new, bandwidth, rate):
    """Tokens per second at most, with as many rows as ours has at once, and what takes the time."""
    config, drawn = model.config, len(prompts) * n * new
    rows, length = min(len(prompts) * n, sampling.ROWS[DEVICE]), len(prompts[0])
    weights = sum(w.numel() * w.element_size() for name, w in model.named_parameters()
                  if "embed" not in name)
    token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    flops = matrix_flops(model)
    body = flops - 2 * config.vocab_size * config.hidden_size  # a prompt needs one token's logits
    terms = {"reading weights": drawn / rows * weights / bandwidth,
             "reading the cache": drawn * token * (new / 2 + length / n) / bandwidth,
             "arithmetic of drawing": drawn * flops / rate,
             "arithmetic of prompts": len(prompts) * length * body / rate}
    reading, caching, drawing, prompting = terms.values()
    terms = {name: round(value, 3) for name, value in terms.items()}
    return drawn / (max(reading + caching, drawing) + prompting), terms


def eight_billion(note, args, bits):
    """Sampling and DPO; then the peers."""
    bandwidth, rate = machine(args.small)
    note("card", bandwidth_GB_s=round(bandwidth / 1e9), TFLOP_s=round(rate / 1e12, 1))
    model = big(bits, args.small)
    draw(note, args, model, bandwidth, rate)
    train(note, args, model, rate)
    sampling.base_model(model).set_attn_implementation("sdpa")
    for samples in (176, 44):
        draw_by(note, f"generate, {samples} samples a call", judge_work(args, model, samples // 11),
                lambda *work, samples=samples: generate(model, *work, (), samples))
    model = train_by_trl(note, args, model)
    if bits == 16:
        draw_by(note, "generate_batch", judge_work(args, model, 16),
                lambda *work: continuous(model, *work, ()))


def judge_work(args, model, count=64):
    """`count` prompts of 900 tokens, 11 samples of each, 200 new tokens."""
    return (tokens(model, 4, 45), 11, 10) if args.small else (tokens(model, count, 900), 11, 200)


def draw(note, args, model, bandwidth, rate):
    """The three roles' work, on this card and on one of 24 GB."""
    scale = 20 if args.small else 1
    first = tokens(model, 2, 1200 // scale)
    meta = [ids + own for ids in first for own in tokens(model, 110 // scale, 300 // scale)]
    works = {"judge": judge_work(args, model), "meta-judge": (meta, 1, 100 // scale),
             "actor": (tokens(model, 96 // scale, 100 // scale), 7, 300 // scale)}
    ours(model, *judge_work(args, model, 2)[:2], 8, ())
    for name, (prompts, n, new) in works.items():
        most, terms = limit(model, prompts, n, new, bandwidth, rate)
        with count_captures() as captures:
            took, drawn = seconds(lambda: ours(model, prompts, n, new, ()))
        note(f"{name}, ours", tokens_s=round(drawn / took), seconds=round(took, 2), peak_GB=peak(),
             limit_tokens_s=round(most), of_limit=round(drawn / took / most, 3),
             captures=len(captures), capturing_s=round(sum(captures), 2), at_the_least_s=terms)
    note("a step of the judge's work", **step_figures(model, works["judge"]))
    if any(expanded_bytes(module, model.dtype) for module in model.modules()):
        with not_expanded():
            took, drawn = seconds(lambda: ours(model, *judge_work(args, model), ()))
        note("judge, ours, weights not expanded", tokens_s=round(drawn / took), peak_GB=peak())
    try:
        with card_of(24 if CUDA else None) as taken:
            took, drawn = seconds(lambda: ours(model, *judge_work(args, model, 24), ()))
            note("judge, ours, 24 GB", tokens_s=round(drawn / took), peak_GB=peak(taken))
    except (RuntimeError, MemoryError) as error:
        note("judge, ours, 24 GB", error=str(error).splitlines()[0])


def step_figures(model, work):
    """Milliseconds of a step with as many rows as there are at once, and what takes them."""
    rows = sampling.ROWS[DEVICE]
    prompts, n, new = work[0][:-(-rows // work[1])], work[1], min(work[2], 60)

    def step(begin=new // 3):
        took = [seconds(lambda: ours(model, prompts, n, steps, ()))[0] for steps in (begin, new)]
        return round((took[1] - took[0]) / (new - begin) * 1e3, 2)
    figures = {"ms": step()}
    with model.disable_adapter():
        figures["without the adapter"] = step()
    logits = 8 * torch.randn(min(rows, len(prompts) * n), model.config.vocab_size, device=DEVICE)
    uniform = torch.rand(len(logits), device=DEVICE)
    took, _ = seconds(lambda: [sampling.draw(logits, uniform, 0.8, 0.95) for _ in range(10)])
    figures["drawing"] = round(took * 100, 2)
    figures["ms of the whole, prompts included, by kernel"] = by_kernel(
        lambda: ours(model, prompts, n, new, ()))
    return figures


def by_kernel(work, most=12):
    """Milliseconds of the kernels that take the most time of a piece of work."""
    kinds = [torch.profiler.ProfilerActivity.CUDA if CUDA else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        work()
    spent = Counter()
    for event in profile.key_averages():
        took = event.self_device_time_total if CUDA else event.self_cpu_time_total
        spent[event.key.removeprefix("void ")[:110]] += took / 1e3
    return {name: round(took, 1) for name, took in spent.most_common(most)}


def draw_by(note, peer, work, draw):
    try:
        took, drawn = seconds(lambda: draw(*work))
        note(f"judge, {peer}", tokens_s=round(drawn / took), peak_GB=peak())
    except Exception as error:  # a peer that does not run is a result as well
        note(f"judge, {peer}", error=f"{type(error).__name__}: {error}".splitlines()[0])


@contextmanager
def count_captures():
    """A list that will hold the seconds of each graph's capture."""
    taken, before = [], StepGraphs.capture

    def timed(self, forward):
        start = time.perf_counter()
        graph = before(self, forward)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        return graph
    StepGraphs.capture = timed
    yield taken
    StepGraphs.capture = before


def shared(note, args):
    """One layer of 8B's shape at a step of 704 rows: groups of n samples with prefixes of P tokens,
    as ours attends to them, and with each row's prefix read for itself.
    """
    heads, of_keys, width = (4, 1, 64) if args.small else (32, 8, 128)
    for prefix in (16, 64) if args.small else (128, 512, 2048):
        for n in (1, 7, 11, 110):
            rows = 16 if args.small else 704
            groups, own = -(-rows // n), 100
            rows = groups * n
            members = [Group([0] * prefix, 1 + rows * own + g * prefix) for g in range(groups)]
            pool = Pool(1 + rows * own + groups * prefix, prefix + own)
            batch = SimpleNamespace(device=torch.device(DEVICE), pool=pool)
            numbers, shape = Batch.lay(batch, [([0], 1 + b * own, own - 1, members[b // n])
                                               for b in range(rows)])
            Batch.run(batch, lambda **_: None, torch.from_numpy(numbers).to(DEVICE), shape)
            query, key, value = (torch.randn(rows, h, width, device=DEVICE).bfloat16()
                                 for h in (heads, of_keys, of_keys))
            ours = step_time(lambda: sampling.attend(query, key, value, pool, 0, 0.1, None))
            whole = torch.randn(2, rows, of_keys, prefix + own, width, device=DEVICE).bfloat16()
            mask = torch.zeros(rows, 1, 1, prefix + own, device=DEVICE).bfloat16()
            theirs = step_time(lambda: torch.nn.functional.scaled_dot_product_attention(
                query.view(rows, of_keys, heads // of_keys, width), *whole, attn_mask=mask))
            note(f"{groups} groups of {n}, prefix of {prefix}",
                 times_as_fast=round(theirs / ours, 2), ours_us=round(ours * 1e6))


def host(note, args):
    """What Python does in a step of 704 rows, beside the forward pass and the drawing."""
    model, rows, drawing = small_models()["Llama"].to(DEVICE), 704, [0]
    logits = 8 * torch.randn(rows, model.config.vocab_size, device=DEVICE)

    def timed(*arguments, draw=sampling.draw):
        took, tokens = seconds(lambda: draw(*arguments))
        drawing[0] += took
        return tokens

    def others(steps):
        drawing[0] = 0
        took, _ = seconds(lambda: ours(model, tokens(model, rows // 11, 20), 11, steps, ()))
        return took - drawing[0]
    sampling.probe_sharing(model)  # its probe needs true logits
    Batch.step = lambda self, shape: logits[: shape.T]
    sampling.draw, sampling.ROWS[DEVICE] = timed, rows
    uncapturable.add(model)
    others(10)
    note("Python in a step of 704 rows", ms=round((others(200) - others(100)) * 10, 2))


def step_time(work):
    """Median seconds of work() in a CUDA graph, where there is CUDA."""
    run = work
    for _ in range(3):
        work()
    if CUDA:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        run = graph.replay
    return statistics.median(seconds(run)[0] for _ in range(10))


# ---- training

def pair_works(args):
    """Judge pairs of 900 + 2 x 200 tokens and actor pairs of 100 + 2 x 500, and how many a step."""
    return ({"judge": (45, 10), "actor": (10, 25)}, 4) if args.small else (
        {"judge": (900, 200), "actor": (100, 500)}, 16)


def train(note, args, model, rate):
    """DPO on this card and on one of 24 GB."""
    flops = matrix_flops(model, without=("lora", "lm_head"))
    head = 2 * model.config.vocab_size * model.config.hidden_size
    works, a_step = pair_works(args)
    ways = {"": nullcontext, ", piece by piece": piecewise, ", PEFT's layers": by_peft}
    for size, label in [*((None, label) for label in ways), *[(24, "")] * CUDA]:
        for kind, (prompt, answer) in works.items():
            name = f"{kind} pairs, {size or 'all'} GB{label}"
            examples = pairs(model, prompt, answer, a_step)
            answers = sum(len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in examples)
            try:
                with card_of(size) as taken, ways[label]():
                    took, count = steps(model, examples)
            except (RuntimeError, ValueError, MemoryError) as error:
                note(name, error=str(error).splitlines()[0])
                continue
            # forward, and backward to what goes into frozen weights
            useful = 2 * (count * flops + answers * head)
            note(name, pairs_s=round(a_step / took, 2),
                 tokens_s=round(count / took), of_matrix_rate=round(useful / took / rate, 3),
                 peak_GB=peak(taken))
    examples = pairs(model, *works["judge"], a_step)
    dpo.reference(model, examples)
    note("judge pairs, ms of three steps by kernel",
         **by_kernel(lambda: steps(model, examples), 20))


def train_by_trl(note, args, model):
    """TRL's DPO: the model without its adapter is what is left."""
    peer = model.unload()
    works, a_step = pair_works(args)
    examples = pairs(peer, *works["judge"], a_step)
    for example in examples:
        example["chosen_ids"][-1] = example["rejected_ids"][-1] = 1
    for per_pass, checkpointing in ((1, False), (4, True)):
        name, clock = f"judge pairs, TRL, {per_pass} a pass", Clock()
        peer.gradient_checkpointing_disable()  # TRL would only ever enable it
        try:
            with tempfile.TemporaryDirectory() as folder:
                trainer = trl_trainer(peer, examples, folder, per_pass, checkpointing, 3, clock,
                                      bf16=CUDA)
                seconds(trainer.train)
                peer = trainer.model.unload()
            note(name, checkpointing=checkpointing, peak_GB=peak(),
                 pairs_s=round(a_step / statistics.median(clock.seconds[1:]), 2))
        except Exception as error:  # not installed, or out of memory
            note(name, error=f"{type(error).__name__}: {error}".splitlines()[0])
    return peer


def steps(model, examples):
    """Median seconds of DPO steps on all examples, the first left out; tokens of a step."""
    _, records = seconds(lambda: list(dpo.train_dpo(model, examples, beta=0.1, epochs=3,
                                                    batch_size=len(examples), lr=1e-6)))
    records = [record for record in records if "step" in record][1:]
    return statistics.median(record["tokens"] / record["tokens_per_second"]
                             for record in records), records[0]["tokens"]


class Clock(TrainerCallback):
    """Seconds of each of TRL's steps."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        if CUDA:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


# ---- the stages

STAGES = {"correct": correct, "tiny": tiny, "real": real,
          "nf4": lambda note, args: eight_billion(note, args, 4),
          "bf16": lambda note, args: eight_billion(note, args, 16), "shared": shared,
          "host": host, "plan": plan}


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def end_with_parent(parent):
    """Nothing of a stage goes on when the process that began it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def do(stage, args):
    """Run a stage, and write down each figure."""
    threading.Thread(target=end_with_parent, args=[os.getppid()], daemon=True).start()
    card = torch.cuda.get_device_name() if CUDA else "CPU"

    def note(name, **figures):
        line = {"stage": stage, "name": name, "card": card, "torch": torch.__version__,
                "date": str(date.today()), "small": args.small, **figures}
        with open(args.out / "gpu.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{stage}: {name}: {', '.join(f'{key} {value}' for key, value in figures.items())}",
              flush=True)

    took, _ = seconds(lambda: STAGES[stage](note, args))
    note("done", seconds=round(took, 1))


def table(lines):
    """What was measured, as Markdown."""
    last = {(line["stage"], line["name"]): line for line in lines}  # a stage may have been cut
    for stage in dict.fromkeys(stage for stage, _ in last):
        mine = [line for (of, _), line in last.items() if of == stage]
        yield f"\n{stage}: {mine[0]['card']}, PyTorch {mine[0]['torch']}, {mine[0]['date']}\n"
        yield "| what | figures |"
        yield "|---|---|"
        for line in mine:
            left_out = ("stage", "name", "card", "torch", "date", "small")
            figures = [f"{key.replace('_', ' ')} {value}" for key, value in line.items()
                       if key not in left_out]
            yield f"| {line['name']} | {'; '.join(figures)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="where figures go")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), help="these stages")
    parser.add_argument("--minutes", type=float, default=60, help="for all of it")
    parser.add_argument("--model", help="a model folder or a hub name, for the stage real")
    parser.add_argument("--small", action="store_true",
                        help="small models on any machine: does the script run?")
    parser.add_argument("--tables", action="store_true", help="print what was measured")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "gpu.jsonl"
    if args.tables:
        return print("\n".join(table(records(file))))
    if args.stage:
        return do(args.stage, args)
    if not (CUDA or args.small):
        parser.error("there is no CUDA GPU here; --small runs anywhere")
    end = time.monotonic() + 60 * args.minutes
    done = {line["stage"] for line in records(file) if line["name"] == "done"}
    for stage in args.only or STAGES:
        left = min(LIMITS[stage], end - time.monotonic())
        why_not = ("is done" if stage in done else "no time left" if left < 5 else
                   "needs --model" if stage in ("real", "plan") and not args.model else None)
        if why_not:
            print(f"{stage}: {why_not}", flush=True)
            continue
        command = [sys.executable, __file__, "--stage", stage, *sys.argv[1:]]
        child = subprocess.Popen(command, start_new_session=True)
        try:
            child.wait(timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{stage}: cut after {left:.0f} seconds", flush=True)
        finally:
            with contextlib.suppress(ProcessLookupError):  # and what it has started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


if __name__ == "__main__":
    main()
