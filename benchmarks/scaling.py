"""How the time of each stage falls with the number of processes: `OMP_NUM_THREADS=1 python benchmarks/scaling.py --processes 1 2`

Runs the tiny world as a user would, alone and under torchrun, each process with one thread, and reads the seconds off the runs' files.
"""
import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent


def seconds(processes, out, flags):
    """Seconds by stage, over all iterations."""
    shutil.rmtree(out, ignore_errors=True)
    program = [sys.executable] + (["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else [])
    with open(f"{out}.log", "w") as log:
        subprocess.run([*program, "metareward.py", "--model", "tiny", "--out", out, *flags], cwd=ROOT, check=True, stdout=log, stderr=log)
    total = Counter()
    for record in json.loads((Path(out) / "summary.json").read_text()):
        total.update(record["seconds"])
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many, one run each")
    parser.add_argument("--iters", default="4", help="iterations of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="where the runs go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [seconds(n, (args.out / f"{n}").resolve(), ["--iters", args.iters]) for n in args.processes]
    print("| stage | " + " | ".join(f"{n} processes, s" if n > 1 else "1 process, s" for n in args.processes) + " | ratio |")
    print("|" + "---|" * (len(runs) + 2))
    for stage in [*(stage for stage in runs[0] if runs[0][stage] >= 1), "all"]:
        times = [run.total() if stage == "all" else run[stage] for run in runs]
        print(f"| {stage} | " + " | ".join(f"{time:.1f}" for time in times) + f" | {times[0] / times[-1]:.2f} |")


if __name__ == "__main__":
    main()
