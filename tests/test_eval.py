"""eval.py: the figures against other people's code (statsmodels, scipy) or against counting by hand, and the report as a browser reads it.

Every figure is compared as a number, most of them on random data of many sizes: a formula that is right by chance on one example is not on
a hundred. The report is parsed with html.parser; each text in it carries its own mark, so that one that is lost or not escaped is named.
"""
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import eval as measuring
from eval import (
    agreement,
    length_controlled_win_rate,
    mean,
    measure_actor,
    measure_judge,
    measure_meta_judge,
    read_jsonl,
    report,
    truth,
    win_rate,
    write_whole,
)

ROOT = Path(__file__).parent.parent
FUZZ = settings(max_examples=150, deadline=None)


# ---- win rates

def test_win_rate_by_hand():
    """(1 + 1 + 0 + 1/2) / 4 = 0.625; squared distances 2 x 0.140625 + 0.390625 + 0.015625 = 0.6875, / 3 = 0.229167, root / 2 = 0.239357."""
    rate, error = win_rate([1, 1, 0, 0.5])
    assert rate == 0.625 and error == pytest.approx(math.sqrt(0.6875 / 3) / 2)


def test_win_rate_of_one_has_no_error():
    rate, error = win_rate([1])
    assert rate == 1 and math.isnan(error)


def bradley_terry_with_length(wins, ours, theirs):
    """The same model fitted by statsmodels: a binomial GLM with a logit link, which takes fractional wins."""
    difference = np.subtract(theirs, ours)
    x = np.tanh(difference / np.std(difference, ddof=1))
    fit = sm.GLM(wins, np.column_stack([x, np.ones(len(x))]), family=sm.families.Binomial()).fit(tol=1e-14, maxiter=300)
    return 1 / (1 + math.exp(-fit.params[1]))


@pytest.mark.parametrize("fractional", [False, True])
def test_length_controlled_win_rate_against_statsmodels(fractional):
    """30 random data sets with an advantage and a length bias of their own: one wrong sign, std or link differs in the second digit."""
    rng = np.random.default_rng(int(fractional))
    plain = []
    for _ in range(30):
        size = rng.integers(40, 200)
        ours, theirs = rng.integers(100, 3000, size), rng.integers(100, 2500, size)
        logit = rng.normal() - rng.uniform(0, 2) * np.tanh((theirs - ours) / 900)
        chance = 1 / (1 + np.exp(-logit))
        wins = np.clip(chance + rng.normal(0, 0.2, size), 0, 1) if fractional else (rng.random(size) < chance).astype(float)
        expected = bradley_terry_with_length(wins, ours, theirs)
        assert length_controlled_win_rate(wins, ours, theirs) == pytest.approx(expected, abs=1e-6)
        plain.append(abs(expected - wins.mean()))
    assert max(plain) > 0.02  # the data do tell the controlled rate from the plain one


