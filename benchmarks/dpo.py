"""dpo.py against TRL's DPOTrainer on a random Llama of 56 million parameters: `python
benchmarks/dpo.py` (needs requirements-dev.txt)

Same model, LoRA, pairs, dtype and threads, reference log-probabilities computed beforehand, an
optimizer step on four pairs. Each trainer is a process of its own; they step in turn, so that the
machine's moods meet both, and the median of --steps steps counts, after one to warm up. Peak memory
is that of the whole process. TRL gets every number of pairs per pass that divides a step, with and
without gradient checkpointing, two steps each, and is then measured with the fastest of these
settings; all of them are printed. The last table compares loss and gradient, fp32.
"""
import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging

from benchmarks.memory import peak_memory

logging.set_verbosity_error()
warnings.filterwarnings("ignore")
SEED, PAIRS, VOCABULARY = 0, 4, 32768
# tokens of the prompt and of 4 x 2 answers
WORKLOADS = {"judge": (600, [150] * 8), "actor": (60, [100, 357, 229, 400, 186, 143, 314, 271])}
# of TRL
SETTINGS = [(pairs, checkpointing) for pairs in (1, 2, 4) for checkpointing in (False, True)]


def llama():
    """8 layers of width 512, 8 heads, 2 of keys and values, 32,768 tokens, weights at random: 56.1
    million parameters, fp32.
    """
    torch.manual_seed(SEED)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408,
                         num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=2,
                         bos_token_id=None, eos_token_id=1)
    return LlamaForCausalLM(config).requires_grad_(False)


def pairs(workload):
    """Token ids as train_dpo takes them; every answer ends in the end token, 1."""
    rng = torch.Generator().manual_seed(SEED)
    prompt, answers = WORKLOADS[workload]

    def tokens(count):
        return torch.randint(3, VOCABULARY, (count,), generator=rng).tolist()
    return [{"prompt_ids": tokens(prompt), "chosen_ids": tokens(chosen - 1) + [1],
             "rejected_ids": tokens(rejected - 1) + [1]}
            for chosen, rejected in zip(answers[::2], answers[1::2])]


def our_model():
    from dpo import add_lora
    return add_lora(llama(), 16)


def trl_trainer(model, examples, folder, per_pass, checkpointing, steps, callback, bf16=False):
    """TRL's trainer on the same pairs, as texts of which its tokenizer makes the same tokens. A
    step takes all examples.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer
    words = {0: "<unknown>", 1: "<end>", 2: "<padding>"}
    tokenizer = Tokenizer(models.WordLevel({words.get(i, str(i)): i
                                            for i in range(model.config.vocab_size)},
                                           unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unknown>",
                                        eos_token="<end>", pad_token="<padding>")
    texts = [{"prompt": " ".join(map(str, pair["prompt_ids"])) + " ",
              "chosen": " ".join(map(str, pair["chosen_ids"][:-1])),
              "rejected": " ".join(map(str, pair["rejected_ids"][:-1]))} for pair in examples]
    settings = DPOConfig(
        output_dir=folder, use_cpu=model.device.type == "cpu", bf16=bf16, max_length=None,
        precompute_ref_log_probs=True, precompute_ref_batch_size=1,
        per_device_train_batch_size=per_pass, gradient_accumulation_steps=len(examples) // per_pass,
        gradient_checkpointing=checkpointing,
        max_steps=steps, save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no")
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear",
                      task_type="CAUSAL_LM")
    trainer = DPOTrainer(model=model, args=settings, processing_class=tokenizer,
                         train_dataset=Dataset.from_list(texts), peft_config=lora,
                         callbacks=[callback])
    if any(row[key] != pair[key] for row, pair in zip(trainer.train_dataset, examples)
           for key in ("prompt_ids", "chosen_ids", "rejected_ids")):
        raise RuntimeError("TRL trains on other tokens")
    return trainer


class Stepper(TrainerCallback):
    """Takes each step when a line comes in, and prints its seconds."""

    def on_step_begin(self, *args, **kwargs):
        print("ready", flush=True)
        sys.stdin.readline()
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        print(time.perf_counter() - self.start, flush=True)


def work(trainer, workload, per_pass, checkpointing, steps):
    """What a process does: so many steps, and its peak memory in bytes."""
    stepper = Stepper()
    with tempfile.TemporaryDirectory() as folder:
        if trainer == "TRL":
            trl_trainer(llama(), pairs(workload), folder, per_pass, bool(checkpointing), steps,
                        stepper).train()
        else:
            import dpo
            take_step = dpo.take_step

            def timed(*arguments):
                stepper.on_step_begin()
                figures = take_step(*arguments)
                stepper.on_step_end()
                return figures
            dpo.take_step = timed
            for _ in dpo.train_dpo(our_model(), pairs(workload), beta=0.1, epochs=steps,
                                   batch_size=PAIRS, lr=1e-6):
                pass
    print(peak_memory(), flush=True)


class Process:
    """A trainer that waits to be told to take a step."""

    def __init__(self, *arguments, threads):
        command = [sys.executable, __file__, "--threads", str(threads),
                   "--work", *map(str, arguments)]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True)

    def number(self):
        for line in self.process.stdout:
            if re.fullmatch(r"[0-9.]+(e-?\d+)?\n", line):
                return float(line)
        self.errors.seek(0)
        raise RuntimeError(f"a trainer died: "
                           f"{' '.join(self.process.args)}\n{self.errors.read()[-2000:]}")

    def step(self):
        """Seconds of one step."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.number()


