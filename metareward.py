"""Meta-Rewarding (Wu et al. 2024, arXiv 2407.19594): a model that trains on its own judgments.

    python metareward.py --iters 4    # with a GPU Llama-3-8B-Instruct, without one the tiny world

It answers prompts, judges its answers, judges its judgments, and trains on what it preferred. Read
`iterate` first: it is the algorithm, and what stands above it are its steps.

[E1] Of a prompt's answers with scores from low to high, the shortest with at least
     (1 - rho) high + rho low is chosen, the longest with at most (1 - rho) low + rho high rejected.
[E2] A win in first place weighs w1 = second / (first + second), one in second place
     w2 = first / (first + second), where first and second are how many wins each place had.
[E3] B_mn = w1 [m, shown first, won against n] + w2 [m, shown second, won against n].
[E4] Ratings e maximise sum_mn B_mn log sigmoid(e_m - e_n); the highest is chosen over the lowest.
[E5] loss = -log sigmoid(beta (log p(c) - log p_ref(c)) - beta (log p(r) - log p_ref(r))).

The reference of iteration t, and where its training starts, is M_{t-1}, the model that made
iteration t's data; the result is M_t. M_0 is the seed model after a warm start. One LoRA adapter
on one frozen base carries through. Files, resuming, settings and the report are in harness/, and
of the method the invented prompts and the warm start's choice of judgments (harness/inputs.py).

Deviations from the paper:
1. LoRA on a 4-bit base instead of full fine-tuning, with ten times its learning rate.
2. The model under training invents its own prompts instead of a 70B model.
3. The warm start's judgments come from the seed model, kept where they agree with human ranks.
4. The epoch of DPO is picked by its loss on held-out pairs.
5. The Elo fit is regularised (see `elo`).
6. The judge of every M_t is measured on M_0's held-out answers, so that its figures compare.
"""
import itertools
import math
import random
from collections import Counter

import harness.startup  # what must stand before torch is imported
from harness.settings import DIAGNOSED, parse_settings

if __name__ == "__main__":
    harness.startup.begin(lambda: parse_settings(cuda=None))
# isort: split
import numpy as np
import torch

import prompts as words
from dpo import train_dpo, train_sft
from eval import (
    by_prompt,
    comparisons,
    mean,
    measure_actor,
    measure_judge,
    measure_meta_judge,
    measure_people,
    numbers,
)
from harness import inputs
from harness.checks import truth
from harness.first_replies import check_judging, first_prompts
from harness.lines import VERDICTS, as_pair, as_reply, score_of, winner_of
from harness.plan import fit_hours, foresee, plan
from harness.program import as_program, last_words
from harness.run import Run
from harness.views.figures import table

SAME = 1e-9         # scores and ratings this close are equal: sums in another order differ so much
EVAL_ANSWERS = 4    # answers per held-out prompt
EQUAL = (0.5, 0.5)  # weights under which a win counts the same shown first or second


# ---- the method, as pure functions of numbers

def position_weights(first_wins, second_wins):
    """Weights (w1, w2) of a win shown first and of a win shown second [E2].

    first_wins, second_wins: how many comparisons each place won. The rarer kind of win weighs
    more, and w1 + w2 = 1.
    """
    if not (0 <= first_wins < math.inf and 0 <= second_wins < math.inf):
        raise ValueError("first_wins and second_wins must be finite and not negative")
    total = first_wins + second_wins
    if total == 0:
        return EQUAL
    return second_wins / total, first_wins / total  # [E2]


def battle_matrix(verdicts, w1, w2):
    """How much each judgment won against each other, (N, N) [E3].

    verdicts[m, n], with m shown first: 1 if m won, -1 if n did, 0 if no winner was named.
    """
    r = np.asarray(verdicts)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or not np.isin(r, (-1, 0, 1)).all():
        raise ValueError("verdicts must be a square matrix of -1, 0 and 1")
    if not (0 <= w1 <= 1 and 0 <= w2 <= 1):
        raise ValueError("w1 and w2 must be in [0, 1]")
    return w1 * (r == 1) + w2 * (r.T == -1)  # [E3]


