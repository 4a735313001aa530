"""How long a run takes: from a few prompts before it begins, from what it took once under way.

A forecast is a list with, for each iteration, 0 first, {stage: (seconds, tokens)}.
"""
import time
from collections import Counter

from harness.first_replies import first_prompts
from harness.settings import DIAGNOSED

LONG = 60  # seconds of a stage after which the screen says when the run will have ended


# ---- before it begins: a smaller run drawn out to the whole

def forecast(run, trials):
    """For each iteration of the whole run, 0 first, {stage: (seconds, tokens)}."""
    small, records = trials[-1]
    whole = []
    for t in range(run.settings.iters + 1):
        trains_no_judge = len(records) > 2 and t > run.settings.judge_iters
        like = 2 if trains_no_judge else min(t, 1)  # the small run's iteration of this kind
        whole.append({})
        for stage in records[like]["seconds"]:
            here, there = units(small, like, stage), units(run, t, stage)
            points = [(units(trial, like, stage), past[like]["seconds"].get(stage))
                      for trial, past in trials]
            tokens = records[like]["tokens"].get(stage, 0) / here * there
            whole[t][stage] = on_line(points, there), tokens
    return whole


def units(run, t, stage):
    """How many prompts a stage of iteration t works on."""
    s = run.settings
    of_seed = {"first answers": first_prompts(run), "first judgments": first_prompts(run),
               "judgments of ranked replies": run.replies, "training": run.replies}
    held_out = {"held-out answers": run.eval_prompts, "held-out judgments": run.eval_prompts,
                "held-out judgments of M_0's answers": run.eval_prompts,
                "judgments of replies ranked by people": run.ranked}
    known = held_out | of_seed if t == 0 else held_out
    if stage in known:
        return len(known[stage])
    few = stage == "comparisons" and t > s.judge_iters  # they are compared for the figures alone
    return min(DIAGNOSED, s.prompts_per_iter) if few else s.prompts_per_iter


def on_line(points, count):
    """Seconds for `count` prompts, from (prompts, seconds) of smaller trials.

    The last two make a line. Its slope is between a quarter and all of the last trial's seconds
    per prompt, so that noise in a short stage does no harm.
    """
    n, taken = points[-1]
    each = taken / n
    if len(points) > 1:
        before, taken_before = points[-2]
        if n > before and taken_before is not None:
            each = min(max((taken - taken_before) / (n - before), each / 4), each)
    return taken + each * (count - n)


def by_stage(stages, which):
    """A forecast's seconds (which = 0) or tokens (1) by stage, of all iterations."""
    sums = Counter()
    for t, of_iteration in enumerate(stages):
        for stage, figures in of_iteration.items():
            warm = t == 0 and stage == "training"
            sums["warm start, training" if warm else stage] += figures[which]
    return sums


def seconds_of(stages):
    return sum(by_stage(stages, 0).values())


# ---- under way

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


# ---- in words

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


def end_of(seconds):
    """The day and the time in so many seconds."""
    return time.strftime("%a %H:%M", time.localtime(time.time() + seconds))


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
