"""Variants of the method that are more than a flag; most are what later papers propose for loops
like this one, tried together with a meta-judge.

`python benchmarks/ablations.py --variants "Meta-Rewarding" "anchored rejection" ...` runs them.
Each function here changes the method in one place, for the process that calls it; none of this is
in the method itself, since none has earned its place there so far (docs/results.md).

anchored       rejected answers from M_0 (arXiv 2508.06026): of K answers about half are M_0's; the
               present judge scores all; the chosen one is M_{t-1}'s, the rejected one M_0's if the
               worst of these is below the worst of M_{t-1}'s. Both tiers are length-controlled.
consistent     a pair of answers counts (1 + tau) / 2 one way and the rest the other (CREAM, arXiv
               2410.12735); tau: Kendall's, of the orders by two halves of the prompt's judgments.
nll            the negative log-probability per token of what is chosen is added to the loss
               (Iterative RPO, arXiv 2404.19733).
cap            judge pairs are at most so large a share of all pairs; which of them is chance.
consensus      judge pairs that no meta-judge chose: of two judgments the one wins whose score is
               nearer to the mean score of its answer; nothing is sampled.
expected       where answers are scored for pairs, a judgment's score is the mean over the judge's
               probabilities of the scores (benchmarks/expected_score.py).
by_truth       judge pairs by the truth: the judgment whose score is nearest to it over the farthest
"""
import random

import numpy as np
import torch

import dpo
import harness.folder
import metareward
from benchmarks.expected_score import expectations
from eval import agreement, by_prompt, mean


def anchored():
    ask, answers_kept = metareward.answer, metareward.finished_answers

    def answer(run, t, prompts, name="responses.jsonl", n=None, label="answers"):
        if label != "answers" or t < 2:  # M_0 is the actor of iteration 1
            return ask(run, t, prompts, name, n, label)
        anchors = run.settings.responses // 2
        own = ask(run, t, prompts, name, run.settings.responses - anchors, label)
        run.become(0)
        old = ask(run, t, prompts, "anchors.jsonl", anchors, "answers of M_0")
        run.become(t - 1)
        first = {record["id"]: record["responses"] for record in old}
        return [record | {"responses": [{**one, "anchor": False} for one in record["responses"]]
                          + [{**one, "anchor": True} for one in first[record["id"]]]}
                for record in own]

    def finished(records, max_score=5):
        of = {record["prompt_id"]: record["responses"] for record in records}
        for kept in answers_kept(records, max_score):
            if isinstance(kept, dict):
                number = int(kept["id"].rpartition("/")[2])
                kept["anchor"] = of[kept["prompt_id"]][number].get("anchor", False)
            yield kept

    def pairs(answers, rho, max_chars):
        for prompt_id, group in by_prompt(answers).items():
            scored = [a for a in group if a["score"] is not None]
            own, old = ([a for a in scored if a["anchor"] == which] for which in (False, True))
            if not own or len(scored) < 2:
                yield "actor pair: fewer than two answers with a score"
                continue
            lowest = {id(pool): min(a["score"] for a in pool) for pool in (own, old) if pool}
            pool = old if old and lowest[id(old)] < lowest[id(own)] else own
            low, high = lowest[id(pool)], max(a["score"] for a in own)
            good, bad = (1 - rho) * high + rho * low, (1 - rho) * low + rho * high
            chosen = min((a for a in own if a["score"] >= good - metareward.SAME),
                         key=lambda a: (len(a["text"]), -a["score"]))
            rejected = max((a for a in pool if a["score"] <= bad + metareward.SAME),
                           key=lambda a: (len(a["text"]), -a["score"]))
            if high - low < metareward.SAME or chosen is rejected:
                yield "actor pair: all scores equal, or the same answer on both sides"
            elif max_chars and len(chosen["text"]) > max_chars:
                yield "actor pair: chosen answer too long"
            else:
                yield metareward.as_pair(
                    "actor", prompt_id, chosen["prompt"], chosen["text"], rejected["text"],
                    chosen_score=chosen["score"], rejected_score=rejected["score"])
    metareward.answer, metareward.finished_answers = answer, finished
    metareward.actor_pairs = pairs


