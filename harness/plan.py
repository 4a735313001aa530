"""What a run will cost: the real loop on a few prompts, timed, and drawn out to the whole."""
import bisect
import contextlib
import copy
import dataclasses
import io
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from dpo import world
from harness.clock import duration
from harness.folder import Run
from harness.settings import DIAGNOSED
from harness.training import save_adapter, set_adapter
from harness.unreadable import Unreadable, first_prompts
from sampling import read_record

SIZES = (2, 6, 18, 54)  # prompts that are tried, one number after the other
PATIENCE = 60           # seconds that no further number of prompts may be expected to take
FEWEST_RANKED = 8       # of fewer ranked replies the seed may judge none as people did


def plan(settings, sample, loop):
    """Print what a run with these settings will take on this machine; nothing is kept.

    loop: metareward.loop.
    """
    with tried(settings, sample, loop) as (run, trials, loading, unreadable):
        if trials:
            small, records = trials[-1]
            show(run, totals(run, trials), loading, disk(run, small))
            tell_untrained(small, records)
    if unreadable:
        raise unreadable


def fit_hours(settings, sample, loop):
    """The settings with as many prompts per iteration as a run of settings.hours has time for.

    A run that is there goes on with what was chosen when it began. Raises ValueError if the
    shortest run takes longer.
    """
    config = Path(settings.out) / "config.json"
    if config.is_file():
        chosen = read_record(config).get("settings", {}).get("prompts_per_iter", 1)
        print(f"The run goes on with --prompts-per-iter {chosen}, as it began")
        return dataclasses.replace(settings, prompts_per_iter=chosen, hours=None)
    start = time.perf_counter()
    with tried(settings, sample, loop) as (run, trials, loading, unreadable):
        if unreadable:
            raise unreadable
        most = len(run.prompts) // settings.iters if run.prompts else 10**6
        left = 3600 * settings.hours - (time.perf_counter() - start) - loading

        def seconds(count):
            whole = copy.copy(run)
            whole.settings = dataclasses.replace(settings, prompts_per_iter=count)
            return sum(totals(whole, trials)[0].values())
        chosen = bisect.bisect_right(range(1, most + 1), left, key=seconds)
        if chosen == 0:
            raise ValueError(
                f"--hours {settings.hours:g}: after the trials {duration(max(0, left))} are left, "
                f"and a run of one prompt per iteration takes {duration(seconds(1))}: use more "
                "--hours, fewer --iters, or a smaller --eval-prompts")
        every = run.prompts and chosen == most
        all_of_them = f", all that {settings.prompts} has" if every else ""
        print(f"--hours {settings.hours:g}: --prompts-per-iter {chosen}{all_of_them}, which takes "
              f"about {duration(seconds(chosen))}", flush=True)
        tell_untrained(*trials[-1])
    return dataclasses.replace(settings, prompts_per_iter=chosen, hours=None)


def tell_untrained(small, records):
    if not all(record["train"] for record in records[1:]):
        print("Training is not counted, or not all of it: no pairs came of "
              f"{small.settings.prompts_per_iter} prompts.")


@contextlib.contextmanager
def tried(settings, sample, loop):
    """(the whole run, [(a small run, its records), ...], seconds of loading, Unreadable or None).

    The loop runs on a few prompts, then on three times as many, and so on until one would take more
    than about a minute. Each stage's seconds are a line through the last two: a fixed part, and a
    part for each prompt. One iteration stands for all that train the judge, one for the others.
    """
    if world() > 1:
        raise ValueError("--plan and --hours try the loop in one process: leave torchrun out; a "
                         "run that has begun with --hours goes on with it")
    print("Running the loop on a few prompts; nothing of it is kept. What else this machine does "
          "meanwhile counts as well.")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = Run(dataclasses.replace(settings, out=f"{folder}/whole"), sample)
        loading, trials, taken, unreadable = time.perf_counter() - start, [], [], None
        save_adapter(run.model, f"{folder}/fresh")
        most = len(run.prompts) // min(2, settings.iters) if run.prompts else SIZES[-1]
        for size in (min(size, most) for size in SIZES):
            set_adapter(run.model, f"{folder}/fresh")  # not the one that the last trial trained
            small = small_run(run, f"{folder}/{size}", size)
            print(f"With {size} prompts:", flush=True)
            start = time.perf_counter()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    trials.append((small, loop(small)))
            except Unreadable as error:
                unreadable = error  # with more prompts it shows; the table is of fewer
                break
            taken.append(time.perf_counter() - start)
            print(f"{duration(taken[-1])} in all", flush=True)
            whole = size >= min(most, max(len(run.eval_prompts), settings.prompts_per_iter))
            if whole or len(taken) > 1 and expected_next(taken) > patience(settings):
                break
        yield run, trials, loading, unreadable


