"""Damages files of runs, and compares what the runs then leave with an undisturbed one:

    OMP_NUM_THREADS=1 python benchmarks/faults.py --faults 100

A small run of the tiny world is stopped at several moments. Of a copy, one file, half the time one
of the latest eight, is removed, emptied, cut at a random byte, or overwritten there with 60 others;
then the run is started again. It must
- make the damage good, and end with the bytes of a run that nobody disturbed, timings aside; or
- stop with one line that names the file, status 2, all other files as they were, and end rightly
  once the file is back; or
- end rightly but for that very file, where it belongs to a part that is finished and that later
  parts do not read.
Anything else is a failure, and so is a traceback. Of text, damage that leaves it well formed
(another number, another word) is not looked for.
"""
import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("tests", ".")]
from test_run import command, differences, size, small, wait_until_it_writes

NEVER = {"lock", "report.html"}  # hold nothing
# Each start writes these anew, config.json with the folder's name.
WRITTEN = {*NEVER, "seconds.json", "config.json"}


def snapshots(folder, flags, moments):
    """Copies of a run's folder at so many moments: it is killed, copied, and started again."""
    run, copies = folder / "stopped", []
    for moment in range(moments):
        before, process = size(run), command([*flags, "--out", str(run)])
        wait_until_it_writes(process, run, before)
        time.sleep(1)
        process.kill()
        process.communicate()
        copies.append(folder / f"moment{moment}")
        shutil.copytree(run, copies[-1])
    return copies


def damage(file, kind, chance):
    content = file.read_bytes()
    at = chance.randrange(len(content) or 1)
    if kind == "removed":
        file.unlink()
    elif kind == "emptied":
        file.write_bytes(b"")
    elif kind == "cut":
        file.write_bytes(content[:at])
    else:
        file.write_bytes(content[:at] + b"\xc3\x00{" * 20 + content[at + 60:])


def started(run, flags):
    """(status, lines of stderr less the progress bars) of a run that is started again."""
    process = command([*flags, "--out", str(run)])
    _, err = process.communicate()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    return process.returncode, [line for line in lines if "it/s" not in line and "|" not in line]


def contents(run):
    return {str(path.relative_to(run)): path.read_bytes()
            for path in run.rglob("*") if path.is_file()}


def whole(name, content):
    """What must be left of a file: if it was killed while it wrote a line, the lines before."""
    return content[: content.rfind(b"\n") + 1] if name.endswith(".jsonl") else content


def try_fault(number, seed, folder, flags, copies, reference):
    """One fault: (what was done, how it ended); "wrong: ..." if in none of the three ways."""
    chance, run = random.Random(f"{seed}/{number}"), folder / f"fault{number}"
    shutil.copytree(chance.choice(copies), run)
    before = contents(run)
    names = [name for name in before if Path(name).name not in NEVER]
    names.sort(key=lambda name: (run / name).stat().st_mtime)
    if chance.random() < 0.5:
        names = names[-8:]  # what was written last is what the run goes on from
    name = chance.choice(names)
    kind = chance.choice(["removed", "emptied", "cut", "overwritten"])
    damage(run / name, kind, chance)
    damaged = contents(run).get(name)
    status, said = started(run, flags)
    if status == 0:
        ended = after_success(name, run, reference, before, damaged)
    elif status == 2 and said and said[-1].startswith("error: "):
        ended = after_refusal(name, run, flags, reference, before, said[-1])
    else:
        ended = f"wrong: status {status}, {' / '.join(said[-2:])}"
    if not ended.startswith("wrong"):
        shutil.rmtree(run)
    return f"{name} {kind}", ended


def after_success(name, run, reference, before, damaged):
    """How it ended, if the run that was started again came to its end."""
    left = contents(run).get(name) == damaged
    if left:
        (run / name).write_bytes(before[name])
    wrong = differences(reference, run)
    if wrong:
        return f"wrong: differs in {' '.join(wrong)}"
    return "not read again" if left else "made good"


def after_refusal(name, run, flags, reference, before, line):
    """How it ended, if the run that was started again stopped with a line."""
    after = contents(run)
    touched = [other for other, content in before.items()
               if other != name and Path(other).name not in WRITTEN
               and not after.get(other, b"").startswith(whole(other, content))]  # more may follow
    (run / name).write_bytes(before[name])
    again, _ = started(run, flags)
    where = f"{Path(name).parent}" if "adapter" in name else name
    if where not in line:
        return f"wrong: not named by: {line}"
    if touched:
        return f"wrong: touched {' '.join(touched)}"
    if again != 0 or differences(reference, run):
        return "wrong: does not end rightly once the file is back"
    return "named"


def main():
    parser = argparse.ArgumentParser(
        description="Damages files of runs and compares what the runs then leave.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="how many")
    parser.add_argument("--moments", type=int, default=12,
                        help="at how many moments the run is stopped")
    parser.add_argument("--seed", type=int, default=0, help="of what is damaged, and how")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    flags, undisturbed = small(folder), folder / "undisturbed"
    process = command([*flags, "--out", str(undisturbed)])
    _, err = process.communicate()
    assert process.returncode == 0, err
    copies = [*snapshots(folder, flags, args.moments), undisturbed]
    ends = Counter()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(try_fault, i, args.seed, folder, flags, copies, undisturbed)
                for i in range(args.faults)]
        for number, job in enumerate(jobs):
            what, ended = job.result()
            ends[ended.partition(":")[0]] += 1
            print(f"{number}: {what}: {ended}", file=sys.stderr, flush=True)
    found = ", ".join(f"{ended} {count}" for ended, count in ends.most_common())
    print(f"{args.faults} faults: {found}")
    if not ends["wrong"]:
        shutil.rmtree(folder)
    sys.exit(bool(ends["wrong"]))


if __name__ == "__main__":
    main()
