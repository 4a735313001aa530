"""How the time of each stage falls with the number of processes:

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --iters 2

Runs the tiny world as a user would, alone and under torchrun with two processes, each with one
thread, and reads the seconds off the runs' files. From these parts it works out what to expect of 8
and 64 processes at the paper's scale:
- a stage takes fixed + shared / P seconds; both follow from the two runs, and `shared` grows with
  the number of prompts;
- a stage ends when its slowest process does: items of the measured lengths are dealt out as
  `share` of harness/engine/processes.py does, and the longest hand counts;
- of a batch each process takes whole pairs, so that training is shared by no more processes than a
  batch has pairs.
Left out: what the network takes (one sum of the adapter's gradients per step), and that a GPU with
few rows computes less per second.
"""
import argparse
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from harness.files import read_jsonl
from harness.settings import Settings

PAPER = Settings(model="", out="")
FILES = {"answers": "responses.jsonl", "judgments": "judgments.jsonl",
         "comparisons": "battles.jsonl"}


def seconds(processes, out, flags):
    """Run with so many processes: seconds by stage, over all iterations."""
    shutil.rmtree(out, ignore_errors=True)
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    with open(f"{out}.log", "w") as log:
        subprocess.run([*program, "metareward.py", "--model", "tiny", "--out", out, *flags],
                       cwd=ROOT, check=True, stdout=log, stderr=log)
    total = Counter()
    for record in json.loads((Path(out) / "summary.json").read_text()):
        for stage, taken in record["seconds"].items():
            total[part(record["iteration"], stage)] += taken
    return total


def part(t, stage):
    """The row of the table that a stage of iteration t belongs to."""
    if stage.startswith("held-out") or stage == "judgments of replies ranked by people":
        return "measuring"
    return "warm start" if t == 0 else stage


def longest_hand(lengths, count, processes):
    """Tokens of the process with the most, by the mean, if items are dealt out in turn.

    lengths: of some items, of which `count` are drawn.
    """
    chance = random.Random(0)
    items = chance.choices(lengths, k=count)
    hands = [sum(items[i::processes]) for i in range(processes)]
    return max(hands) * processes / sum(hands)


def expected(stage, one, two, run, prompts):
    """(seconds that stay, seconds that are shared, {P: seconds}) of a stage at the paper's scale.

    one, two: seconds with one process and with two. run: the folder of the former.
    """
    fixed = max(0, 2 * two - one)
    grows = stage in FILES or stage == "training"
    factor = PAPER.prompts_per_iter / prompts if grows else 1
    shared, times, lengths = (one - fixed) * factor, {}, []
    if stage in FILES:
        lengths = [record["sampled_tokens"]
                   for record in read_jsonl(run / "iter1" / FILES[stage])]
    for P in (1, 8, 64):
        hand = longest_hand(lengths, round(len(lengths) * factor), P) if lengths else 1
        sharing = min(P, PAPER.batch_size) if stage == "training" else P
        times[P] = fixed + shared * hand / sharing
    return fixed, shared, times


def row(stage, one, two, fixed, shared, times):
    return (f"| {stage} | {one:.1f} | {two:.1f} | {one / two:.2f} | {fixed:.1f} | {shared:.0f} | "
            f"{times[1] / times[8]:.1f} | {times[1] / times[64]:.1f} |")


def main():
    parser = argparse.ArgumentParser(
        description="How the time of each stage falls with the number of processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--iters", default="4", help="iterations of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="where the runs go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    one, two = (seconds(n, (args.out / f"{n}").resolve(), ["--iters", args.iters])
                for n in (1, 2))
    config = json.loads((args.out / "1" / "config.json").read_text())
    prompts = config["settings"]["prompts_per_iter"]
    print("| stage | 1 process, s | 2 processes, s | ratio | fixed, s "
          "| shared, s, of the paper's prompts | 8: times faster | 64: times faster |")
    print("|" + "---|" * 8)
    all_fixed, all_shared, all_times = 0, 0, Counter()
    for stage in (stage for stage in one if one[stage] >= 1):
        fixed, shared, times = expected(stage, one[stage], two[stage], args.out / "1", prompts)
        all_fixed, all_shared = all_fixed + fixed, all_shared + shared
        all_times.update(times)
        print(row(stage, one[stage], two[stage], fixed, shared, times))
    print(row("all", one.total(), two.total(), all_fixed, all_shared, all_times))


if __name__ == "__main__":
    main()
