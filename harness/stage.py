"""A stage: prompts are sampled, and what they give is on disk as soon as it is finished.

An item has a few prompts, and all replies to them make one record. Each record is a line of the
stage's file. So a stage that was killed goes on where it was, and ends with the same bytes. The
stages of a run and the commands of eval.py share this.
"""
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from harness.engine.passes import blocks
from harness.engine.processes import rank
from harness.files import read_jsonl
from sampling import sample

DIGESTS = ("set of prompts", "model", "adapter")  # whose values say nothing to a reader
BLOCK = 4096  # samples drawn together; a block that a crash cut short is drawn again


def sample_items(model, tokenizer, items, ask, read, n, label, file, known, look=None, **settings):
    """Sample n replies to each prompt of each item; the records of those not known go to known.

    items: dicts with "id". ask(item): an item's prompts. read(item, samples): its record; samples
    holds n Samples for each prompt. file: where a line is added as each item is finished. known:
    {id: record}. look(record, samples), if given, is called with each new one, and may raise.
    settings: as `sample` takes them.

    A block of which one item is missing is drawn whole. So a stage of a run, which always comes
    with all its items, draws them in the same company as one that never stopped, and the same to
    the last bit. The commands come with what is left, which 16 bits may round otherwise.
    """
    if not items:
        return
    tokens, start = 0, time.perf_counter()

    def finished(item, samples):
        nonlocal tokens
        if item["id"] in known:
            return
        record = with_counts(read(item, samples), samples)
        if look:
            look(record, samples)
        known[item["id"]] = record
        out.write(json.dumps(record) + "\n")
        out.flush()
        tokens += record["sampled_tokens"]
        rate = tokens / (time.perf_counter() - start)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        bar.update()

    have = sum(item["id"] in known for item in items)
    asked = ((item, ask(item)) for item in items)
    with open(file, "a", encoding="utf-8") as out, \
            tqdm(total=len(items), initial=have, desc=label, unit="item") as bar:
        for block in blocks(asked, lambda pair: n * len(pair[1]), BLOCK):
            if all(item["id"] in known for item, _ in block):
                continue
            places = [(item, number) for item, prompts in block for number in range(len(prompts))]
            samples = {item["id"]: [[None] * n for _ in prompts] for item, prompts in block}

            def ended(place, nth, one):
                item, number = places[place]
                samples[item["id"]][number][nth] = one
                if all(map(all, samples[item["id"]])):  # it was the item's last
                    finished(item, samples[item["id"]])

            sample(model, tokenizer, [prompt for _, prompts in block for prompt in prompts], n,
                   keys=[[item["id"], number] for item, number in places], on_end=ended,
                   skip_too_long=True, **settings)


def with_counts(record, samples):
    """A record with how many tokens were sampled, and how many prompts were too long, if any."""
    tokens = sum(len(sample.tokens) for of_prompt in samples for sample in of_prompt)
    too_long = sum(of_prompt[0].tokens == [] for of_prompt in samples)
    record = record | {"sampled_tokens": tokens, "too_long": too_long}
    if not too_long:
        del record["too_long"]  # one of the user's own as well
    return record


def tell_too_long(label, records, max_new_tokens, needed=False):
    """Say how many prompts were too long. Raise ValueError if all of a needed stage were."""
    too_long = sum(record.get("too_long", 0) for record in records)
    why = f"the model's context has no room for them and a reply of {max_new_tokens} tokens"
    if too_long and needed and not any(record["sampled_tokens"] for record in records):
        raise ValueError(f"{label}: all prompts are too long, {why}: choose another --out and "
                         "shorter prompts, answers or replies")
    if too_long and rank() == 0:
        print(f"{label}: {too_long} prompts are too long, {why}; they got none, and are counted",
              file=sys.stderr)


def read_kept(file, made, key="id"):
    """{key: record} of a file whose records were made as `made` says; {} if there is none.

    Raises ValueError that says what to do if they were made otherwise.
    """
    cut_torn_line(Path(file))
    records = read_jsonl(file)
    for record in records:
        if not isinstance(record.get(key), str):
            raise ValueError(f"{file} does not hold answers: give another --out")
        other = [name for name, value in made.items() if record.get(name) != value]
        if other:
            values = f", {record.get(other[0])} instead of {made[other[0]]}"
            raise ValueError(f"{file} holds answers made with another {other[0]}"
                             f"{'' if other[0] in DIGESTS else values}: give another --out, or "
                             "delete that file")
    return {record[key]: record for record in records}


# ---- the file of a run's stage, and those of several processes

def rank_files(file):
    """What several processes have written of a stage's file, one each."""
    return file.parent.glob(f"{file.name}.rank*")


def read_stage(file):
    """The records of a stage by their "id", those of several processes' files included."""
    records = {}
    for source in (file, *rank_files(file)):
        for record in read_jsonl(source):
            tokens = record.get("sampled_tokens")
            if not isinstance(record.get("id"), str) or not isinstance(tokens, int):
                raise ValueError(f"{file}: a line is no record of this run; take it out, and it "
                                 "is drawn again")
            records[record["id"]] = record
    return records


def cut_torn_line(file):
    """Cut a last line without its newline off a file: the process died while writing it."""
    if file.exists():
        text = file.read_bytes()
        os.truncate(file, text.rfind(b"\n") + 1)
