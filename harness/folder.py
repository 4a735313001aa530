"""A run and its folder: what it reads, what it has drawn so far, and how it goes on after a kill.

A stage appends a line to its file as each item is finished. Everything else is written whole. So a
run that is started again finds what was finished, draws the rest, and ends with the same bytes.
"""
import dataclasses
import fcntl
import functools
import json
import math
import os
import random
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import prompts as words
from dpo import add_lora
from harness.card import write_card
from harness.chat import Chat
from harness.clock import after_iteration, after_stage, expected
from harness.command import barrier
from harness.files import (
    digest,
    each_line,
    iterations,
    read_json,
    read_jsonl,
    sha256,
    write_jsonl,
    write_whole,
)
from harness.inputs import SEEDS, evaluation_prompts, ranked_replies, training_prompts
from harness.loading import fingerprint, load, load_tokenizer
from harness.processes import collect, rank, share, world
from harness.records import read_text
from harness.report import cut_short, drifts, glance, report, unscored
from harness.reward import RewardModel, reward_chat
from harness.settings import flag
from harness.training import save_adapter, set_adapter, train
from harness.unreadable import FirstReplies, Unreadable

FORMAT = 6      # of a run's folder; runs of another are not resumed
BLOCK = 4096    # samples drawn together; a block that a crash cut short is drawn again
HELD_OUT = 0.1  # share of the prompts whose examples pick the epoch instead of training
FREE = ("iters", "out", "max_tokens_in_cache")  # may change when a run goes on


