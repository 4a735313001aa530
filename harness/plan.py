"""What a run will cost: the real loop on a few prompts, timed, and drawn out to the whole."""
import bisect
import contextlib
import copy
import dataclasses
import io
import math
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from harness.engine.processes import world
from harness.first_replies import Unreadable
from harness.folder import Folder
from harness.forecast import by_stage, duration, end_of, forecast, seconds_of
from harness.loading import config_of
from harness.run import Run
from harness.training import save_adapter, set_adapter
from harness.views.figures import untrained

SIZES = (2, 6, 18, 54)  # prompts that are tried, one number after the other
PATIENCE = 60           # seconds that no further number of prompts may be expected to take
WORTH_A_TRIAL = 1600    # prompts of a run: of so many the first two trials are a hundredth
LONG_RUN = 3 * 24 * 3600  # seconds
FEWEST_RANKED = 8       # of fewer ranked replies the seed may judge none as people did


def plan(settings, loop):
    """Print what a run with these settings will take on this machine; nothing is kept.

    loop: metareward.loop.
    """
    def enough(trials, seconds):
        _, records = trials[-1]
        if not untrained(records) and seconds > seconds_of(forecast(run, trials)):
            return True  # it would take longer than the run
        return len(trials) > 1 and seconds > PATIENCE

    start = time.perf_counter()
    with rehearsal(settings) as run:
        loading = time.perf_counter() - start
        trials, unreadable = run_trials(run, loop, run.out, enough)
        if trials:
            small, records = trials[-1]
            print_costs(run, forecast(run, trials), loading, disk(run, small))
            tell_untrained(small, records)
    if unreadable:
        raise unreadable


def fit_hours(settings, loop):
    """The settings with as many prompts per iteration as a run of settings.hours has time for.

    And its `forecast`. A run that is there goes on with what was chosen when it began: there is no
    forecast then. Raises ValueError if the shortest run takes longer.
    """
    out = Path(settings.out)
    if (out / "config.json").is_file():
        chosen = config_of(out / "iter0").get("settings", {}).get("prompts_per_iter")
        if chosen:  # else it is no run's, and will be refused
            print(f"{out} is there: the run goes on with --prompts-per-iter {chosen}, as it began, "
                  "and --hours chooses nothing")
        return dataclasses.replace(settings, prompts_per_iter=chosen or 1, hours=None), None
    start = time.perf_counter()
    with rehearsal(settings) as run:
        loading = time.perf_counter() - start
        allowed = 3600 * settings.hours

        def enough(trials, seconds):  # two trials tell what does not grow with the prompts
            return seconds > (min(PATIENCE, 0.1 * allowed) if len(trials) > 1 else 0.25 * allowed)
        trials, unreadable = run_trials(run, loop, run.out, enough)
        if unreadable:
            raise unreadable
        most = len(run.prompts) // settings.iters if run.prompts else 10**6
        used = time.perf_counter() - start + loading
        left = allowed - used

        def stages(count):
            whole = copy.copy(run)
            whole.settings = dataclasses.replace(settings, prompts_per_iter=count)
            return forecast(whole, trials)

        def seconds(count):
            return seconds_of(stages(count))
        chosen = bisect.bisect_right(range(1, most + 1), left, key=seconds)
        if chosen == 0:
            wanted = math.ceil((used + PATIENCE + seconds(1)) / 360) / 10  # hours
            raise ValueError(
                f"--hours {settings.hours:g}: after the trials {duration(max(0, left))} are left, "
                f"and a run of one prompt per iteration takes {duration(seconds(1))}: use --hours "
                f"{wanted:g}, fewer --iters, a smaller --eval-prompts, or a small "
                "--prompts-per-iter without --hours")
        every = run.prompts and chosen == most
        all_of_them = f", all that {settings.prompts} has" if every else ""
        print(f"--hours {settings.hours:g}: --prompts-per-iter {chosen}{all_of_them}, which takes "
              f"about {duration(seconds(chosen))}", flush=True)
        tell_untrained(*trials[-1])
    return dataclasses.replace(settings, prompts_per_iter=chosen, hours=None), stages(chosen)


def foresee(run, loop):
    """The `forecast` of a run that is about to begin, and a line that tells it.

    None where it is not worth its trials: in a run of few prompts, and in one that goes on. After
    the first two trials they end where the next would take two percent of the run.
    """
    s = run.settings
    if s.iters * s.prompts_per_iter < WORTH_A_TRIAL or any(run.out.glob("iter*")) or world() > 1:
        return None

    def enough(trials, seconds):
        return len(trials) > 1 and seconds > min(PATIENCE, 0.02 * seconds_of(forecast(run, trials)))
    try:
        with tempfile.TemporaryDirectory() as folder:
            trials, _ = run_trials(run, loop, folder, enough)
    except (ValueError, OSError, SafetensorError) as error:
        # It is about a few prompts, or a temporary folder, and need not be true of the run.
        print(f"How long the run will take cannot be told beforehand: {error}")
        return None
    if not trials:
        return None  # nothing of what the model says can be read: the run will say so itself
    stages = forecast(run, trials)
    seconds = seconds_of(stages)
    most = [f"{stage} {duration(taken)}" for stage, taken in by_stage(stages, 0).most_common(3)]
    print(f"The run takes about {duration(seconds)}, until {end_of(seconds)}; most of it: "
          f"{', '.join(most)}", flush=True)
    if seconds > LONG_RUN:
        fewer = "" if s.comparisons or s.no_meta_judge else ", --comparisons 44"
        print(f"For a shorter one stop this, and give another --out and --hours H{fewer}, or a "
              "smaller --prompts-per-iter", flush=True)
    tell_untrained(*trials[-1])
    return stages


