"""Kills runs with SIGKILL at random moments, and compares what they leave:

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 50

Small runs of the tiny world, as processes. Some are killed while they start or resume, the others a
random moment after they have written something; each is started again until it ends, and must then
have left the bytes of a run that nobody disturbed, timings aside. After every kill: no finished
line is gone, and no item stands twice in a file.
"""
import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("tests", ".")]
from test_run import command, differences, size, small, wait_until_it_writes


def newest(folder):
    """The file that was written last, as the name of what was under way."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not files:
        return "nothing yet"
    return max(files, key=lambda path: path.stat().st_mtime).name.replace(".part", "")


def check_lines(folder, known):
    """How many finished lines are gone, and how many items stand twice.

    known: {file: the lines that stood there before}, brought up to date.
    """
    gone = twice = 0
    for path in folder.rglob("*.jsonl"):
        lines = path.read_bytes().split(b"\n")[:-1]
        if path.name != "train.jsonl":  # steps after the last checkpoint are taken again
            gone += len(known.get(path, set()) - set(lines))
            known[path] = set(lines)
            items = [json.loads(line).get("id") for line in lines]
            twice += sum(count - 1 for item, count in Counter(items).items() if item is not None)
    return gone, twice


def main():
    parser = argparse.ArgumentParser(
        description="Kills runs with SIGKILL at random moments and compares what they leave.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    chance, where = random.Random(args.seed), Counter()
    kills = runs = gone = twice = 0
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        flags = small(folder)
        process = command([*flags, "--out", str(folder / "undisturbed")])
        _, err = process.communicate()
        assert process.returncode == 0, err
        while kills < args.kills:
            out, known = folder / f"run{runs}", {}
            runs += 1
            while True:
                before, start = size(out), time.monotonic()
                process = command([*flags, "--out", str(out)])
                resuming = chance.random() < 0.2
                if not resuming:
                    wait_until_it_writes(process, out, before)
                time.sleep(chance.uniform(0, 8 if resuming else 1))
                if kills == args.kills or process.poll() is not None:
                    _, err = process.communicate()
                    assert process.returncode == 0, err
                    break
                process.kill()
                process.communicate()
                kills += 1
                idle = size(out) <= before
                where["while it started or resumed" if idle else newest(out)] += 1
                lost = check_lines(out, known)
                gone, twice = gone + lost[0], twice + lost[1]
                print(f"kill {kills} after {time.monotonic() - start:.1f} s: {newest(out)}",
                      file=sys.stderr, flush=True)
            wrong += differences(folder / "undisturbed", out)
    print(f"{kills} kills of {runs} runs; lines lost {gone}, items twice {twice}, "
          f"files that differ in the end {len(wrong)} {' '.join(wrong)}")
    print("under way: " + ", ".join(f"{name} {count}" for name, count in where.most_common()))


if __name__ == "__main__":
    main()
