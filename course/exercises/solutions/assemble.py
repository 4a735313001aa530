"""Solution 13: one iteration of the method, put together from its steps."""

import metareward as m
from dpo import train_dpo
from harness import inputs


def iterate(run, t):
    """One iteration: M_{t-1} makes preferences out of nothing but prompts, and becomes M_t."""
    s = run.settings
    run.become(t - 1)
    prompts = inputs.choose_prompts(run, t)
    answers = m.finished_answers(m.answer(run, t, prompts), s.max_score, run.dropped)
    answers = m.score(run, t, answers)
    pairs = m.actor_pairs(answers, s.at("rho", t), s.at("max_response_chars", t), run.dropped)
    varied = m.most_varied(answers, s.seed, run.dropped)
    if t > s.judge_iters:
        varied = m.diagnostic_sample(varied, f"{s.seed}/{t}/diagnosed")
    compared = m.meta_judge(run, t, varied)
    weights = m.position_weights(*m.wins_by_place(compared))  # [E2]
    ratings = m.rate(compared, weights)  # [E3] [E4]
    run.save(t, "ratings.jsonl", ratings)
    if t <= s.judge_iters:
        limit = s.at("max_judgment_chars", t)
        pairs += m.judge_pairs(compared, ratings, run.rubric, limit, run.dropped)
    run.save(t, "pairs.jsonl", pairs)
    best = run.train(t, train_dpo, pairs, beta=s.beta, epochs=s.epochs)
    return told(compared, weights, pairs, best)


def told(compared, weights, pairs, best):
    """What an iteration leaves in summary.json."""
    figures = m.measure_meta_judge(compared) | {"weights": weights, "answers": len(compared)}
    counts = {kind: sum(pair["kind"] == kind for pair in pairs) for kind in ("actor", "judge")}
    return {"meta_judge": figures, "pairs": counts, "train": best}
