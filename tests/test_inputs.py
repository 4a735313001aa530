"""harness/inputs.py: files of prompts and of ranked replies, and the prompts that a model invents.
"""
import gzip
import json
import re
import tempfile
from collections import Counter

import pytest
from conftest import FUZZ
from hypothesis import given
from hypothesis import strategies as st

from harness.inputs import (
    Unlike,
    evaluation_prompts,
    invent_prompts,
    oasst_replies,
    ranked_replies,
    training_prompts,
    unused,
)
from harness.records import read_prompts, read_text
from harness.settings import Settings
from harness.training import hold_out
from sampling import Sample

# ---- files

def test_read_prompts_of_json_lines(tmp_path):
    """All that a record carries stays, blank lines do not count, and each record gets its own
    number whatever id the file gives.
    """
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "checks": ["^x"]}\n\n{"prompt": "b", "prompt_id": "0", '
                    '"more": 1}\n', encoding="utf-8")
    assert read_prompts(file) == [{"prompt_id": "0", "prompt": "a", "checks": ["^x"]},
                                  {"prompt_id": "1", "prompt": "b", "more": 1}]


def test_read_prompts_of_plain_lines(tmp_path):
    """One prompt a line, in Windows' line ends too; JSON in such a file is a prompt like any other,
    and U+2028 ends no line.
    """
    file = tmp_path / "p.txt"
    file.write_bytes('  How?  \r\n\r\n{"prompt": "b"}\né\u2028漢'.encode())
    prompts = [record["prompt"] for record in read_prompts(file)]
    assert prompts == ["How?", '{"prompt": "b"}', "é\u2028漢"]


@pytest.mark.parametrize("line, says", [
    ("{", "not JSON"), ("prompt", "not JSON"), ("[]", "prompt"), ("null", "prompt"),
    ("3", "prompt"), ("{}", "prompt"), ('{"prompt": 3}', "prompt"),
    ('{"prompt": "x", "checks": ["("]}', "checks"), ('{"prompt": "x", "checks": [1]}', "checks"),
    ('{"prompt": "x", "checks": "abc"}', "checks"), ('{"prompt": "x", "checks": null}', "checks"),
    ('{"prompt": "x", "checks": 3}', "checks"),
])
def test_a_bad_line_is_named(tmp_path, line, says):
    """Flag, file, number of the line (blank ones counted, as an editor does) and what is wrong, in
    one line.
    """
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "good"}\n\n' + line + '\n{"prompt": "good"}\n')
    with pytest.raises(ValueError) as error:
        read_prompts(file, "--eval-prompts")
    message = str(error.value)
    assert message.startswith(f"--eval-prompts {file}, line 3: ")
    assert says in message.split("line 3: ")[1] and "\n" not in message


@pytest.mark.parametrize("line", ['" "', '{"prompt": " "}', '{"instruction": "", "input": "x"}'])
def test_an_empty_prompt_is_left_out_and_counted(tmp_path, capsys, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "good"}\n' + line + '\n{"prompt": "better"}\n')
    assert [record["prompt"] for record in read_prompts(file)] == ["good", "better"]
    assert "left out: 1 empty prompts" in capsys.readouterr().err


GOOD_REPLY = '{"text": "a", "rank": 0}'


@pytest.mark.parametrize("replies", ["", ', "replies": []', ', "replies": {}',
                                     f', "replies": [{GOOD_REPLY}]',
                                     f', "replies": [{GOOD_REPLY}, "b"]',
                                     f', "replies": [{GOOD_REPLY}, {{"text": "b"}}]',
                                     f', "replies": [{GOOD_REPLY}, {{"text": 1, "rank": 1}}]',
                                     f', "replies": [{GOOD_REPLY}, {{"text": "b", "rank": "no"}}]',
                                     f', "replies": [{GOOD_REPLY}, {{"text": "b", "rank": NaN}}]'])
