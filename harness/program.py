"""The main command from outside: signals, exit statuses, last words, and torchrun's processes."""
import errno
import os
import re
import shlex
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
from safetensors import SafetensorError

from harness.engine.processes import rank, world
from harness.views.choice import choose
from harness.views.figures import untrained

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def as_program(argv):
    """Run the body as a command: bad input is one line and exit status 2, Ctrl-C is status 130.

    A run that ends early says how to go on. argv: the command line, None for that of the process.
    """
    planning = "--plan" in (sys.argv if argv is None else argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # what a scheduler sends is Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        join_processes()
        yield
    except KeyboardInterrupt:
        if rank() < 2:  # the second process speaks too, since the first may be the one that died
            print("\nstopped" + ("" if planning else f"; {goes_on(argv)}"), file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        where = f" in process {rank()}" if rank() > 0 else ""
        advice = ""
        if error_number(error) in UNWRITABLE and not planning:
            advice = f"; make room, or allow it to be written; {goes_on(argv)}"
        print(f"error{where}: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        lost = re.search("peer|pipe|connection|remote process", str(error), re.IGNORECASE)
        if world() == 1 or not lost:
            raise
        print("error: another process of this run has ended: if it says why, see to that first; "
              f"{goes_on(argv)}", file=sys.stderr)
        sys.exit(2)
    if world() > 1:
        torch.distributed.destroy_process_group()


def last_words(settings, records):
    """Say which model to take, and what to look at; end with exit status 3 if an iteration of a run
    trained on nothing.
    """
    out = settings.out
    chosen, lines = choose(out, records, settings.max_score)
    print(*lines, sep="\n", end="\n" * bool(lines))
    best = settings.iters if chosen is None else chosen
    print(f"Read {out}/report.html, or ask the model: python sampling.py "
          f"{shlex.quote(f'{out}/iter{best}')} \"How do I ...?\"")
    if idle := untrained(records):
        print(f"Iterations that trained on nothing, since no pairs came of them: "
              f"{', '.join(map(str, idle))}. What was dropped is in the report.")
        sys.exit(3)


def error_number(error):
    """The system's number of an error; safetensors has it in its text only."""
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"os error (\d+)", str(error))):
        number = int(match[1])
    return number


def goes_on(argv):
    """What a run that stopped says last: the command that goes on."""
    program = ["python"]
    if world() > 1:
        program = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    arguments = sys.argv if argv is None else ["metareward.py", *map(str, argv)]
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    same = "same command, on each machine," if several else "same command"
    return (f"what was finished is kept, and the {same} goes on where this one was: "
            f"{shlex.join([*program, *arguments])}")


def join_processes():
    """Under torchrun, work together with the other processes; only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
