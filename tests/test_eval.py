"""eval.py: the figures against other people's code (statsmodels, scipy) or against counting by
hand, and the report as a browser reads it.

Every figure is compared as a number, most of them on random data of many sizes: a formula that is
right by chance on one example is not on a hundred. The report is parsed with html.parser; each text
in it carries its own mark, so that one that is lost or not escaped is named.
"""
import base64
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from conftest import FUZZ
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from scipy import stats

from dpo import add_lora
from eval import (
    agreement,
    bootstrap,
    length_controlled_win_rate,
    mean,
    measure_actor,
    measure_comparisons,
    measure_judge,
    measure_meta_judge,
    measure_people,
    win_rate,
)
from harness.checks import truth
from harness.commands import compare, export
from harness.commands.flags import eval_parser
from harness.commands.main import main as run_command
from harness.commands.repeat import measure_repeats
from harness.files import read_json, read_jsonl, write_jsonl, write_whole
from harness.loading import load
from harness.training import save_adapter
from harness.views import drawing
from harness.views.figures import FIGURES, meanings, table
from harness.views.report import cut_short, drifts, in_a_sentence, report, unread, unscored
from sampling import sample

ROOT = Path(__file__).parent.parent


def command(monkeypatch, capsys, *arguments):
    """Run eval.py's command line in this process: returns (status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    try:
        run_command()
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


# ---- win rates

def test_win_rate_by_hand():
    """(1 + 1 + 0 + 1/2) / 4 = 0.625; squared distances 2 x 0.140625 + 0.390625 + 0.015625 = 0.6875,
    / 3 = 0.229167, root / 2 = 0.239357.
    """
    rate, error = win_rate([1, 1, 0, 0.5])
    assert rate == 0.625 and error == pytest.approx(math.sqrt(0.6875 / 3) / 2)


def test_win_rate_of_one_has_no_error():
    rate, error = win_rate([1])
    assert rate == 1 and math.isnan(error)


def bradley_terry_with_length(wins, ours, theirs):
    """The same model fitted by statsmodels: a binomial GLM with a logit link, which takes
    fractional wins.
    """
    difference = np.subtract(theirs, ours)
    x = np.tanh(difference / np.std(difference, ddof=1))
    fit = sm.GLM(wins, np.column_stack([x, np.ones(len(x))]),
                 family=sm.families.Binomial()).fit(tol=1e-14, maxiter=300)
    return 1 / (1 + math.exp(-fit.params[1]))


@pytest.mark.parametrize("fractional", [False, True])
def test_length_controlled_win_rate_against_statsmodels(fractional):
    """30 random data sets with an advantage and a length bias of their own: one wrong sign, std or
    link differs in the second digit.
    """
    rng = np.random.default_rng(int(fractional))
    plain = []
    for _ in range(30):
        size = rng.integers(40, 200)
        ours, theirs = rng.integers(100, 3000, size), rng.integers(100, 2500, size)
        logit = rng.normal() - rng.uniform(0, 2) * np.tanh((theirs - ours) / 900)
        chance = 1 / (1 + np.exp(-logit))
        wins = np.clip(chance + rng.normal(0, 0.2, size), 0,
                       1) if fractional else (rng.random(size) < chance).astype(float)
        expected = bradley_terry_with_length(wins, ours, theirs)
        assert length_controlled_win_rate(wins, ours, theirs) == pytest.approx(expected, abs=1e-6)
        plain.append(abs(expected - wins.mean()))
    assert max(plain) > 0.02  # the data do tell the controlled rate from the plain one


def test_length_controlled_win_rate_finds_what_was_planted():
    """Wins come from sigmoid(0.4 - 1.5 tanh(d / std d)) exactly, as fractions: the fit must give
    back sigmoid(0.4) = 0.598688.
    """
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(100, 3000, 300), rng.integers(100, 1500, 300)
    d = theirs - ours
    wins = 1 / (1 + np.exp(-(0.4 - 1.5 * np.tanh(d / d.std(ddof=1)))))
    assert length_controlled_win_rate(wins, ours, theirs) == pytest.approx(0.598688, abs=1e-6)
    assert wins.mean() > 0.7  # the plain rate, flattered by length, is far off


def test_equal_lengths_give_the_plain_win_rate():
    wins, lengths = [1, 0, 1, 1, 0.5], [10, 2000, 30, 4, 5]
    assert length_controlled_win_rate(wins, lengths, lengths) == pytest.approx(0.7)
    # equal differences tell nothing either
    assert length_controlled_win_rate(wins, lengths, np.add(lengths, 7)) == pytest.approx(0.7)
    assert length_controlled_win_rate([0.25], [1], [900]) == 0.25


def test_sides_swapped_give_the_other_side_of_the_rate():
    rng = np.random.default_rng(1)
    wins, ours, theirs = rng.random(50), rng.integers(0, 900, 50), rng.integers(0, 900, 50)
    there = length_controlled_win_rate(wins, ours, theirs)
    back = length_controlled_win_rate(1 - wins, theirs, ours)
    assert there + back == pytest.approx(1) and abs(there - 0.5) > 0.001


@FUZZ
@given(st.lists(st.tuples(st.sampled_from([0, 0.5, 1]), st.integers(0, 5000), st.integers(0, 5000)),
                min_size=1, max_size=12))
def test_length_controlled_win_rate_is_always_a_rate(rows):
    """Small samples are often separable, where the maximum lies at infinity: still a number in [0,
    1], without a warning.
    """
    with np.errstate(all="raise"):
        assert 0 <= length_controlled_win_rate(*zip(*rows)) <= 1


def test_separable_preferences_go_to_the_end_of_the_scale():
    """Who always wins, or never, does so at equal lengths too; who wins exactly where it is longer
    has no advantage that length leaves over.
    """
    ours, theirs = [10, 700, 80, 300], [500, 20, 90, 310]
    assert length_controlled_win_rate([1] * 4, ours, theirs) > 0.999
    assert length_controlled_win_rate([0] * 4, ours, theirs) < 0.001
    assert length_controlled_win_rate([0, 1, 0, 1], [0, 500, 100, 400],
                                      [500, 0, 400, 100]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("call, name", [
    (lambda: win_rate([]), "preferences"), (lambda: win_rate([0.5, 1.1]), "preferences"),
    (lambda: win_rate([-0.1]), "preferences"),
    (lambda: win_rate([math.nan]), "preferences"), (lambda: win_rate([[1]]), "preferences"),
    (lambda: win_rate(["A"]), "preferences"),
    (lambda: win_rate(1), "preferences"), (lambda: win_rate([None]), "preferences"),
    (lambda: win_rate([[1], [1, 2]]), "preferences"),
    (lambda: length_controlled_win_rate([2], [1], [1]), "preferences"),
    (lambda: length_controlled_win_rate([1], [-1], [1]), "our_lengths"),
    (lambda: length_controlled_win_rate([1], [1], [math.inf]), "their_lengths"),
    (lambda: length_controlled_win_rate([1, 0], [1, 2], [1]), "their_lengths"),
    (lambda: agreement([], []), "ours"),
    (lambda: agreement([1, 2], [1, math.nan]), "theirs"), (lambda: agreement([1, 2], [1]),
                                                           "theirs"),
    (lambda: agreement(["x"], [1]), "ours"),
])
def test_malformed_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


# ---- agreement

def counted_by_hand(ours, theirs):
    """Pairs of items: ordered alike with ties as an order of their own, and among those that
    neither ties.
    """
    def order(x, y):
        return (x > y) - (x < y)

    pairs = [(order(ours[i], ours[j]), order(theirs[i], theirs[j]))
             for i, j in combinations(range(len(ours)), 2)]
    untied = [a == b for a, b in pairs if a and b]
    return sum(a == b for a, b in pairs) / len(pairs), sum(untied) / len(untied) if untied else None


tenths = st.integers(0, 4).map(lambda x: x / 10)
scores = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*[st.lists(tenths, min_size=n, max_size=n)] * 2))


@FUZZ
@given(scores)
def test_agreement_against_scipy_and_counting(lists):
    """Five values among up to twelve items: nearly every example has ties on one side or both,
    where naive formulas differ.
    """
    ours, theirs = lists
    figures = agreement(ours, theirs)
    assert (figures["with_ties"],
            figures["without_ties"]) == pytest.approx(counted_by_hand(ours, theirs))
    if len(set(ours)) == 1 or len(set(theirs)) == 1:
        assert figures["spearman"] is None and figures["kendall"] is None
    else:
        assert figures["spearman"] == pytest.approx(stats.spearmanr(ours, theirs).statistic)
        assert figures["kendall"] == pytest.approx(stats.kendalltau(ours, theirs).statistic)


def test_agreement_worked_by_hand():
    """Orders of the pairs 01 02 03 12 13 23, ours (1 2 2 3): < < < = < <, theirs (1 3 2 2): < < < >
    > =. Alike: the first three of 6. Untied on both sides: 01 02 03 13, three of them alike.
    """
    figures = agreement([1, 2, 2, 3], [1, 3, 2, 2])
    assert figures["with_ties"] == 3 / 6 and figures["without_ties"] == 3 / 4


def test_agreement_where_nothing_is_left_to_compare():
    """0.1 added three times is not 0.3, so that the standard deviation of three equal scores is not
    0: still None, never NaN.
    """
    assert agreement([3], [4]) == {"with_ties": None, "without_ties": None, "spearman": None,
                                   "kendall": None}
    assert agreement([0.1] * 3, [1, 2, 3]) == {"with_ties": 0, "without_ties": None,
                                               "spearman": None, "kendall": None}
    assert agreement([2, 2], [5, 5]) == {"with_ties": 1, "without_ties": None, "spearman": None,
                                         "kendall": None}


# ---- the three roles

def test_truth_counts_the_checks_that_match():
    assert truth([r"(?i)\bfirst\b", "because", r"\d{3}", "x$"], "First, because 12\nx") == 3
    assert truth([], "anything") == 0 and truth(["^$"], "") == 1


def test_mean_leaves_out_what_was_not_measured():
    assert mean([1, None, 4]) == 2.5 and mean([None]) is None and mean([]) is None
    assert mean(iter([0])) == 0


def an_answer(prompt_id, text="", score=None, finished=True, scores=(), **more):
    return {"prompt_id": prompt_id, "text": text, "score": score, "finished": finished,
            "scores": list(scores), **more}


def test_measure_actor_by_hand():
    """Scores 2, 4, none, 5 -> 11/3 of three; lengths 1, 3, 5, 500 -> 127.25; truths 1, 4, 4, 0 ->
    2.25. The one that was cut off counts like the others: over the three that ended by themselves
    the truth would be 3, and 3 characters the mean.
    """
    answers = [an_answer("a", "x", 2, truth=1), an_answer("a", "xxx", 4, truth=4),
               an_answer("b", "xxxxx", None, truth=4),
               an_answer("b", "x" * 500, 5, finished=False, truth=0)]
    assert measure_actor(answers) == {
        "answers": 4, "cut_off": 1, "cut_off_rate": 0.25,
        "mean_score": pytest.approx(11 / 3), "mean_score_count": 3,
        "mean_length": 127.25, "mean_length_count": 4, "truth": 2.25, "truth_count": 4}


def test_measure_actor_without_truth():
    """No checks at all: no such figure. Checks on some prompts only: the mean over those."""
    assert measure_actor([an_answer("a", "xx", 2)]) == {
        "answers": 1, "cut_off": 0, "cut_off_rate": 0, "mean_score": 2, "mean_score_count": 1,
        "mean_length": 2, "mean_length_count": 1}
    some = measure_actor([an_answer("a", "xx", 2), an_answer("b", "xx", 4, truth=5)])
    assert (some["truth"], some["truth_count"]) == (5, 1)
    assert measure_actor([an_answer("a", "xx", finished=False)]) == {
        "answers": 1, "cut_off": 1, "cut_off_rate": 1, "mean_score": None, "mean_score_count": 0,
        "mean_length": 2, "mean_length_count": 1}
    assert measure_actor([]) == {
        "answers": 0, "cut_off": 0, "cut_off_rate": None, "mean_score": None,
        "mean_score_count": 0, "mean_length": None, "mean_length_count": 0}


def without_counts(figures):
    """The figures alone, of those that say beside them over how many they are."""
    assert all(f"{name}_count" in figures for name, value in figures.items()
               if isinstance(value, float) and not name.endswith(("_count", "cut_off_rate")))
    return {name: value for name, value in figures.items() if not name.endswith("_count")}


def counts(figures):
    return {name.removesuffix("_count"): value for name, value in figures.items()
            if name.endswith("_count")}


def test_short_answers_alone_do_not_make_an_actor_better():
    """What is cut off at 48 tokens counts: if only the short answers were counted, the first of
    these actors would look better than the second, which writes the same answers to their ends.
    """
    short, long = "Yes.", "Because it rains, and then some more."
    first = [an_answer("a", short, finished=True, truth=5),
             an_answer("a", long[:9], finished=False, truth=1)]
    second = [an_answer("a", short, finished=True, truth=5), an_answer("a", long, truth=3)]
    assert measure_actor(first)["truth"] == 3 < measure_actor(second)["truth"] == 4
    assert measure_actor(first)["mean_length"] == (len(short) + 9) / 2


def test_figures_over_enough_prompts_have_an_interval():
    """Ten prompts of two equal answers each: the interval is that of ten numbers, not of twenty.
    Nine prompts have none, nor have nine with a truth among ten.
    """
    answers = [an_answer(str(i), "x" * i, i % 5, truth=i % 3) for i in range(10) for _ in "ab"]
    figures = measure_actor(answers, "reward")
    assert figures["reward"] == 2 and "mean_score" not in figures
    scores = [i % 5 for i in range(10)]
    assert figures["reward_interval"] == bootstrap(np.mean, scores, resamples=400)
    assert figures["mean_length_interval"] == bootstrap(np.mean, range(10), resamples=400)
    low, high = measure_judge([an_answer(str(i), score=score, truth=truth) for i in range(10)
                               for score, truth in ((i % 2, 0), (0.5, 1))]
                              )["truth_agreement_interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert not any("interval" in name for name in measure_actor(answers[:18]))
    del answers[0]["truth"], answers[1]["truth"]
    assert measure_actor(answers).keys() >= {"truth", "mean_score_interval"}
    assert "truth_interval" not in measure_actor(answers)


def test_measure_judge_by_hand():
    """Prompt a, truths 3 1 1, scores 4 2 4: pair 01 right (1), 02 a tie where the truth has none
    (1/2), 12 equal in truth (does not count). Prompt b, truths 0 2, scores 3 1: wrong (0). Prompt
    c: an answer without a score has no pair. Agreement (1 + 1/2 + 0) / 3 = 1/2. Ties: 1 of 4 pairs.
    Judgments: 4 4, 2 None, 4, 3, 1, 5, None None -> 7 of 10 valid, their mean 23 / 7.
    """
    answers = [an_answer("a", "xx", score=4, scores=[4, 4], truth=3),
               an_answer("a", score=2, scores=[2, None], truth=1),
               an_answer("b", "xxx", score=3, scores=[3], truth=0),
               an_answer("a", "x" * 7, score=4, scores=[4], truth=1),
               an_answer("b", "x", score=1, scores=[1], truth=2),
               an_answer("c", "x" * 9, score=5, scores=[5], truth=0),
               an_answer("c", "x" * 99, score=None, scores=[None, None], truth=5)]
    figures = measure_judge(answers)
    assert figures.pop("histogram") == {"1": 1, "2": 1, "3": 1, "4": 3, "5": 1}
    assert sum([1, 1, 1, 3, 1]) == 7
    lengths = [2, 0, 3, 7, 1, 9]
    expected = {"valid_rate": 0.7, "mean_score": 23 / 7, "ties": 1 / 4, "truth_agreement": 1 / 2,
                "halves_kendall": None, "previous_judge_kendall": None,
                "length_correlation": stats.spearmanr([4, 2, 3, 4, 1, 5], lengths)[0],
                "truth_length_correlation": stats.spearmanr([3, 1, 0, 1, 2, 0], lengths)[0]}
    assert without_counts(figures) == pytest.approx(expected)
    assert counts(figures) == {
        "valid_rate": 10, "mean_score": 7, "ties": 4, "truth_agreement": 3, "halves_kendall": 0,
        "previous_judge_kendall": 0, "length_correlation": 6, "truth_length_correlation": 6}
    assert abs(expected["length_correlation"] - expected["truth_length_correlation"]) > 0.5


def test_scores_with_fractions_have_their_own_place_in_the_histogram():
    figures = measure_judge([an_answer("a", score=3, scores=[2.5, 10, 2.5, 9, None])])
    # by size, not as texts
    assert list(figures["histogram"].items()) == [("2.5", 2), ("9", 1), ("10", 1)]


def test_a_judge_who_says_the_same_of_everything_has_one_half():
    """Neither a high score for all, which DPO may teach, nor a score that is the reverse of the
    truth looks like skill.
    """
    same = [an_answer("a", score=5, scores=[5], truth=t) for t in range(4)]
    figures = measure_judge(same)
    assert (figures["valid_rate"], figures["mean_score"], figures["ties"],
            figures["truth_agreement"]) == (1, 5, 1, 0.5)
    assert measure_judge([a | {"score": -a["truth"]} for a in same])["truth_agreement"] == 0
    assert measure_judge([a | {"score": a["truth"]} for a in same])["truth_agreement"] == 1


def test_how_far_a_judge_agrees_with_itself_and_with_the_previous_one():
    """Halves: the first, third, ... judgment and the others. Prompt a: means 4 3 1 and 3 4 2, so
    one pair is turned round and two are not; prompt b: 5 2 and a tie; c has no second half. tau-b
    of the four pairs: (2 - 1) / sqrt(4 * 3). The previous judge's scores 1 2 3 of a turn round all
    three pairs, and keep b's one: (1 - 3) / sqrt(4 * 4); the answer without such a score is left
    out.
    """
    answers = [an_answer("a", score=3.4, scores=[5, 2, None, 4, 3], previous_score=1),
               an_answer("a", score=3.3, scores=[3, 4], previous_score=2),
               an_answer("a", score=1.5, scores=[1, 2], previous_score=3),
               an_answer("b", score=4, scores=[5, 3], previous_score=4),
               an_answer("b", score=2.5, scores=[2, 3], previous_score=1),
               an_answer("c", score=4, scores=[4], previous_score=None),
               an_answer("c", score=2, scores=[2], previous_score=3)]
    figures = measure_judge(answers)
    assert figures["halves_kendall"] == pytest.approx(1 / math.sqrt(12))
    assert figures["previous_judge_kendall"] == pytest.approx(-2 / 4)


def test_a_tie_is_a_tie_whatever_the_order_of_the_sum():
    """The means of 3.1, 3.1, 4.6 and of 3.1, 4.6, 3.1 differ in the last digit."""
    means = [mean([3.1, 3.1, 4.6]), mean([3.1, 4.6, 3.1])]
    assert means[0] != means[1]
    answers = [an_answer("a", score=score, scores=[score], truth=t, rank=t)
               for t, score in enumerate(means)]
    figures = measure_judge(answers)
    assert figures["ties"] == 1 and figures["truth_agreement"] == 0.5
    assert measure_people(answers)["human_agreement"] is None


def test_measure_judge_of_nothing():
    assert without_counts(measure_judge([])) == {
        "valid_rate": None, "mean_score": None, "ties": None, "histogram": {},
        "halves_kendall": None, "previous_judge_kendall": None, "length_correlation": None}
    # never across prompts
    assert measure_judge([an_answer("a", score=2, scores=[2]),
                          an_answer("b", score=3, scores=[3])])["ties"] is None
    assert measure_judge([an_answer("a", score=2, scores=[2], truth=1)])["truth_agreement"] is None


def replies(prompt_id, *scores_and_ranks):
    return [{"prompt_id": prompt_id, "score": score, "rank": rank}
            for score, rank in scores_and_ranks]


def test_measure_people_by_hand():
    """Prompt a, ranks 0 1 2, scores 5 3 4: of three pairs two are ordered as people did; Spearman
    1/2. Prompt b, scores 2 2 for ranks 1 0: a tie that people do not have, and no Spearman. Prompt
    c: 1 3 for ranks 0 1, wrong, Spearman -1; a reply without a score has no pair. Pairs never cross
    prompts. Agreement without ties 2 of 4, with them 2 of 5; Spearman (1/2 - 1) / 2.
    """
    judged = [*replies("a", (5, 0), (3, 1), (4, 2)), *replies("b", (2, 1), (2, 0)),
              *replies("c", (1, 0), (3, 1), (None, 2))]
    figures = measure_people(judged)
    assert without_counts(figures) == pytest.approx({
        "human_agreement": 2 / 4, "human_agreement_with_ties": 2 / 5, "human_spearman": -1 / 4})
    assert counts(figures) == {"human_agreement": 4, "human_agreement_with_ties": 5,
                               "human_spearman": 2}
    assert without_counts(measure_people([])) == {
        "human_agreement": None, "human_agreement_with_ties": None, "human_spearman": None}
    # always 5: no agreement is made up
    assert measure_people(replies("a", (5, 0), (5, 1)))["human_agreement_with_ties"] == 0
    assert measure_people(replies("a", (5, 0), (5, 1)))["human_agreement"] is None


def test_measure_people_against_scipy():
    """100 random groups: Spearman's mean is scipy's over the groups where scores vary, and
    agreement is counted pair by pair.
    """
    rng = np.random.default_rng(0)
    judged, correlations, right, untied, pairs = [], [], 0, 0, 0
    for p in range(100):
        scores, ranks = rng.integers(0, 4, 4).tolist(), rng.permutation(4).tolist()
        judged += replies(str(p), *zip(scores, ranks))
        if len(set(scores)) > 1:
            correlations.append(stats.spearmanr(scores, [-rank for rank in ranks])[0])
        for i, j in combinations(range(4), 2):
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            pairs, untied = pairs + 1, untied + (scores[i] != scores[j])
            right += scores[better] > scores[worse]
    figures = measure_people(judged)
    low, high = figures.pop("human_agreement_interval")
    assert low < right / untied < high
    assert counts(figures) == {"human_agreement": untied, "human_agreement_with_ties": pairs,
                               "human_spearman": len(correlations)}
    assert len(correlations) < 100 and without_counts(figures) == pytest.approx(
        {"human_agreement": right / untied, "human_agreement_with_ties": right / pairs,
         "human_spearman": np.mean(correlations)})


def test_measure_meta_judge_by_hand():
    """Scores 1 3 3, truth 2.5, so that both 3s are nearer to it than the 1. Comparisons, first
    against second: 0-1 first, 1-0 first (not consistent); 0-2 second, 2-0 first (consistent); 1-2
    second, 2-1 not parsed. Valid 5 of 6. First wins 3 of 5. Both orders parsed: 01 and 02, one
    consistent. Scores differ in four (01 10 02 20), the higher wins in three (10 02 20), and in the
    same three the nearer to the truth wins; 12 is equal in both senses, and its second wins.
    """
    battle = {"verdicts": [[0, 1, -1], [1, 0, -1], [1, 0, 0]], "scores": [1, 3, 3], "truth": 2.5}
    figures = measure_meta_judge([battle])
    assert without_counts(figures) == pytest.approx({
        "first_position_rate": 3 / 5, "first_of_equals_rate": 0, "higher_score_rate": 3 / 4,
        "consistent_rate": 1 / 2, "valid_rate": 5 / 6, "truth_accuracy": 3 / 4,
        "scores_differ_rate": 4 / 5})
    assert counts(figures) == {
        "first_position_rate": 5, "first_of_equals_rate": 1, "higher_score_rate": 4,
        "consistent_rate": 2, "valid_rate": 6, "truth_accuracy": 4, "scores_differ_rate": 5}


def test_a_nearer_score_is_not_the_higher_one():
    """Truth 0, and the meta-judge always takes the lower score: never the higher, always right.
    Battles add up as comparisons do: with four comparisons of a second answer, all unparsed, valid
    falls to 2 of 8 and nothing else changes.
    """
    low_wins = {"verdicts": [[0, 1], [-1, 0]], "scores": [1, 4], "truth": 0}
    unparsed = {"verdicts": [[0] * 3] * 3, "scores": [1, 2, 3]}
    figures = measure_meta_judge([low_wins, unparsed])
    assert without_counts(figures) == {
        "first_position_rate": 0.5, "higher_score_rate": 0, "consistent_rate": 1,
        "valid_rate": 2 / 8, "truth_accuracy": 1, "first_of_equals_rate": None,
        "scores_differ_rate": 1}


def test_measure_meta_judge_of_nothing():
    empty = {"first_position_rate": None, "higher_score_rate": None, "consistent_rate": None,
             "valid_rate": None, "scores_differ_rate": None, "first_of_equals_rate": None}
    assert without_counts(measure_meta_judge([])) == empty
    silent = measure_meta_judge([{"verdicts": [[0, 0], [0, 0]], "scores": [1, 2]}])
    assert without_counts(silent) == empty | {"valid_rate": 0} and silent["valid_rate_count"] == 2


def test_measure_repeats_by_hand():
    """Judgments x y z came back as z x y. Verdicts that parsed both times: x-y first, again first;
    y-x first, now second (changed); x-z second, again second; z-x did not parse the first time, y-z
    not the second; z-y second both times. One of four changed. Comparisons won: x 1, y 3, z 1, then
    z 2, x 2, y 1: the pair is another one. Of the second answer nothing parsed, then each won once:
    equals both times. Of the third p won both: changed. Of ten comparisons 1 + 2 + 2 did not parse
    before, and 1 the second time.
    """
    verdicts = [[0, 1, -1], [1, 0, 1], [0, -1, 0]]          # x y z
    again = [[0, 1, -1], [-1, 0, 1], [0, -1, 0]]            # z x y
    silent = {"texts": ["p", "q"], "verdicts": [[0, 0], [0, 0]]}
    battles = [{"texts": ["x", "y", "z"], "verdicts": verdicts}, silent, silent]
    repeats = [{"order": [2, 0, 1], "verdicts": again},
               {"order": [1, 0], "verdicts": [[0, 1], [1, 0]]},
               {"order": [1, 0], "verdicts": [[0, -1], [1, 0]]}]
    assert measure_repeats(battles, repeats) == {"winner_changed": 1 / 4, "pair_changed": 2 / 3,
                                                 "comparisons": 10, "unparsed": [5, 1]}
    assert measure_repeats([], []) == {"winner_changed": None, "pair_changed": None,
                                       "comparisons": 0, "unparsed": [0, 0]}
    with pytest.raises(ValueError):
        measure_repeats(battles, repeats[:2])  # never the verdicts of another answer


@pytest.mark.parametrize("differ, judge_pairs, told", [
    (0.8, 40, ["first", "higher"]), (0.03, 40, ["higher"]), (0.8, 0, [])])
def test_drift_that_means_nothing_is_not_told(differ, judge_pairs, told):
    """A bias for a place among judgments that score the same; any in an iteration that trains no
    judge.
    """
    record = {"iteration": 4, "pairs": {"judge": judge_pairs},
              "meta_judge": {"first_position_rate": 0.97, "higher_score_rate": 0.99,
                             "scores_differ_rate": differ}}
    lines = drifts(record, 5)
    assert len(lines) == len(told) and all(word in line for word, line in zip(told, lines))


@pytest.mark.parametrize("meta, score, max_score, said", [
    ({"first_position_rate": 0.44, "higher_score_rate": 0.63}, 4.1, 5, []),
    ({"first_position_rate": 0.68}, 4.1, 5, ["first judgment in 68%"]),
    ({"first_position_rate": 0.3}, 4.7, 5, ["second judgment in 70%"]),
    ({"higher_score_rate": 0.98}, None, 5, ["higher score in 98%"]),
    (None, 4.71, 5, ["4.71 of 5"]), (None, 9.3, 10, []), (None, 9.5, 10, ["9.50 of 10"]),
    ({"first_position_rate": None, "higher_score_rate": None}, None, 5, [])])
def test_drift_is_told_from_the_papers_values_on(meta, score, max_score, said):
    """44 % and 4.1 are the paper's first iteration, 68 %, 98 % and over 4.7 its second, after which
    it trained the judge no more. Either place.
    """
    lines = drifts({"iteration": 3, "meta_judge": meta, "judge": {"mean_score": score},
                    "pairs": {"judge": 40}}, max_score)
    assert len(lines) == len(said) and all(part in line
                                           and line.startswith(("iteration 3: the meta-judge",
                                                                "M_3: the judge's"))
                                           for part, line in zip(said, lines))


# ---- intervals

def test_bootstrap_against_scipy():
    """The percentile interval of a mean and of a statistic of two columns, against scipy's with as
    many resamples; and a mean's against theory.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 1, 80), rng.normal(0, 2, 80)
    low, high = bootstrap(np.mean, x, resamples=20000)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=20000, method="percentile",
                             rng=1).confidence_interval
    assert (low, high) == pytest.approx(tuple(theirs), abs=0.01)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 80 ** 0.5, rel=0.03)
    def slope(a, b):
        return np.cov(a, b)[0, 1] / np.var(a, ddof=1)
    theirs = stats.bootstrap((x, y), slope, n_resamples=5000, method="percentile", paired=True,
                             vectorized=False, rng=1).confidence_interval
    assert bootstrap(slope, x, y, resamples=5000) == pytest.approx(tuple(theirs), abs=0.04)