def test_ranked_replies_must_be_whole(tmp_path, replies):
    """Only where they are needed: the same line is a good prompt otherwise."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"' + replies + "}\n")
    assert read_prompts(file)[0]["prompt"] == "x"
    with pytest.raises(ValueError, match="line 1: .*replies"):
        read_prompts(file, "--eft", needs_replies=True)


@pytest.mark.parametrize("content, says", [(None, "No such file"), (b"", "no prompts"),
                                           (b"\n \n", "no prompts"),
                                           (b'{"prompt": "\xff"}\n', "UTF-8")])
def test_files_that_cannot_be_used(tmp_path, content, says):
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_prompts(file)
    assert str(error.value).startswith(f"--prompts {file}: ") and says in str(error.value)
    assert "\n" not in str(error.value)


def test_read_text_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="--rubric"):
        read_text(tmp_path, "--rubric")


def test_oasst_replies(tmp_path):
    """Of four trees one is English with two ranked replies: it alone comes back, its unranked reply
    and its deeper turns left out.
    """
    def reply(text, rank, **more):
        return {"text": text, "rank": rank, "role": "assistant", "lang": "en", "replies": [],
                **more}

    def tree(text, lang, *replies):
        return {"message_tree_id": text, "prompt": {"text": text, "lang": lang, "role": "prompter",
                                                    "replies": list(replies)}}

    deeper = {"text": "a second turn", "role": "prompter",
              "replies": [reply("deep 0", 0), reply("deep 1", 1)]}
    no_rank = {"text": "never ranked", "role": "assistant", "lang": "en", "replies": []}
    trees = [tree("Why?", "en", reply("worse", 1), reply("unranked", None), no_rank,
                  reply("better", 0, replies=[deeper])),
             tree("Pourquoi ?", "fr", reply("a", 0), reply("b", 1)),
             tree("One reply?", "en", reply("a", 0)), tree("None?", "en")]
    file = tmp_path / "trees.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(record) + "\n" for record in trees)
    assert list(oasst_replies(file)) == [{"prompt": "Why?",
                                          "replies": [{"text": "worse", "rank": 1},
                                                      {"text": "better", "rank": 0}]}]


# ---- near-duplicates

def test_near_duplicates_are_dropped():
    """7 of 10 words shared is too like, 6 of 10 is not; case, order, punctuation and repetition are
    no difference.
    """
    ten = "one two three four five six seven eight nine ten"
    assert not Unlike([ten]).add("one two three four five six seven")           # 7 / 10
    assert Unlike([ten]).add("one two three four five six")                     # 6 / 10
    assert not Unlike(["one two three four five six seven"]).add(ten)           # either way round
    assert Unlike([ten]).add(ten.replace("eight nine ten", "a b c"))            # 7 / 13
    assert not Unlike([ten]).add("TEN, nine! Eight seven six five four three two one one one?")
    assert not Unlike(["écrire un poème"]).add("Écrire un poème.")


def test_only_what_was_added_counts_and_the_first_wins():
    """b is too like a, and c too like b but not a: had b been kept although it was refused, c would
    be refused as well.
    """
    a, b, c = "1 2 3 4 5 6 7 8 9 10", "1 2 3 4 5 6 7 8 9 11 12", "3 4 5 6 7 8 9 11 12 13"
    unlike = Unlike()
    assert [unlike.add(text) for text in (a, b, c, a, c)] == [True, False, True, False, False]
    assert Unlike([b]).add(c) is False
    assert Unlike([a, b]).sizes == [10]


@pytest.mark.parametrize("empty", ["", "  \n", "?!"])
def test_a_text_without_words_is_never_new(empty):
    assert Unlike().add(empty) is False and Unlike([empty]).add("word") is True


json_values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(),
                                     st.text(max_size=9)),
                           lambda inner: st.one_of(st.lists(inner, max_size=3),
                                                   st.dictionaries(st.sampled_from(
                               ["prompt", "checks", "replies", "text", "rank", "prompt_id", ""]),
                                                                   inner, max_size=4)),
                           max_leaves=8)
good_records = st.fixed_dictionaries({"prompt": st.text(min_size=1),
                                      "replies": st.lists(st.fixed_dictionaries(
    {"text": st.text(min_size=1), "rank": st.integers(0, 3)}), min_size=2, max_size=3)},
                                     optional={"checks": st.lists(st.text(max_size=5))})
lines = st.one_of(st.binary(max_size=40), json_values.map(json.dumps).map(str.encode),
                  good_records.map(json.dumps).map(str.encode))


@FUZZ
@given(st.lists(lines, max_size=3).map(b"\n".join), st.booleans())
def test_any_prompt_file_is_read_or_refused_by_name(content, needs_replies):
    """Bytes, JSON of any shape and good records in one file: records whose prompts are texts, or
    one line that begins with the flag and the file.
    """
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(content)
        file.flush()
        try:
            records = read_prompts(file.name, "--eft", needs_replies)
        except ValueError as error:
            assert str(error).startswith(f"--eft {file.name}") and "\n" not in str(error)
        else:
            assert records
            assert all(isinstance(record["prompt"], str) and record["prompt"].strip()
                       for record in records)
            ids = [record["prompt_id"] for record in records]
            assert len(set(ids)) == len(ids)  # a prompt's number, or that of its first record
            assert all(number == f"{i}" or needs_replies and int(number.partition(".")[0]) < i
                       for i, number in enumerate(ids))
            for record in records:
                assert all(re.compile(check) for check in record.get("checks") or [])
                if needs_replies:
                    assert len(record["replies"]) > 1
                    assert all(isinstance(reply["text"], str) for reply in record["replies"])


@pytest.mark.parametrize("line",
                         ["[" * 100_000,
                          '{"prompt": "a", "replies": [{"text": "b", "rank": 1%s}, {"text": "c", '
                          '"rank": 0}]}' % ("0" * 400)],
                         ids=["brackets in brackets", "a huge rank"])
def test_lines_that_overflow_are_refused(tmp_path, line):
    (tmp_path / "deep.jsonl").write_text(line)
    with pytest.raises(ValueError, match="line 1: "):
        read_prompts(tmp_path / "deep.jsonl", needs_replies=True)


@FUZZ
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=8).map(" ".join), max_size=12))
def test_unlike_against_brute_force(candidates):
    """The index by words gives what comparing every two sets of words gives."""
    unlike, kept = Unlike(), []
    for text in candidates:
        mine = set(text.split())
        new = bool(mine) and all(10 * len(mine & other) < 7 * len(mine | other) for other in kept)
        kept += [mine] if new else []
        assert unlike.add(text) is new


def test_repeated_and_held_out_prompts_are_dropped_and_counted():
    records, dropped = unused([{"prompt": p} for p in ("a", "b", "a", "c")], [{"prompt": "c"}])
    assert [r["prompt"] for r in records] == ["a", "b"]
    assert dropped == {"prompt a duplicate": 1, "prompt held out for measuring": 1}


@pytest.mark.parametrize("other", [
    "Why  is it late? ", "Why is it\r\nlate?", "Why is it late?\u200b", "\ufeffWhy is it late?",
    "Why\u00a0is it late?", "W\u200bhy is it late?",
    "Why is it l\u00adate?", "\uff37hy is it late\uff1f",
    "Why is it late?\ufe0f"])
def test_prompts_that_look_the_same_are_the_same(other):
    """Blanks, invisible characters and wide forms: held out is held out, and none comes twice."""
    plain, another = {"prompt": "Why is it late?"}, {"prompt": "Why is it Late?"}
    assert unused([{"prompt": other}, another], [plain]) == (
        [another], {"prompt held out for measuring": 1})
    assert unused([plain], [{"prompt": other}])[0] == []
    assert unused([plain, {"prompt": other}], []) == ([plain], {"prompt a duplicate": 1})


def test_ranked_replies_that_look_the_same_are_on_one_side(tmp_path):
    """A prompt that measures the judge never trains it with a blank more."""
    replies = [{"text": "Yes.", "rank": 0}, {"text": "No.", "rank": 1}]
    file = tmp_path / "eft.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Number {i}?{blank}", "replies": replies}) + "\n"
                            for i in range(8) for blank in ("", " ", "\u200b")))
    training, measuring = ranked_replies(Settings(model="m", out="o", eft=str(file)))
    assert len(measuring) == 6 and len(training) == 18
    assert not {record["prompt"][:9] for record in measuring} & {
        record["prompt"][:9] for record in training}
    (tmp_path / "ranked.jsonl").write_text(json.dumps({"prompt": " Number 3?",
                                                       "replies": replies}) + "\n")
    with pytest.raises(ValueError, match="that the warm start trains on"):
        ranked_replies(Settings(model="m", out="o", eft=str(file),
                                ranked=str(tmp_path / "ranked.jsonl")))


# ---- ranked replies

def test_a_line_says_which_prompts_are_left(tmp_path, capsys):
    file = tmp_path / "p.txt"
    file.write_text("Why?\nHow?\nWhy?\nWhen?\n")
    settings = Settings(model="tiny", prompts=str(file), iters=2, prompts_per_iter=1)
    assert len(training_prompts(settings, [{"prompt": "How?"}])[0]) == 2
    assert capsys.readouterr().err == (f"--prompts {file}: 2 prompts are left; left out: 1 prompt "
                                       "held out for measuring, 1 prompt a duplicate\n")
    more = Settings(model="tiny", prompts=str(file), iters=2, prompts_per_iter=2)
    with pytest.raises(ValueError, match="fewer --iters, --prompts-per-iter 1 at most, or more"):
        training_prompts(more, [{"prompt": "How?"}])


def test_ranked_replies_are_held_out_or_given(tmp_path):
    """A quarter of --eft's prompts measure the judge and no more than that; with --ranked all of
    them train; an overlap is refused by name.
    """
    def write(name, numbers):
        replies = [{"text": "good", "rank": 0}, {"text": "bad", "rank": 1}]
        (tmp_path / name).write_text("".join(json.dumps({"prompt": f"prompt {i}",
                                                         "replies": replies}) + "\n"
                                             for i in numbers))
        return str(tmp_path / name)

    eft, ranked = write("eft.jsonl", range(12)), write("ranked.jsonl", range(20, 23))
    both = write("both.jsonl", range(11, 13))
    training, measuring = ranked_replies(Settings(model="m", out="o", eft=eft))
    assert len(training) == 9 and len(measuring) == 3
    every = {r["prompt"] for r in [*training, *measuring]}
    assert every == {f"prompt {i}" for i in range(12)}
    other = ranked_replies(Settings(model="m", out="o", eft=eft, seed=1))[1]
    assert [r["prompt"] for r in other] != [r["prompt"] for r in measuring]
    training, measuring = ranked_replies(Settings(model="m", out="o", eft=eft, ranked=ranked))
    assert len(training) == 12
    assert [r["prompt"] for r in measuring] == ["prompt 20", "prompt 21", "prompt 22"]
    assert ranked_replies(Settings(model="m", out="o", no_eft=True)) == ([], [])
    training, measuring = ranked_replies(Settings(model="m", out="o", no_eft=True, eft=eft))
    assert training == [] and len(measuring) == 3  # the same replies measure an ablation's judge
    training, measuring = ranked_replies(Settings(model="m", out="o",
                                                  eft=write("twice.jsonl", [*range(8), *range(8)])))
    assert len(training) == 12 and len(measuring) == 4
    assert not {r["prompt"] for r in training} & {r["prompt"] for r in measuring}
    assert len(ranked_replies(Settings(model="m", out="o", no_eft=True, ranked=ranked))[1]) == 3
    with pytest.raises(ValueError, match="--ranked .*both.jsonl"):
        ranked_replies(Settings(model="m", out="o", eft=eft, ranked=both))


# ---- invented prompts

class Told:
    """Stands in for a run whose model says these things when asked for new tasks; `draw` is what
    Run.draw promises.
    """

    def __init__(self, folder, replies):
        self.settings, self.replies, self.path = Settings(model="m",
                                                          out=str(folder)), replies, folder
        self.held_out = [{"prompt": "Name three rivers of Asia."}]
        self.dropped, self.asked = Counter(), []

    def folder(self, t):
        (self.path / f"iter{t}").mkdir(exist_ok=True)
        return self.path / f"iter{t}"

    def sample(self, t, name, items, ask, read, n, max_new_tokens, label):
        assert all(len(item["seeds"]) == 8 and item["seeds"][0] in ask(item)[0] for item in items)
        self.asked += [(name, item["id"]) for item in items]
        said = [Sample(self.replies[int(item["id"]) % len(self.replies)].format(item["id"]), [1],
                       True) for item in items]
        return [read(item, [[s]]) for item, s in zip(items, said)]


def test_invented_prompts_are_new_and_the_others_counted(tmp_path):
    """Of every four replies one is a new task, one is nearly that task again, one no task, one a
    held-out prompt.
    """
    run = Told(tmp_path, ["Task: Tell a{0} b{0} c{0} d{0} e{0} to me.",
                          "Task: Tell me a0 b0 c0 d0 e0 now!",
                          "Sure! Here is one.", "Task: Name three rivers of Asia, please."])
    chosen = invent_prompts(run, 1, 8)
    assert [c["prompt"] for c in chosen[:2]] == [f"Tell a{i} b{i} c{i} d{i} e{i} to me."
                                                 for i in (0, 4)]
    assert len(chosen) == 8 == len({c["prompt_id"] for c in chosen})
    assert run.dropped == {"new prompt malformed or cut off": 8,
                           "new prompt nearly a duplicate": 16}


def test_invented_prompts_are_asked_for_once(tmp_path):
    """Forty prompts of which one reply in four is one: several rounds, each in a file of its own,
    and no item in two of them.
    """
    run = Told(tmp_path, ["Task: Tell a{0} b{0} c{0} d{0} e{0} to me.", "Well.", "No.", "Oh."])
    chosen = invent_prompts(run, 1, 40)
    assert len(chosen) == 40 and len({name for name, _ in run.asked}) > 1
    assert [item for _, item in run.asked] == [f"{i}" for i in range(len(run.asked))]
    with pytest.raises(ValueError, match="iter1/prompts.jsonl is missing or cut short"):
        invent_prompts(run, 2, 40)


def test_the_warm_start_has_no_prompt_that_measures(tmp_path, capsys):
    """Nor is a prompt of several records on both sides of its own held-out split."""
    replies = [{"text": "Yes.", "rank": 0}, {"text": "No.", "rank": 1}]
    file = tmp_path / "eft.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Number {i % 20}?", "replies": replies}) + "\n"
                            for i in range(60)))
    held = [{"prompt": f"Number  {i}?"} for i in range(5)]
    training, measuring = ranked_replies(Settings(model="m", out="o", eft=str(file)), held)
    assert not {record["prompt"] for record in training} & {f"Number {i}?" for i in range(5)}
    assert "prompts held out for measuring" in capsys.readouterr().err
    assert len({record["prompt_id"] for record in training}) == len(training)
    examples = [{"prompt_id": record["prompt_id"], "prompt": record["prompt"]}
                for record in training]
    kept, apart = hold_out(examples, 0)
    assert apart and not ({example["prompt"] for example in kept}
                          & {example["prompt"] for example in apart})


def test_a_prompt_measures_once(tmp_path, capsys):
    file = tmp_path / "eval.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n"
                            for text in ("Why?", "Why? ", "So?")))
    records = evaluation_prompts(Settings(model="m", out="o", eval_prompts=str(file)))
    assert [record["prompt"] for record in records] == ["Why?", "So?"]
    assert "1 prompt a duplicate" in capsys.readouterr().err