def elo(battles, ridge=1e-6):
    """Ratings that best explain a battle matrix, (N,), mean zero, natural-log scale [E4].

    The model is Bradley and Terry's: m wins against n with probability sigmoid(e_m - e_n). Newton's
    method maximises sum_mn B_mn log sigmoid(e_m - e_n) - ridge/2 sum_m e_m^2, with B scaled to a
    mean of one battle per pair. The ridge keeps ratings finite where a judgment won every battle
    (they are then 12 or more apart) and moves regular ratings by about 1e-5. For example [[0, 3],
    [1, 0]], three wins to one, gives ratings log 3 apart.
    """
    B = np.asarray(battles, dtype=float)
    square = B.ndim == 2 and B.shape[0] == B.shape[1]
    if not square or not np.isfinite(B).all() or (B < 0).any():
        raise ValueError("battles must be a square matrix of finite numbers >= 0")
    N = len(B)
    B = B * (1 - np.eye(N))
    e = np.zeros(N)
    if B.sum() == 0:
        return e
    B *= N * (N - 1) / 2 / B.sum()

    def objective(e):
        log_wins = -np.logaddexp(0, e[None, :] - e[:, None])  # log sigmoid(e_m - e_n)
        return (B * log_wins).sum() - ridge / 2 * (e @ e)  # [E4]

    for _ in range(200):
        p = 1 / (1 + np.exp(np.clip(e[:, None] - e[None, :], -500, 500)))  # P(m loses to n)
        gradient = (B * p).sum(1) - (B * p).sum(0) - ridge * e
        weight = (B + B.T) * p * (1 - p)
        curvature = np.diag(weight.sum(1)) - weight + ridge * np.eye(N)
        step = np.linalg.solve(curvature, gradient)
        step *= min(1, 2 / max(np.abs(step).max(), 1e-300))  # far off, Newton's step is too long
        while objective(e + step) < objective(e) and np.abs(step).max() > 1e-12:
            step /= 2
        e = e + step
        if np.abs(step).max() < 1e-10:
            break
    return e - e.mean()


def actor_pair(scores, lengths, rho):
    """Indices (chosen, rejected) of one prompt's answers with length control, or None [E1].

    scores (K,): mean judge scores, NaN where no judgment was valid. lengths (K,): characters.
    rho in [0, 1]: 0 is best against worst. Of good answers of one length the best is chosen, of bad
    ones of one length the worst rejected. None: fewer than two scores, all scores equal, or the
    same answer on both sides.
    """
    scores, lengths = np.asarray(scores, dtype=float), np.asarray(lengths, dtype=float)
    lists = scores.ndim == 1 and scores.shape == lengths.shape
    if not lists or np.isinf(scores).any() or not (lengths >= 0).all() or not 0 <= rho <= 1:
        raise ValueError("scores (finite or NaN) and lengths (>= 0) must be lists of the same "
                         "length, and rho must be in [0, 1]")
    scored = [i for i in range(len(scores)) if not math.isnan(scores[i])]
    if len(scored) < 2:
        return None
    low, high = min(scores[scored]), max(scores[scored])
    if high - low < SAME:
        return None
    good = (1 - rho) * high + rho * low  # [E1]
    bad = (1 - rho) * low + rho * high   # [E1]
    top = [i for i in scored if scores[i] >= good - SAME]
    bottom = [i for i in scored if scores[i] <= bad + SAME]
    chosen = min(top, key=lambda i: (lengths[i], -scores[i]))
    rejected = max(bottom, key=lambda i: (lengths[i], -scores[i]))
    return (chosen, rejected) if chosen != rejected else None


def judge_pair(ratings, lengths, max_length=None):
    """Indices (chosen, rejected) of the highest and the lowest rated judgment, or None.

    None: all ratings are equal, or the chosen judgment is longer than max_length (`judge_pairs`
    tests that itself, to say which of the two it was). lengths, max_length: characters. Of equal
    ratings the shorter judgment is chosen, the longer rejected.
    """
    ratings, lengths = numbers("ratings", ratings), numbers("lengths", lengths, 0)
    if len(ratings) != len(lengths):
        raise ValueError("ratings and lengths must have the same length")
    if np.ptp(ratings) < SAME:
        return None
    highest = np.flatnonzero(ratings > ratings.max() - SAME).tolist()
    lowest = np.flatnonzero(ratings < ratings.min() + SAME).tolist()
    chosen = min(highest, key=lambda i: lengths[i])
    rejected = max(lowest, key=lambda i: lengths[i])
    if max_length and lengths[chosen] > max_length:
        return None
    return chosen, rejected


