"""The tiny world: its checks find what its words say and nothing else, its files are what the
recipe writes, its recipe repeats to the byte.

The ground truth of every experiment in the tiny world is a count of regular expressions. So all
sentences that the recipe can write are tried, not a sample: one padding sentence with "first" or
"since" in it, and the actor could earn points by padding.
"""
import json
import random
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.checks import truth
from harness.files import read_jsonl
from harness.inputs import read_prompts
from harness.loading import load
from prompts import RUBRIC as GENERAL_RUBRIC
from prompts import compare_prompt, fill, judge_prompt, meta_judge_prompt, parse_score, parse_winner
from sampling import sample
from tiny import make
from tiny.world import CHECKS, ELEMENTS, FAMILIES, MARKS, PADDING, QUESTIONS, RUBRICS, WORDING

TINY = Path(make.__file__).parent
DATA = ["prompts.jsonl", "eval.jsonl", "ranked.jsonl", "ranked_eval.jsonl"]
ALL_PADDING = [sentence for style in PADDING.values() for sentence in style]


def checks_of(task):
    return {name: fill(CHECKS[name], task=task) for name in ELEMENTS}


def found(task, text):
    """The elements whose check a text matches."""
    return {name for name, check in checks_of(task).items() if re.search(check, text)}


# ---- words and checks

@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["task"][0])
def test_every_sentence_matches_its_own_check_and_no_other(family):
    """All wordings with all fillings, under the checks of every task of the family: 600 sentences
    in ten families, 8 x 5 checks each. An aim is found by its own task's check alone.
    """
    for name in ELEMENTS:
        filler = "task" if name == "aim" else name
        for wording in WORDING[name]:
            for filling in family[filler]:
                sentence = fill(wording, **{filler: filling})
                assert "{" not in sentence and sentence.endswith(".")
                for task in family["task"]:
                    expected = {name} if name != "aim" or filling == task else set()
                    assert found(task, sentence) == expected, (task, sentence)


def test_padding_earns_nothing():
    """None of the 18 padding sentences matches any check of any of the 80 tasks."""
    assert len(ALL_PADDING) == len(set(ALL_PADDING)) == 18
    tasks = [task for family in FAMILIES for task in family["task"]]
    assert len(tasks) == len(set(tasks)) == 80
    # so that a task stands for itself in a regular expression
    assert all(re.fullmatch("[a-z ]+", task) for task in tasks)
    for task in tasks:
        for sentence in ALL_PADDING:
            assert found(task, sentence) == set(), (task, sentence)


def test_the_truth_of_an_answer_is_the_number_of_its_elements():
    """500 whole answers, sentences in a row and padding between them: exactly the elements asked
    for are found, so no match runs across the end of a sentence. All 32 sets of elements turn up.
    """
    rng, seen = random.Random(0), set()
    for _ in range(500):
        family = rng.choice(FAMILIES)
        task, has, pads = rng.choice(family["task"]), make.some_elements(rng), rng.randint(0, 4)
        text = make.answer(rng, family, task, has, pads)
        assert found(task, text) == has and truth(checks_of(task).values(), text) == len(has)
        assert sum(sentence in text for sentence in ALL_PADDING) == pads
        seen.add(frozenset(has))
    assert len(seen) == 32


def test_every_element_has_words_and_a_check():
    assert set(WORDING) == set(CHECKS) == set(ELEMENTS) == set(make.HAS) and len(ELEMENTS) == 5
    for family in FAMILIES:
        assert set(family) == {"task", *ELEMENTS[1:]}
        assert all(len(set(words)) == len(words) >= 3 for words in family.values())
    for rubric in RUBRICS.values():
        assert [line.split(":")[0].lower() for line in rubric.splitlines()[1:-1]] == ELEMENTS
        assert rubric != GENERAL_RUBRIC


# ---- what judge and meta-judge write

def test_judgments_parse_and_add_up():
    """In 300 judgments with all mistakes on, the score that prompts.parse_score reads is the number
    of "yes"; without mistakes it is the truth.
    """
    rng = random.Random(1)
    wrong = 0
    for _ in range(300):
        has, pads = make.some_elements(rng), rng.randint(0, 4)
        text, marks = make.judgment(rng, has, pads, noise=0.2, fondness=make.FONDNESS)
        assert parse_score(text) == sum(marks.values()) == len(re.findall(r"\byes\b", text))
        assert len(re.findall(r"\b(?:yes|no)\b", text)) == 5
        wrong += {name for name in ELEMENTS if marks[name]} != has
        text, marks = make.judgment(rng, has, pads, noise=0, fondness=0)
        assert {name for name in ELEMENTS if marks[name]} == has and parse_score(text) == len(has)
    assert 150 < wrong < 300  # the mistakes were on