class Run:
    """Settings, inputs, model and folder of a run: what every stage needs."""

    def __init__(self, settings, sample, model=None, reward_model=None):
        """sample: sampling.sample, or what stands for it. model: one with an adapter, or None.

        reward_model: the RewardModel of --reward, or None; what is None is loaded.
        """
        self.settings, self.sample, self.out = settings, sample, Path(settings.out)
        self.rubric = words.RUBRIC
        if settings.rubric:
            self.rubric = read_text(settings.rubric, "--rubric").strip()
        self.eval_prompts = evaluation_prompts(settings)
        self.chat = Chat(load_tokenizer(settings.model))
        scored_by_model = reward_model is None and settings.reward not in ("judge", "checks")
        if scored_by_model:
            reward_chat(settings.reward)  # fails by its name, before any work
        self.replies, self.ranked = ranked_replies(settings, self.eval_prompts)
        self.held_out = [*self.eval_prompts, *self.ranked]
        self.prompts, self.unfit = training_prompts(settings, self.held_out)
        self.dropped = Counter()    # what the present iteration sampled and did not use, by reason
        self.tokens = {}            # (iteration, stage) -> tokens drawn
        self.otherwise = {}         # (iteration, stage) -> texts that `with_ids` counts
        self.otherwise_told = False
        self.notes = []             # of the last report
        self.forecast = None        # what harness.plan said of each stage
        if (self.out / "config.json").is_file() and rank() == 0:
            self.lock_folder()
        self.check_folder()
        self.reward_model = reward_model
        if scored_by_model:
            self.reward_model = RewardModel(settings.reward, settings.bits)
        if model is None:
            base, _ = load(settings.model, bits=settings.bits)
        self.claim_folder()
        if model is None:
            torch.manual_seed(settings.seed)  # each start of a run makes the same fresh adapter
            model = add_lora(base, settings.lora_rank)
        self.model = model

    # ---- the folder, and whose it is

    @functools.cached_property
    def config(self):
        """What config.json says of this run: its settings, what it reads, and versions."""
        flags = {flag(name): getattr(self.settings, name)
                 for name in ("prompts", "eval_prompts", "eft", "ranked", "rubric")}
        files = {name: sha256(file) for name, file in flags.items() if file}
        files["--model"] = fingerprint(self.settings.model)
        if self.settings.reward not in ("judge", "checks"):
            files["--reward"] = fingerprint(self.settings.reward)
        if not self.prompts:
            files[SEEDS.name] = sha256(SEEDS)
        if not self.settings.eft and not self.settings.no_eft:
            files["oasst1"] = digest([self.replies, self.ranked])
        versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                    "transformers": transformers.__version__}
        config = {"format": FORMAT, "settings": dataclasses.asdict(self.settings),
                  "files": files, "versions": versions}
        return json.loads(json.dumps(config))  # tuples become lists, as in the file

    def check_folder(self):
        """Refuse a folder whose run had other settings, or read files of another content.

        More iterations may be asked for later. Returns notes on versions that have changed.
        """
        in_the_way = next((place for place in (self.out, *self.out.parents) if place.is_file()),
                          None)
        if in_the_way:
            raise ValueError(f"--out {self.out}: {in_the_way} is a file, and no folder can be made "
                             "there: choose another --out")
        file = self.out / "config.json"
        if not file.exists():
            if (self.out / "summary.json").exists() or any(self.out.glob("iter*")):
                raise ValueError(f"{file} is missing, which says what run this is: put it back "
                                 "from a copy, or choose another --out")
            return []
        theirs, mine = read_json(file), self.config
        if not isinstance(theirs, dict) or not isinstance(theirs.get("settings"), dict):
            raise ValueError(f"{self.out} is no run's folder, though it has a config.json: "
                             "choose another --out")
        if theirs.get("format") != FORMAT:
            raise ValueError(f"{self.out} holds a run of another version of this program, which "
                             "left other files: choose another --out")
        self.check_settings(theirs["settings"], mine["settings"])
        for name, content in theirs.get("files", {}).items():
            may_grow = name == "--prompts"
            if content != mine["files"].get(name) and not (may_grow and self.begins_with_used()):
                longer = ", or a file that begins with the same prompts" if may_grow else ""
                raise ValueError(f"{self.out} holds a run whose {name} had another content: "
                                 f"choose another --out{longer}")
        return [f"this run was begun with {name} {version}, and goes on with "
                f"{mine['versions'].get(name)}"
                for name, version in theirs.get("versions", {}).items()
                if version != mine["versions"].get(name)]

    def begins_with_used(self):
        """Whether --prompts begins with what the run has used of it, so that it may go on longer.
        """
        used = [record for _, folder in sorted(iterations(self.out).items())
                for record in read_jsonl(folder / "prompts.jsonl")]
        return bool(used) and used == (self.prompts or [])[:len(used)]

    def check_settings(self, theirs, mine):
        done = len(self.records()) - 1
        if self.settings.iters < done:
            raise ValueError(f"{self.out} holds a run of {done} iterations: "
                             "--iters may grow, not shrink")
        other = []
        for name, value in mine.items():
            was = theirs.get(name)
            goes_on = (isinstance(was, list) and len(was) == theirs.get("iters")
                       and value[:len(was)] == was)  # a schedule goes on where it ended
            if name not in FREE and value != was and not goes_on:
                other.append(f"{flag(name)} {was}, not {value}")
        if other:
            raise ValueError(f"{self.out} holds a run with {'; '.join(other)}: choose another "
                             "--out, or the same settings")

    def lock_folder(self):
        """Refuse a folder that another process works on. The lock ends with this process."""
        self.lock = open(self.out / "lock", "a")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.out} is in use by another process: wait for it, or choose "
                             "another --out") from None

    def claim_folder(self):
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock_folder()
            for note in self.check_folder():  # another process may have come meanwhile
                print(f"note: {note}", file=sys.stderr)
            done = len(self.records()) - 1
            if 0 <= done < self.settings.iters:
                print(f"{self.out} is there, up to M_{done}: the run goes on", flush=True)
            write_whole(self.out / "config.json", json.dumps(self.config, indent=1) + "\n")
        barrier()

    def folder(self, t):
        folder = self.out / f"iter{t}"
        folder.mkdir(exist_ok=True)
        return folder

    # ---- a stage that samples

    def draw(self, t, name, items, ask, read, n, max_new_tokens, label, needed=True):
        """Sample n replies to each prompt of each item, and return a record for each item.

        items: dicts with "id". ask(item): the prompts of an item. read(item, samples): its record;
        samples holds n Samples for each prompt. label: what the screen and the summary call it.
        iterT/name gets a line as each item is finished; items that it has are not drawn again.
        Of several processes each draws its share into a file of its own, until all are done.
        If hardly any of the first few hundred replies is what was asked for, a stage that is
        needed raises Unreadable, and another returns nothing.
        """
        file, known = self.folder(t) / name, on_disk(self.folder(t) / name)
        own = file if world() == 1 else Path(f"{file}.rank{rank()}")
        barrier()  # all processes have read before any writes
        cut_torn_line(own)
        with self.timed(t, label):
            try:
                self.draw_share(t, own, share(items), known, ask, read, n, max_new_tokens, label)
                doubt = None
            except Unreadable as error:
                doubt = str(error)
            doubts = [doubt for doubt in collect(doubt) if doubt]
            if doubts and needed:
                raise Unreadable(doubts[0])
            if doubts:
                print(f"Iteration {t} goes on without this: {doubts[0]}")
                return []
            if world() > 1:
                known = on_disk(file)
        records = [known[item["id"]] for item in items]
        self.save(t, name, records)
        if rank() == 0:
            for part in rank_files(file):
                part.unlink()
        for total, count in ((self.tokens, lambda record: record["sampled_tokens"]),
                             (self.otherwise, with_ids)):
            total[t, label] = total.get((t, label), 0) + sum(map(count, records))
        self.tell_too_long(records, label, max_new_tokens, needed)
        self.tell_otherwise(records, label)
        return records

    def draw_share(self, t, file, items, known, ask, read, n, max_new_tokens, label):
        """Draw those items that are not known, append their records to the file and to known.

        Blocks of items are cut from the whole list, so that a run that goes on draws them in the
        same company as one that never stopped, and so draws the same to the last bit.
        """
        if not items:
            return
        tokens, start, first = 0, time.perf_counter(), FirstReplies(t, label)

        def finished(item, samples):
            nonlocal tokens
            if item["id"] in known:
                return
            record = finished_record(read(item, samples), samples)
            first.add(record, samples)
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
                tqdm(total=len(items), initial=have, desc=f"iteration {t}: {label}",
                     unit="item") as bar:
            for block in blocks(asked, lambda pair: n * len(pair[1]), BLOCK):
                if all(item["id"] in known for item, _ in block):
                    continue
                gather = Gather(block, n, finished)
                self.sample(
                    self.model, self.chat.tokenizer,
                    [prompt for _, prompts in block for prompt in prompts], n,
                    max_new_tokens=max_new_tokens, temperature=self.settings.temperature,
                    top_p=self.settings.top_p, seed=[self.settings.seed, t, base_name(file)],
                    keys=[[item["id"], number] for item, number in gather.places],
                    capacity=self.settings.max_tokens_in_cache, on_end=gather.add,
                    skip_too_long=True)

    def reward(self, t, answers, name, label):
        """Give answers the "score" that --reward names: their truth, or a reward model's logit."""
        with self.timed(t, label):
            scores = self.reward_scores(t, answers, label)
        records = []
        for answer, score in zip(answers, scores, strict=True):
            why = self.why_unscored(score)
            score, known = (None, {"unscored": why}) if why else (score, {})
            records.append(answer | {"scores": [score], "score": score} | known)
        self.save(t, name, records)
        return records

    def why_unscored(self, score):
        """Why what `reward_scores` gave is no score; None if it is one."""
        if score is None:
            return ("prompt without checks" if self.settings.reward == "checks"
                    else "answer too long for the reward model's context")
        return None if math.isfinite(score) else "reward not a finite number"

    def reward_scores(self, t, answers, label):
        """A number for each answer, or None."""
        if self.settings.reward == "checks":
            return [answer.get("truth") for answer in answers]
        return self.reward_model.scores(answers, f"iteration {t}: {label}")

    def tell_too_long(self, records, label, max_new_tokens, needed=True):
        """Say how many prompts were too long. Raise ValueError if all of a needed stage were."""
        too_long = sum(record.get("too_long", 0) for record in records)
        if not too_long:
            return
        about = f"the model's context has no room for them and a reply of {max_new_tokens} tokens"
        if needed and not any(record["sampled_tokens"] for record in records):
            raise ValueError(f"{label}: all prompts are too long, {about}: choose another --out "
                             "and shorter prompts, answers or replies")
        if rank() == 0:
            print(f"{label}: {too_long} prompts are too long, {about}; they got none, and are "
                  "counted", file=sys.stderr)

    def tell_otherwise(self, records, label):
        """Say so, once, if most texts would be encoded otherwise than they were drawn."""
        total = sum(reply["finished"] for record in records for reply in replies_of(record))
        otherwise = sum(map(with_ids, records))
        if 2 * otherwise > total and not self.otherwise_told and rank() == 0:
            self.otherwise_told = True
            print(f"{label}: {otherwise:,} of {total:,} texts would be encoded otherwise than the "
                  "model drew them, perhaps since its chat template puts something else around an "
                  "answer than it does. What trains is what it drew", file=sys.stderr)

    # ---- what an iteration leaves

    def keep(self, selection):
        """The records that a selection yields; the sentences it yields instead are counted.

        A sentence says why something was dropped. All are in the summary, by reason.
        """
        kept = []
        for one in selection:
            if isinstance(one, str):
                self.dropped[one] += 1
            else:
                kept.append(one)
        return kept

    def save(self, t, name, records):
        """Write iterT/name whole, which one process does for all."""
        if rank() == 0:
            write_jsonl(self.folder(t) / name, records)
        barrier()

    @contextmanager
    def timed(self, t, stage):
        """Add the seconds that this takes to those that the stage took before.

        If it took long, a line says how long the rest of the run will take.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            if rank() == 0:
                seconds = self.seconds(t)
                seconds[stage] = round(seconds.get(stage, 0) + taken, 2)
                write_whole(self.folder(t) / "seconds.json", json.dumps(seconds))
        rounds = stage == "comparisons" and self.settings.comparisons  # others may follow
        if rank() == 0 and not rounds:
            told = expected(self.records(), self.settings, self.forecast)
            for line in after_stage(t, stage, taken, told, seconds):
                print(line, flush=True)

    def seconds(self, t):
        try:
            return dict(read_json(self.folder(t) / "seconds.json"))
        except (OSError, ValueError, TypeError):  # no run shall end for want of its timings
            return {}

    def train(self, t, recipe, examples, **settings):
        """Train M_t's adapter by dpo.train_dpo or dpo.train_sft: the figures of the best epoch.

        examples: lines of pairs.jsonl or of sft.jsonl. Those of some prompts do not train: their
        loss picks the epoch. Goes on from the folder's checkpoint if there is one. Without
        examples M_t is the model as it is, and there are no figures.
        """
        mine = self.settings
        if not examples:
            if t > 0:
                print(f"Iteration {t}: no pairs, so nothing to train on; M_{t} is M_{t - 1}. What "
                      "was dropped is in the table below.")
            save_adapter(self.model, self.folder(t) / "adapter")
            return None
        training, held_out = hold_out(encoded(self.chat, examples), mine.seed)
        with self.timed(t, "training"):
            return train(self.model, recipe, training, held_out, self.folder(t),
                         f"iteration {t}: training", lr=mine.lr, batch_size=mine.batch_size,
                         seed=mine.seed, **settings)

    def counts(self, t):
        """Of iteration t by stage, of those this process went through: what was drawn.

        "tokens", and the texts that would have been "encoded_otherwise" than they were drawn.
        """
        totals = {"tokens": self.tokens, "encoded_otherwise": self.otherwise}
        return {name: {stage: count for (i, stage), count in total.items() if i == t and count}
                for name, total in totals.items()}

    # ---- the models M_0, M_1, ...

    def records(self):
        """The records of summary.json: one for each model that is trained and measured."""
        file = self.out / "summary.json"
        return read_json(file) if file.exists() else []

    def made(self, t):
        """The figures of how M_t was made, or None if it is not trained yet."""
        file = self.folder(t) / "figures.json"
        return read_json(file) if file.exists() else None

    def finish(self, t, figures):
        """Iteration t is trained: write down its figures, and what its adapter's file holds."""
        if rank() == 0:
            adapter = sha256(self.folder(t) / "adapter" / "adapter_model.safetensors")
            steps, counts = read_jsonl(self.folder(t) / "train.jsonl"), self.counts(t)
            if steps:
                counts["tokens"]["training"] = sum(step.get("tokens", 0) for step in steps)
            figures["pairs"]["dropped"] = dict(self.dropped)
            figures = figures | counts | {"adapter": adapter}
            write_whole(self.folder(t) / "figures.json", json.dumps(figures))
            for file in self.folder(t).glob("round*.jsonl*"):  # all is in battles.jsonl
                file.unlink()
            (self.folder(t) / "checkpoint.safetensors").unlink(missing_ok=True)
        barrier()

    def become(self, t):
        """Put M_t's adapter into the model."""
        set_adapter(self.model, self.folder(t) / "adapter", self.made(t)["adapter"])

    def add_record(self, t, measured):
        """Add M_t's record to summary.json, draw the report, and say on the screen how it is."""
        figures, records = self.made(t), self.records()
        for name, counts in self.counts(t).items():
            figures[name] = figures.get(name, {}) | counts
        record = {"iteration": t, **measured, **figures, "seconds": self.seconds(t)}
        records = [*records, record]
        barrier()  # all processes have read before one writes
        if rank() == 0:  # the card first: what is in the summary is not done again
            write_card(self.folder(t) / "adapter", self.settings, records)
            write_whole(self.out / "summary.json", json.dumps(records, indent=1) + "\n")
        barrier()
        self.draw_report()
        print(glance(record))
        for line in cut_short(record) + unscored(record):
            print(f"Caution, {line}")
        for line in drifts(record, self.settings.max_score):
            print(f"Drift, {line}")
        for line in after_iteration(records, expected(records, self.settings)):
            print(line, flush=True)

    def answers_of_m0(self, count):
        """M_0's held-out answers, `count` in all, without what M_0 said of them."""
        file = self.folder(0) / "eval.jsonl"
        records = read_jsonl(file)
        if len(records) < count:
            raise ValueError(f"{file} is missing or cut short, and the judge is measured on it: "
                             "put it back from a copy, or start again in another folder")
        judged = ("judgments", "scores", "score", "sampled_tokens")
        return [{key: value for key, value in record.items() if key not in judged}
                for record in records]

    def with_previous_scores(self, t, records):
        """M_0's answers, judged by M_t, with M_{t-1}'s score of each as "previous_score".

        None where M_{t-1}'s file lacks it, which costs a figure and no more.
        """
        file = self.folder(t - 1) / ("eval_judge.jsonl" if t > 1 else "eval.jsonl")
        before = {record.get("id"): record.get("score") for record in each_line(file, [])}
        return [record | {"previous_score": before.get(record["id"])} for record in records]

    def draw_report(self):
        if rank() == 0:
            self.notes = report(self.out)

    def tell_notes(self):
        """What the last report found missing or damaged."""
        for note in self.notes:
            print(f"note: {note}", file=sys.stderr)


