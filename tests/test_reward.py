"""--reward in the judge's place, judgments that people bring, and models that cannot judge."""
import json
import math
import re
from collections import Counter

import pytest
import torch
from conftest import CHATML, TINY
from test_run import refusal, scripted, small
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

import harness.first_replies
import metareward
from harness.files import read_jsonl
from harness.inputs import eft_replies, given_examples, read_prompts
from harness.reward import RewardModel
from harness.settings import Settings
from harness.views.figures import look_up
from prompts import judge_prompt, meta_judge_prompt, parse_score, parse_winner
from sampling import Sample


def run(folder, *flags):
    """A run of one iteration in folder/run: the records of summary.json."""
    metareward.main(small(folder, "--out", str(folder / "run"), "--iters", "1", "--epochs", "1",
                          "--prompts-per-iter", "6", *flags))
    return json.loads((folder / "run" / "summary.json").read_text())


# ---- what scores answers

def test_with_checks_as_reward_answers_have_their_true_score(tmp_path, capsys):
    """No judge and no meta-judge is asked, and the table has no rows for them."""
    first, last = run(tmp_path, "--reward", "checks")
    folder = tmp_path / "run" / "iter1"
    judged = read_jsonl(folder / "judgments.jsonl")
    assert judged and all(r["score"] == r["truth"] and "judgments" not in r for r in judged)
    pairs = read_jsonl(folder / "pairs.jsonl")
    assert pairs and all(p["kind"] == "actor" and p["chosen_score"] > p["rejected_score"]
                         for p in pairs)
    assert first["judge"] is None and last["meta_judge"] is None and last["train"]
    assert not (folder / "eval_judge.jsonl").exists()
    out = capsys.readouterr().out
    assert "actor: true score" in out and "judge:" not in out