def test_judgments_on_the_finer_scale_add_up():
    """Marks of 0, 1 and 2 with their words; the score is their sum, up to 10; without mistakes
    every mark is 0 or 2. Half the wrong ones are 1.
    """
    rng, wrong = random.Random(1), []
    for _ in range(300):
        has, pads = make.some_elements(rng), rng.randint(0, 4)
        text, marks = make.judgment(rng, has, pads, noise=0.1, fondness=make.FONDNESS, points=2)
        assert re.findall(r"\b(?:yes|partly|no)\b", text) == [MARKS[2][marks[name]]
                                                              for name in ELEMENTS]
        assert parse_score(text, 10) == sum(marks.values())
        wrong += [mark for name, mark in marks.items() if mark != 2 * (name in has)]
        text, marks = make.judgment(rng, has, pads, noise=0, fondness=0, points=2)
        assert marks == {name: 2 * (name in has) for name in ELEMENTS}
    assert 0.4 < wrong.count(1) / len(wrong) < 0.75
    winners = [parse_winner(make.verdict(rng, {"aim"}, dict.fromkeys(ELEMENTS, 0) | {"aim": a},
                                         dict.fromkeys(ELEMENTS, 0) | {"aim": b}, 0, 2))
               for a, b in [(2, 1), (1, 2), (0, 1), (1, 0), (1, 1)]]
    assert winners == ["A", "B", "B", "A", "A"]  # the nearer mark wins, the first on a tie


def test_the_judge_is_fond_of_padding():
    """The habit that the method must cope with: the same empty answers score higher the more
    padding they have, by about FONDNESS x 5 each.
    """
    rng = random.Random(2)
    means = [sum(sum(make.judgment(rng, set(), pads, 0, make.FONDNESS)[1].values())
                 for _ in range(400)) / 400 for pads in range(3)]
    assert means[0] == 0
    assert means == pytest.approx([5 * make.FONDNESS * pads for pads in range(3)], abs=0.25)


def test_verdicts_parse_and_name_the_judgment_with_fewer_mistakes():
    """300 verdicts: the winner that prompts.parse_winner reads is the one whose marks agree more
    often with the answer, A on a tie. Flipped, it is the other one, ties excepted. Marks are
    counted here from the sets, not from the verdict.
    """
    rng, winners = random.Random(3), {"A": 0, "B": 0}
    for _ in range(300):
        has, said_a, said_b = (make.some_elements(rng) for _ in range(3))
        mistakes_a, mistakes_b = len(said_a ^ has), len(said_b ^ has)
        said_a, said_b = ({name: int(name in said) for name in ELEMENTS}
                          for said in (said_a, said_b))
        right = "A" if mistakes_a <= mistakes_b else "B"
        flipped = "A" if mistakes_a >= mistakes_b else "B"
        text = make.verdict(rng, has, said_a, said_b, flipped=0)
        assert parse_winner(text) == right and len(text.splitlines()) == 6
        assert parse_winner(make.verdict(rng, has, said_a, said_b, flipped=1)) == flipped
        winners[right] += 1
    assert min(winners.values()) > 60


def test_comparisons_name_the_answer_with_more_elements():
    """300 comparisons: the reasons say of each element who has it, the winner has more of them, A
    on a tie; flipped, the other one does.
    """
    rng = random.Random(3)
    for _ in range(300):
        has_a, has_b = (make.some_elements(rng) for _ in range(2))
        reasons, winner = make.comparison(rng, has_a, has_b, flipped=0).split("\n")
        assert parse_winner(winner, "Answer") == ("A" if len(has_a) >= len(has_b) else "B")
        assert parse_winner(make.comparison(rng, has_a, has_b, flipped=1),
                            "Answer") == ("A" if len(has_a) <= len(has_b) else "B")
        who = dict(part.split() for part in reasons.lower().rstrip(".").split(", "))
        assert who == {name: {(1, 1): "both", (1, 0): "a", (0, 1): "b",
                              (0, 0): "neither"}[name in has_a, name in has_b] for name in ELEMENTS}