def test_bootstrap_draws_groups_as_one():
    """Every row five times over, in groups: as wide as the rows alone, where drawing the copies one
    by one would be sqrt(5) narrower.
    """
    x = np.random.default_rng(0).normal(0, 1, 60)
    alone, copied = bootstrap(np.mean, x), bootstrap(np.mean, np.repeat(x, 5),
                                                     groups=np.repeat(np.arange(60), 5))
    assert copied == pytest.approx(alone) and bootstrap(np.mean, x, seed=1) != alone
    narrow = bootstrap(np.mean, np.repeat(x, 5))
    assert (alone[1] - alone[0]) / (narrow[1] - narrow[0]) == pytest.approx(5 ** 0.5, rel=0.1)


# ---- comparing

def compared(prompt, a, b, *winners):
    return {"prompt": prompt, "a": a, "b": b, "winners": list(winners)}


def test_measure_comparisons_by_hand():
    """Won by a in both orders, by b in both, once each, and one without a second verdict, left out:
    (1 + 0 + 1/2) / 3. First places: the first order's a, the second's b: a-a has one of two, b-b
    one, a-b two: 4 of 6. Consistent: 2 of 3.
    """
    records = [compared("p", "xx", "y", "a", "a"), compared("q", "x", "yyy", "b", "b"),
               compared("r", "x", "yy", "a", "b"),
               compared("s", "x" * 50, "y", "a", None)]
    figures = measure_comparisons(records)
    assert figures["compared"] == 3 and figures["unparsed"] == 1
    assert figures["first_position_rate"] == pytest.approx(4 / 6)
    assert figures["win_rate"] == pytest.approx(1 / 2)
    assert figures["consistent_rate"] == pytest.approx(2 / 3)
    # of three prompts
    assert figures["mean_lengths"] == pytest.approx([4 / 3, 2])
    assert figures["win_rate_interval"] is None
    rate = length_controlled_win_rate([1, 0, 0.5], [2, 1, 1], [1, 3, 2])
    assert figures["length_controlled_win_rate"] == rate
    unparsed = measure_comparisons([compared("s", "x", "y", None, "b")])
    assert unparsed == {"compared": 0, "unparsed": 1}


