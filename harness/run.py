"""A run: what it reads, its model, its stages, and what an iteration leaves.

A stage appends a line to its file as each item is finished (harness/stage.py). Everything else is
written whole. So a run that is started again finds what was finished, draws the rest, and ends with
the same bytes.
"""
import json
import math
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

import prompts as words
from dpo import add_lora
from harness.engine.chat import Chat
from harness.engine.processes import barrier, collect, rank, share, world
from harness.files import digest, each_line, read_jsonl, sha256, write_whole
from harness.first_replies import FirstReplies, Unreadable
from harness.folder import Folder
from harness.forecast import after_iteration, after_stage, expected
from harness.inputs import SEEDS, evaluation_prompts, ranked_replies, training_prompts
from harness.loading import fingerprint, load, load_tokenizer
from harness.records import read_text
from harness.reward import RewardModel, reward_chat
from harness.settings import flag
from harness.stage import cut_torn_line, rank_files, read_stage, sample_items, tell_too_long
from harness.training import encode_examples, hold_out, save_adapter, set_adapter, train_in_folder
from harness.views.card import write_card
from harness.views.figures import line_on
from harness.views.report import cut_short, drifts, report, unread, unscored


class Run(Folder):
    """Settings, inputs, model and folder of a run: what every step of the loop needs."""

    def __init__(self, settings):
        self.rubric = words.RUBRIC
        if settings.rubric:
            self.rubric = read_text(settings.rubric, "--rubric").strip()
        self.eval_prompts = evaluation_prompts(settings)
        self.chat = Chat(load_tokenizer(settings.model))
        scored_by_model = settings.reward not in ("judge", "checks")
        if scored_by_model:
            reward_chat(settings.reward)  # fails by its name, before any work
        self.replies, self.ranked = ranked_replies(settings, self.eval_prompts)
        self.held_out = [*self.eval_prompts, *self.ranked]
        prompts, self.unfit = training_prompts(settings, self.held_out)
        self.dropped = Counter()    # what the present iteration sampled and did not use, by reason
        self.tokens = Counter()     # (iteration, stage) -> tokens drawn
        self.otherwise = Counter()  # (iteration, stage) -> texts that `with_ids` counts
        self.otherwise_told = False
        self.notes = []             # of the last report
        self.forecast = None        # what harness.plan said of each stage
        super().__init__(settings, self.hashes(settings, prompts), prompts)
        if scored_by_model:
            self.reward_model = RewardModel(settings.reward, settings.bits)
        base, _ = load(settings.model, bits=settings.bits)
        self.claim_folder()
        torch.manual_seed(settings.seed)  # each start of a run makes the same fresh adapter
        self.model = add_lora(base, settings.lora_rank)

    def hashes(self, settings, prompts):
        """{flag: a hash of what it reads} of all that a run reads."""
        flags = {flag(name): getattr(settings, name)
                 for name in ("prompts", "eval_prompts", "eft", "ranked", "rubric")}
        files = {name: sha256(file) for name, file in flags.items() if file}
        files["--model"] = fingerprint(settings.model)
        if settings.reward not in ("judge", "checks"):
            files["--reward"] = fingerprint(settings.reward)
        if not prompts:
            files[SEEDS.name] = sha256(SEEDS)
        if not settings.eft and not settings.no_eft:
            files["oasst1"] = digest([self.replies, self.ranked])
        return files

    # ---- stages

    def sample(self, t, name, items, ask, read, n, max_new_tokens, label, needed=True):
        """Sample n replies to each prompt of each item, and return a record for each item.

        items: dicts with "id". ask(item): the prompts of an item. read(item, samples): its record;
        samples holds n Samples for each prompt. label: the stage, as the screen, the summary, the
        costs and `FirstReplies` know it.
        iterT/name gets a line as each item is finished, and the lines that it has stay; the name
        is part of the seed.
        Of several processes each draws its share into a file of its own, until all are done.
        If hardly any of the first few hundred replies is what was asked for, a stage that is
        needed raises Unreadable, and another returns nothing.
        """
        file, known = self.folder(t) / name, read_stage(self.folder(t) / name)
        own = file if world() == 1 else Path(f"{file}.rank{rank()}")
        barrier()  # all processes have read before any writes
        cut_torn_line(own)
        s, first = self.settings, FirstReplies(t, label)
        with self.timed(t, label):
            try:
                sample_items(self.model, self.chat.tokenizer, share(items), ask, read, n,
                             f"iteration {t}: {label}", own, known, first.add,
                             max_new_tokens=max_new_tokens, temperature=s.temperature,
                             top_p=s.top_p, seed=[s.seed, t, name],
                             capacity=s.max_tokens_in_cache)
                doubt = None
            except Unreadable as error:
                doubt = str(error)
            doubts = [doubt for doubt in collect(doubt) if doubt]
            if doubts and needed:
                raise Unreadable(doubts[0])
            if doubts:
                print(f"Iteration {t} goes on without this: {doubts[0]}")
                items = []  # none is kept: a run that is resumed asks, and doubts, in the same way
            if world() > 1:
                known = read_stage(file)
        records = [known[item["id"]] for item in items]
        self.save(t, name, records)
        if rank() == 0:
            for part in rank_files(file):
                part.unlink()
        self.tokens[t, label] += sum(record["sampled_tokens"] for record in records)
        self.otherwise[t, label] += sum(map(with_ids, records))
        tell_too_long(label, records, max_new_tokens, needed)
        self.tell_otherwise(records, label)
        return records

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

    def tell_otherwise(self, records, label):
        """Say so, once, if most texts would be encoded otherwise than they were drawn."""
        total = sum(reply["finished"] for record in records for reply in texts_that_train(record))
        otherwise = sum(map(with_ids, records))
        if 2 * otherwise > total and not self.otherwise_told and rank() == 0:
            self.otherwise_told = True
            print(f"{label}: {otherwise:,} of {total:,} texts would be encoded otherwise than the "
                  "model drew them, perhaps since its chat template puts something else around an "
                  "answer than it does. What trains is what it drew", file=sys.stderr)

    # ---- what an iteration leaves

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

    def train(self, t, recipe, examples, **settings):
        """Train M_t's adapter by dpo.train_dpo or dpo.train_sft: the figures of the best epoch.

        examples: lines of pairs.jsonl or of sft.jsonl. Those of a tenth of the prompts are held
        out: their loss picks the epoch. Goes on from the folder's checkpoint if there is one.
        Without examples M_t is the model as it is, and there are no figures.
        """
        mine = self.settings
        if not examples:
            if t > 0:
                print(f"Iteration {t}: no pairs, so nothing to train on; M_{t} is M_{t - 1}. What "
                      "was dropped is in the table below.")
            save_adapter(self.model, self.folder(t) / "adapter")
            return None
        training, held_out = hold_out(encode_examples(self.chat, examples), mine.seed)
        with self.timed(t, "training"):
            return train_in_folder(
                self.model, recipe, training, held_out, self.folder(t), f"iteration {t}: training",
                lr=mine.lr, batch_size=mine.batch_size, seed=mine.seed, **settings)

    def counts(self, t):
        """Of iteration t by stage, of those this process went through: what was drawn.

        "tokens", and the texts that would have been "encoded_otherwise" than they were drawn.
        """
        totals = {"tokens": self.tokens, "encoded_otherwise": self.otherwise}
        return {name: {stage: count for (i, stage), count in total.items() if i == t and count}
                for name, total in totals.items()}

    # ---- the models M_0, M_1, ...

    def finish(self, t, figures):
        """Iteration t is trained: write down its figures, and what its adapter's file holds.

        What only an iteration under way needs is gone then: its checkpoint, its rounds.
        """
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
        print(line_on(record))
        for line in cut_short(record) + unread(record) + unscored(record):
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


def texts_that_train(record):
    """What a stage's record holds of texts that train, answers or judgments."""
    return [*record.get("responses", []), *record.get("judgments", [])]


def with_ids(record):
    """How many of a record's texts would be encoded otherwise than the model drew them."""
    return sum("ids" in reply for reply in texts_that_train(record))
