"""harness/records.py: the shapes of prompt files and of ranked replies that people have.

Each shape is written as public data sets have it, read, and its one line looked at.
"""
import gzip
import json

import pytest

from harness.records import read_prompts


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def said(*turns, role="role", content="content", names=("user", "assistant")):
    return [{role: names[i % 2], content: text} for i, text in enumerate(turns)]


CHAT = said("Why?", "Because.", "And?", "So.")
SHARE_GPT = said("Why?", "Because.", role="from", content="value", names=("human", "gpt"))

PROMPTS = {  # name: (file's name, its content, the prompts, what the line says)
    "our own": ("p.jsonl", lines({"prompt": "Why?"}, {"prompt": "How?"}), ["Why?", "How?"], None),
    "text": ("p.txt", "Why?\n\nHow?\n", ["Why?", "How?"], None),
    "a list": ("p.json", json.dumps([{"prompt": "Why?"}, {"prompt": "How?"}], indent=1),
               ["Why?", "How?"], None),
    "a list in .jsonl": ("p.jsonl", json.dumps([{"prompt": "Why?"}]), ["Why?"], None),
    "csv": ("p.csv", 'id,prompt\r\n1,"Why, and\nsay ""how"""\r\n\r\n2,How?\r\n',
            ['Why, and\nsay "how"', "How?"], None),
    "csv of Excel": ("p.csv", "\ufeffPrompt ,id\nWhy?,1\n", ["Why?"], None),
    "dolly": ("p.jsonl", lines({"instruction": "Sum up.", "context": "A text.", "response": "x"},
                               {"instruction": "Sing.", "context": "", "response": "y"}),
              ["Sum up.\n\nA text.", "Sing."],
              "1 records from `instruction` + `context`, 1 records from `instruction`; "
              "not read: `response`"),
    "alpaca": ("p.json", json.dumps([{"instruction": "Add.", "input": "1, 2", "output": "3"}]),
               ["Add.\n\n1, 2"], "1 records from `instruction` + `input`; not read: `output`"),
    "alpaca as prompt": ("p.jsonl", lines({"prompt": "Add.", "input": "1, 2"}), ["Add.\n\n1, 2"],
                         "1 records from `prompt` + `input`"),
    "filled in": ("p.jsonl", lines({"prompt": "Add:\n1, 2", "instruction": "Add.",
                                           "input": "1, 2", "hint": " ", "flag": False}),
                  ["Add:\n1, 2"], "1 records from `prompt` + `input`; not read: `instruction`"),
    "short material": ("p.jsonl", lines({"prompt": "What is a?", "context": "a"}),
                       ["What is a?\n\na"], "1 records from `prompt` + `context`"),
    "SQuAD": ("p.jsonl", lines({"id": "5", "title": "Rain", "context": "It rains.",
                                "question": "Why?", "answers": {"text": ["x"]}}),
              ["Why?\n\nIt rains."],
              "1 records from `question` + `context`; not read: `title`, `answers`"),
    "passages": ("p.jsonl", lines({"question": "Why?", "contexts": ["One.", " ", "Two."]}),
                 ["Why?\n\nOne.\n\nTwo."], "1 records from `question` + `contexts`"),
    "HotpotQA": ("p.jsonl", lines({"question": "Why?", "context": {"title": ["Rain"]}}), ["Why?"],
                 "1 records from `question`; left out: 1 `context` fields"),
    "messages with context": ("p.jsonl", lines({"messages": CHAT[:1], "context": "A text."}),
                              ["Why?"], "1 records from `messages`; left out: 1 `context` fields"),
    "OpenOrca": ("p.jsonl", lines({"system_prompt": "Be.", "question": "Why?", "response": "x"}),
                 ["Why?"],
                 "1 records from `question`; left out: 1 system turns; not read: `response`"),
    "text as material": ("p.jsonl", lines({"question": "Why?", "text": "A passage.", "id": 1}),
                         ["Why?"], "1 records from `question`; not read: `text`"),
    "texts a line": ("p.jsonl", '{"prompt": "Why?"}\n"How?"\n', ["Why?", "How?"], None),
    "parts": ("p.jsonl", lines({"messages": [{"role": "user", "content": [
        {"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}]}), ["Why?"],
        "1 records from `messages`"),
    "multiple choice": ("p.jsonl", lines({"question": "Why?", "choices": ["x", "y"], "hint": ""}),
                        ["Why?"], "1 records from `question`; not read: `choices`"),
    "many fields": ("p.jsonl", lines({"prompt": "Why?"} | dict.fromkeys("abcdefghijklmno", 1)),
                    ["Why?"], "1 records from `prompt`; not read: "
                    + ", ".join(f"`{name}`" for name in "abcdefghijkl") + " and 3 more"),
    "question": ("p.csv", "question,answer\nWhy?,42\n", ["Why?"],
                 "1 records from `question`; not read: `answer`"),
    "prompt of messages": ("p.jsonl", lines({"prompt": CHAT[:1]}), ["Why?"], None),
    "messages": ("p.jsonl", lines({"messages": [{"role": "system", "content": "Be."}, *CHAT]}),
                 ["Why?"], "1 records from `messages`; left out: 1 system turns, 3 later turns"),
    "ShareGPT": ("p.json", json.dumps([{"id": "a", "conversations": SHARE_GPT}]), ["Why?"],
                 "1 records from `conversations`; left out: 1 later turns"),
    "WildChat": ("p.jsonl", lines({"conversation": CHAT[:2]}), ["Why?"],
                 "1 records from `conversation`; left out: 1 later turns"),
    "Arena-Hard": ("p.jsonl", lines({"turns": [{"content": "Why?"}]}), ["Why?"],
                   "1 records from `turns`"),
    "nulls of pandas": ("p.jsonl", lines({"prompt": None, "instruction": "Why?", "input": None}),
                        ["Why?"], "1 records from `instruction`"),
    "list of texts": ("p.json", json.dumps(["Why?", "How?"]), ["Why?", "How?"], None),
    "no suffix": ("prompts", lines({"prompt": "Why?"}), ["Why?"], None),
    "ndjson": ("p.ndjson", lines({"prompt": "Why?"}), ["Why?"], None),
    "tsv": ("p.tsv", "id\tprompt\n1\tWhy, and how?\n", ["Why, and how?"], None),
    "lists in CSV": ("p.csv", 'prompt\n"[""Why?"", ""And?""]"\n', ["Why?"],
                     "1 records from `prompt`; left out: 1 later turns"),
    "one pretty record": ("p.json", json.dumps({"prompt": "Why?"}, indent=2), ["Why?"], None),
    "useless records": ("p.json", json.dumps([{"conversations": []}, {"messages": CHAT[:1]}, {
        "messages": [*CHAT[:1], {"role": "assistant", "content": None}]}]), ["Why?", "Why?"],
        "2 records from `messages`; left out: 1 records without a user's turn, 1 later turns"),
    "MT-Bench": ("p.jsonl", lines({"question_id": 81, "turns": ["Why?", "Rewrite it."]}), ["Why?"],
                 "1 records from `turns`; left out: 1 later turns"),
}


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_in_the_shapes_that_people_have(tmp_path, capsys, name, gzipped):
    file_name, content, prompts, line = PROMPTS[name]
    file = tmp_path / (file_name + ".gz" * gzipped)
    file.write_bytes(gzip.compress(content.encode()) if gzipped else content.encode())
    assert [record["prompt"] for record in read_prompts(file)] == prompts
    assert capsys.readouterr().err == (f"--prompts {file}: {line}\n" if line else "")


HH = {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
      "rejected": "\n\nHuman: Why?\n\nAssistant: No."}
TWO = [("Because.", 0), ("No.", 1)]
REPLIES = {  # name: (records, the replies' texts and ranks, what the line says)
    "our own": ([{"prompt": "Why?", "replies": [{"text": "Because.", "rank": 0},
                                                {"text": "No.", "rank": 1}]}], TWO, None),
    "scores": ([{"prompt": "Why?", "replies": [{"text": "Because.", "score": 4.5},
                                               {"text": "No.", "score": 2}]}],
               [("Because.", -4.5), ("No.", -2)], None),
    "chosen and rejected": ([{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}], TWO,
                            "1 records from `prompt` + `chosen` + `rejected`"),
    "of messages": ([{"prompt": "Why?", "chosen": said("Why?", "Because."),
                      "rejected": said("Why?", "No.")}], TWO,
                    "1 records from `prompt` + `chosen` + `rejected`"),
    "our own pairs": ([{"prompt": CHAT[:1], "chosen": CHAT[1:2], "kind": "actor",
                        "rejected": [{"role": "assistant", "content": "No."}]}], TWO,
                      "1 records from `prompt` + `chosen` + `rejected`"),
    "HH": ([HH, {name: text + "\n\nHuman: And?\n\nAssistant: So." for name, text in HH.items()}],
           TWO, "1 records from `chosen` + `rejected`; "
                "left out: 1 conversations of several turns"),
    "HH without an answer": ([HH, {**HH, "chosen": "\n\nHuman: Why?\n\nAssistant: "}], TWO,
                             "1 records from `chosen` + `rejected`; "
                             "left out: 1 dialogues without an answer"),
    "replies to a later turn": ([{"prompt": CHAT[:3], "chosen": "So.", "rejected": "x"},
                                 {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}], TWO,
                                "1 records from `prompt` + `chosen` + `rejected`; "
                                "left out: 1 conversations of several turns"),
    "Nectar": ([{"prompt": "\n\nHuman: Why?\n\nAssistant: ", "answers": [
        {"answer": "Because.", "rank": 0}, {"answer": "No.", "rank": 1}]}], TWO,
        "1 records from `prompt` + `answers`"),
    "HelpSteer": ([{"prompt": "Why?", "response": "Because.", "helpfulness": 4},
                   {"prompt": "Why?", "response": "No.", "helpfulness": 1}],
                  [("Because.", -4), ("No.", -1)],
                  "2 records from `prompt` + `response` + `helpfulness`"),
    "UltraFeedback": ([{"instruction": "Why?", "completions": [
        {"response": "Because.", "overall_score": 8.0}, {"response": "No.", "overall_score": 3}]}],
        [("Because.", -8), ("No.", -3)], "1 records from `instruction` + `completions`"),
    "responses": ([{"prompt": "Why?", "responses": [{"content": "Because.", "score": "4"},
                                                    {"content": "No.", "score": "1"}]}],
                  [("Because.", -4), ("No.", -1)], "1 records from `prompt` + `responses`"),
    "a reply a line": ([{"prompt": "Why?", "response": "Because.", "score": 4},
                        {"prompt": "How?", "response": "So.", "score": 4},
                        {"prompt": "Why?", "response": "No.", "score": 1}],
                       [("Because.", -4), ("No.", -1)], "3 records from `prompt` + `response` + "
                       "`score`; left out: 1 prompts with one reply"),
}


@pytest.mark.parametrize("name", REPLIES)
def test_ranked_replies_in_the_shapes_that_people_have(tmp_path, capsys, name):
    records, replies, line = REPLIES[name]
    (tmp_path / "p.jsonl").write_text(lines(*records))
    record, = read_prompts(tmp_path / "p.jsonl", "--eft", needs_replies=True)
    assert record["prompt"] == "Why?" and record["prompt_id"] == "0"
    assert [(reply["text"], reply["rank"]) for reply in record["replies"]] == replies
    assert capsys.readouterr().err == (f"--eft {tmp_path}/p.jsonl: {line}\n" if line else "")


@pytest.mark.parametrize("name, content, says", [
    ("p.csv", b"text,n\nWhy?,1\n", "line 1: a CSV file needs a header"),
    ("p.csv", b"prompt,n\nWhy?\n", "line 2: 1 cells under 2 columns"),
    ("p.csv", b'prompt\n"Why?\n', "line 2: no CSV"),
    ("p.csv", b"prompt;n\nWhy?\n", "line 2: 1 cells under 2 columns"),
    ("p.txt", "Why?\nO\xf9?\n".encode("latin-1"), "line 2: not UTF-8 text; make such of it"),
    ("p.csv", b"prompt,n\n,1\n", "left out: 1 empty prompts"),
    ("p.parquet", b"PAR1\x15\x04", "a parquet file: make JSON lines of it"),
    ("p.arrow", b"ARROW1\0\0", "an arrow file: make JSON lines of it"),
    ("p.arrow", b"\xff\xff\xff\xff\x10\0", "datasets.Dataset.from_file(FILE).to_json"),
    ("p.txt", "Why?".encode("utf-16"), "UTF-16 text: make UTF-8 of it"),
    ("p.jsonl.gz", b"\x1f\x8b\x08\0\0", "a damaged gzip file"),
    ("p.json", b'[{"prompt": "Why?"}, 3]', "record 2: needs \"prompt\""),
    ("p.json", b"[]", "no prompts in it"),
    ("p.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}',
     "no prompts in it; left out: 1 records without a user's turn"),
    ("p.jsonl", b'{"task": "x", "n": 1}', 'or "messages"); there is "task", "n"'),
    ("p.jsonl", b'{"messages": ["x", 3]}', "line 1: needs"),
    (None, b"", "a folder: name a file in it"),
])
def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path, name, content, says):
    file = tmp_path / name if name else tmp_path
    if name:
        file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_prompts(file)
    assert str(error.value).startswith(f"--prompts {file}") and says in str(error.value)
    assert "\n" not in str(error.value)


def test_replies_of_one_prompt_only_make_no_file(tmp_path):
    (tmp_path / "p.jsonl").write_text(lines({"prompt": "Why?", "response": "So.", "score": 4}))
    with pytest.raises(ValueError, match="no prompts in it"):
        read_prompts(tmp_path / "p.jsonl", "--eft", needs_replies=True)