def hold_out(examples, seed):
    """Split off the examples of a tenth of the prompts, if there are enough: (training, rest).

    Records of one prompt, as "7" and "7.1", are on the same side.
    """
    prompts = [example["prompt_id"].partition(".")[0] for example in examples]
    ids = sorted(set(prompts))
    held = set(random.Random(f"{seed}/held out").sample(ids, int(HELD_OUT * len(ids))))
    return ([example for example, prompt in zip(examples, prompts) if prompt not in held],
            [example for example, prompt in zip(examples, prompts) if prompt in held])


def encoded(chat, examples):
    """Pairs, or EFT examples, as token ids; "line" is the line in their file.

    They have "prompt_ids", and "chosen_ids" and "rejected_ids", or "answer_ids". What a model drew
    has the ids that it drew.
    """
    names = {"chosen": "chosen_ids", "rejected": "rejected_ids", "completion": "answer_ids"}
    encoded = []
    for line, example in enumerate(examples, 1):
        ids = {"prompt_ids": chat.prompt(example["prompt"][0]["content"])}
        for name in names.keys() & example.keys():
            drawn = example.get("ids", {}).get(name)
            ids[names[name]] = drawn or chat.answer(example[name][0]["content"])
        encoded.append({"prompt_id": example["prompt_id"], "line": line, **ids})
    return encoded


