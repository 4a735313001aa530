"""What a run reads: prompt files, ranked replies with what the warm start learns of them, and
prompts that the model invents itself.
"""
import gzip
import itertools
import json
import random
import re
from collections import Counter, defaultdict

import numpy as np
from huggingface_hub import hf_hub_download

import prompts as words
from eval import by_prompt
from harness.files import read_jsonl
from harness.lines import as_example, shorten
from harness.records import brings_lesson, folded, read_prompts, tell, without
from harness.settings import HERE

SEEDS = HERE / "data" / "seeds.jsonl"
OASST = ("OpenAssistant/oasst1", "2023-04-12_oasst_ready.trees.jsonl.gz")
OASST_PROMPTS = 800     # with N judgments a reply, 600 already give the paper's 1,630 EFT examples
UNREAD = 0.05           # share of --eft's given judgments that may have no score
HELD_RANKED = 0.25      # share of --eft's prompts that measure the judge, if there is no --ranked


# ---- files of prompts

def evaluation_prompts(settings):
    """The prompts of --eval-prompts, each of them once."""
    records, dropped = unused(read_prompts(settings.eval_prompts, "--eval-prompts"), [])
    if dropped:
        tell(f"--eval-prompts {settings.eval_prompts}: {len(records):,} prompts are left"
             f"{without(dropped)}")
    return records


def training_prompts(settings, held_out):
    """The prompts of --prompts: (records, what was dropped). (None, nothing) if none are given.

    held_out: records that measure; their prompts never train, and neither do repetitions.
    """
    if not settings.prompts:
        if settings.reward == "checks":
            raise ValueError("--reward checks needs --prompts whose records have \"checks\", such "
                             "as data/verifiable.jsonl")
        return None, Counter()
    records, dropped = unused(read_prompts(settings.prompts), held_out)
    if settings.reward == "checks":
        unchecked = sum(not record.get("checks") for record in records)
        dropped += Counter({"prompt without checks": unchecked})
        records = [record for record in records if record.get("checks")]
    if dropped:
        tell(f"--prompts {settings.prompts}: {len(records):,} prompts are left{without(dropped)}")
    if not records:
        raise ValueError(f"--prompts {settings.prompts}: no prompt is left{without(dropped)}")
    wanted = 1 if settings.hours else settings.prompts_per_iter  # which --hours has yet to choose
    if len(records) < settings.iters * wanted:
        most = len(records) // settings.iters
        raise ValueError(
            f"--prompts {settings.prompts}: {len(records)} different prompts do not make "
            f"{settings.iters} iterations of {wanted}: use fewer --iters"
            + (f", --prompts-per-iter {most} at most" if most else "")
            + ", or more prompts (a run that is there takes a file that begins with the same)")
    return records, dropped


def unused(records, held_out):
    """Prompts without repetitions and without those held out: (records, what was dropped)."""
    held, seen, kept, dropped = prompts_in(held_out), set(), [], Counter()
    for record in records:
        prompt = folded(record["prompt"])
        if prompt in held:
            dropped["prompt held out for measuring"] += 1
        elif prompt in seen:
            dropped["prompt a duplicate"] += 1
        else:
            seen.add(prompt)
            kept.append(record)
    return kept, dropped


def prompts_in(records):
    """The prompts of records, as they are compared: what looks the same is the same."""
    return {folded(record["prompt"]) for record in records}


# ---- ranked replies

def ranked_replies(settings, held_out=()):
    """Human-ranked replies: (those of the warm start, those that measure the judge).

    No prompt is among both. held_out: records that measure; the warm start has none of their
    prompts either.
    """
    if settings.reward != "judge":
        return [], []
    replies = eft_replies(settings) if settings.eft or not settings.no_eft else []
    texts = sorted(prompts_in(replies))
    if settings.ranked:
        measuring = read_prompts(settings.ranked, "--ranked", needs_replies=True)
        held = prompts_in(measuring)
        if not settings.no_eft and held & set(texts):
            raise ValueError(f"--ranked {settings.ranked}: it has prompts that the warm start "
                             "trains on: give others, or leave it out")
    else:
        rng = random.Random(f"{settings.seed}/ranked")
        held = set(rng.sample(texts, int(HELD_RANKED * len(texts))))
        measuring = [record for record in replies if folded(record["prompt"]) in held]
    if settings.no_eft:
        return [], measuring
    training = [record for record in replies if folded(record["prompt"]) not in held]
    measured = prompts_in(held_out)
    clean = [record for record in training if folded(record["prompt"]) not in measured]
    if len(clean) < len(training):
        dropped = {"prompts held out for measuring": len(training) - len(clean)}
        tell(f"--eft {settings.eft or 'oasst1'}: {len(clean):,} prompts are left{without(dropped)}")
    return clean, measuring


