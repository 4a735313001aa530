"""sampling.py against transformers' generate on a random Llama of 30 million parameters: `python
benchmarks/sampling.py`

The four workloads of a run, in shapes that fit a laptop: same model, dtype and threads, one
process, the two in alternation; the median of --runs runs in tokens per second, which counts the
tokens of each sample up to its end. generate gets every number of samples per call of BATCHES
(num_return_sequences where prompts repeat) on a quarter of the work, and then the fastest. Peak
memory is that of a fresh process which makes the model and runs the workload once: ours, generate
with its fastest batch, and generate with all samples in one call.
"""
import argparse
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.memory import peak_memory
from sampling import sample_tokens

logging.set_verbosity_error()
warnings.filterwarnings("ignore")
SEED = 0
# of 4,096 nearly equally likely tokens these end a sample: lengths are geometric with a mean of
# about 60
STOPS = list(range(68))
BATCHES = (16, 64, 256)   # samples per call that generate may choose from


def llama():
    """8 layers of width 512, 8 heads, 2 of keys and values, 4,096 tokens, weights at random: 29.9
    million parameters, fp32.
    """
    torch.manual_seed(SEED)
    config = LlamaConfig(vocab_size=4096, hidden_size=512, intermediate_size=1664,
                         num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=0,
                         bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tokens(count, length):
    """`count` random prompts of `length` token ids."""
    return torch.randint(100, 4096, (count, length)).tolist()


def workloads():
    """name -> (prompts, samples of each, most new tokens, tokens that end a sample)."""
    torch.manual_seed(SEED)
    answers = tokens(2, 700)
    return {"judge": (tokens(8, 600), 11, 64, []),
            "actor": (tokens(16, 60), 7, 256, STOPS),
            "meta-judge": ([shared + own for shared in answers for own in tokens(110, 200)], 1, 48,
                           []),
            "single": (tokens(1, 60), 1, 128, [])}


def ours(model, prompts, n, new, stops):
    return sum(len(ids) for samples in sample_tokens(model, prompts, n, stops=stops,
                                                     max_new_tokens=new) for ids in samples)


def generate(model, prompts, n, new, stops, batch):
    """transformers' own: `batch` samples per call, tokens after a sample's end not counted. All
    prompts of a workload are equally long.
    """
    count, per_call = 0, max(1, batch // n)
    for first in range(0, len(prompts), per_call):
        ids = torch.tensor(prompts[first: first + per_call], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True,
                             temperature=0.8, top_p=0.95, top_k=0, num_return_sequences=n,
                             max_new_tokens=new, eos_token_id=stops or None,
                             pad_token_id=0)[:, ids.shape[1]:]
        if stops:
            ends = torch.isin(out, torch.tensor(stops, device=model.device)).int()
            count += int(((ends.cumsum(-1) - ends) == 0).sum())
        else:
            count += out.numel()
    return count


def continuous(model, prompts, n, new, stops):
    """transformers' continuous batching; of samples of one length (no stops)."""
    settings = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95, top_k=0,
                                max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    out = model.generate_batch(inputs=[ids for ids in prompts for _ in range(n)],
                               generation_config=settings)
    drawn = sum(len(result.generated_tokens) for result in out.values())
    if drawn < len(prompts) * n * new:
        raise RuntimeError(f"it gave up after {drawn} tokens")
    return drawn


def rate(function, *arguments):
    start = time.perf_counter()
    count = function(*arguments)
    return count / (time.perf_counter() - start)


def best_batch(model, prompts, n, new, stops):
    """The samples per call with which generate is fastest, tried on a quarter of the prompts."""
    part = prompts[: -(-len(prompts) // 4)]
    sizes = sorted({min(size, n * len(prompts)) for size in BATCHES if size >= n})
    return max(sizes, key=lambda size: rate(generate, model, part if size <= n * len(part)
                                            else prompts, n, new, stops, size))


def peak(name, who, batch, threads):
    """Peak memory in bytes of a fresh process that runs the workload once."""
    command = [sys.executable, __file__, "--only", name, "--peak-of", who, "--batch", str(batch),
               "--threads", str(threads)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(workloads()), choices=list(workloads()),
                        help="which workloads")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, the median counts")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--beside", action="store_true", help="instead: the judge's work by ours "
                        "in float32 and in bfloat16, and a quarter of it by generate_batch")
    parser.add_argument("--peak-of", choices=["ours", "generate"],
                        help="print one workload's peak memory in bytes and nothing else")
    parser.add_argument("--batch", type=int, default=0,
                        help="samples per call of generate (0: the fastest is looked for)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = llama()
    if args.peak_of:
        work = workloads()[args.only[0]]
        ours(model, *work) if args.peak_of == "ours" else generate(model, *work, args.batch)
        return print(peak_memory())
    if args.beside:
        work, half = workloads()["judge"], llama().to(torch.bfloat16)
        for name, network in (("float32", model), ("bfloat16", half)):
            rates = [rate(ours, network, *work) for _ in range(args.runs)]
            print(f"ours, {name}: {statistics.median(rates):.0f} tokens/s", flush=True)
        print(f"generate_batch: {rate(continuous, model, work[0][:2], *work[1:]):.0f} tokens/s")
        return
    print(f"PyTorch {torch.__version__}, {args.threads} threads, "
          f"{sum(w.numel() for w in model.parameters()) / 1e6:.1f} M parameters, fp32")
    print(f"{'workload':12}{'ours':>12}{'generate':>12}{'ratio':>8}{'lowest, highest':>17}"
          f"{'batch':>8}{'peak: ours':>15}{'generate':>12}{'all at once':>18}")
    for name in args.only:
        work = workloads()[name]
        batch = args.batch or best_batch(model, *work)
        rates = [(rate(ours, model, *work), rate(generate, model, *work, batch))
                 for _ in range(args.runs)]
        mine, theirs = (statistics.median(column) for column in zip(*rates))
        ratios = [a / b for a, b in rates]
        whole = len(work[0]) * work[1]
        peaks = [peak(name, *which, args.threads) / 1e6
                 for which in (("ours", 0), ("generate", batch), ("generate", whole))]
        print(f"{name:12}{mine:8.0f} t/s{theirs:8.0f} t/s"
              f"{mine / theirs:7.2f}x{min(ratios):9.2f}x{max(ratios):7.2f}x{batch:8}"
              f"{peaks[0]:12.0f} MB{peaks[1]:9.0f} MB{peaks[2]:9.0f} MB{whole:6}", flush=True)


if __name__ == "__main__":
    main()
