"""harness/folder.py, stage.py, forecast.py and plan.py: the parts of a run around the method that
need no whole run.
"""
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import harness.plan
from harness.forecast import (
    after_iteration,
    after_stage,
    duration,
    expected,
    on_line,
    seconds_left,
)
from harness.plan import fit_hours, short
from harness.settings import Settings, parse_settings
from harness.stage import tell_too_long
from harness.training import hold_out

# ---- held-out pairs

def test_hold_out_never_splits_a_prompt():
    """50 prompts with 1 to 3 pairs each: 5 prompts are held out with all that is theirs, nothing is
    lost or there twice. By pairs instead of prompts, some prompt would stand on both sides.
    """
    examples = [{"prompt_id": f"{i}", "number": n} for i in range(50) for n in range(1 + i % 3)]
    training, held = hold_out(examples, seed=3)
    ids = [{e["prompt_id"] for e in side} for side in (training, held)]
    assert len(ids[0]) == 45 and len(ids[1]) == 5 and not ids[0] & ids[1]
    assert sorted(map(str, training + held)) == sorted(map(str, examples))


def test_hold_out_depends_on_the_seed_alone():
    """Not on the order of the examples, nor on Python's hashes, which are salted anew in each
    process: the five are pinned, 1 choice of 2,118,760.
    """
    examples = [{"prompt_id": f"{i}"} for i in range(50)]
    held = [{e["prompt_id"] for e in hold_out(given, seed)[1]}
            for given, seed in ((examples, 3), (examples[::-1], 3), (examples, 4))]
    assert held[0] == held[1] != held[2]
    assert held[0] == {"9", "12", "19", "21", "33"}


def test_hold_out_of_few_prompts_trains_on_all():
    examples = [{"prompt_id": f"{i}"} for i in range(9)]
    assert hold_out(examples, 0) == (examples, []) and hold_out([], 0) == ([], [])


# ---- stages

def test_a_stage_goes_on_if_any_reply_was_drawn(capsys):
    """Items with many prompts, such as an answer's comparisons: one of each is too long, and the
    others have their replies.
    """
    tell_too_long("comparisons", [{"too_long": 1, "sampled_tokens": 30},
                                  {"too_long": 2, "sampled_tokens": 0}], 100, needed=True)
    assert "comparisons: 3 prompts are too long" in capsys.readouterr().err
    with pytest.raises(ValueError, match="all prompts are too long"):
        tell_too_long("comparisons", [{"too_long": 2, "sampled_tokens": 0}] * 2, 100, needed=True)


# ---- the plan

def test_the_time_of_a_stage_is_a_line_through_two_trials():
    """With 10 and 40 prompts 3 and 9 seconds: 1 s is fixed and 0.2 s goes to each, so 100 take 21.
    Noise cannot make a prompt free, nor cost more than its share of the last trial.
    """
    assert on_line([(10, 3), (40, 9)], 100) == pytest.approx(21)
    assert on_line([(10, 5), (40, 4)], 80) == pytest.approx(4 + 40 * 0.025)
    assert on_line([(10, 0.1), (40, 4)], 80) == pytest.approx(8)
    assert on_line([(40, 4)], 10) == pytest.approx(1)
    assert on_line([(40, 3), (40, 4)], 80) == pytest.approx(8)


@pytest.mark.parametrize("seconds, shown", [(4, "4 s"), (89, "89 s"), (90, "1.5 min"),
                                            (5400, "1.5 h"), (216000, "2.5 days")])