def test_checks_as_reward_need_prompts_with_checks(tmp_path, capsys):
    assert "needs --prompts" in refusal(capsys, "--model", TINY, "--reward", "checks",
                                        "--prompts", "", "--out", tmp_path / "run")
    lines = (TINY / "prompts.jsonl").read_text().splitlines(keepends=True)[:6]
    (tmp_path / "prompts.jsonl").write_text("".join(lines) + '{"prompt": "Sing."}\n')
    _, last = run(tmp_path, "--reward", "checks", "--prompts", str(tmp_path / "prompts.jsonl"))
    assert last["pairs"]["dropped"]["prompt without checks"] == 1


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """The folder of a small random reward model with the tiny world's tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("reward"), AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_labels=1, initializer_range=0.3,
        max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_models_scores_are_those_of_its_own_forward_pass(reward_model, monkeypatch):
    """One text at a time, as transformers would; whatever else stands in the batch."""
    monkeypatch.setitem(harness.reward.BATCH_TOKENS, "cpu", 60)
    answers = [{"prompt": f"How do I sing {'so well ' * (i % 3)}?", "text": f"Like {i}."}
               for i in range(7)]
    scores = RewardModel(str(reward_model), bits=32).scores(answers, "scores")
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    for answer, score in zip(answers, scores, strict=True):
        turns = [{"role": "user", "content": answer["prompt"]},
                 {"role": "assistant", "content": answer["text"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            assert score == pytest.approx(model(ids).logits.item(), abs=1e-5)
    assert len({round(score, 4) for score in scores}) == 7


@pytest.mark.parametrize("end, pad", [("<|im_end|>", "<|pad|>"), ("<|im_end|>", "<|im_end|>"),
                                      ("<|im_end|>", None)])
def test_a_reward_model_is_called_as_its_card_calls_it(end, pad, tmp_path):
    """The template's whole rendering of both turns, with the line break that ChatML puts after the
    end token, in one forward pass: whatever the padding token is, and if there is none.
    """
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template, tokenizer.eos_token = CHATML, end
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_labels=1, initializer_range=0.3,
        pad_token_id=pad and tokenizer.convert_tokens_to_ids(pad))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    answers = [{"prompt": "How?", "text": f"Like {i}{' this' * (i % 2)}."} for i in range(6)]
    scores = RewardModel(str(tmp_path), bits=32).scores(answers, "scores")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = []
    for answer in answers:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": answer["prompt"]},
             {"role": "assistant", "content": answer["text"]}], return_tensors="pt",
            return_dict=False)
        assert tokenizer.decode(ids[0, -2:]) == "<|im_end|>\n"
        with torch.no_grad():
            expected.append(model(ids).logits[0][0].item())
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in scores}) == 6


def test_what_a_reward_model_cannot_score_is_counted_and_is_no_number(reward_model, tmp_path,
                                                                      monkeypatch, capsys):
    """Answers longer than its context, and one whose reward is not a number."""
    monkeypatch.setattr(RewardModel, "logits", lambda self, ids: [
        math.nan if sum(one) % 5 == 0 else float(sum(one) % 7) for one in ids])
    monkeypatch.setattr(RewardModel, "try_it", lambda self, name: setattr(self, "context", 55))
    _, last = run(tmp_path, "--reward", str(reward_model))
    judged = read_jsonl(tmp_path / "run" / "iter1" / "judgments.jsonl")
    unscored = Counter(record["unscored"] for record in judged if record["score"] is None)
    dropped = last["pairs"]["dropped"]
    assert set(unscored) == {"answer too long for the reward model's context",
                             "reward not a finite number"}
    assert {reason: dropped[reason] for reason in unscored} == unscored
    actor = last["actor"]
    assert 0 < actor["reward_count"] < actor["answers"] and math.isfinite(actor["reward"])
    assert "NaN" not in (tmp_path / "run" / "summary.json").read_text()


def test_a_reward_model_that_gives_no_number_is_refused_before_a_run(reward_model, tmp_path,
                                                                     capsys):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    model.score.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "reward")
    assert "no finite number" in refusal(
        capsys, *small(tmp_path, "--out", str(tmp_path / "run"), "--reward",
                       str(tmp_path / "reward")))
    assert not (tmp_path / "run").exists()


def test_a_reward_model_that_is_not_there_is_named_by_its_flag(tmp_path, capsys):
    says = refusal(capsys, *small(tmp_path, "--out", str(tmp_path / "run"),
                                  "--reward", "../nosuch"))
    assert "--reward ../nosuch" in says and "no such folder" in says


def test_a_reward_model_scores_a_run(reward_model, tmp_path, capsys):
    first, last = run(tmp_path, "--reward", str(reward_model))
    pairs = read_jsonl(tmp_path / "run" / "iter1" / "pairs.jsonl")
    assert pairs and all(p["chosen_score"] > p["rejected_score"] for p in pairs)
    assert last["judge"] is None and last["actor"]["reward"] and last["actor"]["truth"]


def test_a_model_of_another_kind_is_no_reward_model(tmp_path, capsys):
    assert "not a reward model" in refusal(
        capsys, *small(tmp_path, "--out", str(tmp_path / "run"), "--iters", "1",
                       "--reward", str(TINY)))


def test_without_a_judge_there_is_no_warm_start_and_no_meta_judge():
    settings = Settings(model="tiny", out="x", reward="checks", judgments=1)
    assert settings.no_eft and settings.no_meta_judge


# ---- judgments that people bring

def test_given_judgments_and_comparisons_are_trained_on_as_they_are():
    records = [{"prompt_id": "0", "prompt": "Why?", "replies": [
        {"text": "Rain.", "rank": 0, "judgment": "Short, and right.\nScore: 4",
         "comparisons": [{"judgments": ["a\nScore: 4", "b\nScore: 1"], "better": 0}]},
        {"text": "No.", "rank": 1, "judgment": "It is good."}]}]
    dropped = Counter()
    good, first, second = given_examples(records, "rubric", 5, dropped)
    assert good["prompt"][0]["content"] == judge_prompt("Why?", "Rain.", "rubric")
    assert good["completion"][0]["content"] == "Short, and right.\nScore: 4" and good["score"] == 4
    for example, m, n, winner in ((first, 0, 1, "A"), (second, 1, 0, "B")):
        texts = ["a\nScore: 4", "b\nScore: 1"]
        assert example["prompt"][0]["content"] == meta_judge_prompt(
            "Why?", "Rain.", texts[m], texts[n], "rubric")
        assert example["completion"][0]["content"] == f"Winner: Judgment {winner}"
    assert dropped == {"given judgment that ends in no score": 1}


def test_a_run_with_given_judgments_asks_the_seed_for_none(tmp_path, capsys):
    records = [json.loads(line) for line in (TINY / "ranked.jsonl").read_text().splitlines()[:6]]
    for record in records:
        for reply in record["replies"]:
            reply["judgment"] = f"It has some elements.\nScore: {5 - reply['rank']}"
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    first, _ = run(tmp_path, "--eft", str(file))
    assert not (tmp_path / "run" / "iter0" / "judgments.jsonl").exists()
    assert len(read_jsonl(tmp_path / "run" / "iter0" / "sft.jsonl")) == sum(
        len(record["replies"]) for record in records)
    assert first["train"]


def given(tmp_path, unread, read):
    """A file of ranked replies with judgments, of which the first ones have no line for a score."""
    texts = ["The answer is direct. Score: 5"] * unread + ["It is direct.\nScore: 5"] * read
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Why {i}?", "replies": [
        {"text": "So.", "rank": 0, "judgment": text}, {"text": "No.", "rank": 1}]}) + "\n"
        for i, text in enumerate(texts)))
    return Settings(model="tiny", out="x", eft=str(file))


def test_given_judgments_that_cannot_be_read_are_refused_at_once(tmp_path):
    settings = given(tmp_path, 3, 17)
    with pytest.raises(ValueError) as error:
        eft_replies(settings)
    assert str(error.value) == (
        f'--eft {settings.eft}: 3 of 20 given judgments do not end in a line "Score: n" with n '
        'from 0 to 5, the first on line 1: "The answer is direct. Score: 5"; put the score on a '
        'line of its own, the last one')


def test_a_few_given_judgments_that_cannot_be_read_are_told_at_once(tmp_path, capsys):
    assert len(eft_replies(given(tmp_path, 1, 19))) == 20
    assert "1 of 20 given judgments do not end in" in capsys.readouterr().err
    eft_replies(given(tmp_path, 0, 2))
    assert not capsys.readouterr().err


def test_of_a_file_of_one_reply_a_line_the_reply_s_own_line_is_named(tmp_path):
    """Though replies to one prompt are put together, where the first of them stands."""
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Why?", "text": f"{i}.", "rank": i,
                                        "judgment": judgment}) + "\n"
                            for i, judgment in enumerate(["Good.\nScore: 5", "It is bad."])))
    with pytest.raises(ValueError, match="1 of 2 given judgments .* the first on line 2: \"It is"):
        eft_replies(Settings(model="tiny", out="x", eft=str(file)))


def test_a_given_comparison_may_have_a_reason():
    """What the judge saw, which stands before the winner in both orders, or a text for each."""
    def said(reason):
        comparison = {"judgments": ["a", "b"], "better": 1, "reason": reason}
        records = [{"prompt_id": "0", "prompt": "Why?",
                    "replies": [{"text": "Rain.", "comparisons": [comparison]}]}]
        return [line["completion"][0]["content"]
                for line in given_examples(records, "rubric", 5, Counter())]
    assert said("It rains.") == [f"It rains.\nWinner: Judgment {winner}" for winner in "BA"]
    assert said(["A: a, B: b", "A: b, B: a"]) == ["A: a, B: b\nWinner: Judgment B",
                                                  "A: b, B: a\nWinner: Judgment A"]


def test_the_record_of_the_document_is_one(tmp_path):
    """Of docs/real-model.md: two judgments, a comparison in both orders, and a demonstration."""
    page = (TINY.parent / "docs" / "real-model.md").read_text()
    [record] = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "eft.jsonl").write_text(json.dumps(json.loads(record)) + "\n")
    records = read_prompts(tmp_path / "eft.jsonl", "--eft", needs_replies=True)
    said = [line["completion"][0]["content"]
            for line in given_examples(records, "rubric", 1, Counter())]
    assert [parse_score(text, 1) for text in said] == [1, None, 0, None, None]
    assert [parse_winner(text) for text in said] == [None, None, None, "A", "B"]


def test_a_reply_may_be_a_demonstration():
    """It trains as an answer, beside its judgment."""
    reply = {"text": "Rain.", "judgment": "Score: 3", "demonstration": True}
    records = [{"prompt_id": "0", "prompt": "Why?", "replies": [reply]}]
    judged, answered = given_examples(records, "rubric", 5, Counter())
    assert judged["completion"][0]["content"] == "Score: 3"
    assert [answered[name][0]["content"] for name in ("prompt", "completion")] == ["Why?", "Rain."]


def test_a_single_reply_may_bring_a_judgment(tmp_path):
    """It needs no other, by which it would be ranked."""
    for name, more in (("taught", {"judgment": "Score: 3"}), ("ranked", {})):
        record = {"prompt": "Why?", "replies": [{"text": "Rain.", "rank": 0, **more}]}
        (tmp_path / name).write_text(json.dumps(record) + "\n")
    [record] = read_prompts(tmp_path / "taught", "--eft", needs_replies=True)
    assert record["replies"][0]["judgment"] == "Score: 3"
    with pytest.raises(ValueError, match="two or more"):
        read_prompts(tmp_path / "ranked", "--eft", needs_replies=True)


@pytest.mark.parametrize("more", [
    {"judgment": 3}, {"comparisons": {}}, {"comparisons": [{"judgments": ["a"], "better": 0}]},
    {"comparisons": [{"judgments": ["a", "b"], "better": 2}]},
    {"comparisons": [{"judgments": ["a", "b"], "better": 0, "reason": 3}]},
    {"comparisons": [{"judgments": ["a", "b"], "better": 0, "reason": ["a"]}]},
    {"demonstration": "yes"}])
def test_malformed_judgments_are_refused(tmp_path, capsys, more):
    replies = [{"text": "a", "rank": 0, **more}, {"text": "b", "rank": 1}]
    (tmp_path / "eft.jsonl").write_text(json.dumps({"prompt": "a", "replies": replies}) + "\n")
    told = refusal(capsys, "--model", TINY, "--out", tmp_path / "run", "--eft",
                   tmp_path / "eft.jsonl")
    assert "line 1: a reply's \"judgment\" must be a text" in told and [*more][0] in told


# ---- models that cannot judge

NEVER = {"judge": lambda i, k: ("It is very good.", True)}
NO_WINNER = {"meta_judge": lambda i, k: ("Both are good.", True)}



def test_a_model_that_cannot_judge_is_told_early(tmp_path, capsys, monkeypatch):
    """With exit status 2, and one line that has a reply and what to do; each time it is started."""
    monkeypatch.setattr("harness.stage.sample", scripted(**NEVER))
    arguments = small(tmp_path, "--out", str(tmp_path / "run"), "--iters", "1", "--no-eft",
                      "--responses", "8", "--judgments", "9")
    for _ in range(4):
        says = refusal(capsys, *arguments)
        assert re.search(r"first judgments: 0 of the first 2\d\d replies end in a score", says)
        assert '"It is very good."' in says and "--eft" in says
    assert not (tmp_path / "run" / "iter0" / "eval_responses.jsonl").exists()


def test_a_run_of_few_judgments_does_not_look_first(tmp_path):
    """4 prompts, 2 answers and 3 judgments each: it would judge more before than in all of it."""
    metareward.main(small(tmp_path, "--out", str(tmp_path / "run"), "--iters", "1", "--no-eft",
                          "--prompts-per-iter", "4", "--responses", "2", "--judgments", "3"))
    assert not (tmp_path / "run" / "iter0" / "first_judgments.jsonl").exists()


def test_the_plan_of_a_model_that_cannot_judge_says_so(tmp_path, capsys, monkeypatch):
    """The line that a run ends with."""
    monkeypatch.setattr("harness.stage.sample", scripted(**NEVER))
    with pytest.raises(SystemExit) as stop:
        metareward.main(small(tmp_path, "--plan", "--iters", "1", "--no-eft", "--responses", "8",
                              "--judgments", "9"))
    says = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and says.startswith("error: first judgments: 0 of the first 2")


def test_a_model_that_cannot_compare_trains_as_actor(tmp_path, capsys, monkeypatch):
    """It says so, trains on pairs of answers, and ends as usual."""
    monkeypatch.setattr(harness.first_replies, "EARLY", 12)
    monkeypatch.setattr("harness.stage.sample", scripted(**NO_WINNER))
    _, last = run(tmp_path, "--no-eft")
    out = capsys.readouterr().out
    assert "0 of the first 12 replies end in a winner" in out and "goes on without" in out
    assert last["pairs"]["actor"] and not last["pairs"]["judge"] and last["train"]
    assert look_up(last, "meta_judge.valid_rate") is None


def test_a_few_replies_that_can_be_read_are_enough():
    """One in twenty: such a model may learn to judge."""
    first = harness.first_replies.FirstReplies(1, "judgments")
    score = [None] * 19 + [3]
    record = {"judgments": [{"score": one} for one in score]}
    for _ in range(10):
        first.add(record, [[Sample("x", [1], True)] * 20])
    with pytest.raises(harness.first_replies.Unreadable):
        first = harness.first_replies.FirstReplies(1, "judgments")
        first.add({"judgments": [{"score": None}] * 200}, [[Sample("x", [1], True)] * 200])


def test_a_run_that_trained_on_nothing_ends_with_status_3(tmp_path, capsys, monkeypatch):
    same = {"judge": lambda i, k: ("Always the same.\nScore: 5", True)}
    monkeypatch.setattr("harness.stage.sample", scripted(**same))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--no-eft", "--no-meta-judge")
    assert stop.value.code == 3
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert last_line.startswith("Iterations that trained on nothing, since no pairs came of them: "
                                "1")