def test_length_controlled_win_rate_finds_what_was_planted():
    """Wins come from sigmoid(0.4 - 1.5 tanh(d / std d)) exactly, as fractions: the fit must give back sigmoid(0.4) = 0.598688."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(100, 3000, 300), rng.integers(100, 1500, 300)
    d = theirs - ours
    wins = 1 / (1 + np.exp(-(0.4 - 1.5 * np.tanh(d / d.std(ddof=1)))))
    assert length_controlled_win_rate(wins, ours, theirs) == pytest.approx(0.598688, abs=1e-6)
    assert wins.mean() > 0.7  # the plain rate, flattered by length, is far off


def test_equal_lengths_give_the_plain_win_rate():
    wins, lengths = [1, 0, 1, 1, 0.5], [10, 2000, 30, 4, 5]
    assert length_controlled_win_rate(wins, lengths, lengths) == pytest.approx(0.7)
    assert length_controlled_win_rate(wins, lengths, np.add(lengths, 7)) == pytest.approx(0.7)  # equal differences tell nothing either
    assert length_controlled_win_rate([0.25], [1], [900]) == 0.25


def test_sides_swapped_give_the_other_side_of_the_rate():
    rng = np.random.default_rng(1)
    wins, ours, theirs = rng.random(50), rng.integers(0, 900, 50), rng.integers(0, 900, 50)
    there, back = length_controlled_win_rate(wins, ours, theirs), length_controlled_win_rate(1 - wins, theirs, ours)
    assert there + back == pytest.approx(1) and abs(there - 0.5) > 0.001


@FUZZ
@given(st.lists(st.tuples(st.sampled_from([0, 0.5, 1]), st.integers(0, 5000), st.integers(0, 5000)), min_size=1, max_size=12))
def test_length_controlled_win_rate_is_always_a_rate(rows):
    """Small samples are often separable, where the maximum lies at infinity: still a number in [0, 1], without a warning."""
    with np.errstate(all="raise"):
        assert 0 <= length_controlled_win_rate(*zip(*rows)) <= 1


def test_separable_preferences_go_to_the_end_of_the_scale():
    """Who always wins, or never, does so at equal lengths too; who wins exactly where it is longer has no advantage that length leaves over."""
    ours, theirs = [10, 700, 80, 300], [500, 20, 90, 310]
    assert length_controlled_win_rate([1] * 4, ours, theirs) > 0.999
    assert length_controlled_win_rate([0] * 4, ours, theirs) < 0.001
    assert length_controlled_win_rate([0, 1, 0, 1], [0, 500, 100, 400], [500, 0, 400, 100]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("call, name", [
    (lambda: win_rate([]), "preferences"), (lambda: win_rate([0.5, 1.1]), "preferences"), (lambda: win_rate([-0.1]), "preferences"),
    (lambda: win_rate([math.nan]), "preferences"), (lambda: win_rate([[1]]), "preferences"), (lambda: win_rate(["A"]), "preferences"),
    (lambda: win_rate(1), "preferences"), (lambda: win_rate([None]), "preferences"), (lambda: win_rate([[1], [1, 2]]), "preferences"),
    (lambda: length_controlled_win_rate([2], [1], [1]), "preferences"), (lambda: length_controlled_win_rate([1], [-1], [1]), "our_lengths"),
    (lambda: length_controlled_win_rate([1], [1], [math.inf]), "their_lengths"),
    (lambda: length_controlled_win_rate([1, 0], [1, 2], [1]), "their_lengths"), (lambda: agreement([], []), "ours"),
    (lambda: agreement([1, 2], [1, math.nan]), "theirs"), (lambda: agreement([1, 2], [1]), "theirs"), (lambda: agreement(["x"], [1]), "ours"),
])
def test_malformed_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


# ---- agreement

def counted_by_hand(ours, theirs):
    """Pairs of items: ordered alike with ties as an order of their own, and among those that neither ties."""
    def order(x, y):
        return (x > y) - (x < y)

    pairs = [(order(ours[i], ours[j]), order(theirs[i], theirs[j])) for i, j in combinations(range(len(ours)), 2)]
    untied = [a == b for a, b in pairs if a and b]
    return sum(a == b for a, b in pairs) / len(pairs), sum(untied) / len(untied) if untied else None


scores = st.integers(2, 12).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 4).map(lambda x: x / 10), min_size=n, max_size=n)] * 2))


@FUZZ
@given(scores)
def test_agreement_against_scipy_and_counting(lists):
    """Five values among up to twelve items: nearly every example has ties on one side or both, where naive formulas differ."""
    ours, theirs = lists
    figures = agreement(ours, theirs)
    assert (figures["with_ties"], figures["without_ties"]) == pytest.approx(counted_by_hand(ours, theirs))
    if len(set(ours)) == 1 or len(set(theirs)) == 1:
        assert figures["spearman"] is None and figures["kendall"] is None
    else:
        assert figures["spearman"] == pytest.approx(stats.spearmanr(ours, theirs).statistic)
        assert figures["kendall"] == pytest.approx(stats.kendalltau(ours, theirs).statistic)


def test_agreement_worked_by_hand():
    """Orders of the pairs 01 02 03 12 13 23, ours (1 2 2 3): < < < = < <, theirs (1 3 2 2): < < < > > =. Alike: the first three of 6.
    Untied on both sides: 01 02 03 13, three of them alike."""
    figures = agreement([1, 2, 2, 3], [1, 3, 2, 2])
    assert figures["with_ties"] == 3 / 6 and figures["without_ties"] == 3 / 4


def test_agreement_where_nothing_is_left_to_compare():
    """0.1 added three times is not 0.3, so that the standard deviation of three equal scores is not 0: still None, never NaN."""
    assert agreement([3], [4]) == {"with_ties": None, "without_ties": None, "spearman": None, "kendall": None}
    assert agreement([0.1] * 3, [1, 2, 3]) == {"with_ties": 0, "without_ties": None, "spearman": None, "kendall": None}
    assert agreement([2, 2], [5, 5]) == {"with_ties": 1, "without_ties": None, "spearman": None, "kendall": None}


# ---- the three roles

def test_truth_counts_the_checks_that_match():
    assert truth([r"(?i)\bfirst\b", "because", r"\d{3}", "x$"], "First, because 12\nx") == 3
    assert truth([], "anything") == 0 and truth(["^$"], "") == 1


def test_mean_leaves_out_what_was_not_measured():
    assert mean([1, None, 4]) == 2.5 and mean([None]) is None and mean([]) is None and mean(iter([0])) == 0


def an_answer(prompt_id, text="", score=None, finished=True, scores=(), **more):
    return {"prompt_id": prompt_id, "text": text, "score": score, "finished": finished, "scores": list(scores), **more}


def test_measure_actor_by_hand():
    """Finished: scores 2, 4, none -> 3; lengths 1, 3, 5 -> 3; truths 1, 4, 4 -> 3. The one that was cut off only counts as cut off."""
    answers = [an_answer("a", "x", 2, truth=1), an_answer("a", "xxx", 4, truth=4), an_answer("b", "xxxxx", None, truth=4),
               an_answer("b", "x" * 500, 5, finished=False, truth=0)]
    assert measure_actor(answers) == {"mean_score": 3, "mean_length": 3, "truth": 3, "cut_off": 1}


def test_measure_actor_without_truth():
    """No checks at all: no such figure. Checks on some prompts only: the mean over those."""
    assert measure_actor([an_answer("a", "xx", 2)]) == {"mean_score": 2, "mean_length": 2, "cut_off": 0}
    assert measure_actor([an_answer("a", "xx", 2), an_answer("b", "xx", 4, truth=5)])["truth"] == 5
    assert measure_actor([an_answer("a", "xx", finished=False)]) == {"mean_score": None, "mean_length": None, "cut_off": 1}
    assert measure_actor([]) == {"mean_score": None, "mean_length": None, "cut_off": 0}


def test_measure_judge_by_hand():
    """Prompt a, truths 3 1 1, scores 4 2 4: pair 01 right (1), 02 a tie where the truth has none (1/2), 12 equal in truth (does not count).
    Prompt b, truths 0 2, scores 3 1: wrong (0). Prompt c: an answer without a score has no pair. Agreement (1 + 1/2 + 0) / 3 = 1/2.
    Ties: 1 of 4 pairs. Judgments: 4 4, 2 None, 4, 3, 1, 5, None None -> 7 of 10 valid, their mean 23 / 7."""
    answers = [an_answer("a", score=4, scores=[4, 4], truth=3), an_answer("a", score=2, scores=[2, None], truth=1),
               an_answer("b", score=3, scores=[3], truth=0), an_answer("a", score=4, scores=[4], truth=1),
               an_answer("b", score=1, scores=[1], truth=2),
               an_answer("c", score=5, scores=[5], truth=0), an_answer("c", score=None, scores=[None, None], truth=5)]
    assert measure_judge(answers) == pytest.approx({"valid_rate": 0.7, "mean_score": 23 / 7, "ties": 1 / 4, "truth_agreement": 1 / 2})


def test_a_judge_who_says_the_same_of_everything_has_one_half():
    """Neither a high score for all, which DPO may teach, nor a score that is the reverse of the truth looks like skill."""
    same = [an_answer("a", score=5, scores=[5], truth=t) for t in range(4)]
    assert measure_judge(same) == {"valid_rate": 1, "mean_score": 5, "ties": 1, "truth_agreement": 0.5}
    assert measure_judge([a | {"score": -a["truth"]} for a in same])["truth_agreement"] == 0
    assert measure_judge([a | {"score": a["truth"]} for a in same])["truth_agreement"] == 1


def test_measure_judge_of_nothing():
    assert measure_judge([]) == {"valid_rate": None, "mean_score": None, "ties": None}
    assert measure_judge([an_answer("a", score=2, scores=[2]), an_answer("b", score=3, scores=[3])])["ties"] is None  # never across prompts
    assert measure_judge([an_answer("a", score=2, scores=[2], truth=1)])["truth_agreement"] is None


def test_measure_meta_judge_by_hand():
    """Scores 1 3 3, truth 2.5, so that both 3s are nearer to it than the 1. Comparisons, first against second:
    0-1 first, 1-0 first (not consistent); 0-2 second, 2-0 first (consistent); 1-2 second, 2-1 not parsed.
    Valid 5 of 6. First wins 3 of 5. Both orders parsed: 01 and 02, one consistent. Scores differ in four (01 10 02 20), the higher wins in
    three (10 02 20), and in the same three the nearer to the truth wins; 12 is equal in both senses."""
    battle = {"verdicts": [[0, 1, -1], [1, 0, -1], [1, 0, 0]], "scores": [1, 3, 3], "truth": 2.5}
    assert measure_meta_judge([battle]) == pytest.approx({
        "first_position_rate": 3 / 5, "higher_score_rate": 3 / 4, "consistent_rate": 1 / 2, "valid_rate": 5 / 6, "truth_accuracy": 3 / 4})


def test_a_nearer_score_is_not_the_higher_one():
    """Truth 0, and the meta-judge always takes the lower score: never the higher, always right. Battles add up as comparisons do: with four
    comparisons of a second answer, all unparsed, valid falls to 2 of 8 and nothing else changes."""
    low_wins = {"verdicts": [[0, 1], [-1, 0]], "scores": [1, 4], "truth": 0}
    unparsed = {"verdicts": [[0] * 3] * 3, "scores": [1, 2, 3]}
    figures = measure_meta_judge([low_wins, unparsed])
    assert figures == {"first_position_rate": 0.5, "higher_score_rate": 0, "consistent_rate": 1, "valid_rate": 2 / 8, "truth_accuracy": 1}


def test_measure_meta_judge_of_nothing():
    empty = {"first_position_rate": None, "higher_score_rate": None, "consistent_rate": None, "valid_rate": None}
    assert measure_meta_judge([]) == empty
    assert measure_meta_judge([{"verdicts": [[0, 0], [0, 0]], "scores": [1, 2]}]) == empty | {"valid_rate": 0}


# ---- files

def test_read_jsonl_leaves_out_a_torn_last_line(tmp_path):
    """Even one that happens to be JSON ("12" of "123"): without its newline nobody knows that it is whole."""
    file = tmp_path / "x.jsonl"
    assert read_jsonl(file) == []
    for torn in (b"", b'{"a": 3', b"12", '{"a": "é'.encode()[:-1]):
        file.write_bytes(b'{"a": 1}\n{"a": "\\u00e9"}\n' + torn)
        assert read_jsonl(file) == [{"a": 1}, {"a": "é"}]


@pytest.mark.parametrize("bad", [b'{"a": 2', b"", b"\xff\xfe"])
def test_read_jsonl_names_a_bad_line(tmp_path, bad):
    """A line in the middle cannot have been torn by a crash: somebody must look at it."""
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n' + bad + b'\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: not JSON"):
        read_jsonl(file)


def test_write_whole_leaves_the_old_file_until_the_new_one_is_there(tmp_path, monkeypatch):
    """The process dies before the renaming: the old content still stands, and the next attempt replaces it and leaves nothing beside it."""
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
    """A text that would run in a page that does not escape it, marked with the place it stands in."""
    return f"<script>alert('{name}')</script>&amp;<img src=x onerror={name}>\"'"


def figures(t, **more):
    return {"iteration": t, "actor": {"mean_score": 3.25, "mean_length": 120.4, "truth": 2.5, "cut_off": 0},
            "judge": {"valid_rate": 0.98, "mean_score": 3.1, "ties": 0.25, "truth_agreement": 0.704}, "meta_judge": None,
            "pairs": {"actor": 0, "judge": 0, "dropped": {}}, "train": None, "seconds": {}} | more


def write_pairs(folder, *kinds):
    numbered = {"actor": {"chosen_score": 4.0, "rejected_score": 1.5}, "judge": {"chosen_rating": 2.345, "rejected_rating": -1.0}}
    pairs = [{"prompt": [{"role": "user", "content": evil(f"{kind} prompt")}], "chosen": [{"role": "assistant", "content": evil(f"{kind} chosen")}],
              "rejected": [{"role": "assistant", "content": evil(f"{kind} rejected")}], "kind": kind, "prompt_id": evil("id"),
              **numbered[kind]}
             for kind in kinds]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.fixture
def run(tmp_path):
    """The folder of a run of two iterations, the second without judge pairs, a mark in every text that came from a person or a model."""
    meta = {"first_position_rate": 0.61, "higher_score_rate": 0.83, "consistent_rate": 0.4, "valid_rate": 0.9, "truth_accuracy": None,
            "weights": [0.4, 0.6]}
    pairs = {"actor": 17, "judge": 5, "dropped": {evil("reason"): 7}}
    records = [figures(0), figures(1, meta_judge=meta, pairs=pairs, seconds={evil("stage"): 12.5}),
               figures(2, pairs={"actor": 19, "judge": 0, "dropped": {"other": 3}}, train={"loss": 0.5})]
    for t in range(3):
        (tmp_path / f"iter{t}").mkdir()
    write_pairs(tmp_path / "iter1", "actor", "judge")
    write_pairs(tmp_path / "iter2", "actor")
    battle = {"id": "0/1", "prompt_id": "0", "prompt": evil("battle prompt"), "text": evil("battle answer"),
              "texts": [evil("judgment 0"), evil("judgment 1")], "scores": [3, 4], "verdicts": [[0, 1], [0, 0]],
              "said": [{"first": 0, "second": 1, "text": evil("verdict 01"), "finished": True},
                       {"first": 1, "second": 0, "text": evil("verdict 10"), "finished": False}]}
    (tmp_path / "iter1" / "battles.jsonl").write_text(json.dumps(battle) + "\n" + '{"torn')
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"model": evil("model"), "seed": 7}, "versions": {}}))
    (tmp_path / "summary.json").write_text(json.dumps(records))
    return tmp_path


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, its text, and the rows of its tables."""
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
    """Nothing is fetched and nothing runs: no such tag, no handler, and no address but the picture's own bytes."""
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "a", "form", "video", "svg"})
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("href", "srcset", "style", "background") for name in attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    assert page.open == [], "a tag is never closed"