def test_sides_swapped_swap_the_rate():
    rng = np.random.default_rng(0)
    records = [compared(str(i % 20), "x" * int(rng.integers(1, 90)),
                        "y" * int(rng.integers(1, 60)), *rng.choice(["a", "b"], 2))
               for i in range(60)]
    turned = [compared(r["prompt"], r["b"], r["a"], *({"a": "b", "b": "a"}[w]
                                                      for w in reversed(r["winners"])))
              for r in records]
    there, back = measure_comparisons(records), measure_comparisons(turned)
    for name in ("win_rate", "length_controlled_win_rate"):
        assert there[name] + back[name] == pytest.approx(1)
    assert there["first_position_rate"] == pytest.approx(back["first_position_rate"])
    assert there["consistent_rate"] == back["consistent_rate"]


GOOD = ("Here is how to {task}. First, put the food in a clean box. The reason is that air and "
        "warmth spoil food. For example, a cotton towel is "
        "enough. Then make sure that no water has gathered inside.")
POOR = ("It is not hard to {task}. What a wonderful question! I know a very great deal about this. "
        "Nobody could explain this better than I can.")
TASKS = ["keep bread fresh", "store fresh herbs", "keep cheese soft", "keep apples crisp",
         "keep cookies crunchy", "store ripe tomatoes"]


