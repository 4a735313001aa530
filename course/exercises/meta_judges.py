"""Six simulated meta-judges for exercise 7, nothing to fill in. `python
course/exercises/meta_judges.py` prints what is first seen of them.
"""

import numpy as np

# name: (advantage of the first place in nats, spread of the judgments' qualities, share of verdicts
# that do not parse, answers)
KINDS = {
    "decided": (0.0, 3.0, 0.0, 60),
    "mumbling": (0.0, 1.0, 0.4, 60),
    "new": (0.0, 1.0, 0.0, 4),
    "hasty": (0.8, 3.0, 0.1, 60),
    "late": (-0.6, 1.0, 0.1, 60),
    "subtle": (0.25, 0.5, 0.0, 120),
}


def simulate(rng, advantage, spread, malformed, answers, judgments=7):
    """Records as in battles.jsonl, less the texts: P(m, shown first, beats n) = sigmoid(q_m - q_n +
    advantage), the qualities q unseen.
    """
    records = []
    for i in range(answers):
        q = rng.normal(0, spread / np.sqrt(2), judgments)
        wins = rng.random((judgments, judgments)) < 1 / (
            1 + np.exp(-(q[:, None] - q[None, :] + advantage))
        )
        said = rng.random((judgments, judgments)) >= malformed
        verdicts = np.where(wins, 1, -1) * said * (1 - np.eye(judgments, dtype=int))
        records.append(
            {
                "id": f"{i}/0",
                "verdicts": verdicts.tolist(),
                "scores": rng.integers(0, 6, judgments).tolist(),
            }
        )
    return records


def planted(seed):
    """The six under the letters A to F, in an order that depends on the seed: ({letter: records},
    {letter: true advantage}).
    """
    rng = np.random.default_rng(seed)
    names = rng.permutation(list(KINDS)).tolist()
    return (
        {letter: simulate(rng, *KINDS[name]) for letter, name in zip("ABCDEF", names)},
        {letter: KINDS[name][0] for letter, name in zip("ABCDEF", names)},
    )


def main():
    print("meta-judge  answers  first won  second won  neither")
    for letter, records in planted(0)[0].items():
        said = np.concatenate(
            [
                np.array(record["verdicts"])[~np.eye(len(record["scores"]), dtype=bool)]
                for record in records
            ]
        )
        first, second, none = ((said == one).mean() for one in (1, -1, 0))
        print(f"{letter:10}{len(records):>9}{first:>11.1%}{second:>12.1%}{none:>9.1%}")


if __name__ == "__main__":
    main()