def other_loss(change):
    """Let DPO minimise change(losses, the same with sides changed, log p(chosen), examples)."""
    def train_dpo(model, examples, held_out=(), *, beta, **settings):
        def compute(part):
            ref = [torch.tensor([e[name] for e in part], dtype=torch.float64)
                   for name in ("ref_chosen", "ref_rejected")]
            chosen, rejected = dpo.logps_of(model, part)
            losses, good, bad = dpo.dpo_loss(chosen, rejected, *ref, beta)
            swapped, *_ = dpo.dpo_loss(rejected, chosen, *ref[::-1], beta)
            figures = {"margin": good - bad, "accuracy": (good > bad).float(),
                       "chosen_reward": good, "rejected_reward": bad,
                       "chosen_logp": chosen.detach(), "rejected_logp": rejected.detach()}
            return change(losses, swapped, chosen, part), figures
        yield from dpo.train(model, examples, held_out, compute, **settings)
    metareward.train_dpo = train_dpo


def consistent():
    find, encode = metareward.actor_pairs, harness.folder.encoded

    def actor_pairs(answers, rho, max_chars):
        groups = by_prompt(answers)
        for pair in find(answers, rho, max_chars):
            if isinstance(pair, dict):
                halves = [(a["scores"][0::2], a["scores"][1::2]) for a in groups[pair["prompt_id"]]]
                means = [pair for pair in ((mean(one), mean(other)) for one, other in halves)
                         if None not in pair]
                tau = agreement(*zip(*means))["kendall"] if len(means) > 1 else None
                pair["consistency"] = (1 + (tau or 0)) / 2
            yield pair

    def encoded(chat, examples):
        return [{**ids, "consistency": example.get("consistency", 1.0)}
                for ids, example in zip(encode(chat, examples), examples, strict=True)]

    def weighted(losses, swapped, chosen, part):
        c = torch.tensor([example["consistency"] for example in part], dtype=losses.dtype)
        return c * losses + (1 - c) * swapped
    metareward.actor_pairs, harness.folder.encoded = actor_pairs, encoded
    other_loss(weighted)


def nll():
    other_loss(lambda losses, swapped, chosen, part: losses - chosen / torch.tensor(
        [len(example["chosen_ids"]) for example in part]))


def cap(share):
    find = metareward.judge_pairs

    def judge_pairs(compared, ratings, rubric, max_chars):
        found = list(find(compared, ratings, rubric, max_chars))
        places = [i for i, one in enumerate(found) if isinstance(one, dict)]
        most = round(share / (1 - share) * len(compared))  # as many pairs of answers as prompts
        kept = set(random.Random("cap").sample(places, min(most, len(places))))
        for i, one in enumerate(found):
            yield one if i in kept or isinstance(one, str) else "judge pair: more than the cap"
    metareward.judge_pairs = judge_pairs


def consensus():
    def meta_judge(run, t, varied):
        records = []
        for item in varied:
            off = np.abs(np.array(item["scores"]) - np.mean(item["scores"]))
            verdicts = np.sign(off - off[:, None]).astype(int)  # [m, n]: 1 if m is nearer
            records.append({**item, "verdicts": verdicts.tolist(), "said": []})
        run.save(t, "battles.jsonl", records)
        return records
    metareward.meta_judge = meta_judge


def expected():
    draw = metareward.judge

    def judge(run, t, answers, name="judgments.jsonl", label="judgments"):
        records = draw(run, t, answers, name, label)
        if label == "judgments":  # what is measured, and what is taught, stays as it is
            run.model.eval()
            expectations(run.model, run.chat, run.rubric, run.settings.max_score, records)
            for record in records:
                record["scores"] = record.pop("expected")
                record["score"] = mean(record["scores"])
        return records
    metareward.judge = judge


def by_truth():
    def judge_pairs(compared, ratings, rubric, max_chars):
        for record in compared:
            off = np.abs(np.array(record["scores"]) - record["truth"])
            lengths = [len(text) for text in record["texts"]]
            pair = metareward.judge_pair(-off, lengths, max_chars)
            if pair is None or record["texts"][pair[0]] == record["texts"][pair[1]]:
                yield "judge pair: all as far from the truth, or the chosen judgment too long"
                continue
            prompt = metareward.words.judge_prompt(record["prompt"], record["text"], rubric)
            texts = [record["texts"][place] for place in pair]
            yield metareward.as_pair("judge", record["prompt_id"], prompt, *texts,
                                     chosen_rating=-off[pair[0]], rejected_rating=-off[pair[1]])
    metareward.judge_pairs = judge_pairs