def write_answers(file, *texts, tasks=TASKS):
    records = [{"prompt": f"How do I {task}?", "text": text.format(task=task), "finished": True}
               for task in tasks for text in texts]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_compare_two_files_by_a_real_judge(tmp_path, monkeypatch, capsys):
    """Good answers against poor ones of the same length and less: the tiny judge finds them,
    whichever file comes first; every pair is written down with its four verdicts; answers without a
    counterpart are counted.
    """
    good, poor = write_answers(tmp_path / "good.jsonl",
                               GOOD), write_answers(tmp_path / "poor.jsonl", POOR, tasks=TASKS[:5])
    file = tmp_path / "new" / "pairs.jsonl"
    status, out, _ = command(monkeypatch, capsys, "compare", good, poor, "--judge",
                             ROOT / "tiny" / "judge", "--out", file)
    assert status == 0 and "5 pairs of answers to 5 prompts" in out
    assert "1 answers without a counterpart" in out
    assert "too few prompts" in out and "judge is one of the two" not in out
    assert re.search(r"A wins +100.0%", out)
    assert "not AlpacaEval's nor any other leaderboard's" in out
    pairs = read_jsonl(file)
    assert [pair["winners"] for pair in pairs] == [["a", "a"]] * 5
    assert all(len(pair["said"]) == 2 for pair in pairs)
    assert pairs[0]["a"] == GOOD.format(task=TASKS[0])
    assert pairs[0]["b"] == POOR.format(task=TASKS[0])
    status, out, _ = command(monkeypatch, capsys, "compare", poor, good, "--judge",
                             ROOT / "tiny" / "judge")
    assert status == 0 and re.search(r"A wins +0.0%", out) and "cannot tell" not in out


def test_a_judge_with_a_place_is_found_out(tmp_path, monkeypatch, capsys):
    """The tiny judge says A where it sees no difference: the same answers on both sides are a draw,
    half each, and the bias is 100 %.
    """
    same = write_answers(tmp_path / "same.jsonl", GOOD)
    status, out, _ = command(monkeypatch, capsys, "compare", same, same, "--judge",
                             ROOT / "tiny" / "judge")
    assert status == 0 and re.search(r"A wins +50.0%", out)
    assert re.search(r"prefers the first +100.0%", out)
    assert re.search(r"same in both orders +0.0%", out)
    assert "This judge cannot tell: it prefers the first answer, whatever it is." in out


def test_a_judge_that_is_one_of_the_two_is_told(tmp_path, monkeypatch, capsys):
    """By whatever name: a folder with a slash behind it, and a run's iteration whose own answers
    are judged.
    """
    judge = tmp_path / "judge"
    shutil.copytree(ROOT / "tiny" / "judge", judge)
    own, other = write_answers(judge / "eval.jsonl", GOOD,
                               tasks=TASKS[:1]), write_answers(tmp_path / "other.jsonl", POOR,
                                                               tasks=TASKS[:1])
    assert "judge is one of the two" in command(monkeypatch, capsys, "compare", own, other,
                                                "--judge", f"{judge}/")[1]


def test_cut_off_answers_are_counted_where_they_are_compared(tmp_path, monkeypatch, capsys):
    good, poor = write_answers(tmp_path / "good.jsonl",
                               GOOD), write_answers(tmp_path / "poor.jsonl", POOR, tasks=TASKS[:2])
    good.write_text(good.read_text().replace('"finished": true', '"finished": false'))
    out = command(monkeypatch, capsys, "compare", good, poor, "--judge", ROOT / "tiny" / "judge")[1]
    assert "cut off, and compared as they are: 2 of A, 0 of B" in out
    assert "4 answers without a counterpart" in out


LONG = "How do I sing " + "so well " * 2000 + "?"


def test_prompts_that_are_too_long_are_left_out_and_told(tmp_path, monkeypatch, capsys):
    """One prompt of three leaves the model no room; then one answer of three leaves the judge none;
    then all.
    """
    (tmp_path / "prompts.txt").write_text(f"How do I keep bread fresh?\n{LONG}\nHow do I keep "
                                          f"cheese soft?\n")
    status, out, error = command(monkeypatch, capsys, "compare", ROOT / "tiny", ROOT / "tiny",
                                 "--prompts", tmp_path / "prompts.txt", "--judge",
                                 ROOT / "tiny" / "judge", "--max-new-tokens", "100")
    assert status == 0 and "0 answers without a counterpart" in out and "to 2 prompts" in out, error
    assert "A: answers: 1 prompts are too long" in error
    assert "B: answers: 1 prompts are too long" in error and error.count("too long") == 2
    good, other = write_answers(tmp_path / "good.jsonl",
                                GOOD), write_answers(tmp_path / "other.jsonl", POOR)
    other.write_text(other.read_text().replace("Nobody could", "Nobody " * 2000 + "could", 1))
    status, out, error = command(monkeypatch, capsys, "compare", good, other, "--judge",
                                 ROOT / "tiny" / "judge")
    assert status == 0 and "comparisons: 2 prompts are too long" in error
    assert "1 pairs without two verdicts" in out
    status, out, error = command(monkeypatch, capsys, "compare", good, other, "--judge",
                                 ROOT / "tiny" / "judge", "--max-verdict-tokens", "5000")
    assert status == 2 and "comparisons: 12 prompts are too long" in error
    assert error.splitlines()[-1].startswith("error: no verdict of")


def test_a_missing_judge_is_found_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("harness.stage.sample", lambda *_, **__: pytest.fail("answers were drawn"))
    status, _, error = command(monkeypatch, capsys, "compare", ROOT / "tiny", ROOT / "tiny",
                               "--judge", "no/such/place")
    assert status == 2 and "no/such/place" in error


def test_compare_a_model_with_a_file(tmp_path, monkeypatch, capsys):
    """The model answers the file's own prompts; its answers are those that sampling gives with the
    same seed, and it is greedy if told so.
    """
    file = write_answers(tmp_path / "good.jsonl", GOOD, tasks=TASKS[:3])
    status, out, error = command(monkeypatch, capsys, "compare", ROOT / "tiny", file, "--judge",
                                 ROOT / "tiny" / "judge", "--out",
                                 tmp_path / "pairs.jsonl", "--temperature", "0", "--max-new-tokens",
                                 "150")
    assert status == 0, error
    asked = [record["prompt"] for record in read_jsonl(file)]
    expected = sample(*load(str(ROOT / "tiny")), asked, max_new_tokens=150, temperature=0)
    said = [pair["a"] for pair in read_jsonl(tmp_path / "pairs.jsonl")]
    assert said == [answers[0].text for answers in expected]


@pytest.mark.parametrize("arguments, says", [
    (["{good}", "{other}", "--judge", "{judge}"], "no answers to the same prompts"),
    (["{good}", "{bad}", "--judge", "{judge}"], "record 1 needs \"text\""),
    (["{good}", "{good}", "--judge", "{missing}"], "no such folder"),
    (["{good}", "{missing}", "--judge", "{judge}"], "no such folder"),
    (["{good}", "no/such/answers.jsonl", "--judge", "{judge}"], "there is no such file"),
    (["{good}", "{good}"], "--judge"),
    (["{good}", "--judge", "{judge}"], "B"), (["{good}", "{torn}", "--judge", "{judge}"], "line 1"),
    (["{good}", "{good}", "--judge", "{judge}", "--prompts", "{missing}"], "--prompts"),
    (["{good}", "{good}", "--judge", "{judge}", "--max-verdict-tokens", "3"], "no verdict of"),
    (["{good}", "{good}", "--judge", "{judge}", "--frobnicate"], "--frobnicate")])
def test_comparisons_that_cannot_be_made(tmp_path, monkeypatch, capsys, arguments, says):
    """One line that names what is wrong, status 2, no traceback."""
    write_answers(tmp_path / "good.jsonl", GOOD, tasks=TASKS[:2])
    write_answers(tmp_path / "other.jsonl", GOOD, tasks=TASKS[2:4])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "How do I keep bread fresh?"}\n')
    (tmp_path / "torn.jsonl").write_text('{"prompt": "How do')
    places = {name: tmp_path / f"{name}.jsonl" for name in ("good", "other", "bad", "torn")} | {
        "judge": ROOT / "tiny" / "judge", "missing": "no/such/place"}
    status, _, error = command(monkeypatch, capsys, "compare", *(argument.format(**places)
                                                                 for argument in arguments))
    line = error.strip().splitlines()[-1]
    assert status == 2 and line.startswith("error: ") and says in line and "Traceback" not in error


# ---- answers for the official tools

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two iterations whose adapters are real, and differ."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    for t in (0, 1):
        torch.manual_seed(t)
        model = add_lora(load(str(ROOT / "tiny"))[0], rank=2)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02 * t)
        save_adapter(model, run / f"iter{t}" / "adapter")
    settings = {"max_answer_tokens": 120, "bits": 32, "eval_prompts": str(ROOT / "tiny/eval.jsonl")}
    (run / "config.json").write_text(json.dumps({"settings": settings}))
    return run


def test_models_of_a_run_answer_its_own_prompts_as_long_as_it_did(trained, tmp_path, monkeypatch,
                                                                  capsys):
    """Nothing but the iterations is named: the prompts are the run's held-out ones, and no answer
    is longer than the run's.
    """
    asked = []
    def short(model, tokenizer, prompts, *rest, **settings):
        asked.append((len(prompts), settings["max_new_tokens"]))
        return sample(model, tokenizer, prompts, *rest, **settings | {"max_new_tokens": 4})
    monkeypatch.setattr("harness.stage.sample", short)
    status, _, error = command(monkeypatch, capsys, "compare", trained / "iter0", trained / "iter1",
                               "--judge", ROOT / "tiny" / "judge")
    assert asked == [(60, 120), (60, 120), (120, 512)] and status == 2 and "no verdict of" in error