def test_durations(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize("number, shown", [(0, "0"), (999, "999"), (1000, "1.00k"),
                                           (65120, "65.1k"), (999999, "1.00M"), (3e12, "3.00T"),
                                           (9996, "10.0k"), (99.96e9, "100G")])
def test_short_numbers(number, shown):
    assert short(number) == shown


# ---- how long a run takes

def records_of(*stages, answers=50):
    return [{"iteration": t, "seconds": seconds, "meta_judge": {"answers": answers}}
            for t, seconds in enumerate(stages)]


def left(records, settings, t=None):
    t = records[-1]["iteration"] if t is None else t
    return seconds_left(expected(records, settings), t, records[t]["seconds"])


def test_the_clock_counts_on_iterations_like_the_last():
    """And on a few comparisons alone where the judge trains no longer."""
    settings = Settings(iters=4, judge_iters=2)
    records = records_of({"training": 9}, {"answers": 10, "comparisons": 100}, {
        "answers": 10, "comparisons": 100})
    assert left(records[:2], settings) == 110 + 2 * (10 + 40)  # 20 of 50 answers
    assert left(records, settings) == 2 * (10 + 40)
    few = records_of({}, {"answers": 10, "comparisons": 100}, answers=3)
    assert left(few, settings) == 3 * 110
    after = records_of({}, {}, {}, {"answers": 10, "comparisons": 40}, answers=20)
    assert left(after, settings) == 50
    told = expected(records, settings)
    assert not [*after_iteration(records[:1], told)]
    assert not [*after_iteration(records, expected(records, Settings(iters=2)))]
    actor_alone = [{"iteration": 1, "seconds": {"answers": 9, "comparisons": 0.01},
                    "meta_judge": None}]
    assert seconds_left(expected(actor_alone, settings), 1, {
        "answers", "comparisons"}) == pytest.approx(27.03)
    line, = after_iteration(records, told)
    assert line.startswith("2 of 4 iterations in 3.8 min; at this pace 1.7 min are left, until ")


def test_the_clock_within_an_iteration():
    """By what was measured of the iterations before, by the forecast in the first ones."""
    settings, stages = Settings(iters=2), {"answers": (50, 7), "training": (100, 7)}
    forecast = [{"training": (30, 7)}, stages, stages]
    assert [*after_stage(0, "training", 90, expected([], settings), {"training"})] == []
    told = expected([], settings, forecast)
    line, = after_stage(0, "training", 90, told, {"training"})
    assert line.startswith("Iteration 0, training: 1.5 min; 5.0 min of the run are left, until ")
    assert seconds_left(told, 1, {"answers"}) == 100 + 150
    assert [*after_stage(1, "answers", 59, told, {"answers"})] == []  # not worth a line
    records = records_of({"training": 40}, {"answers": 10, "training": 20})
    assert seconds_left(expected(records, settings, forecast), 2, {"answers"}) == 20


@pytest.fixture
def linear(monkeypatch, tmp_path):
    """`fit_hours` for so many seconds, and so many prompts in a file. By the trials a prompt costs
    two seconds an iteration, and the rest of a run 60.
    """
    def choose(seconds, prompts=None):
        settings = Settings(model="tiny", out=str(tmp_path / "run"), iters=2, hours=seconds / 3600)

        @contextmanager
        def rehearsal(*arguments):
            yield SimpleNamespace(prompts=prompts, settings=settings, out=tmp_path)

        def forecast(run, trials):
            each = 2 * run.settings.prompts_per_iter
            return [{"training": (60, 0)}] + [{"answers": (each, 0)}] * run.settings.iters
        monkeypatch.setattr(harness.plan, "rehearsal", rehearsal)
        monkeypatch.setattr(harness.plan, "run_trials", lambda run, *others: ([(run, [])], None))
        monkeypatch.setattr(harness.plan, "forecast", forecast)
        return fit_hours(settings, None)
    return choose


def test_hours_choose_the_prompts(linear, capsys, tmp_path):
    settings, forecast = linear(500.5)
    assert settings.prompts_per_iter == 110 and settings.hours is None
    assert forecast == [{"training": (60, 0)}, *[{"answers": (220, 0)}] * 2]
    assert linear(65)[0].prompts_per_iter == 1
    assert linear(500.5, [1] * 41)[0].prompts_per_iter == 20  # of two iterations each
    assert "--prompts-per-iter 20, all that" in capsys.readouterr().out
    with pytest.raises(ValueError, match="one prompt per iteration takes 64 s"):
        linear(63)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"settings": {"prompts_per_iter": 7}}')
    again, forecast = linear(500)  # it was chosen when the run began
    assert (again.prompts_per_iter, again.hours, forecast) == (7, None, None)


@pytest.mark.parametrize("content", ['{"settings": []}', '{"model_type": "llama"}'])
def test_hours_leave_a_folder_that_is_no_run_s_to_be_refused(linear, capsys, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    settings, forecast = linear(500)
    assert (settings.hours, forecast) == (None, None) and capsys.readouterr().out == ""


def test_hours_end_the_trials_while_there_is_time(linear, monkeypatch):
    """After one trial where the next would take a quarter of the time; else after two, where it
    would take a tenth, or a minute. And who has too little time is told how much it takes.
    """
    with pytest.raises(ValueError, match=r"takes 64 s: use --hours 0\.1, fewer"):
        linear(36)
    ended = []

    def trials(run, loop, folder, enough):
        ended.append([enough([1] * count, seconds) for count, seconds in
                      ((1, 90), (1, 91), (2, 36), (2, 37))])
        return [(run, [])], None

    @contextmanager
    def rehearsed(settings):
        yield SimpleNamespace(prompts=None, settings=settings, out=None)
    monkeypatch.setattr(harness.plan, "rehearsal", rehearsed)
    monkeypatch.setattr(harness.plan, "run_trials", trials)
    monkeypatch.setattr(harness.plan, "forecast", lambda run, trials: [{"answers": (1, 0)}])
    fit_hours(Settings(model="tiny", out="nowhere/x", iters=1, hours=0.1), None)
    assert ended == [[False, True, False, True]]


def test_hours_and_prompts_per_iteration_exclude_each_other():
    with pytest.raises(ValueError, match="give one of the two"):
        parse_settings(["--model", "tiny", "--hours", "1", "--prompts-per-iter", "5"])
    with pytest.raises(ValueError, match="give one of the two"):
        parse_settings(["--model", "tiny", "--hours", "1", "--plan"])
    with pytest.raises(ValueError, match="--hours must be above 0"):
        parse_settings(["--model", "tiny", "--hours", "0"])


def test_trials_are_one_processs_work(monkeypatch):
    monkeypatch.setattr(harness.plan, "world", lambda: 2)
    with pytest.raises(ValueError, match="leave torchrun out"):
        with harness.plan.rehearsal(Settings(model="tiny")):
            pass