def patience(settings):
    """Seconds that no further trial may be expected to take."""
    return PATIENCE if settings.hours is None else min(PATIENCE, 0.1 * 3600 * settings.hours)


def expected_next(taken):
    """Seconds that three times as many prompts will take, from those of the last two trials."""
    return taken[-1] + 3 * max(0, taken[-1] - taken[-2])


def small_run(run, out, size):
    """A run like this one, with the same model, and `size` prompts of each kind at most."""
    settings = run.settings
    alike = settings.no_meta_judge or settings.judge_iters in (0, settings.iters)
    iters = 1 if alike else min(2, settings.iters)
    schedules = {name: (settings.at(name, 1), settings.at(name, settings.iters))[:iters]
                 for name in ("rho", "max_response_chars", "max_judgment_chars")}
    small = Run(dataclasses.replace(
        settings, out=out, iters=iters, judge_iters=min(1, settings.judge_iters),
        prompts_per_iter=min(size, settings.prompts_per_iter), **schedules), run.sample, run.model)
    small.eval_prompts = small.eval_prompts[:size]
    small.ranked = small.ranked[:size]
    small.replies = small.replies[:max(size, FEWEST_RANKED)]
    return small


def units(run, t, stage):
    """How many prompts a stage of iteration t works on."""
    prompts = run.settings.prompts_per_iter
    if stage.startswith("first"):
        return len(first_prompts(run))
    if stage.startswith("held-out"):
        return len(run.eval_prompts)
    if stage == "judgments of replies ranked by people":
        return len(run.ranked)
    if t == 0:
        return len(run.replies)
    if stage == "comparisons" and t > run.settings.judge_iters:
        return min(DIAGNOSED, prompts)
    return prompts


def totals(run, trials):
    """Seconds and tokens of the whole run by stage, two Counters."""
    small, records = trials[-1]
    seconds, tokens = Counter(), Counter()
    first = min(run.settings.judge_iters, run.settings.iters) if len(records) == 3 else None
    for t, record in enumerate(records):
        often = [1, first or run.settings.iters, run.settings.iters - (first or 0)][t]
        # The same stage in the whole run works on more prompts, but no less often.
        like = t if t < 2 else run.settings.iters
        for stage, taken in record["seconds"].items():
            name = f"warm start, {stage}" if t == 0 and stage == "training" else stage
            here, there = units(small, t, stage), units(run, like, stage)
            points = [(units(trial, t, stage), past[t]["seconds"].get(stage))
                      for trial, past in trials]
            seconds[name] += often * on_line(points, there)
            tokens[name] += often * record["tokens"].get(stage, 0) / here * there
    return seconds, tokens


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


def disk(run, small):
    """Bytes that the whole run will leave, from what the small one left."""
    last = small.folder(small.settings.iters)
    adapter = sum(file.stat().st_size for file in (last / "adapter").rglob("*"))
    lines = sum(file.stat().st_size for file in Path(small.out).rglob("*.jsonl"))
    per_prompt = lines / (small.settings.iters * small.settings.prompts_per_iter)
    prompts = run.settings.iters * run.settings.prompts_per_iter
    return adapter * (run.settings.iters + 1) + per_prompt * prompts


def show(run, totals, loading, size):
    seconds, tokens = totals
    rows = [(stage, short(tokens[stage]), duration(seconds[stage])) for stage in seconds]
    whole = loading + sum(seconds.values())
    rows.append(("all, with loading", short(sum(tokens.values())), duration(whole)))
    print(f"\n{'stage':40}{'tokens':>10}{'time':>10}")
    for row in rows:
        print("{:40}{:>10}{:>10}".format(*row))
    if cuda := torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"Memory so far: {short(peak)}B of {'the GPU' if cuda else 'this process'}. "
          f"Disk: about {short(size)}B.\n"
          f"For {run.settings.iters} iterations, with answers and judgments like those of the "
          "first models and\npairs from every prompt. Training counts the tokens of each epoch.")


def short(number):
    """A number with three digits and k, M, G or T."""
    if number < 999.5:
        return f"{number:.0f}"
    for unit in ("k", "M", "G", "T"):
        number /= 1000
        if number < 999.5:
            break
    digits_after = 3 - len(str(int(number)))
    return f"{number:.{max(0, digits_after)}f}{unit}"