@pytest.mark.parametrize("kind", ["mt-bench", "compare", "ifeval"])
def test_a_command_that_was_killed_goes_on(trained, tmp_path, monkeypatch, capsys, kind):
    """It dies after each third reply, is given again until it ends, draws nothing twice, and leaves
    what an undisturbed one leaves; but for another temperature it does not take over what is there.
    """
    (tmp_path / "q").write_text("".join(json.dumps(
        {"question_id": i, "turns": [f"How do I {task}?", "Why?"], "prompt": f"How do I {task}?",
         "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}) + "\n"
        for i, task in enumerate(TASKS[:4])))
    flags = {"mt-bench": ["export", trained, "--format", "mt-bench", "--questions",
                          tmp_path / "q"],
             "compare": ["compare", trained / "iter0", trained / "iter1", "--prompts",
                         tmp_path / "q", "--judge", ROOT / "tiny" / "judge"],
             "ifeval": ["ifeval", trained, "--questions", tmp_path / "q"]}[kind]
    flags += ["--max-answer-tokens", "20"]
    died = drawn = 0

    def dies(*arguments, on_end, **settings):
        ended = 0

        def end(*of_one):
            nonlocal ended, died, drawn
            on_end(*of_one)
            ended, drawn = ended + 1, drawn + 1
            if ended == 3:
                died += 1
                raise KeyboardInterrupt
        return sample(*arguments, on_end=end, **settings)

    def left(out):
        files = sorted(path for path in Path(out).parent.rglob("*") if path.is_file())
        return {file.name: re.sub(r'"tstamp": [\d.]+', "", file.read_text()) for file in files}

    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    for name in ("whole", "cut"):
        out = tmp_path / name / "out"
        monkeypatch.setattr("harness.stage.sample", dies if name == "cut" else sample)
        while True:
            try:
                status, said, error = command(monkeypatch, capsys, *flags, "--out", out)
                break
            except KeyboardInterrupt:
                if kind != "ifeval" and died == 1:
                    assert "another temperature, 0.8 instead of 0.1" in command(
                        monkeypatch, capsys, *flags, "--temperature", "0.1", "--out", out)[2]
        assert status in (0, 2), error  # the seed judges nothing that names a winner
    assert died > 1 and drawn == {"mt-bench": 16, "compare": 16, "ifeval": 8}[kind]
    assert left(tmp_path / "whole" / "out") == left(tmp_path / "cut" / "out")


ALPACA = [{"instruction": f"How do I {task}?", "output": "A reference.", "generator": "reference",
           "dataset": "koala"} for task in TASKS[:3]]


def exported(run, out, monkeypatch, capsys, form, questions, *flags):
    status, said, error = command(monkeypatch, capsys, "export", run, "--format", form,
                                  "--questions", questions, "--out", out, *flags)
    assert status == 0, error
    return said


def test_alpaca_eval_reads_its_export(trained, tmp_path, monkeypatch, capsys):
    """The installed package evaluates the file: it finds the generator's name, joins every answer
    with the reference by its instruction, and an annotator of our own, in the place of GPT-4,
    prefers the longer answer, which is ours all three times.
    """
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(ALPACA))
    said = exported(trained, tmp_path / "out", monkeypatch, capsys, "alpaca",
                    tmp_path / "alpaca_eval.json")
    file = tmp_path / "out" / "mine-iter1" / "model_outputs.json"
    keys = {"instruction", "output", "generator", "dataset"}
    assert [set(record) for record in json.loads(file.read_text())] == [keys] * 3
    assert f"{file}: 3 questions, 0 answers cut off" in said
    assert (tmp_path / "out" / "mine-iter0" / "model_outputs.json").is_file()

    from alpaca_eval import evaluate
    from alpaca_eval.annotators import PairwiseAnnotator

    class Longer(PairwiseAnnotator):
        def __init__(self, annotators_config):
            pass

        @property
        def input_keys(self):
            return ["instruction"]

        def __call__(self, both, **settings):
            seen.extend(both.to_dict("records"))
            return [{**row, "preference": 2.0 if len(row["output_2"]) > len(row["output_1"])
                     else 1.0} for row in both.to_dict("records")]

    seen = []
    leaderboard, _ = evaluate(model_outputs=file, reference_outputs=tmp_path / "alpaca_eval.json",
                              annotators_config="none", Annotator=Longer,
                              precomputed_leaderboard=None, output_path=None,
                              is_return_instead_of_print=True, fn_metric="get_winrate",
                              sort_by="win_rate")
    assert list(leaderboard.index) == ["mine-iter1"]
    assert leaderboard.loc["mine-iter1", "win_rate"] == 100
    assert [row["instruction"] for row in seen] == [record["instruction"] for record in ALPACA]


def test_mt_bench_answers_the_second_turn_after_the_first(trained, tmp_path, monkeypatch, capsys):
    """The second answer is what the model says to the whole chat, first answer included: drawn here
    again by `sample`, token for token.
    """
    questions = [{"question_id": 81 + i, "category": "writing",
                  "turns": [f"How do I {task}?", "Please explain how to rest tired eyes."]}
                 for i, task in enumerate(TASKS[:3])]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(question) + "\n"
                                                     for question in questions))
    exported(trained, tmp_path / "out", monkeypatch, capsys, "mt-bench",
             tmp_path / "question.jsonl", "--iterations", "1", "--temperature", "0")
    records = read_jsonl(tmp_path / "out" / "model_answer" / "mine-iter1.jsonl")
    assert [record["question_id"] for record in records] == [81, 82, 83]
    assert {record["model_id"] for record in records} == {"mine-iter1"}
    assert len({record["answer_id"] for record in records}) == 3
    assert all(record["tstamp"] > 1.7e9 for record in records)
    model, tokenizer = load(str(trained / "iter1"))
    for question, record in zip(questions, records):
        (choice,) = record["choices"]
        first, second = choice["turns"]
        assert choice["index"] == 0
        chat = [question["turns"][0], first, question["turns"][1]]
        said = sample(model, tokenizer, [chat, question["turns"][0]], max_new_tokens=120,
                      temperature=0)
        assert [second, first] == [answers[0].text for answers in said]
    alone = sample(model, tokenizer, [questions[0]["turns"][1]], max_new_tokens=120,
                   temperature=0)[0][0].text
    # what went before was read
    assert {record["choices"][0]["turns"][1] for record in records} != {alone}
    assert not (tmp_path / "out" / "model_answer" / "mine-iter0.jsonl").exists()


def test_a_question_that_is_too_long_is_exported_empty_and_told(trained, tmp_path, monkeypatch,
                                                                capsys):
    """Its second turn, too, which no other question has. The other questions' answers are those
    without it.
    """
    questions = [{"question_id": i, "turns": turns}
                 for i, turns in enumerate([["How do I keep bread\u2028 fresh?"], [LONG, "Why?"]])]
    texts = []
    for some in (questions, questions[:1]):
        (tmp_path / "question.jsonl").write_text("".join(json.dumps(question, ensure_ascii=False)
                                                         + "\n" for question in some))
        status, out, error = command(monkeypatch, capsys, "export", trained, "--format", "mt-bench",
                                     "--questions", tmp_path / "question.jsonl",
                                     "--out", tmp_path / "out", "--iterations", "1")
        assert status == 0, error
        texts.append([record["choices"][0]["turns"]
                      for record in read_jsonl(tmp_path / "out" / "model_answer"
                                               / "mine-iter1.jsonl")])
        if some == questions:
            assert "turn 1: 1 prompts are too long" in error
            assert "turn 2: 1 prompts are too long" in error
            assert "0 answers cut off" in out and "2 empty" in out
    assert texts[0] == [*texts[1], ["", ""]] and all(texts[1][0])


def test_arena_hard_in_both_forms(trained, tmp_path, monkeypatch, capsys):
    """The form follows the question file: question_id and turns in 2024, uid and prompt in 2025.
    Same draws, so the same answers.
    """
    old = [{"question_id": f"q{i}", "category": "arena-hard-v0.1", "cluster": "c",
            "turns": [{"content": f"How do I {task}?"}]}
           for i, task in enumerate(TASKS[:2])]
    new = [{"uid": f"u{i}", "category": "hard_prompt", "subcategory": "coding",
            "prompt": f"How do I {task}?"} for i, task in enumerate(TASKS[:2])]
    answers = []
    for name, questions in (("old", old), ("new", new)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n"
                                                        for question in questions))
        exported(trained, tmp_path / name, monkeypatch, capsys, "arena-hard",
                 tmp_path / f"{name}.jsonl", "--iterations", "1")
        answers.append(read_jsonl(tmp_path / name / "model_answer" / "mine-iter1.jsonl"))
    for i, (a, b) in enumerate(zip(*answers, strict=True)):
        assert set(a) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert a["question_id"] == f"q{i}"
        (turn,) = a["choices"][0]["turns"]
        assert set(turn) == {"content", "token_len"} and turn["token_len"] > 3
        assert set(b) == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
        assert b["uid"] == f"u{i}" and b["model"] == "mine-iter1"
        assert b["messages"] == [{"role": "user", "content": f"How do I {TASKS[i]}?"},
                                 {"role": "assistant", "content": {"answer": turn["content"]}}]
        assert b["metadata"]["token_len"] == turn["token_len"]


