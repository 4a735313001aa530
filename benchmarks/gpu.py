"""What a GPU does with an 8B-shaped Llama-3 of random weights, in bfloat16 and in NF4: `python
benchmarks/gpu.py`

Prints the card, its bandwidth and matrix rate as measured; whether CUDA graphs draw what plain
steps draw and greedy answers are generate's; tokens per second on the judge's workload beside
transformers' generate, its continuous batching and the physical limit; how much a smaller card's
cache holds; whether packed pairs are separate sequences; memory and speed of DPO, its share of the
matrix rate, and the same on a card of 24 GB and for TRL, where it is installed. --small does it all
with a small model on any machine, to see that the script runs.
"""
import argparse
import gc
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
import sampling
from benchmarks.dpo import trl_trainer
from benchmarks.sampling import generate, ours
from dpo import activation_bytes, add_lora, free_memory, pair_logps, train_dpo, trainable

logging.set_verbosity_error()
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


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


def peak():
    if not CUDA:
        return "peak not measured"
    return f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def machine(small):
    """Bandwidth in bytes per second and matrix rate in FLOP per second, measured."""
    a = torch.zeros(2**24 if small else 2**30, device=DEVICE)
    m = torch.randn(512 if small else 8192, 512 if small else 8192, device=DEVICE,
                    dtype=torch.bfloat16)
    b = torch.empty_like(a)
    for _ in range(2):  # the second counts
        copying, _ = seconds(lambda: [b.copy_(a) for _ in range(10)])
        multiplying, _ = seconds(lambda: [m @ m for _ in range(10)])
    bandwidth, rate = 20 * a.numel() * 4 / copying, 20 * m.shape[0]**3 / multiplying
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{name}, PyTorch {torch.__version__}: {bandwidth / 1e9:,.0f} GB/s, {rate / 1e12:,.1f} "
          f"TFLOP/s in bfloat16", flush=True)
    return bandwidth, rate


def model_of(bits, small):
    """Llama-3-8B's shape, weights at random; bits 4: its linear layers in NF4, as transformers
    would load them.
    """
    torch.manual_seed(0)
    shape = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512,
             "num_hidden_layers": 2, "num_attention_heads": 4} if small else {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32}
    config = LlamaConfig(**shape, num_key_value_heads=shape["num_attention_heads"] // 4,
                         max_position_embeddings=8192, rope_theta=500000.0,
                         pad_token_id=0, bos_token_id=None, eos_token_id=None)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(dtype)
    model.eval().requires_grad_(False)
    # as sure of the next token as a trained model: else any nucleus is half the vocabulary
    model.lm_head.weight.mul_(8)
    if bits == 4:
        import bitsandbytes  # which --bits 16 does without
        for name, old in [(name, module) for name, module in model.named_modules()
                          if type(module) is torch.nn.Linear and name != "lm_head"]:
            new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=False,
                                             compute_dtype=torch.bfloat16, quant_type="nf4",
                                             device="meta")
            new.weight = bitsandbytes.nn.Params4bit(old.weight.data.cpu(), requires_grad=False,
                                                    quant_type="nf4", compress_statistics=True)
            new.support_avx512bf16_for_cpu = False
            model.set_submodule(name, new.to(DEVICE))
        # as transformers would say, so that PEFT takes its adapters for such layers
        model.is_loaded_in_4bit = True
        if CUDA:
            torch.cuda.empty_cache()
    return model


def tokens(model, count, length):
    torch.manual_seed(1)
    return torch.randint(100, model.config.vocab_size, (count, length)).tolist()


def check(model, small):
    """Draws with graphs against draws without; greedy answers against generate's, which rounding
    may part at some token.
    """
    prompts, stops = tokens(model, 6, 40), set(range(0, model.config.vocab_size, 50))

    def samples():
        return sampling.sample_tokens(model, prompts, 5, stops=stops, max_new_tokens=60,
                                      temperature=1.0)
    drawn = samples()
    sampling.uncapturable.add(model)
    plain = samples()
    sampling.uncapturable.discard(model)
    same = sum(a == b for x, y in zip(drawn, plain) for a, b in zip(x, y))
    greedy = [x[0] for x in sampling.sample_tokens(model, prompts, stops=(), max_new_tokens=30,
                                                   temperature=0)]
    ids = torch.tensor(prompts, device=DEVICE)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=30, pad_token_id=0)[:, 40:].tolist()
    agree = [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), 30)
             for x, y in zip(greedy, theirs)]
    print(f"  graphs and plain steps: {same} of 30 samples the same; greedy tokens until one "
          f"differs from generate's, of 30: {agree}", flush=True)


def continuous(model, prompts, n, new):
    """transformers' continuous batching."""
    settings = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95, top_k=0,
                                max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    out = model.generate_batch(inputs=[ids for ids in prompts for _ in range(n)],
                               generation_config=settings)
    drawn = sum(len(result.generated_tokens) for result in out.values())
    if drawn < len(prompts) * n * new:
        raise RuntimeError(f"it gave up after {drawn} tokens")
    return drawn


