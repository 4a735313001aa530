"""Which of a run's models to take, by what was measured and is not the model's own opinion.

The last one is not always the best. Held-out prompts with checks tell; people's ranks tell of the
judge alone; a model's score of itself tells nothing.
"""
from pathlib import Path

import numpy as np

from eval import FEWEST, bootstrap, by_prompt, mean
from harness.files import each_line
from harness.views.figures import look_up

COMPARE = "python eval.py compare {out}/iter{last} {out}/iter0 --judge MODEL"


def choose(out, records, max_score):
    """(The iteration to take, None if it cannot be told, and the sentences that say why).

    out: the run's folder. records: of its summary.json.
    """
    truths = {record["iteration"]: prompt_means(out, record["iteration"]) for record in records}
    lost = [f"M_{t}" for t, of_prompt in truths.items() if not of_prompt]
    known = {t: of_prompt for t, of_prompt in truths.items() if of_prompt}
    if len(known) > 1 or len(records) == len(known) == 1:
        prompts = sorted(set.intersection(*map(set, known.values())))
        best, lines = by_truth({t: np.array([of_prompt[prompt] for prompt in prompts])
                                for t, of_prompt in known.items()}, max_score)
        lines += [f"Of {', '.join(lost)} the held-out answers are missing."] * bool(lost)
        return best, lines
    why = "no held-out prompt has checks, and a model's score of itself is its opinion"
    if any(look_up(record, "actor.truth") is not None for record in records):
        why = f"the held-out answers of {', '.join(lost)} are missing"
    elif any(look_up(record, "actor.reward") is not None for record in records):
        why = "no held-out prompt has checks, and the reward is what it trained for"
    lines = [f"Which model answers best cannot be told from this run: {why}. Ask a judge that took "
             f"no part in it: {COMPARE.format(out=out, last=records[-1]['iteration'])}"
             ] if len(records) > 1 else []
    return None, lines + best_judge(records)


def prompt_means(out, t):
    """{prompt: the mean true score of M_t's answers to it} of the held-out prompts with checks."""
    answers = [answer for answer in each_line(Path(out) / f"iter{t}" / "eval.jsonl", [])
               if answer.get("truth") is not None]
    return {prompt: mean(answer["truth"] for answer in group)
            for prompt, group in by_prompt(answers).items()}


def by_truth(table, max_score):
    """What `choose` returns. table: {t: M_t's mean true score of each prompt, an array (n,)}.

    The best is better than another if the 95 % interval of the difference, over the same prompts
    drawn anew, is above 0.
    """
    best = max(table, key=lambda t: table[t].mean())
    n = len(table[best])
    line = f"Best by the truth: M_{best}, {table[best].mean():.2f} of {max_score}"
    if len(table) == 1:
        return best, []
    if n < FEWEST:
        return best, [f"{line}, on {n} prompts with checks, too few to be sure."]
    low, high = bootstrap(np.mean, table[best])
    lines = [f"{line} ({low:.2f} to {high:.2f}, 95 % interval over {n} prompts)."]
    alike = {}  # {a model that the best may be before by chance: that in words}
    for t in [t for t in table if t != best]:
        better = table[best] - table[t]
        low, high = bootstrap(np.mean, better)
        if low <= 0:
            alike[t] = f"M_{t} (better by {better.mean():.2f}, {low:+.2f} to {high:+.2f})"
    if alike:
        lines.append(f"It may be chance that it is before {', '.join(alike.values())}.")
    if best == 0 or 0 in alike:
        lines.append("So nothing shows that the run made its answers better.")
    return best, lines


def best_judge(records):
    """A sentence on whose judge agrees best with people, if people ranked replies."""
    path = "judge.human_agreement"
    known = [record for record in records if look_up(record, path) is not None]
    if len(known) < 2:
        return []
    best = max(known, key=lambda record: look_up(record, path))
    low, _ = look_up(best, f"{path}_interval") or (0, 1)
    alike = [f"M_{record['iteration']}" for record in known
             if record is not best and (look_up(record, f"{path}_interval") or (0, 1))[1] >= low]
    told = f"; the intervals of {', '.join(alike)} reach as far" if alike else ""
    return [f"As a judge M_{best['iteration']} agrees best with people: in "
            f"{look_up(best, path):.0%} of the ranked pairs that it does not tie{told}. That says "
            "nothing of its answers."]