def test_style_counts_by_hand():
    """Headers of two levels, three list items, two bold passages; inside a code block nothing
    counts, and a # without a space is no header.
    """
    text = ("# One\n## Two\n#tag\n1. first\n- second\n  * third **bold** and __also__\n"
            "```\n# comment\n- no\n**no**\n```\n")
    counts = export.style_counts(text)
    assert counts["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert counts["list_count"] == {"ordered": 1, "unordered": 2}
    assert counts["bold_count"] == {"**": 1, "__": 1}


@pytest.mark.parametrize("form, content, says", [
    ("alpaca", '[{"instruction": 3}]', "record 1: no question of alpaca, which needs instruction"),
    ("alpaca", "", "no questions"), ("alpaca", "[{", "line 1: not JSON"),
    ("mt-bench", '{"question_id": 1, "turns": ["a"]}\n{"uid": "x", "prompt": "y"}',
     "line 2: no question of mt-bench, which needs question_id"),
    ("arena-hard", '{"instruction": "x"}', "line 1: no question of arena-hard"),
    ("mt-bench", '{"question_id": 1, "turns": []}', "line 1: no question"),
    ("mt-bench", '{"question_id": 1, "turns": "hello"}', "line 1: no question"),
    ("mt-bench", '{"question_id": 1, "turns": [{"content": "x"}]}', "line 1: no question"),
    ("arena-hard", '{"turns": [{"content": "x"}]}', "line 1: no question"),
    ("alpaca", "[3]", "record 1: no question"),
    ("alpaca", "[" * 100_000, "line 1: not JSON"), ("alpaca", "\udcff", "not UTF-8")])
def test_question_files_that_do_not_fit_the_format(trained, tmp_path, monkeypatch, capsys, form,
                                                   content, says):
    (tmp_path / "questions.jsonl").write_text(content, errors="surrogateescape")
    status, out, error = command(monkeypatch, capsys, "export", trained, "--format", form,
                                 "--questions", tmp_path / "questions.jsonl")
    assert status == 2 and out == "" and error.startswith("error: --questions") and says in error
    assert error.count("\n") == 1


def test_exports_that_cannot_be_made(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "questions.json").write_text(json.dumps(ALPACA))
    for run, flags, says in [(tmp_path, [], "no iteration with an adapter"),
                             (trained, ["--iterations", "7"],
                              "no adapter of iteration 7, only of 0 1")]:
        status, _, error = command(monkeypatch, capsys, "export", run, "--format", "alpaca",
                                   "--questions", tmp_path / "questions.json", *flags)
        assert status == 2 and says in error and error.count("\n") == 1


# ---- files

def test_read_jsonl_leaves_out_a_torn_last_line(tmp_path):
    """Even one that happens to be JSON ("12" of "123"): without its newline nobody knows that it is
    whole.
    """
    file = tmp_path / "x.jsonl"
    assert read_jsonl(file) == []
    for torn in (b"", b'{"a": 3', b"12", '{"a": "é'.encode()[:-1]):
        file.write_bytes(b'{"a": 1}\n{"a": "\\u00e9"}\n' + torn)
        assert read_jsonl(file) == [{"a": 1}, {"a": "é"}]


def test_read_json_tells_what_is_wrong_or_raises(tmp_path):
    """What is missing is an empty one of its kind; what cannot be read never is, but for notes."""
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "torn.json").write_text("[1")
    (tmp_path / "folder.json").mkdir()
    assert read_json(tmp_path / "list.json") == read_json(tmp_path / "list.json", list) == [1]
    assert read_json(tmp_path / "none.json", dict) == {}
    for name, error in (("list", ValueError), ("torn", ValueError), ("folder", OSError)):
        with pytest.raises(error):
            read_json(tmp_path / f"{name}.json", dict)
    notes = []
    for name in ("list", "torn", "folder", "none"):
        assert read_json(tmp_path / f"{name}.json", dict, notes) == {}
    assert [told.split(f"{tmp_path}/")[1].split(";")[0] for told in notes] == [
        "list.json: no JSON record", "torn.json: not JSON",
        "folder.json: cannot be read (Is a directory)", "none.json is missing"]


@pytest.mark.parametrize("bad", [b'{"a": 2', b"", b"\xff\xfe"])
def test_read_jsonl_names_a_bad_line(tmp_path, bad):
    """A line in the middle cannot have been torn by a crash: somebody must look at it."""
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n' + bad + b'\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: not JSON"):
        read_jsonl(file)


@FUZZ
@given(st.lists(st.dictionaries(st.text(max_size=9),
                                st.one_of(st.text(st.characters(exclude_categories=())),
                                          st.floats(allow_nan=False), st.none()),
                                max_size=3), max_size=4))
def test_json_lines_give_every_text_back(records):
    """NUL, halves of surrogate pairs, line separators that are no line breaks: one record a line,
    and the same when read.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_jsonl(Path(folder) / "x.jsonl", records)
        assert read_jsonl(Path(folder) / "x.jsonl") == records
        assert (Path(folder) / "x.jsonl").read_bytes().count(b"\n") == len(records)


@FUZZ
@given(st.text(alphabet=st.characters(), max_size=80),
       st.sampled_from(["", "</pre>", "<script>x</script>", "&lt;", "-->",
                        "<img src=x onerror=x>"]))
def test_every_text_is_data_in_the_page(text, evil):
    """What a browser reads out of the report's building blocks is the text that went in, and no tag
    but theirs.
    """
    # HTML turns these two into others, in any text
    whole = (text + evil + text).replace("\r", " ").replace("\0", " ")
    for block, tags in ((drawing.pre(whole), ["pre"]), (drawing.details(whole, ""),
                                                        ["details", "summary"]),
                        (drawing.html_table([whole], []), ["table", "tr", "th"]),
                        (drawing.notice("x", [whole]), ["p", "small", "b"])):
        page = Page(block)
        assert [tag for tag, _ in page.tags] == tags and whole in page.text


def test_write_whole_leaves_the_old_file_until_the_new_one_is_there(tmp_path, monkeypatch):
    """The process dies before the renaming: the old content still stands, and the next attempt
    replaces it and leaves nothing beside it.
    """
    file = tmp_path / "x.json"
    write_whole(file, "old é")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_whole(file, "new")
    assert file.read_text(encoding="utf-8") == "old é"
    write_whole(file, "new")
    assert file.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


# ---- the report

def evil(name):
    """A text that would run in a page that does not escape it, marked with the place it stands in.
    """
    return f"<script>alert('{name}')</script>&amp;<img src=x onerror={name}>\"'"


def figures(t, **more):
    return {"iteration": t, "actor": {"mean_score": 3.25, "mean_length": 120.4, "truth": 2.5,
                                      "answers": 12, "cut_off": 0, "cut_off_rate": 0.0},
            "judge": {"valid_rate": 0.98, "mean_score": 3.1, "ties": 0.25, "truth_agreement": 0.704,
                      "histogram": {"1": 3, "4": 9},
                      "human_agreement": 0.613}, "meta_judge": None,
            "pairs": {"actor": 0, "judge": 0, "dropped": {}}, "train": None, "seconds": {},
            "tokens": {}} | more


def write_lines(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def message(role, text):
    return [{"role": role, "content": text}]


def write_iteration(folder, *kinds):
    """What the report reads of an iteration: a prompt with a pair of each of `kinds`."""
    write_lines(folder / "eval.jsonl", {
        "id": "7/0", "prompt_id": "7", "prompt": evil("held-out prompt"), "score": 4.5, "truth": 3,
        "text": evil("held-out answer"), "finished": True})
    if not kinds:
        return
    numbered = {"actor": {"chosen_score": 4.0, "rejected_score": 1.5},
                "judge": {"chosen_rating": 2.345, "rejected_rating": -1.0}}
    write_lines(folder / "pairs.jsonl", *({
        "prompt": message("user", evil(f"{kind} prompt")),
        "chosen": message("assistant", evil(f"{kind} chosen")),
        "rejected": message("assistant", evil(f"{kind} rejected")), "kind": kind, "prompt_id": "0",
        **numbered[kind]} for kind in kinds))
    write_lines(folder / "judgments.jsonl", *({
        "id": f"0/{side}", "prompt_id": "0", "text": evil(f"actor {side}"), "truth": 3, "score": 4,
        "judgments": [{"text": evil(f"{side} judged"), "score": 4}]}
        for side in ("chosen", "rejected")))
    write_lines(folder / "train.jsonl", *({"step": i, "loss": 0.7 - i / 10,
                                           "chosen_reward": 0.1 * i, "rejected_reward": -0.1 * i,
                                           "accuracy": 0.5}
                                          for i in range(1, 5)),
                {"epoch": 1, "held_out_loss": 0.6, "held_out_accuracy": 1.0})
    if "judge" in kinds:
        write_lines(folder / "battles.jsonl", {
            "id": "0/1", "prompt_id": "0", "prompt": evil("battle prompt"),
            "text": evil("battle answer"),
            "texts": [evil("judgment 0"), evil("judgment 1")], "scores": [3, 4],
            "verdicts": [[0, 1], [0, 0]],
            "said": [{"first": 0, "second": 1, "text": evil("verdict 01"), "finished": True},
                     {"first": 1, "second": 0, "text": evil("verdict 10"), "finished": False}]})
        write_lines(folder / "ratings.jsonl", {"id": "0/1", "battles": [[0, 0.4], [0, 0]],
                                               "ratings": [1.25, -1.25], "pair": [0, 1]})


@pytest.fixture
def run(tmp_path):
    """The folder of a run of two iterations, the second without judge pairs, a mark in every text
    that came from a person or a model.
    """
    meta = {"first_position_rate": 0.71, "higher_score_rate": 0.83, "consistent_rate": 0.4,
            "valid_rate": 0.9, "truth_accuracy": None,
            "weights": [0.4, 0.6]}
    pairs = {"actor": 17, "judge": 5, "dropped": {evil("reason"): 7}}
    records = [figures(0), figures(1, meta_judge=meta, pairs=pairs, seconds={evil("stage"): 12.5},
                                   tokens={"answers": 23456}, train={"loss": 0.6}),
               figures(2, pairs={"actor": 19, "judge": 0, "dropped": {"other": 3}},
                       train={"loss": 0.5})]
    for t in range(3):
        (tmp_path / f"iter{t}").mkdir()
    write_iteration(tmp_path / "iter0")
    write_iteration(tmp_path / "iter1", "actor", "judge")
    write_iteration(tmp_path / "iter2", "actor")
    settings = {"model": evil("model"), "seed": 7, "max_score": 5, "iters": 2}
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings, "versions": {}}))
    (tmp_path / "summary.json").write_text(json.dumps(records))
    return tmp_path


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, its text, and the rows
    of its tables.
    """
    VOID = {"meta", "img", "br", "hr", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.rows = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [] if tag in self.VOID else [tag]
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def page_of(run):
    report(run)
    return Page((run / "report.html").read_text(encoding="utf-8"))


def check_self_contained(page):
    """Nothing is fetched and nothing runs: no such tag, no handler, and no address but a picture's
    own bytes and places on the page itself.
    """
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed",
                                                     "base", "form", "video", "svg"})
    places = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("srcset", "style", "background")
                       for name in attributes)
        data = "data:image/svg+xml;base64,"
        assert attributes.get("src", data).startswith(data)
        link = attributes.get("href")
        assert link is None or link[0] == "#" and link[1:] in places
    assert page.open == [], "a tag is never closed"


def test_the_report_is_self_contained_and_every_text_is_escaped(run):
    """Each of these places has a mark of its own: as text it must be there, and as a tag it would
    be found.
    """
    page = page_of(run)
    check_self_contained(page)
    assert "url(" not in drawing.STYLE and "@import" not in drawing.STYLE
    places = ["model", "held-out prompt", "held-out answer", "reason", "stage", "battle answer",
              "judgment 0", "judgment 1", "verdict 01",
              "verdict 10", "battle prompt",
              "chosen judged", "rejected judged", *(f"{kind} {part}" for kind in ("actor", "judge")
                                                    for part in ("chosen", "rejected")),
              "actor prompt"]
    assert [place for place in places if evil(place) not in page.text] == []