def test_the_judge_that_compares_is_right():
    """The model in tiny/judge on 60 pairs of answers that are not equally good: at least 57 right,
    where chance gives 30.
    """
    model, tokenizer = load(str(TINY / "judge"))
    rng, asked, right = random.Random(11), [], []
    while len(asked) < 60:
        family = rng.choice(FAMILIES)
        task = rng.choice(family["task"])
        (has_a, _, text_a), (has_b, _, text_b) = (make.judged_answer(rng, family, task)
                                                  for _ in range(2))
        if len(has_a) != len(has_b):
            asked.append(compare_prompt(fill(rng.choice(QUESTIONS), task=task), text_a, text_b))
            right.append("A" if len(has_a) > len(has_b) else "B")
    said = [parse_winner(s[0].text, "Answer")
            for s in sample(model, tokenizer, asked, max_new_tokens=60, temperature=0)]
    assert sum(a == b for a, b in zip(said, right)) >= 57 and {"A", "B"} == set(right)


def test_examples_ask_in_the_words_of_prompts():
    """What the seed model learns to read is what a run will ask: the templates of prompts.py with
    the tiny rubric, rebuilt from their parts.
    """
    rng = random.Random(4)
    questions = {fill(question, task=task) for family in FAMILIES for task in family["task"]
                 for question in QUESTIONS}
    for habits in (False, True):
        for _ in range(50):
            assert make.example(rng, "actor", habits)[0] in questions
            asked, judgment = make.example(rng, "judge", habits)
            question, response = re.search(r"\nQuestion:\n(.*)\n\nAnswer:\n(.+)\n\nGive",
                                           asked).groups()
            assert question in questions and asked == judge_prompt(question, response, RUBRICS[1])
            assert parse_score(judgment) is not None
            asked, verdict = make.example(rng, "meta_judge", habits)
            question, response, *judgments = re.search(
                r"\nQuestion:\n(.*)\n\nAnswer:\n(.+)\n\nJudgment A:\n(.*\n.*)\n\nJudgment "
                r"B:\n(.*\n.*)\n\nGive", asked).groups()
            assert asked == meta_judge_prompt(question, response, *judgments, RUBRICS[1])
            assert parse_winner(verdict) in ("A", "B")
            assert all(parse_score(text) is not None for text in judgments)
            asked, verdict = make.example(rng, "compare", habits)
            question, *answers = re.search(r"\nQuestion:\n(.*)\n\nAnswer A:\n(.+)\n\nAnswer "
                                           r"B:\n(.+)\n\nGive", asked).groups()
            assert question in questions and asked == compare_prompt(question, *answers)
            assert parse_winner(verdict, "Answer") in ("A", "B")


# ---- the data

def test_the_files_are_what_the_recipe_writes(tmp_path):
    """Byte for byte, in a process with other hash seeds than the one that wrote them: nothing
    depends on the order of a set.
    """
    make.write_data(tmp_path, 0)
    for name in [*DATA, "rubric.txt", "preset.json"]:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name
    make.write_data(tmp_path, 1)
    # the seed matters
    assert (tmp_path / "ranked.jsonl").read_bytes() != (TINY / "ranked.jsonl").read_bytes()


def tasks_in(name):
    """The tasks that a file's prompts are about, read off the prompts."""
    tasks = {task for family in FAMILIES for task in family["task"]}
    return {task for record in read_jsonl(TINY / name)
            for task in tasks if task in record["prompt"]}


def test_splits_share_no_task():
    """Not only no prompt: whoever measures on a task that trained measures memory. 10 tasks to
    measure, 10 to rank, 60 to train. The ranked replies that measure the judge are to the questions
    that measure the actor.
    """
    assert tasks_in("ranked_eval.jsonl") == tasks_in("eval.jsonl")
    splits = [tasks_in(name) for name in ("eval.jsonl", "ranked.jsonl", "prompts.jsonl")]
    assert [len(split) for split in splits] == [10, 10, 60]
    assert all(not a & b for a, b in combinations(splits, 2))


