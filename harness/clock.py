"""How long a run will still take, from what it took so far."""
import time

from harness.settings import DIAGNOSED

LONG = 60  # seconds of a stage after which the screen says when the run will have ended


def expected(records, settings, forecast=None):
    """{stage: seconds} of each iteration, 0 first, or None where nothing tells it.

    What was measured if it was; else what the last iteration took; else what the forecast says.
    Where the judge trains no longer, a few answers are compared instead of all.
    """
    told = [None] * (settings.iters + 1)
    for t, stages in enumerate(forecast or []):
        told[t] = {stage: seconds for stage, (seconds, _) in stages.items()}
    for record in records:
        told[record["iteration"]] = record["seconds"]
    if not records or records[-1]["iteration"] == 0:  # M_0 was made in another way
        return told
    last, seconds, compared = (records[-1][name] for name in ("iteration", "seconds", "meta_judge"))
    for t in range(last + 1, settings.iters + 1):
        told[t] = dict(seconds)
        if compared and last <= settings.judge_iters < t:
            few = min(1, DIAGNOSED / max(1, compared["answers"]))
            told[t]["comparisons"] = few * seconds.get("comparisons", 0)
    return told


def seconds_left(told, t, done):
    """Seconds that are left when iteration t has done these stages; None if that is not known.

    told: what `expected` says.
    """
    if None in told[t:]:
        return None
    return (sum(seconds for stage, seconds in told[t].items() if stage not in done)
            + sum(sum(stages.values()) for stages in told[t + 1:]))


def end_of(seconds):
    """The day and the time in so many seconds."""
    return time.strftime("%a %H:%M", time.localtime(time.time() + seconds))


def after_iteration(records, told):
    """A line that says when the run will have ended; none before the first iteration has."""
    done, iters = records[-1]["iteration"], len(told) - 1
    if 0 < done < iters:
        so_far = sum(sum(record["seconds"].values()) for record in records)
        left = seconds_left(told, done, records[-1]["seconds"])
        yield (f"{done} of {iters} iterations in {duration(so_far)}; at this pace "
               f"{duration(left)} are left, until {end_of(left)}")


def after_stage(t, stage, taken, told, done):
    """A line on a stage that took long: how long it took, and when the run will have ended."""
    left = seconds_left(told, t, done)
    if taken > LONG and left:
        yield (f"Iteration {t}, {stage}: {duration(taken)}; {duration(left)} of the run are left, "
               f"until {end_of(left)}")


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