def speed(model, bandwidth, rate, small):
    """The judge's workload: 64 prompts of 900 tokens, 11 samples of 200 new tokens each. The limit
    is that of as many samples at once.

    generate has as many prompts as make four calls: more would only take longer.
    """
    count, length, n, new = (4, 60, 3, 8) if small else (64, 900, 11, 200)
    prompts, config = tokens(model, count, length), model.config
    figures = {}
    ours(model, prompts[:2], n, new, ())
    peers = {f"generate, {k * n} samples per call":
             lambda k=k: generate(model, prompts[: 4 * k], n, new, (), k * n) for k in (1, 4, 16)}
    for name, work in {"ours": lambda: ours(model, prompts, n, new, ()), **peers,
                       "generate_batch": lambda: continuous(model, prompts, n, new)}.items():
        try:
            took, drawn = seconds(work)
            figures[name] = drawn / took
            print(f"  {name:32}{drawn / took:10,.0f} tokens/s{took:8.1f} s   {peak()}", flush=True)
        except Exception as error:  # a peer that does not run is a result as well
            print(f"  {name:32}does not run: {type(error).__name__}: "
                  f"{str(error).splitlines()[0] if str(error) else ''}", flush=True)
    rows, drawn = min(count * n, sampling.ROWS[DEVICE]), count * n * new
    weights = sum(w.numel() * w.element_size() for name, w in model.named_parameters()
                  if "embed" not in name)
    token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    flops = 2 * sum(m.in_features * m.out_features for m in model.modules()
                    if isinstance(m, torch.nn.Linear))
    # a prompt needs the logits of its last token only
    body = flops - 2 * config.vocab_size * config.hidden_size
    terms = {"reading weights": drawn / rows * weights / bandwidth,
             "reading the cache": drawn * token * (new / 2 + length / n) / bandwidth,
             "arithmetic of drawing": drawn * flops / rate,
             "arithmetic of prompts": count * length * body / rate}
    reading, caching, drawing, prompting = terms.values()
    limit = drawn / (max(reading + caching, drawing) + prompting)
    best = max([1e-9, *(rate for name, rate in figures.items() if name != "ours")])
    print("  seconds at the least: "
          + ", ".join(f"{name} {value:.2f}" for name, value in terms.items()))
    mine = figures["ours"]
    print(f"  limit {limit:,.0f} tokens/s, of which ours is {mine / limit:.0%}; ours is "
          f"{mine / best:.1f}x the best peer", flush=True)


def smaller_cards(model, small):
    """The same on a card of 24 and of 80 GB: the rest of this one's memory is taken."""
    for size in (24, 80) if CUDA else ():
        ballast = None
        torch.cuda.empty_cache()
        try:
            rest = int(torch.cuda.mem_get_info()[1] - size * 1e9)
            ballast = torch.empty(rest, dtype=torch.uint8, device=DEVICE)  # noqa: F841
            prompts = tokens(model, 64, 900)
            capacity = sampling.cache_capacity(model)
            rows = sampling.make_rows(prompts, 11, [[None] * 11] * 64)
            took, drawn = seconds(lambda: ours(model, prompts, 11, 200, ()))
            print(f"  {size} GB: cache of {capacity:,} tokens, "
                  f"{sampling.slot_counts(rows, 200, capacity, sampling.ROWS['cuda'])[0]} rows, "
                  f"{drawn / took:,.0f} tokens/s", flush=True)
        except RuntimeError as error:
            print(f"  {size} GB: {str(error).splitlines()[0]}", flush=True)


def pairs(model, prompt, answer, count):
    """Token ids as train_dpo takes them, of different lengths: from these down."""
    columns = [[ids[: length - i % (length // 2)]
                for i, ids in enumerate(tokens(model, count, length))]
               for length in (prompt, answer, answer)]
    return [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row)) for row in zip(*columns)]


def packed(model, small):
    """Packed pairs on this device against separate sequences, float32 and bfloat16, a small model:
    log-probabilities and gradients.
    """
    prompts, chosen, rejected = [[5] * 70, [6, 7]], [[8] * 130, [9]], [[10, 11], [12] * 64]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=4096, hidden_size=256, intermediate_size=512,
                             num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2)
        other = add_lora(LlamaForCausalLM(config).to(DEVICE, dtype).requires_grad_(False),
                         4).train()
        weights = list(trainable(other).values())
        for weight in weights:
            torch.nn.init.normal_(weight, std=0.05)
        ours = torch.stack(pair_logps(other, prompts, chosen, rejected), 1).flatten()
        theirs = []
        for prompt, *answers in zip(prompts, chosen, rejected):
            for answer in answers:
                ids = torch.tensor([prompt + answer], device=DEVICE)
                logits = other(input_ids=ids).logits[0, len(prompt) - 1: -1].float()
                targets = torch.tensor(answer, device=DEVICE)[:, None]
                theirs.append(logits.log_softmax(-1).gather(-1, targets).sum())
        theirs = torch.stack(theirs)
        a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), weights)])
                for logps in (ours, theirs))
        print(f"  packed pairs, {dtype}: log-probabilities off by "
              f"{((ours - theirs) / theirs).abs().max().item():.1e}, "
              f"gradient by {((a - b).norm() / b.norm()).item():.1e} of its norm", flush=True)


