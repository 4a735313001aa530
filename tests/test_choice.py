"""harness/views/choice.py: which model a run's figures choose, by hand and by simulated runs."""
import json

import numpy as np
import pytest

from harness.views.choice import choose

TOP = 5


def run_of(folder, truths, **figures):
    """A run's folder whose models have these true scores, {t: [[of prompt 0's answers], ...]}, and
    its records. figures: {a judge's figure: [its value for each model]}.
    """
    for t, of_prompts in truths.items():
        (folder / f"iter{t}").mkdir()
        lines = [{"prompt_id": f"{i}", "text": "x", "truth": truth}
                 for i, of_prompt in enumerate(of_prompts) for truth in of_prompt]
        (folder / f"iter{t}" / "eval.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines))
    return [{"iteration": t, "judge": {name: values[t] for name, values in figures.items()}}
            for t in truths]


def test_the_best_is_named_with_those_that_cannot_be_told_from_it(tmp_path):
    """M_1 is 0.5 better than M_0 on each of twelve prompts; M_2 is 0.1 worse than M_1 in the mean,
    1 better on five prompts and worse by 0.8857 on seven.
    """
    base = np.linspace(1, 3, 12)
    one = base + 0.5
    two = one + np.array([1] * 5 + [-6.2 / 7] * 7)
    records = run_of(tmp_path, {t: [[x, x] for x in values] for t, values in
                                enumerate((base, one, two))})
    best, (first, alike) = choose(tmp_path, records, TOP)
    assert best == 1
    assert first.startswith(f"Best by the truth: M_1, {one.mean():.2f} of 5 (") and "12" in first
    assert "before M_2 (better by 0.10, -0." in alike and "M_0" not in alike


def test_a_run_that_shows_nothing_says_so(tmp_path):
    rng = np.random.default_rng(0)
    truths = {t: rng.uniform(0, 5, (30, 4)).tolist() for t in range(3)}
    best, lines = choose(tmp_path, run_of(tmp_path, truths), TOP)
    assert best in truths and lines[-1].startswith("So nothing shows that the run made")


def test_a_run_that_only_falls_takes_the_first(tmp_path):
    truths = {t: [[3.0 - t]] * 5 + [[4.0 - t]] * 5 for t in range(3)}
    best, lines = choose(tmp_path, run_of(tmp_path, truths), TOP)
    assert best == 0 and "may be chance" not in " ".join(lines)
    assert lines[-1].startswith("So nothing shows")


@pytest.mark.parametrize("prompts, models, said", [
    (9, 2, "on 9 prompts with checks, too few to be sure."), (30, 1, None)])
def test_few_prompts_and_one_model(tmp_path, prompts, models, said):
    truths = {t: [[t + 1.0]] * prompts for t in range(models)}
    best, lines = choose(tmp_path, run_of(tmp_path, truths), TOP)
    assert best == models - 1 and (lines == [] if said is None else said in lines[0])


def test_prompts_without_checks_and_missing_files_choose_nothing(tmp_path):
    """A judge that took no part is asked instead; people's ranks tell of the judge."""
    records = run_of(tmp_path, {t: [[None]] * 20 for t in range(3)},
                     human_agreement=[0.6, 0.8, 0.79],
                     human_agreement_interval=[[0.5, 0.69], [0.7, 0.9], [0.7, 0.88]])
    best, (line, judge) = choose(tmp_path, records, TOP)
    assert best is None and f"python eval.py compare {tmp_path}/iter2 {tmp_path}/iter0" in line
    assert judge.startswith("As a judge M_1 agrees best with people: in 80% of the ranked pairs")
    assert "the intervals of M_2 reach as far" in judge and "M_0" not in judge
    for file in tmp_path.glob("*/eval.jsonl"):
        file.unlink()
    assert choose(tmp_path, records, TOP)[0] is None
    assert choose(tmp_path, records[:1], TOP) == (None, [])


@pytest.mark.parametrize("actor, why", [
    ({"truth": 2.0}, "the held-out answers of M_0, M_1 are missing"),
    ({"reward": 2.0}, "the reward is what it trained for"), ({}, "its opinion")])
def test_why_it_cannot_be_told(tmp_path, actor, why):
    records = [{"iteration": t, "actor": actor} for t in (0, 1)]
    best, (line,) = choose(tmp_path, records, TOP)
    assert best is None and why in line


def test_one_model_that_is_left_is_not_the_best(tmp_path):
    records = run_of(tmp_path, {t: [[1.0 + t]] * 20 for t in range(2)})
    (tmp_path / "iter1" / "eval.jsonl").unlink()
    assert choose(tmp_path, records, TOP)[0] is None


def test_a_model_whose_answers_are_lost_is_named(tmp_path):
    records = run_of(tmp_path, {t: [[1.0 + t]] * 20 for t in range(3)})
    (tmp_path / "iter2" / "eval.jsonl").unlink()
    best, lines = choose(tmp_path, records, TOP)
    assert best == 1 and lines[-1] == "Of M_2 the held-out answers are missing."


def test_the_interval_holds_what_it_says(tmp_path):
    """Of 60 simulated runs of two equally good models M_1 is called better than M_0 in about one
    in forty: an interval of 95 % misses 0 on either side as often.
    """
    from harness.views.choice import by_truth

    wrong = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        prompt = rng.normal(2.5, 1, 40)
        table = {t: prompt + rng.normal(0, 0.7, 40) for t in (0, 1)}
        wrong += "So nothing shows" not in by_truth(table, TOP)[1][-1]
    assert wrong <= 6