def test_the_report_is_self_contained_and_every_text_is_escaped(run):
    """Each of the sixteen places has a mark of its own: as text it must be there, and as a tag it would be found."""
    page = page_of(run)
    check_self_contained(page)
    assert "url(" not in measuring.STYLE and "@import" not in measuring.STYLE
    places = ["model", "id", "reason", "stage", "battle answer", "judgment 0", "judgment 1", "verdict 01", "verdict 10", "battle prompt",
              *(f"{kind} {part}" for kind in ("actor", "judge") for part in ("prompt", "chosen", "rejected"))]
    missing = [place for place in places if evil(place)[:90] not in page.text]  # titles are cut after 90 characters
    assert missing == []


def test_the_report_says_what_the_run_measured(run):
    """Rows of the tables as a reader sees them; what was not measured is a dash, never a number."""
    rows = {row[0]: row[1:] for row in page_of(run).rows if row}
    assert rows["actor: true score"] == ["2.50"] * 3 and rows["actor: characters per answer"] == ["120"] * 3
    assert rows["judge: right about the truth"] == ["70.4%"] * 3 and rows["judge: valid"] == ["98%"] * 3
    assert rows["meta-judge: prefers the first"] == ["-", "61%", "-"] and rows["meta-judge: same in both orders"] == ["-", "40%", "-"]
    assert rows["training: actor pairs"] == ["0", "17", "19"] and rows["training: judge pairs"] == ["0", "5", "0"]
    assert "meta-judge: right about the truth" not in rows  # measured nowhere: no row
    assert rows[evil("reason")] == ["0", "7", "0"] and rows["other"] == ["0", "0", "3"] and rows[evil("stage")] == ["0", "12.5", "0"]