def steps(model, examples):
    """Median seconds of DPO steps on all examples, the first left out; tokens of a step."""
    _, records = seconds(lambda: list(train_dpo(model, examples, beta=0.1, epochs=4,
                                                batch_size=len(examples), lr=1e-6)))
    records = [record for record in records if "step" in record][1:]
    return statistics.median(record["tokens"] / record["tokens_per_second"]
                             for record in records), records[0]["tokens"]


def dpo(model, bandwidth, rate, small):
    """Judge pairs of 900 + 2 x 200 tokens and actor pairs of 100 + 2 x 500, 16 a step."""
    flops = 2 * sum(m.in_features * m.out_features for name, m in model.named_modules()
                    if isinstance(m, torch.nn.Linear) and "lora" not in name
                    and "lm_head" not in name)
    head = 2 * model.config.vocab_size * model.config.hidden_size
    scale, a_step = (20, 4) if small else (1, 16)
    workloads = {"judge": (900, 200), "actor": (100, 500)}
    for name, (prompt, answer) in workloads.items():
        examples = pairs(model, prompt // scale, answer // scale, a_step)
        for size in (None, 24) if CUDA else (None,):
            torch.cuda.empty_cache()
            ballast = torch.empty(int(torch.cuda.mem_get_info()[1] - size * 1e9), dtype=torch.uint8,
                                  device=DEVICE) if size else None
            took, count = steps(model, examples)
            answers = sum(len(example["chosen_ids"]) + len(example["rejected_ids"])
                          for example in examples)
            # forward, and backward to what goes into frozen weights
            useful = 2 * (count * flops + answers * head)
            taken = 0 if ballast is None else ballast.numel()
            memory, budget = "peak not measured", "budget not measured"
            if CUDA:
                memory = f"peak {(torch.cuda.max_memory_allocated() - taken) / 1e9:.1f} GB"
                fits = 0.8 * free_memory() / activation_bytes(model)
                budget = f"{fits:,.0f} tokens fit"
            print(f"  DPO, {name} pairs of {prompt} + 2 x "
                  f"{answer}{f', {size} GB' if size else ''}: {len(examples) / took:.2f} pairs/s, "
                  f"{count / took:,.0f} tokens/s, {useful / took / rate:.0%} of the matrix rate, "
                  f"{memory}, {budget}", flush=True)
            del ballast
    peer = model.unload()
    peer.set_attn_implementation("sdpa")
    for name, (prompt, answer) in workloads.items():
        examples = pairs(peer, prompt // scale, answer // scale, a_step)
        for example in examples:
            example["chosen_ids"][-1] = example["rejected_ids"][-1] = 1
        for per_pass, checkpointing in ((1, False), (1, True), (4, True)):
            clock = Clock()
            peer.gradient_checkpointing_disable()  # TRL would only ever enable it
            try:
                with tempfile.TemporaryDirectory() as folder:
                    trainer = trl_trainer(peer, examples, folder, per_pass, checkpointing, 4, clock,
                                          bf16=CUDA)
                    seconds(trainer.train)
                    peer = trainer.model.unload()
                print(f"  TRL, {name} pairs, {per_pass} per pass, checkpointing "
                      f"{'on' if checkpointing else 'off'}: "
                      f"{len(examples) / statistics.median(clock.seconds[1:]):.2f} pairs/s, "
                      f"{peak()}", flush=True)
            except Exception as error:  # not installed, or out of memory
                print(f"  TRL, {name} pairs: does not run: {type(error).__name__}: "
                      f"{str(error).splitlines()[0] if str(error) else ''}", flush=True)


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true",
                        help="a small model on any machine: does the script run?")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 4], choices=[16, 4],
                        help="which precisions")
    args = parser.parse_args()
    if not (CUDA or args.small):
        parser.error("there is no CUDA GPU here; --small runs anywhere")
    limits = machine(args.small)
    for bits in args.bits:
        model = add_lora(model_of(bits, args.small), 16)  # a run samples with its adapter, too
        print(f"{bits} bits: " + (f"{torch.cuda.memory_allocated() / 2**30:.1f} GiB of weights"
                                  if CUDA else "on the CPU"), flush=True)
        for part, more in ((check, ()), (speed, limits), (smaller_cards, ()), (packed, ()),
                           (dpo, limits)):
            try:
                part(model, *more, args.small)
            except Exception:  # the other parts are still worth their time on the card
                traceback.print_exc()
        del model
        gc.collect()  # TRL leaves the model in a cycle
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