class Gather:
    """Gathers the samples of a block, and hands on each item when its last sample has ended."""

    def __init__(self, block, n, finished):
        """block: (item, its prompts), one after the other. finished(item, samples) is called."""
        self.places = [(item, number) for item, prompts in block for number in range(len(prompts))]
        self.samples = {item["id"]: [[None] * n for _ in prompts] for item, prompts in block}
        self.left = {item["id"]: n * len(prompts) for item, prompts in block}
        self.finished = finished

    def add(self, place, nth, sample):
        """The nth sample of the block's prompt number `place` has ended."""
        item, number = self.places[place]
        self.samples[item["id"]][number][nth] = sample
        self.left[item["id"]] -= 1
        if self.left[item["id"]] == 0:
            self.finished(item, self.samples[item["id"]])


def replies_of(record):
    """What a stage's record holds of texts that train, answers or judgments."""
    return [*record.get("responses", []), *record.get("judgments", [])]


def with_ids(record):
    """How many of a record's texts would be encoded otherwise than the model drew them."""
    return sum("ids" in reply for reply in replies_of(record))


def finished_record(record, samples):
    """A stage's record with how many tokens were drawn, and how many prompts were too long."""
    tokens = sum(len(sample.tokens) for of_prompt in samples for sample in of_prompt)
    too_long = sum(of_prompt[0].tokens == [] for of_prompt in samples)
    record = record | {"sampled_tokens": tokens, "too_long": too_long}
    if not too_long:
        del record["too_long"]
    return record


def rank_files(file):
    """What several processes have written of a stage's file, one each."""
    return file.parent.glob(f"{file.name}.rank*")


def base_name(file):
    """The name of the stage's file that this file, perhaps of one of several processes, is for."""
    return file.name.partition(".rank")[0]


def on_disk(file):
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


def blocks(items, size, limit):
    """Split items, in order, into blocks of at most `limit` in all, at least one item each."""
    block, used = [], 0
    for item in items:
        if block and used + size(item) > limit:
            yield block
            block, used = [], 0
        block.append(item)
        used += size(item)
    if block:
        yield block