def tell_untrained(small, records):
    if untrained(records):
        print("Training is not counted, or not all of it: no pairs came of "
              f"{small.settings.prompts_per_iter} prompts.")


@contextlib.contextmanager
def rehearsal(settings):
    """The run that the trials stand for, in a folder that will be gone."""
    if world() > 1:
        raise ValueError("--plan and --hours try the loop in one process: leave torchrun out; a "
                         "run that has begun with --hours goes on with it")
    with tempfile.TemporaryDirectory() as folder:
        yield Run(dataclasses.replace(settings, out=folder))


def run_trials(run, loop, folder, enough):
    """([(a small run, its records), ...], Unreadable or None); the run's model is as it was.

    folder: where the small runs go. The loop runs on a few prompts, then on three times as many,
    and so on until enough(trials so far, seconds that the next may take). One iteration stands for
    all that train the judge, one for the others.
    """
    print("Running the loop on a few prompts, to see how long it takes; nothing of it is kept. "
          "What else this machine does meanwhile counts as well.")
    trials, taken, unreadable = [], [], None
    save_adapter(run.model, f"{folder}/fresh")
    most = len(run.prompts) // min(2, run.settings.iters) if run.prompts else SIZES[-1]
    for size in (min(size, most) for size in SIZES):
        small = small_run(run, f"{folder}/{size}", size)
        about = f", about {duration(expected_next(taken))}" if taken else ""
        print(f"With {size} prompts{about}:", flush=True)
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                trials.append((small, loop(small)))
        except Unreadable as error:
            unreadable = error  # with more prompts it shows; the table is of fewer
            break
        finally:
            set_adapter(run.model, f"{folder}/fresh")  # not the one that was trained
        taken.append(time.perf_counter() - start)
        by_this = ""
        if not run.settings.hours:  # which has yet to choose how many prompts the run has
            told = duration(seconds_of(forecast(run, trials)))
            by_this = f"; by this the run takes about {told}"
        print(f"{duration(taken[-1])} in all{by_this}", flush=True)
        largest = size >= min(most, max(len(run.eval_prompts), run.settings.prompts_per_iter))
        if largest or enough(trials, expected_next(taken)):
            break
    return trials, unreadable


def expected_next(taken):
    """Seconds that three times as many prompts will take, from those of the last one or two trials.
    """
    if len(taken) == 1:
        return 3 * taken[-1]
    return taken[-1] + 3 * max(0, taken[-1] - taken[-2])


def small_run(run, out, size):
    """A run like this one, with the same model, and `size` prompts of each kind at most."""
    settings = run.settings
    alike = settings.no_meta_judge or settings.judge_iters in (0, settings.iters)
    iters = 1 if alike else min(2, settings.iters)
    schedules = {name: (settings.at(name, 1), settings.at(name, settings.iters))[:iters]
                 for name in ("rho", "max_response_chars", "max_judgment_chars")}
    small = copy.copy(run)  # what it has read and loaded is the same
    Folder.__init__(small, dataclasses.replace(
        settings, out=out, iters=iters, judge_iters=min(1, settings.judge_iters),
        prompts_per_iter=min(size, settings.prompts_per_iter), **schedules),
        run.config["files"], run.prompts)
    small.claim_folder()
    small.dropped, small.tokens, small.otherwise = Counter(), Counter(), Counter()
    small.eval_prompts = small.eval_prompts[:size]
    small.ranked = small.ranked[:size]
    small.replies = small.replies[:max(size, FEWEST_RANKED)]
    return small


def disk(run, small):
    """Bytes that the whole run will leave, from what the small one left."""
    last = small.folder(small.settings.iters)
    adapter = sum(file.stat().st_size for file in (last / "adapter").rglob("*"))
    lines = sum(file.stat().st_size for file in Path(small.out).rglob("*.jsonl"))
    per_prompt = lines / (small.settings.iters * small.settings.prompts_per_iter)
    prompts = run.settings.iters * run.settings.prompts_per_iter
    return adapter * (run.settings.iters + 1) + per_prompt * prompts


def print_costs(run, stages, loading, size):
    seconds, tokens = by_stage(stages, 0), by_stage(stages, 1)
    rows = [(stage, short(tokens[stage]), duration(seconds[stage])) for stage in seconds]
    whole = loading + sum(seconds.values())
    rows.append(("all, with loading", short(sum(tokens.values())), duration(whole)))
    print(f"\n{'stage':40}{'tokens':>10}{'time':>10}")
    for row in rows:
        print("{:40}{:>10}{:>10}".format(*row))
    if cuda := torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    print(f"Memory so far: {short(peak)}B of {'the GPU' if cuda else 'this process'}. "
          f"Disk: about {short(size)}B.\n"
          f"For {run.settings.iters} iterations, with answers and judgments like those of the "
          "first models and\npairs from every prompt. Training counts the tokens of each epoch.")


def short(number):
    """A number with three digits and k, M, G or T."""
    return f"{number:.0f}" if number < 999.5 else tqdm.format_sizeof(number)