def test_the_report_shows_the_pairs_with_their_numbers(run):
    page = page_of(run)
    for said in ("chosen, score 4.00", "rejected, score 1.50", "chosen, rating 2.3", "rejected, rating -1.00", "Answers, iteration 1",
                 "Judgments, iteration 1", "Verdicts, iteration 1", "Answers, iteration 2"):
        assert said in page.text
    assert "Judgments, iteration 2" not in page.text and "iteration 0" not in page.text


def test_the_report_with_plots(run):
    pytest.importorskip("matplotlib")
    images = [attributes for tag, attributes in page_of(run).tags if tag == "img"]
    assert len(images) == 1 and images[0]["alt"] and len(images[0]["src"]) > 10_000


def test_the_report_without_matplotlib(run, monkeypatch):
    """Plots are an extra: without them the page says how to get them and has all its tables."""
    with_plots = page_of(run)
    monkeypatch.setattr(measuring, "Figure", None)
    page = page_of(run)
    check_self_contained(page)
    assert "img" not in {tag for tag, _ in page.tags} and "pip install matplotlib" in page.text and page.rows == with_plots.rows


def test_the_report_of_a_run_that_has_only_warmed_up(run):
    """Iteration 0 alone, no checks: the page stands, and has no row for what nobody measured."""
    first = figures(0, actor={"mean_score": None, "mean_length": None, "cut_off": 3}, judge={"valid_rate": 0.0, "mean_score": None, "ties": None})
    (run / "summary.json").write_text(json.dumps([first]))
    rows = {row[0]: row[1:] for row in page_of(run).rows if row}
    assert rows["judge: valid"] == ["0%"] and "judge: right about the truth" not in rows
    assert not any(name.startswith(("actor: score", "judge: mean score", "meta-judge")) for name in rows)


def command(monkeypatch, capsys, *arguments):
    """Run eval.py's command line in this process: returns (status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    try:
        measuring.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_command_draws_a_report_and_says_where(run, monkeypatch, capsys):
    status, out, _ = command(monkeypatch, capsys, "report", run)
    assert status == 0 and out.strip() == f"{run}/report.html" and (run / "report.html").is_file()


@pytest.mark.parametrize("spoil", ["summary.json", "config.json", "torn summary", "torn pairs"])
def test_the_command_on_a_folder_that_is_no_run(run, monkeypatch, capsys, spoil):
    """One line on stderr, exit status 2, and no page, whatever is missing or broken."""
    if spoil == "torn summary":
        (run / "summary.json").write_text('[{"iteration": 0')
    elif spoil == "torn pairs":
        (run / "iter1" / "pairs.jsonl").write_text("{\n{}\n")
    else:
        (run / spoil).unlink()
    status, out, error = command(monkeypatch, capsys, "report", run)
    assert status == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1 and not (run / "report.html").exists()


def test_the_command_as_it_is_typed(tmp_path):
    """A real process on an empty folder: status 2, one line that names the folder, no traceback."""
    done = subprocess.run([sys.executable, "eval.py", "report", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert str(tmp_path) in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
