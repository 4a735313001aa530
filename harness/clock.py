"""How long a run will still take, from what it took so far."""
import time

from harness.settings import DIAGNOSED


def seconds_left(records, settings):
    """Seconds that the iterations to come will take if they are like the last one.

    Where the judge trains no longer, a few answers are compared instead of all.
    """
    last, taken, compared = (records[-1][name] for name in ("iteration", "seconds", "meta_judge"))
    saved = 0  # in each iteration that compares a few answers, if the last one compared all
    if compared and last <= settings.judge_iters:
        few = min(1, DIAGNOSED / max(1, compared["answers"]))
        saved = (1 - few) * taken.get("comparisons", 0)
    return sum(sum(taken.values()) - (saved if t > settings.judge_iters else 0)
               for t in range(last + 1, settings.iters + 1))


def clock(records, settings):
    """A line that says when the run will have ended; none before the first iteration has."""
    done = records[-1]["iteration"]
    if not 0 < done < settings.iters:
        return
    so_far = sum(sum(record["seconds"].values()) for record in records)
    left = seconds_left(records, settings)
    end = time.strftime("%a %H:%M", time.localtime(time.time() + left))
    yield (f"{done} of {settings.iters} iterations in {duration(so_far)}; at this pace "
           f"{duration(left)} are left, until {end}")


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
