"""Checks of exercise 13: two iterations of the tiny world by your `iterate` and by this project's
leave the same pairs, and the same adapters.
"""

import functools
import itertools
import json
from unittest import mock

import pytest

import metareward
from exercises.loop import TINY, first_lines, run

WHY = {
    "actor": "are rho and the limit those of iteration t, and the answers judged?",
    "judge": "only iterations up to s.judge_iters make them, out of comparisons of the most varied "
    "answers, with the weights of [E2]",
}


def loop(folder, iterate):
    """Two small iterations, of which the first trains the judge: the run's folder."""
    flags = ["--model", TINY, "--iters", 2, "--judge-iters", 1, "--prompts-per-iter", 4,
             "--responses", 3, "--judgments", 3, "--epochs", 1, "--no-eft", "--rho", 0, 0.4,
             "--eval-prompts", first_lines("eval.jsonl", 1, folder),
             "--ranked", first_lines("ranked_eval.jsonl", 1, folder)]

    def watched(run, t):
        with mock.patch.object(run, "become", wraps=run.become) as become:
            told = iterate(run, t)
        assert mock.call(t - 1) in become.call_args_list, (
            "each iteration begins with run.become(t - 1): a run that goes on holds a fresh adapter"
        )
        return told

    with mock.patch.object(metareward, "iterate", watched):
        run(folder / "run", *flags)
    return folder / "run"


@pytest.fixture(scope="module")
def make_runs(task, tmp_path_factory):
    """Both runs' folders, made once; yours first, since it may end early."""

    @functools.cache
    def make():
        try:
            task.iterate(None, 1)
        except NotImplementedError:  # at once, not after a warm start
            raise
        except Exception:
            pass
        yours = loop(tmp_path_factory.mktemp("yours"), task.iterate)
        return yours, loop(tmp_path_factory.mktemp("ours"), metareward.iterate)

    return make


def lines(run, t, name):
    file = run / f"iter{t}" / name
    assert file.exists(), f"iteration {t} leaves no {name}: run.save(t, name, records) writes it"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_same_pairs(make_runs):
    runs = make_runs()
    for t, (kind, why) in itertools.product((1, 2), WHY.items()):
        mine, theirs = (
            [pair for pair in lines(run, t, "pairs.jsonl") if pair["kind"] == kind] for run in runs
        )
        assert mine == theirs, (
            f"iteration {t} has {len(mine)} {kind} pairs, and should have {len(theirs)}; the first "
            f"that differs: {next((m for m, o in zip(mine, theirs) if m != o), 'none')}\n{why}"
        )


def test_the_same_models(make_runs):
    for t in (1, 2):
        mine, theirs = (
            run / f"iter{t}" / "adapter" / "adapter_model.safetensors" for run in make_runs()
        )
        assert mine.read_bytes() == theirs.read_bytes(), (
            f"M_{t} is another model: do both kinds of pairs train together, by this iteration's "
            "settings?"
        )


def test_what_it_tells(make_runs):
    records = (json.loads((run / "summary.json").read_text()) for run in make_runs())
    for told, expected in zip(*records):
        for name in ("actor", "judge"):
            assert told["pairs"][name] == expected["pairs"][name], "return what `told` makes of it"
        assert told["meta_judge"] == expected["meta_judge"], (
            "other comparisons: in iterations after s.judge_iters a diagnostic sample is compared"
        )
    for t in (1, 2):
        mine, theirs = (lines(run, t, "ratings.jsonl") for run in make_runs())
        assert mine == theirs, f"other ratings in iteration {t}: the weights of [E2]?"
