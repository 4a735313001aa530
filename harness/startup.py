"""What comes before torch and transformers are imported, which takes seconds."""
import os
import signal
import sys

# Threads that wait give way: ten times faster beside another program, and no slower alone.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # of several processes one shows its bars


def begin(parse):
    """Let --help, mistakes in the command line and Ctrl-C end the program before the imports.

    parse: reads the command line. Raises ValueError or OSError for a mistake.
    """
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds; in a log, bars need not move
    try:
        parse()
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