def next_comparisons(verdicts, done, budget, seed=0):
    """Which of N judgments to compare next: a list of (m, n), m shown first; [] when all is done.

    verdicts (N, N): those so far, as `battle_matrix` takes them. done (N, N): whether m was
    compared with n, m shown first. budget: how many comparisons in all, better no fewer than N.
    First each judgment meets its neighbours in a random circle, as often in first as in second
    place. After that the leader meets its two strongest contenders and the last its two weakest, in
    both orders: who is first and who is last is all that a pair needs. What few comparisons leave
    open counts for a contender (an upper confidence bound).
    """
    verdicts, done = np.asarray(verdicts), np.asarray(done, dtype=bool)
    if verdicts.ndim != 2 or len(set(verdicts.shape) | set(done.shape)) != 1 or budget < 1:
        raise ValueError("verdicts and done must be square matrices of one size, and budget >= 1")
    N = len(done)
    missing = ~done & ~np.eye(N, dtype=bool)
    left = min(budget - done.sum(), missing.sum())
    if left <= 0:
        return []
    if not done.any():
        circle = random.Random(seed).sample(range(N), N)
        reach = max(1, min(budget // (2 * N), (N - 1) // 2))
        return [(circle[i], circle[(i + step) % N])
                for step in range(1, reach + 1) for i in range(N)][:left]
    ratings = elo(battle_matrix(verdicts, *EQUAL), ridge=0.05)
    doubt = 1.2 / np.sqrt(np.maximum(1, done.sum(0) + done.sum(1)))
    chosen = []  # (0 for the strongest rival, 1 for the next one, m, n)
    for one, others in ((ratings.argmax(), (-ratings - doubt).argsort(kind="stable")),
                        (ratings.argmin(), (ratings - doubt).argsort(kind="stable"))):
        rivals = [other for other in others if missing[one, other] or missing[other, one]][:2]
        chosen += [(nth, m, n) for nth, other in enumerate(rivals)
                   for m, n in ((one, other), (other, one)) if missing[m, n]]
    chosen.sort(key=lambda meeting: meeting[0])
    pairs = [meeting[1:] for meeting in chosen] or np.argwhere(missing)
    return list(dict.fromkeys((int(m), int(n)) for m, n in pairs))[:left]


# ---- the three roles: what is asked, and what is read out of the replies

def answer(run, t, prompts, name="responses.jsonl", n=None, label="answers"):
    """As actor, answer prompts: records with "responses", K for each prompt."""
    def ask(item):
        return [item["prompt"]]

    def read(item, samples):
        return {**item, "responses": [as_reply(run.chat, s) | {"tokens": len(s.tokens)}
                                      for s in samples[0]]}

    items = [{**prompt, "id": prompt["prompt_id"]} for prompt in prompts]
    return run.sample(t, name, items, ask, read, n or run.settings.responses,
                      run.settings.max_answer_tokens, label)


def judge(run, t, answers, name="judgments.jsonl", label="judgments"):
    """As judge, score answers: records with N "judgments", their "scores" and the mean "score".

    A judgment that was cut off or is malformed has the score None, and never becomes a number.
    """
    def ask(item):
        return [words.judge_prompt(item["prompt"], item["text"], run.rubric)]

    def read(item, samples):
        said = [as_reply(run.chat, s) for s in samples[0]]
        scores = [score_of(one, run.settings.max_score) for one in said]
        judgments = [one | {"score": score} for one, score in zip(said, scores)]
        return {**item, "judgments": judgments, "scores": scores, "score": mean(scores)}

    return run.sample(t, name, answers, ask, read, run.settings.judgments,
                      run.settings.max_judgment_tokens, label)


def score(run, t, answers, name="judgments.jsonl", label="judgments"):
    """Answers with their "score": the judge's, unless --reward names something else."""
    if run.settings.reward == "judge":
        return judge(run, t, answers, name, label)
    return run.reward(t, answers, name, label)


def meta_judge(run, t, varied):
    """As meta-judge, compare every two judgments of an answer, in both orders, or --comparisons.

    Returns records with "verdicts" (N, N), as `battle_matrix` reads them; none at all if hardly any
    comparison names a winner.
    """
    budget = run.settings.comparisons
    compared = {item["id"]: {**item, "verdicts": np.zeros([len(item["texts"])] * 2, int).tolist(),
                             "said": [], "sampled_tokens": 0} for item in varied}
    for number in itertools.count(1):
        orders = {key: pairs for key, record in compared.items()
                  if (pairs := next_pairs(record, budget, f"{run.settings.seed}/{t}/{key}"))}
        if not orders:
            break
        made = compare(run, t, [item for item in varied if item["id"] in orders], orders,
                       f"round{number}.jsonl" if budget else "battles.jsonl")
        if not made and number == 1:
            return []
        if not made:
            break
        for record in made:
            compared[record["id"]] = add_battles(compared[record["id"]], record)
    run.save(t, "battles.jsonl", compared.values())
    return list(compared.values())


def compare(run, t, items, orders, name):
    """The meta-judge's verdicts on orders[id] of each item: pairs (m, n), m shown first."""
    def ask(item):
        return [words.meta_judge_prompt(item["prompt"], item["text"], item["texts"][m],
                                        item["texts"][n], run.rubric)
                for m, n in orders[item["id"]]]

    def read(item, samples):
        N = len(item["texts"])
        verdicts, said = np.zeros((N, N), dtype=int), []
        for (m, n), (s,) in zip(orders[item["id"]], samples):
            verdicts[m, n] = VERDICTS[winner_of(s)]
            said.append({"first": m, "second": n, "text": s.text, "finished": s.finished})
        return {**item, "verdicts": verdicts.tolist(), "said": said}

    return run.sample(t, name, items, ask, read, 1, run.settings.max_verdict_tokens, "comparisons",
                      needed=False)


def next_pairs(record, budget, seed):
    """Which of a compared answer's judgments meet next: all that can, or with a budget what
    `next_comparisons` wants, where equal texts do not meet.

    Nothing more is asked of one whose first comparisons all named no winner.
    """
    if not budget:
        N = len(record["texts"])
        return [] if record["said"] else list(itertools.permutations(range(N), 2))
    if record["said"] and not np.any(record["verdicts"]):
        return []
    texts, done = record["texts"], np.zeros_like(record["verdicts"], dtype=bool)
    for said in record["said"]:
        done[said["first"], said["second"]] = True
    first = [texts.index(text) for text in dict.fromkeys(texts)]
    own = np.ix_(first, first)
    pairs = next_comparisons(np.array(record["verdicts"])[own], done[own], budget, seed)
    return [(first[m], first[n]) for m, n in pairs]


def add_battles(before, record):
    """A compared answer with what further comparisons of it said."""
    counts = {key: before.get(key, 0) + record[key] for key in ("sampled_tokens", "too_long")
              if key in record}
    verdicts = np.add(before["verdicts"], record["verdicts"]).tolist()
    return {**before, **counts, "verdicts": verdicts, "said": before["said"] + record["said"]}


# ---- selections: each returns a list, and counts in `dropped` what is not in it, by reason

def finished_answers(records, max_score, dropped):
    """The different finished answers to each prompt."""
    kept = []
    for record in records:
        if record.get("too_long"):
            dropped["prompt too long for the model's context"] += 1
            continue
        seen = set()
        for number, response in enumerate(record["responses"]):
            text = response["text"]
            if not response["finished"]:
                dropped["answer cut off"] += 1
            elif not text.strip():
                dropped["answer empty"] += 1
            elif response.get("marked") or text.lstrip().startswith("<think>"):
                dropped["answer with control tokens or a thought in it"] += 1
            elif text in seen:
                dropped["answer a duplicate"] += 1
            else:
                seen.add(text)
                kept.append(as_answer(record, number, response, max_score))
        if not seen:
            dropped["prompt without a finished answer"] += 1
    return kept


def actor_pairs(answers, rho, max_chars, dropped):
    """One pair of answers per prompt [E1], from judged answers."""
    count_unread_judgments(answers, dropped)
    pairs = []
    for prompt_id, group in by_prompt(answers).items():
        scores = [math.nan if a["score"] is None else a["score"] for a in group]
        pair = actor_pair(scores, [len(a["text"]) for a in group], rho)
        if pair is None:
            dropped[f"actor pair: {why_no_pair(scores)}"] += 1
            continue
        chosen, rejected = group[pair[0]], group[pair[1]]
        if max_chars and len(chosen["text"]) > max_chars:
            dropped["actor pair: chosen answer too long"] += 1
            continue
        pairs.append(as_pair("actor", prompt_id, chosen["prompt"], chosen["text"],
                             rejected["text"], (chosen.get("ids"), rejected.get("ids")),
                             chosen_score=chosen["score"], rejected_score=rejected["score"]))
    return pairs


def most_varied(answers, seed, dropped):
    """Per prompt the answer whose scores vary most, with its valid judgments; ties at random."""
    chosen = []
    for prompt_id, group in by_prompt(answers).items():
        group = [a for a in group if len(valid_scores(a)) > 1]
        if not group:
            dropped["judge pair: no answer with two valid judgments"] += 1
            continue
        variances = [np.var(valid_scores(a)) for a in group]
        most = [a for a, v in zip(group, variances) if v >= max(variances) - SAME]
        record = random.Random(f"{seed}/{prompt_id}").choice(most)
        bare = {key: record[key] for key in ("id", "prompt_id", "prompt", "text", "truth")
                if key in record}
        valid = [j for j in record["judgments"] if j["score"] is not None]
        ids = {"ids": [j.get("ids") for j in valid]} if any("ids" in j for j in valid) else {}
        chosen.append({**bare, "texts": [j["text"] for j in valid],
                       "scores": valid_scores(record), **ids})
    return chosen


def judge_pairs(compared, ratings, rubric, max_chars, dropped):
    """One pair of judgments per compared answer: the highest rated over the lowest."""
    pairs = []
    for record, rating in zip(compared, ratings, strict=True):
        count_unread_verdicts(record, dropped)
        if rating["pair"] is None:
            dropped["judge pair: all ratings equal"] += 1
            continue
        chosen, rejected = rating["pair"]
        texts, scores, rated = record["texts"], record["scores"], rating["ratings"]
        if max_chars and len(texts[chosen]) > max_chars:
            dropped["judge pair: chosen judgment too long"] += 1
        elif texts[chosen] == texts[rejected]:
            dropped["judge pair: the same judgment on both sides"] += 1
        else:
            prompt = words.judge_prompt(record["prompt"], record["text"], rubric)
            ids = record.get("ids") or [None] * len(texts)
            pairs.append(as_pair("judge", record["prompt_id"], prompt, texts[chosen],
                                 texts[rejected], (ids[chosen], ids[rejected]),
                                 chosen_rating=rated[chosen], rejected_rating=rated[rejected],
                                 chosen_score=scores[chosen], rejected_score=scores[rejected]))
    return pairs


def as_answer(record, number, response, max_score):
    """An answer; where its prompt has checks with its true score, of max_score the share met."""
    known, checks = {"ids": response["ids"]} if "ids" in response else {}, record.get("checks")
    if checks:
        known["truth"] = max_score * truth(checks, response["text"]) / len(checks)
    return {"id": f"{record['prompt_id']}/{number}", "prompt_id": record["prompt_id"],
            "prompt": record["prompt"], "text": response["text"], **known}


def valid_scores(answer):
    """The scores of those judgments of an answer that gave one."""
    return [score for score in answer["scores"] if score is not None]


def why_no_pair(scores):
    """Why `actor_pair` found none."""
    scored = [score for score in scores if not math.isnan(score)]
    if len(scored) < 2:
        return "fewer than two answers with a score"
    equal = max(scored) - min(scored) < SAME
    return "all scores equal" if equal else "the same answer on both sides"


def count_unread_judgments(answers, dropped):
    """Count the judgments that gave no score, and the answers that were not scored."""
    for answer in answers:
        if answer.get("too_long") or "unscored" in answer:
            dropped[answer.get("unscored", "answer too long to be judged")] += 1
        elif None in answer["scores"]:
            dropped["judgment malformed or cut off"] += answer["scores"].count(None)


def count_unread_verdicts(record, dropped):
    """Count an answer's comparisons that named no winner."""
    too_long = record.get("too_long", 0)
    unread = comparisons(record) - int(np.count_nonzero(record["verdicts"])) - too_long
    dropped += Counter({"verdict malformed or cut off": unread,
                        "judgments too long to be compared": too_long})


# ---- rating

def diagnostic_sample(varied, seed):
    """A few of the answers: where no judge trains, they are compared for the figures alone."""
    count = min(DIAGNOSED, len(varied))
    return [varied[i] for i in sorted(random.Random(seed).sample(range(len(varied)), count))]


def wins_by_place(compared):
    """How many of all comparisons the judgment shown first won, and the one shown second."""
    verdicts = [v for record in compared for row in record["verdicts"] for v in row]
    return verdicts.count(1), verdicts.count(-1)


def rate(compared, weights):
    """Of each compared answer the matrix "battles" [E3], the "ratings" [E4] and their "pair"."""
    ratings = []
    for record in compared:
        B = battle_matrix(record["verdicts"], *weights)  # [E3]
        e = elo(B)  # [E4]
        ratings.append({"id": record["id"], "battles": B.tolist(), "ratings": e.tolist(),
                        "pair": judge_pair(e, [len(text) for text in record["texts"]])})
    return ratings


# ---- iteration 0: the warm start

def warm_start(run):
    """M_0: SFT on the seed's own judgments of ranked replies, where they order them as people did.

    Or on what the replies bring with them. Returns figures for summary.json.
    """
    s = run.settings
    figures = {"meta_judge": None, "pairs": {"actor": 0, "judge": 0, "judge_share": None}}
    if s.no_eft:
        first_look(run)  # the run of a model that cannot judge ends here
        return figures | {"train": run.train(0, train_sft, [])}  # none: M_0 is the seed as it is
    if inputs.carries_lessons(run.replies):
        examples = inputs.given_examples(run.replies, run.rubric, s.max_score, run.dropped)
    else:
        items = inputs.ranked_items(run.replies)
        judged = judge(run, 0, items, label="judgments of ranked replies")
        agreeing = inputs.agreeing_judgments(judged, run.dropped)
        examples = inputs.even_out_scores(agreeing, run.rubric, s.seed, run.dropped)
    if not examples:
        lost = "; ".join(f"{reason} {count}" for reason, count in run.dropped.items())
        raise ValueError("there is no judgment that agrees with the ranked replies "
                         f"({lost}): choose another --out and --no-eft")
    run.save(0, "sft.jsonl", examples)
    return figures | {"train": run.train(0, train_sft, examples, epochs=s.eft_epochs)}


def first_look(run):
    """Have the seed judge a few of its own answers; raise Unreadable if it cannot.

    Nothing is done if no judge is wanted, or an iteration has fewer judgments than it takes.
    """
    if prompts := first_prompts(run):
        answers = answer(run, 0, prompts, "first_responses.jsonl", label="first answers")
        items = [{"id": f"{record['id']}/{i}", "prompt": record["prompt"], "text": one["text"]}
                 for record in answers for i, one in enumerate(record["responses"])]
        check_judging(judge(run, 0, items, "first_judgments.jsonl", "first judgments"))


# ---- measuring

def examine(run, t):
    """Figures of M_t as actor and as judge, on held-out prompts.

    Every judge is measured on M_0's answers, so that its figures compare.
    """
    records = answer(run, t, run.eval_prompts, "eval_responses.jsonl", EVAL_ANSWERS,
                     "held-out answers")
    items = [as_answer(record, i, response, run.settings.max_score) | response
             for record in records if not record.get("too_long")
             for i, response in enumerate(record["responses"])]
    own = score(run, t, items, "eval.jsonl", "held-out judgments")
    too_long = {"too_long": sum("too_long" in record for record in records)}  # no answers at all
    if run.settings.reward != "judge":  # not its own opinion
        return {"actor": measure_actor(own, "reward") | too_long, "judge": None}
    first = own if t == 0 else run.with_previous_scores(t, judge(
        run, t, run.answers_of_m0(len(items)), "eval_judge.jsonl",
        "held-out judgments of M_0's answers"))
    figures = {"actor": measure_actor(own) | too_long, "judge": measure_judge(first)}
    if run.ranked:
        judged = judge(run, t, inputs.ranked_items(run.ranked), "eval_ranked.jsonl",
                       "judgments of replies ranked by people")
        figures["judge"] |= measure_people(judged)
    return figures


# ---- the loop. A run (harness/run.py) has settings, what it reads (prompts, eval_prompts, replies,
# ranked, rubric), a model with its chat, and a folder in which each step leaves a file:
#   run.become(t)        puts M_t's adapter into the model
#   run.sample(...)      samples replies to many prompts, and goes on after a kill (the three roles)
#   run.reward(...)      scores answers where --reward is no judge
#   run.dropped          counts what the selections drop, by reason
#   run.save(t, name, records), run.train(...)    write a file; train, log, save M_t's adapter

def iterate(run, t):
    """One iteration: M_{t-1} makes preferences out of nothing but prompts, and becomes M_t.

    Returns figures for summary.json.
    """
    s = run.settings  # s.at(name, t) is the value of a schedule, such as rho, in iteration t
    run.become(t - 1)
    prompts = inputs.choose_prompts(run, t)
    # {"prompt_id": "7", "prompt": "How do I keep bread fresh?"}

    # Answer: K samples for each prompt.
    answers = finished_answers(answer(run, t, prompts), s.max_score, run.dropped)
    # {"id": "7/2", "prompt_id": "7", "prompt": ..., "text": "Wrap the loaf in a cloth ..."}

    # Judge: N judgments of each answer; the mean of their scores is the answer's score.
    answers = score(run, t, answers)
    # the same with {"judgments": [{"text": "... Score: 4"}, ...], "scores": [4, ...], "score": 3.6}

    # Pairs of answers: the shortest of the good ones over the longest of the bad ones [E1].
    pairs = actor_pairs(answers, s.at("rho", t), s.at("max_response_chars", t), run.dropped)
    # {"kind": "actor", "prompt": ..., "chosen": ..., "rejected": ...}

    # Compare: of each prompt the answer whose scores vary most; every two of its judgments.
    trains_judge = t <= s.judge_iters
    dropped = run.dropped if trains_judge else Counter()  # else no pair is wanted, none is missed
    varied = [] if s.no_meta_judge else most_varied(answers, s.seed, dropped)
    varied = varied if trains_judge else diagnostic_sample(varied, f"{s.seed}/{t}/diagnosed")
    compared = meta_judge(run, t, varied)
    # {"id": "7/2", "texts": ["... Score: 4", ...], "verdicts": [[0, 1, ...], [-1, 0, ...], ...]}

    # Rate: weigh wins against the bias for a place [E2], count battles [E3], fit ratings [E4].
    weights = EQUAL if s.no_position_weights else position_weights(*wins_by_place(compared))
    ratings = rate(compared, weights)
    run.save(t, "ratings.jsonl", ratings)
    # {"id": "7/2", "battles": [[0, 1.0, ...], ...], "ratings": [1.2, -0.7, ...], "pair": [0, 4]}

    # Pairs of judgments: the highest rated over the lowest.
    if trains_judge:
        limit = s.at("max_judgment_chars", t)
        pairs += judge_pairs(compared, ratings, run.rubric, limit, run.dropped)
    run.save(t, "pairs.jsonl", pairs)

    # Train: DPO [E5] on both kinds of pairs, from M_{t-1}, which is also the reference.
    best = run.train(t, train_dpo, pairs, beta=s.beta, epochs=s.epochs)
    figures = measure_meta_judge(compared) | {"weights": weights, "answers": len(compared)}
    counts = {kind: sum(p["kind"] == kind for p in pairs) for kind in ("actor", "judge")}
    counts["score_gap"] = mean(p["chosen_score"] - p["rejected_score"] for p in pairs
                               if p["kind"] == "actor")
    counts["judge_share"] = None if s.no_meta_judge else mean(p["kind"] == "judge" for p in pairs)
    return {"meta_judge": None if s.no_meta_judge else figures, "pairs": counts, "train": best}


def loop(run):
    """All iterations, from wherever the run's folder stands: the records of summary.json."""
    done = len(run.records())
    if done:
        run.draw_report()  # the process may have died before it drew the last one
    for t in range(done, run.settings.iters + 1):
        if not run.made(t):
            run.dropped.clear()
            run.finish(t, iterate(run, t) if t > 0 else warm_start(run))
        run.become(t)
        run.add_record(t, examine(run, t))
    run.tell_notes()
    return run.records()


def main(argv=None):
    with as_program(argv):
        settings, only_plan = parse_settings(argv, torch.cuda.is_available())
        if only_plan:
            return plan(settings, loop)
        settings, forecast = fit_hours(settings, loop) if settings.hours else (settings, None)
        run = Run(settings)
        run.forecast = forecast or foresee(run, loop)
        records = loop(run)
        print(table(records))
        last_words(settings, records)


if __name__ == "__main__":
    main()
