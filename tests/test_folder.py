"""harness/folder.py and harness/plan.py: the parts of a run around the method that need no whole
run.
"""
import pytest

from harness.folder import Run, hold_out
from harness.plan import duration, on_line, short

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
    Run.tell_too_long(None, [{"too_long": 1, "sampled_tokens": 30},
                             {"too_long": 2, "sampled_tokens": 0}], "comparisons", 100)
    assert "comparisons: 3 prompts are too long" in capsys.readouterr().err
    with pytest.raises(ValueError, match="all prompts are too long"):
        Run.tell_too_long(None, [{"too_long": 2, "sampled_tokens": 0}] * 2, "comparisons", 100)


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
                                            (5400, "1.5 h")])
def test_durations(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize("number, shown", [(0, "0"), (999, "999"), (1000, "1.00k"),
                                           (65120, "65.1k"), (999999, "1.00M"), (3e12, "3.00T")])
def test_short_numbers(number, shown):
    assert short(number) == shown