def eft_replies(settings):
    """The records of --eft, or the first trees of oasst1 from the hub."""
    if settings.eft:
        records = read_prompts(settings.eft, "--eft", needs_replies=True)
        if not settings.no_eft:
            check_given(records, settings)
        return records
    tell("Ranked replies for the warm start: oasst1, from the hub or its cache")
    try:
        file = hf_hub_download(*OASST, repo_type="dataset")
        trees = itertools.islice(oasst_replies(file), OASST_PROMPTS)
        return [{"prompt_id": f"{i}", **record} for i, record in enumerate(trees)]
    except Exception as error:  # the hub's client raises many kinds, and a cut file others
        raise ValueError(f"oasst1 cannot be fetched ({type(error).__name__}): give ranked replies "
                         "with --eft FILE, or start without them with --no-eft") from None


def check_given(records, settings):
    """Say how many of --eft's given judgments cannot be read; ValueError if more than a few."""
    given = [(place, reply["judgment"]) for record in records
             for place, reply in zip(record["places"], record["replies"]) if "judgment" in reply]
    unread = [(place, text) for place, text in given
              if words.parse_score(text, settings.max_score) is None]
    if not unread:
        return
    place, text = unread[0]
    told = (f"--eft {settings.eft}: {len(unread):,} of {len(given):,} given judgments do not end "
            f"in a line \"Score: n\" with n from 0 to {settings.max_score}, the first on {place}: "
            f"{shorten(text)}")
    if len(unread) > UNREAD * len(given):
        raise ValueError(f"{told}; put the score on a line of its own, the last one")
    tell(f"{told}; they are left out")


