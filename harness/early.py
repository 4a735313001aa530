"""What must be set before torch and transformers are imported, which takes seconds."""
import os
import signal
import sys

# Threads that wait give way: ten times faster beside another program, and no slower alone.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # of several processes one shows its bars


def quiet_interrupt():
    """Let Ctrl-C during the imports end the program without a traceback."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