def measured(*processes, steps):
    """Each process's seconds per step, taken in turn, without the first, and its peak memory."""
    seconds = [[process.step() for process in processes] for _ in range(steps + 1)][1:]
    return list(zip(*seconds)), [process.number() for process in processes]


def values(workload):
    """Loss and LoRA gradient of a policy that has left its reference, TRL's and ours: (losses,
    cosine, relative distance).
    """
    from dpo import dpo_loss, pair_logps, trainable
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(llama(), pairs(workload), folder, PAIRS, False, 1, Stepper())
    theirs = {name: weight for name, weight in trainer.model.named_parameters() if "lora_" in name
              and ".default." in name}
    model = our_model()
    columns = [[pair[key] for pair in pairs(workload)]
               for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
    with torch.no_grad():
        reference = pair_logps(model, *columns)
    ours = trainable(model)
    for name, weight in ours.items():
        weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
        theirs[name].data.copy_(weight)
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model,
                                    trainer.data_collator([trainer.train_dataset[i]
                                                           for i in range(PAIRS)]))
    expected_gradient = torch.cat([g.flatten()
                                   for g in torch.autograd.grad(expected,
                                                                [theirs[name] for name in ours])])
    loss = dpo_loss(*pair_logps(model.train(), *columns), *reference, beta=0.1)[0].mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(ours.values()))])
    distance = (gradient - expected_gradient).norm() / expected_gradient.norm()
    return loss.item(), expected.item(), F.cosine_similarity(gradient.double(),
                                                             expected_gradient.double(),
                                                             dim=0).item(), distance.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS),
                        help="which workloads")
    parser.add_argument("--steps", type=int, default=5, help="steps of each, the median counts")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--work", nargs=5, metavar="X",
                        help="be one of the processes: trainer, workload, pairs per pass, "
                             "checkpointing, steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.work:
        trainer, workload, *numbers = args.work
        return work(trainer, workload, *map(int, numbers))
    print(f"PyTorch {torch.__version__}, {args.threads} threads, "
          f"{sum(w.numel() for w in llama().parameters()) / 1e6:.1f} M parameters, fp32, "
          f"LoRA of rank 16, {PAIRS} pairs a step")
    for workload in args.only:
        tried, leanest = {}, float("inf")
        for per_pass, checkpointing in SETTINGS:
            (((seconds,),), (peak,)) = measured(Process("TRL", workload, per_pass,
                                                        int(checkpointing), 2,
                                                        threads=args.threads), steps=1)
            tried[per_pass, checkpointing], leanest = seconds, min(leanest, peak)
            print(f"  TRL, {workload} pairs, {per_pass} per pass, checkpointing "
                  f"{'on ' if checkpointing else 'off'}: {seconds:6.1f} s a step, "
                  f"{peak / 1e6:5.0f} MB", flush=True)
        best = min(tried, key=tried.get)
        (ours, theirs), peaks = measured(Process("ours", workload, 0, 0, args.steps + 1,
                                                 threads=args.threads),
                                         Process("TRL", workload, best[0], int(best[1]),
                                                 args.steps + 1, threads=args.threads),
                                         steps=args.steps)
        ratios = [b / a for a, b in zip(ours, theirs)]
        mine, other = statistics.median(ours), statistics.median(theirs)
        print(f"{workload} pairs: ours {mine:.2f} s a step, {PAIRS / mine:.2f} pairs/s, "
              f"{peaks[0] / 1e6:.0f} MB; TRL ({best[0]} per pass, "
              f"checkpointing {'on' if best[1] else 'off'}) {other:.2f} s a step, "
              f"{PAIRS / other:.2f} pairs/s, {peaks[1] / 1e6:.0f} MB")
        print(f"{workload} pairs: {other / mine:.2f}x the steps per second (lowest "
              f"{min(ratios):.2f}x, highest {max(ratios):.2f}x), "
              f"{peaks[0] / peaks[1]:.2f}x the memory ({peaks[0] / leanest:.2f}x that of TRL's "
              f"leanest setting)", flush=True)
    for workload in args.only:
        loss, expected, cosine, distance = values(workload)
        print(f"{workload} pairs: loss {loss:.7f}, TRL's {expected:.7f}, difference "
              f"{abs(loss - expected):.1e}; gradient: cosine {cosine:.9f}, "
              f"relative distance {distance:.1e}", flush=True)


if __name__ == "__main__":
    main()
