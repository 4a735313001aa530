"""Exercise 13: one iteration of the method, put together from its steps."""

import metareward as m
from dpo import train_dpo  # noqa: F401
from harness import inputs  # noqa: F401


def iterate(run, t):
    """One iteration: M_{t-1} makes preferences out of nothing but prompts, and becomes M_t.

    Returns what `told` makes of it. s = run.settings has the numbers; s.at(name, t) is a schedule's
    value in iteration t. These are the steps, in the order of the alphabet; `run.dropped` counts
    what a selection leaves out:

        m.actor_pairs(answers, rho, max_chars, run.dropped)      pairs of answers [E1]; schedules
                                                                 "rho" and "max_response_chars"
        m.answer(run, t, prompts)                                K answers to each prompt
        m.diagnostic_sample(varied, f"{s.seed}/{t}/diagnosed")   a few of them, compared for the
                                                                 figures alone
        m.finished_answers(answered, s.max_score, run.dropped)   those that may train, one by one
        inputs.choose_prompts(run, t)                            prompts that nobody has used
        m.judge_pairs(compared, ratings, run.rubric, max_chars, run.dropped)
                                                                 pairs of judgments; schedule
                                                                 "max_judgment_chars"
        m.meta_judge(run, t, varied)                             comparisons of its judgments
        m.most_varied(answers, s.seed, run.dropped)              of each prompt the answer whose
                                                                 scores vary most
        m.position_weights(*m.wins_by_place(compared))           [E2]
        m.rate(compared, weights)                                battles [E3], ratings [E4]
        run.become(t)                                            puts M_t's adapter into the model
        run.save(t, name, records)                               "ratings.jsonl", "pairs.jsonl"
        run.train(t, train_dpo, pairs, beta=s.beta, epochs=s.epochs)
                                                                 DPO [E5]: figures of the best epoch
        m.score(run, t, answers)                                 N judgments of each answer

    The judge trains in the iterations up to s.judge_iters; in later ones only a few answers are
    compared, and no pairs of judgments are made.
    """
    raise NotImplementedError


def told(compared, weights, pairs, best):
    """What an iteration leaves in summary.json; nothing to fill in."""
    figures = m.measure_meta_judge(compared) | {"weights": weights, "answers": len(compared)}
    counts = {kind: sum(pair["kind"] == kind for pair in pairs) for kind in ("actor", "judge")}
    return {"meta_judge": figures, "pairs": counts, "train": best}