def test_no_plot_holds_a_text_of_a_model(run):
    """Plots are pictures of numbers: what a model wrote, or a reason's name, is in none of them."""
    report(run)
    images = re.findall(r"base64,([^\"]+)", (run / "report.html").read_text())
    assert len(images) >= 8
    assert all(b"alert" not in base64.b64decode(image) and b"<script" not in base64.b64decode(image)
               for image in images)


def test_the_document_has_the_table_of_figures():
    assert meanings() in (ROOT / "docs" / "reading-the-figures.md").read_text(), (
        "put what `python -m harness.views.figures` prints in the place of its table")


def test_the_readme_shows_the_figures_that_the_screen_shows():
    """All that a run of the tiny world has, in this order; and the documents' other tables some."""
    names = [figure.name for figure in FIGURES if "glance" in figure.shown]
    for page, all_of_them in (("README.md", True), ("course/lecture.md", False)):
        rows = re.findall(r"^((?:actor|judge|meta-judge|training): [^:\n]+?)  +[-\d]",
                          (ROOT / page).read_text(), re.MULTILINE)
        assert len(rows) > 5 and set(rows) <= set(names), page
        if all_of_them:
            assert rows == [name for name in names if name != "actor: score by --reward"]


def test_the_command_line_knows_each_format():
    choices = next(action.choices for action in eval_parser()._subparsers._group_actions[0]
                   .choices["export"]._actions if action.dest == "format")
    assert choices == [*export.FORMATS, "model"]


def test_the_report_says_what_the_run_measured(run):
    """Rows of the tables as a reader sees them; what was not measured is a dash, never a number."""
    page = page_of(run)
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["actor: true score"] == ["2.50"] * 3
    assert rows["actor: characters per answer"] == ["120"] * 3
    assert rows["judge: right about the truth"] == ["70.4%"] * 3
    assert rows["judge: valid"] == ["98%"] * 3
    assert rows["judge: agrees with people"] == ["61.3%"] * 3
    assert rows["meta-judge: prefers the first"] == ["-", "71%", "-"]
    assert rows["meta-judge: same in both orders"] == ["-", "40%", "-"]
    assert rows["training: actor pairs"] == ["0", "17", "19"]
    assert rows["training: judge pairs"] == ["0", "5", "0"]
    assert "meta-judge: right about the truth" not in rows  # measured nowhere: no row
    assert rows[evil("reason")] == ["-", "7", "-"] and rows["other"] == ["-", "-", "3"]
    assert rows[evil("stage")] == ["-", "12.5", "-"]
    assert rows["answers"] == ["-", "23,456", "-"]
    assert "Drift" in page.text
    assert "iteration 1: the meta-judge prefers the first judgment in 71%" in page.text
    assert "Missing from this page" not in page.text


def test_the_report_shows_the_pairs_with_their_numbers(run):
    page = page_of(run)
    for said in ("0/chosen: score 4.00, true score 3.00", "actor pair: score 4.00 over 1.50",
                 "judge pair: rating 2.35 over -1.00", "judgment 0, rating +1.25, chosen",
                 "Samples of iteration 1", "Samples of iteration 2", "+1.25", "0.4"):
        assert said in page.text, said
    assert page.text.count("judge pair: rating") == 1
    assert "Samples of iteration 0" not in page.text


def test_the_report_with_plots(run):
    """Curves, scores, loss, rewards, accuracy; each names itself for those who do not see it, and
    none has a background of its own.
    """
    images = {attributes["alt"]: attributes["src"] for tag, attributes in page_of(run).tags
              if tag == "img"}
    assert [*images][:3] == ["score of the answers", "how often the judge is right",
                             "characters per answer"]
    assert {
            "meta-judge: biases", "judge: share of each score",
            "DPO: loss", "DPO: rewards (nats times beta)",
            "DPO: share of pairs in order"} <= images.keys()
    for source in images.values():
        svg = base64.b64decode(source.split(",")[1]).decode()
        assert svg.lstrip().startswith("<?xml") and "#ffffff" not in svg and "http-equiv" not in svg
    # drawn again, the same to the byte
    assert (run / "report.html").read_text() == (report(run), (run / "report.html").read_text())[1]


def test_answers_that_were_cut_off_are_among_the_first_figures(run, capsys):
    """21 of 24, then 3 of 24: in the sentence, below the plots, as a row, and as a warning above a
    tenth; the table says over how many each mean is.
    """
    def actor(cut_off, **more):
        return {"answers": 24, "cut_off": cut_off, "cut_off_rate": cut_off / 24, **more}

    records = [figures(0, actor=actor(21, truth=2.0, truth_count=20)), figures(1, actor=actor(1))]
    records.append(figures(2, actor=actor(3), train={"epoch": 1}))
    (run / "summary.json").write_text(json.dumps(records))
    report(run)
    page = (run / "report.html").read_text()
    assert "; 12\N{NO-BREAK SPACE}% of them are cut off instead of 88\N{NO-BREAK SPACE}%." in page
    assert "M_0 21 of 24, M_1 1 of 24, M_2 3 of 24. They are measured as far as they go" in page
    rows = {row[0]: row[1:] for row in page_of(run).rows if row}
    assert rows["actor: answers cut off"] == ["88%", "4%", "12%"]
    assert rows["actor: true score"] == ["2.00 (20)", "-", "-"]
    assert [len(cut_short(record)) for record in records] == [1, 0, 1]
    assert "M_0: 21 of 24 held-out answers" in cut_short(records[0])[0]
    (run / "summary.json").write_text(json.dumps(records[1:2]))
    report(run)
    page = (run / "report.html").read_text()
    assert "Held-out answers cut off: M_1 1 of 24.<" in page
    assert "measured as far as they go" not in page
    assert "actor: answers cut off" in table(records)
    part = figures(1, actor=actor(0, reward=1.5, reward_count=17))
    (run / "summary.json").write_text(json.dumps([part]))
    report(run)
    assert "7 of 24 held-out answers have no score" in unscored(part)[0]
    assert "7 of 24 held-out answers have no score" in (run / "report.html").read_text()


def test_judgments_that_cannot_be_read_are_warned_of():
    few = {"iteration": 0, "judge": {"valid_rate": 14 / 48, "valid_rate_count": 48}}
    assert unread(few)[0].startswith("M_0: 34 of 48 judgments of held-out answers were cut off")
    assert unread({"iteration": 1, "judge": {"valid_rate": 0.9, "valid_rate_count": 48}}) == []
    assert unread({"iteration": 1, "judge": None}) == []


@pytest.mark.parametrize("steady, told", [(6, True), (7, False)])
def test_a_judge_of_two_minds_is_named(steady, told):
    """Of twelve pairs so many have one winner in both orders; the others the first of each."""
    records = [{"prompt": f"{i}", "a": "x", "b": "y", "winners": ["a", "a" if i < steady else "b"]}
               for i in range(12)]
    lines = compare.comparison_table(measure_comparisons(records),
                                     SimpleNamespace(judge="j", a="a", b="b"))
    assert ("same in both orders in 50% alone" in lines) == told and "cannot tell" not in lines


def test_the_report_of_a_run_that_has_only_warmed_up(run):
    """Iteration 0 alone, no checks: the page stands, and has no row for what nobody measured."""
    first = figures(0, actor={"mean_score": None, "mean_length": None, "cut_off": 3},
                    judge={"valid_rate": 0.0, "mean_score": None, "ties": None})
    (run / "summary.json").write_text(json.dumps([first]))
    rows = {row[0]: row[1:] for row in page_of(run).rows if row}
    assert rows["judge: valid"] == ["0%"] and "judge: right about the truth" not in rows
    assert not any(name.startswith(("actor: score", "judge: mean score", "meta-judge"))
                   for name in rows)


def of(t, judge=None, **actor):
    return {"iteration": t, "actor": actor, "judge": judge}


@pytest.mark.parametrize("records, iters, sentence", [
    ([of(0, {"truth_agreement": 0.751}, truth=2.63, mean_score=3.9, mean_length=164),
      of(1),
      of(2, {"truth_agreement": 0.994}, truth=4.74, mean_score=4.8, mean_length=238)], 2,
     "After 2 iterations answers meet 95 % of the demands on them instead of 53 %; the judge is "
     "right 99 % of the time instead of 75 %; answers are 45 % longer."),
    ([of(0, {"human_agreement": 0.7}, mean_score=3.92, mean_length=100),
      of(1, {"human_agreement": 0.65}, mean_score=3.94, mean_length=90)], 4,
     "After 1 of 4 iterations the model gives its own answers 3.9 of 5, as before (which proves "
     "nothing); the judge agrees with people 65 % of the time instead of 70 %; answers are 10 % "
     "shorter."),
    ([of(0, {"truth_agreement": 0.7, "truth_agreement_interval": [0.6, 0.8]}, truth=2.5,
         truth_interval=[2.3, 2.7], mean_length=100),
      of(1, {"truth_agreement": 0.9, "truth_agreement_interval": [0.85, 0.95]}, truth=2.75,
         truth_interval=[2.6, 3.0], mean_length=100)], 1,
     "After 1 iteration answers meet 55 % of the demands on them instead of 50 %, which may be "
     "chance; the judge is right 90 % of the time instead of 70 %; answers are as long as before."),
    ([of(0, reward=-1.25, mean_length=100), of(1, reward=0.5, mean_length=100)], 1,
     "After 1 iteration the mean reward of an answer is 0.50 instead of -1.25; answers are as long "
     "as before."),
    ([of(0, {"truth_agreement": 0.75}, truth=2.5, mean_length=164.3)], 0,
     "After 0 iterations answers meet 50 % of the demands on them; the judge is right 75 % of the "
     "time; answers are 164 characters long."),
    ([of(0, {"truth_agreement": None}, truth=None, mean_score=None, mean_length=None),
      of(1, {"truth_agreement": 0.5}, truth=5, mean_score=None, mean_length=9)], 1,
     "After 1 iteration answers meet 100 % of the demands on them; the judge is right 50 % of the "
     "time; answers are 9 characters long."),
    ([of(0, truth=2.5, mean_length=100), of(1, truth=2.6, mean_length=90) | {"train": None}], 1,
     "After 1 iteration the model is what it was before: there were no pairs to train on. What was "
     "dropped stands below."),
    ([of(0, truth=2.5, truth_count=20, mean_length=100),
      of(1, truth=3, truth_count=20, mean_length=100)], 1,
     "After 1 iteration answers meet 60 % of the demands on them instead of 50 %, of too few "
     "prompts to be sure; answers are as long as before."),
    ([of(0, mean_score=None, mean_length=None)] * 2, 0,
     "After 0 iterations nothing could be measured."),
    ([], 4, "No model of this run is measured yet.")])