def oasst_replies(file):
    """Ranked replies to the first turns of oasst1's English trees (its "ready trees" file)."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            prompt = json.loads(line)["prompt"]
            replies = [{"text": reply["text"], "rank": reply["rank"]}
                       for reply in prompt["replies"] if reply.get("rank") is not None]
            if prompt["lang"] == "en" and len(replies) > 1:
                yield {"prompt": prompt["text"], "replies": replies}


def ranked_items(records):
    """One item per ranked reply, as `judge` takes them."""
    return [{"id": f"{record['prompt_id']}/{i}", "prompt_id": record["prompt_id"],
             "prompt": record["prompt"], "text": reply["text"], "rank": reply["rank"]}
            for record in records for i, reply in enumerate(record["replies"])]


def given_examples(records, rubric, max_score, dropped):
    """Warm-start examples from what ranked replies carry, for models that cannot judge untaught.

    A reply may have a "judgment", a text that ends in a score, and "comparisons": two "judgments"
    and the "better" one, 0 or 1; of each comparison both orders train. Its "reason" comes before
    the winner: a text, or two, with the first judgment as A and with the second. Of a reply with
    "demonstration": true the text trains as an answer. Counts what it drops, as selections do.
    """
    examples = []
    for record in records:
        for reply in record["replies"]:
            asked = (record["prompt"], reply["text"])
            if "judgment" in reply:
                score = words.parse_score(reply["judgment"], max_score)
                if score is None:
                    dropped["given judgment that ends in no score"] += 1
                else:
                    prompt = words.judge_prompt(*asked, rubric)
                    examples.append(as_example(record["prompt_id"], prompt, reply["judgment"],
                                               score=score))
            for comparison in reply.get("comparisons", []):
                reason = comparison.get("reason", "")
                reasons = reason if isinstance(reason, list) else [reason] * 2
                for m, n in ((0, 1), (1, 0)):
                    first, second = comparison["judgments"][m], comparison["judgments"][n]
                    prompt = words.meta_judge_prompt(*asked, first, second, rubric)
                    winner = "A" if m == comparison["better"] else "B"
                    verdict = f"{reasons[m]}\nWinner: Judgment {winner}".lstrip("\n")
                    examples.append(as_example(record["prompt_id"], prompt, verdict))
            if reply.get("demonstration"):
                examples.append(as_example(record["prompt_id"], record["prompt"], reply["text"]))
    return examples


def agreeing_judgments(judged, dropped):
    """The judgments whose scores agree with the ranks; those of one round stay or go together.

    A round is the j-th judgment of every reply to a prompt. It agrees when no reply has a higher
    score than one that people ranked above it, and the best a higher one than the worst.
    """
    kept = []
    for group in by_prompt(judged).values():
        for judgments in zip(*(record["judgments"] for record in group)):
            scores = [j["score"] for j in judgments]
            missing = scores.count(None)
            if missing:
                dropped["EFT judgments malformed or cut off"] += missing
                if missing < len(scores):
                    dropped["EFT judgments lost with one of their round"] += len(scores) - missing
            elif not agree([record["rank"] for record in group], scores):
                dropped["EFT judgments that disagree with the ranks"] += len(scores)
            else:
                kept += [{"record": record, "text": j["text"], "ids": j.get("ids"),
                          "score": j["score"]} for record, j in zip(group, judgments)]
    return kept


def agree(ranks, scores):
    """Whether scores order replies as their ranks (0 the best) do; equal ranks in any order."""
    # Replies of one rank are put in the order of their scores, so that they never disagree.
    by_rank = sorted(zip(ranks, scores), key=lambda two: (two[0], -two[1]))
    ordered = [score for _, score in by_rank]
    return ordered == sorted(scores, reverse=True) and ordered[0] > ordered[-1]


def even_out_scores(kept, rubric, seed, dropped):
    """The EFT examples, in random order: no score more than twice as often as the median score."""
    kept, examples = list(kept), []
    random.Random(f"{seed}/EFT").shuffle(kept)
    frequencies = Counter(one["score"] for one in kept)
    cap = 2 * np.median(list(frequencies.values())) if kept else 0
    used = Counter()
    for one in kept:
        used[one["score"]] += 1
        if used[one["score"]] > cap:
            dropped["EFT judgments with a too frequent score"] += 1
            continue
        record = one["record"]
        prompt = words.judge_prompt(record["prompt"], record["text"], rubric)
        examples.append(as_example(record["prompt_id"], prompt, one["text"], one["ids"],
                                   score=one["score"]))
    return examples


def carries_lessons(records):
    return any(brings_lesson(reply) for record in records for reply in record["replies"])


# ---- invented prompts

def choose_prompts(run, t):
    """The prompts of iteration t, from the file or invented by the model; none was used before."""
    count = run.settings.prompts_per_iter
    if run.prompts is None:
        chosen = invent_prompts(run, t, count)
    else:
        chosen = run.prompts[(t - 1) * count: t * count]
        run.dropped += run.unfit if t == 1 else Counter()
    run.save(t, "prompts.jsonl", chosen)
    return chosen


def invent_prompts(run, t, count):
    """Self-instruct: ask for one more task after 8 seed tasks, as often as tasks are missing.

    Dropped are replies that are malformed, and tasks that are nearly a duplicate of a seed, of a
    held-out prompt, or of a task of this or an earlier iteration.
    """
    seeds = [record["prompt"] for record in read_prompts(SEEDS)]
    known = [*seeds, *earlier_prompts(run, t, count),
             *(record["prompt"] for record in run.held_out)]
    replies, chosen = [], []
    for number in itertools.count():  # a file of requests for each round
        if len(replies) > 20 * count + 100:
            raise ValueError(f"the model invents too few new prompts ({len(chosen)} in "
                             f"{len(replies)} tries): choose another --out and give a file with "
                             "--prompts")
        requests = []
        for i in range(len(replies), len(replies) + max(32, count - len(chosen))):
            shown = random.Random(f"{run.settings.seed}/{t}/{i}").sample(seeds, 8)
            requests.append({"id": f"{i}", "seeds": shown})
        replies += request(run, t, requests, number)
        unlike = Unlike(known)
        tasks = [reply for reply in replies if reply["task"]]
        chosen = [{"prompt_id": f"{t}-{reply['id']}", "prompt": reply["task"]}
                  for reply in tasks if unlike.add(reply["task"])]
        if len(chosen) >= count:
            break
    run.dropped += Counter({"new prompt malformed or cut off": len(replies) - len(tasks),
                            "new prompt nearly a duplicate": len(tasks) - len(chosen),
                            "new prompt not needed": len(chosen) - count})
    return chosen[:count]


def earlier_prompts(run, t, count):
    """The prompts of all iterations before t, which were invented too."""
    earlier = []
    for i in range(1, t):
        file = run.folder(i) / "prompts.jsonl"
        prompts = [record["prompt"] for record in read_jsonl(file)]
        if len(prompts) < count:
            raise ValueError(f"{file} is missing or cut short, and no prompt may be used twice: "
                             "put it back from a copy")
        earlier += prompts
    return earlier


def request(run, t, items, number):
    """Ask for a new task after some seed tasks: records with "task", None where malformed."""
    def ask(item):
        return [words.new_task_prompt(item["seeds"])]

    def read(item, samples):
        (reply,), = samples
        return {**item, "task": words.parse_task(reply.text) if reply.finished else None}

    return run.sample(t, f"requests{number}.jsonl", items, ask, read, n=1, max_new_tokens=256,
                      label="new prompts")


class Unlike:
    """Recognises near-duplicates: texts that share at least 70 % of their words.

    The measure is Jaccard's, which is cheaper than the ROUGE-L of Self-Instruct.
    """

    def __init__(self, texts=()):
        self.sizes, self.holders = [], defaultdict(list)  # words of each text; word -> texts
        for text in texts:
            self.add(text)

    def add(self, text):
        """Add a text unless it is too like an earlier one; says whether it was added."""
        mine = set(re.findall(r"\w+", text.lower()))
        shared = Counter(i for word in mine for i in self.holders[word])
        for i, count in shared.items():
            if count >= 0.7 * (len(mine) + self.sizes[i] - count):
                return False
        if not mine:
            return False
        for word in mine:
            self.holders[word].append(len(self.sizes))
        self.sizes.append(len(mine))
        return True
