"""What `python eval.py` does: the command that is asked for."""
import os
import sys

from safetensors import SafetensorError

from harness.commands import compare, export, ifeval, judge, repeat
from harness.commands.flags import eval_parser
from harness.views import several_runs, story

COMMANDS = {"report": several_runs, "show": story, "compare": compare, "repeat": repeat,
            "ifeval": ifeval, "judge": judge, "export": export}


def main(argv=None):
    """argv: the command line, None for that of the process. Bad input is one line, and status 2."""
    try:
        args = eval_parser().parse_args(argv)
        COMMANDS[args.command].command(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is yet to flush
        sys.exit(141)  # as a shell says of a program that a closed pipe has ended
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