def test_a_run_in_a_sentence(records, iters, sentence):
    """With the truth, without it, by a reward, before the first iteration, with figures that nobody
    could measure: what is said is what summary.json holds, and nothing is said of what is not.
    """
    said = in_a_sentence(records, {"iters": iters, "max_score": 5})
    assert said.replace("\N{NO-BREAK SPACE}", " ") == sentence


def test_the_prompt_on_the_page_is_the_one_whose_change_is_the_median(run):
    """First answers change by 0, +1 and +2: the middle one is shown, as each model answered it, and
    no second answer. Without the truth the own score, which is the other way round, decides.
    """
    for t in range(3):
        write_lines(run / f"iter{t}" / "eval.jsonl", *(
            {"prompt_id": f"{change}", "prompt": f"prompt {change}", "text": f"{nth} {t}/{change}",
             "truth": t * change / 2 if nth == "first" else 0, "score": 4 - t * (2 - change) ** 2,
             "finished": t > 0}
            for change in (2, 0, 1) for nth in ("first", "second")))
    text = page_of(run).text
    assert "changes by the median, +1, from M_0 to M_2" in text and "of 3 held-out prompts" in text
    assert [f"first {t}/1" in text for t in range(3)] == [True] * 3
    assert "first 2/0" not in text and "second" not in text.partition("All figures")[0]
    assert "true score 0, own score 4, 9 characters, cut off" in text
    assert "true score 0.5, own score 3, 9 characters" in text


def test_several_runs_on_one_page(run, monkeypatch, capsys, tmp_path):
    """Both runs' last figures beside each other, three plots with both names in each, and a word
    where their held-out prompts differ; what is no run is refused.
    """
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=lambda folder, names: ["other"])
    records = json.loads((other / "summary.json").read_text())[:2]
    (other / "summary.json").write_text(json.dumps(records))
    status, out, error = command(monkeypatch, capsys, "report", run, other)
    assert (status, out) == (0, f"{run.parent}/compare.html\n") and "iteration 2 is not" in error
    page = Page((run.parent / "compare.html").read_text(encoding="utf-8"))
    check_self_contained(page)
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["last model"] == ["M_2", "M_1"] and rows["training: actor pairs"] == ["19", "17"]
    images = [base64.b64decode(attributes["src"].split(",")[1]).decode()
              for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3 and all(f"{name}</text>" in image or f">{name}<" in image
                                    for image in images for name in (run.name, "other"))
    assert "do not compare" not in page.text
    assert rows.keys().isdisjoint({"--rho", "--out"})  # the same in both, or of no interest
    config = json.loads((other / "config.json").read_text()) | {"files": {"--eval-prompts": "x"}}
    config["settings"] |= {"rho": [0.5], "out": "elsewhere"}
    (other / "config.json").write_text(json.dumps(config))
    status, out, _ = command(monkeypatch, capsys, "report", run, other, "--out", tmp_path / "c")
    assert status == 0 and "do not compare" in (tmp_path / "c").read_text()
    rows = {row[0]: row[1:] for row in Page((tmp_path / "c").read_text()).rows if row}
    assert rows["--rho"][1] == "[0.5]" != rows["--rho"][0] and "--out" not in rows
    (other / "config.json").unlink()
    status, _, error = command(monkeypatch, capsys, "report", run, other, "--out", tmp_path / "c")
    rows = {row[0]: row[1:] for row in Page((tmp_path / "c").read_text()).rows if row}
    assert status == 0 and "config.json is missing" in error
    assert rows["--model"][1] == "unknown" and rows.keys().isdisjoint({"--rho", "--bits"})
    status, _, error = command(monkeypatch, capsys, "report", run, tmp_path / "iter0" / "none")
    assert status == 2 and "no run's folder" in error


def test_the_command_draws_a_report_and_says_where(run, monkeypatch, capsys):
    status, out, error = command(monkeypatch, capsys, "report", run)
    assert status == 0 and out.strip() == f"{run}/report.html" and (run / "report.html").is_file()
    assert error == ""


SPOILED = {
    "summary.json missing": (lambda run: (run / "summary.json").unlink(),
                             "summary.json is missing"),
    "summary.json torn": (lambda run: (run / "summary.json").write_text('[{"iteration": 0'),
                          "summary.json: not JSON"),
    "summary.json of another kind": (lambda run: (run / "summary.json").write_text('{"a": 1}'),
                                     "summary.json: no JSON list"),
    "config.json missing": (lambda run: (run / "config.json").unlink(), "config.json is missing"),
    "config.json of another program": (lambda run: (run / "config.json").write_text("{}"), None),
    "pairs.jsonl missing": (lambda run: (run / "iter1" / "pairs.jsonl").unlink(),
                            "iter1/pairs.jsonl is missing"),
    "pairs.jsonl broken": (lambda run: (run / "iter2" / "pairs.jsonl").write_text("{\n"),
                           "iter2/pairs.jsonl, line 1: not JSON"),
    "train.jsonl torn": (lambda run: (run / "iter2"
                                      / "train.jsonl").write_text('{"step": 1, "loss": 1}\n{"ste'),
                         "iter2/train.jsonl, line 2: torn"),
    "judgments.jsonl missing": (lambda run: (run / "iter1" / "judgments.jsonl").unlink(),
                                "iter1/judgments.jsonl is missing"),
    "battles.jsonl of others": (lambda run: write_lines(run / "iter1" / "battles.jsonl", {"x": 1}),
                                "cannot be drawn"),
    "an iteration under way": (lambda run: (run / "iter3").mkdir(),
                               "iteration 3 is not in summary.json"),
    "ratings.jsonl missing": (lambda run: (run / "iter1" / "ratings.jsonl").unlink(),
                              "iter1/ratings.jsonl is missing"),
    "battles.jsonl torn": (lambda run: (run / "iter1" / "battles.jsonl").write_text('{"id": "0/1"'),
                           "iter1/battles.jsonl, line 1: torn"),
    "settings of another kind": (lambda run: (run / "config.json").write_text('{"settings": [1]}'),
                                 None),
    "max_score of another kind": (
        lambda run: (run / "config.json").write_text('{"settings": {"max_score": "5"}}'),
        "Drift: cannot be drawn"),
    "a folder in the place of a file": (lambda run: ((run / "iter2" / "train.jsonl").unlink(),
                                                     (run / "iter2" / "train.jsonl").mkdir()),
                                        "Training: cannot be drawn"),
    "iteration folder missing": (lambda run: shutil.rmtree(run / "iter2"),
                                 "iter2/train.jsonl is missing"),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_is_missing_is_told_and_the_rest_reported(run, monkeypatch, capsys, spoil):
    """A line on stderr and on the page for each thing that is missing, torn or foreign; status 0,
    and the samples of the other iteration stand.
    """
    damage, says = SPOILED[spoil]
    damage(run)
    status, out, error = command(monkeypatch, capsys, "report", run)
    assert status == 0 and out.strip() == f"{run}/report.html"
    page = Page((run / "report.html").read_text())
    check_self_contained(page)
    if says:
        assert says in error and says in page.text
        assert all(line.startswith("note: ") for line in error.splitlines())
    assert error.count("\n") == len(set(error.splitlines()))  # nothing is said twice
    if not spoil.startswith("summary"):
        assert evil("actor chosen") in page.text
        assert ["actor: true score", "2.50", "2.50", "2.50"] in page.rows


@pytest.mark.parametrize("key, value", [
    ("judge", 5), ("judge", {"histogram": {"1": 0}}), ("judge", {"histogram": {"x": 3}}),
    ("meta_judge", [1]), ("actor", {"truth": "x"}),
    ("pairs", None), ("seconds", 3), ("iteration", [1]), ("iteration", "1"),
    ("judge", {"mean_score": "x"})])
def test_odd_records_are_told_and_the_page_drawn(run, key, value):
    """A summary that no run of ours leaves: never a traceback, whatever stands where a figure
    should.
    """
    records = json.loads((run / "summary.json").read_text())
    records[1][key] = value
    (run / "summary.json").write_text(json.dumps(records))
    check_self_contained(page_of(run))


def test_no_field_of_a_file_runs_in_the_page(run):
    """Numbers of a folder from elsewhere may be texts too."""
    battle, judged = read_jsonl(run / "iter1"
                                / "battles.jsonl")[0], read_jsonl(run / "iter1" / "judgments.jsonl")
    battle["said"][0]["first"] = evil("number")
    write_lines(run / "iter1" / "battles.jsonl", battle)
    write_lines(run / "iter2" / "judgments.jsonl", *({**record, "truth": evil("truth")}
                                                     for record in judged))
    check_self_contained(page_of(run))


def test_iterations_that_the_summary_lacks_are_named(run, monkeypatch, capsys):
    """A lost summary.json: no number is made up for what is gone, and the page says what is
    missing.
    """
    (run / "summary.json").unlink()
    for t in (0, 1):
        (run / f"iter{t}" / "figures.json").write_text("{}")
    status, _, error = command(monkeypatch, capsys, "report", run)
    assert status == 0 and "summary.json is missing" in error
    for t in (0, 1):
        assert f"iteration {t} is not in summary.json" in error
        assert f"iteration {t} is not in" in (run / "report.html").read_text()


@pytest.mark.parametrize("width, scheme", [(1200, "light"), (1200, "dark"), (500, "light")])
def test_the_report_in_a_browser(run, tmp_path, width, scheme):
    """A headless browser draws the page without a message on its console; the background follows
    the scheme; at a phone's width as well.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                   "google-chrome"))), None)
    if not browser:
        pytest.skip("no browser on this machine")
    report(run)
    picture = tmp_path / "page.png"
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu",
                           "--hide-scrollbars", "--enable-logging=stderr",
                           f"--user-data-dir={tmp_path}/profile",
                           *(dark if scheme == "dark" else []),
                           f"--window-size={width},2000", f"--screenshot={picture}",
                           f"file://{run}/report.html"],
                          capture_output=True, text=True, timeout=120)
    assert picture.is_file(), done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr and "Uncaught" not in done.stderr, done.stderr[-2000:]
    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] == width and (pixels[3, 3].mean() > 0.9) == (scheme == "light")
    assert pixels.std() > 0.05


def test_a_folder_that_is_no_run(tmp_path, monkeypatch, capsys):
    status, out, error = command(monkeypatch, capsys, "report", tmp_path)
    assert status == 2 and out == "" and error.startswith("error: ") and "no run's folder" in error
    assert not (tmp_path / "report.html").exists()


def test_the_command_as_it_is_typed(tmp_path):
    """A real process on an empty folder: status 2, one line that names the folder, no traceback."""
    done = subprocess.run([sys.executable, "eval.py", "report", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert str(tmp_path) in done.stderr and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