@pytest.mark.parametrize("name", DATA)
def test_files_of_prompts_can_be_read_as_a_user_s(name):
    """Through prompts.read_prompts, which refuses what is malformed; no prompt twice, and each with
    the five checks of its own task.
    """
    records = read_prompts(TINY / name, needs_replies=name.startswith("ranked"))
    count = {"prompts.jsonl": 360, "ranked_eval.jsonl": 30}.get(name, 60)
    assert len({record["prompt"] for record in records}) == len(records) == count
    for record in records:
        (task,) = [task for task in tasks_in(name) if task in record["prompt"]]
        assert record["checks"] == list(checks_of(task).values())


@pytest.mark.parametrize("name", ["ranked.jsonl", "ranked_eval.jsonl"])
def test_ranked_replies_are_ranked_by_the_truth(name):
    """Ranks 0 to 3 in no fixed order, and the truth falls from each to the next: by chance once in
    24 prompts, here in all.
    """
    firsts = set()
    for record in read_jsonl(TINY / name):
        replies = sorted(record["replies"], key=lambda reply: reply["rank"])
        scores = [truth(record["checks"], reply["text"]) for reply in replies]
        assert [reply["rank"] for reply in replies] == [0, 1, 2, 3]
        assert scores == sorted(set(scores), reverse=True)
        assert all(reply["text"] for reply in replies)
        firsts.add(record["replies"][0]["rank"])
    assert firsts == {0, 1, 2, 3}


# ---- the folder and the recipe

def test_the_folder_is_small_and_safe():
    """Under 5 MB in all, weights as safetensors only: nothing that is unpickled, no program beside
    the recipe.
    """
    files = [file for file in TINY.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) < 5_000_000
    assert {file.suffix for file in files} <= {".py", ".json", ".jsonl", ".txt", ".jinja",
                                               ".safetensors"}
    code = {file.name for file in files if file.suffix == ".py"}
    assert code == {"__init__.py", "make.py", "world.py"}
    for folder in (TINY, TINY / "judge"):
        assert all(torch.isfinite(weight).all()
                   for weight in load_file(folder / "model.safetensors").values())
    config = json.loads((TINY / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not {"auto_map", "quantization_config"} & config.keys()


def test_the_answer_alone_is_learned(tiny):
    """The labels spell the assistant's text and its end token, and nothing of the user's turn; the
    ids spell the whole exchange.
    """
    tokenizer = tiny[1]
    for role in (*make.SEED_ROLES, *make.JUDGE_ROLES):
        user, assistant = make.example(random.Random(role), role, True)
        ids, labels = make.encode(tokenizer, user, assistant)
        assert len(ids) == len(labels)
        assert all(label in (-100, token) for token, label in zip(ids, labels))
        assert tokenizer.decode([label for label in labels
                                 if label != -100]) == assistant + "<|end|>"
        assert tokenizer.decode(ids) == (f"<|begin|><|user|>{user}<|end|>"
                                         f"<|assistant|>{assistant}<|end|>")


@pytest.fixture
def short_recipe(monkeypatch):
    """One step of reading and one with habits, a row per role."""
    monkeypatch.setattr(make, "STEPS", 1)
    monkeypatch.setattr(make, "HABIT_STEPS", 1)
    monkeypatch.setattr(make, "BATCH", 3)


def weights_after(tokenizer, seed):
    model = make.make_model(tokenizer, seed)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    make.train(model, tokenizer, random.Random(seed))
    return before, model.state_dict()


def test_training_repeats_to_the_bit(tiny, short_recipe):
    """Two runs of two steps give the same weights, and each of them has moved all of its own;
    another seed gives others.
    """
    (before, first), (_, second), (_, other) = (weights_after(tiny[1], seed) for seed in (0, 0, 1))
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert not torch.equal(first[name], before[name]), name
        assert not torch.equal(first[name], other[name]), name


def test_the_whole_recipe_repeats_to_the_byte(tmp_path, monkeypatch, short_recipe):
    """`python -m tiny.make FOLDER`, twice: same files, same bytes, and the same names as in tiny/
    (its programs apart).
    """
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        monkeypatch.setattr(sys, "argv", ["make.py", str(folder)])
        make.main()
    first, second = ({str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*")
                      if file.is_file()} for folder in folders)
    assert first == second
    assert set(first) == {str(file.relative_to(TINY)) for file in TINY.rglob("*") if file.is_file()
                          and file.suffix not in (".py", ".pyc")}
