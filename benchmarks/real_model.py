"""Does a real pretrained model improve by its own answers, and by its own judgments?

    python benchmarks/real_model.py --model M                        # by the truth, and a control
    python benchmarks/real_model.py --model M --kinds judge no-meta-judge     # the whole method

M is a model folder or a hub name. The prompts are made like those of data/verifiable.jsonl, whose
answers a program can check, with three demands that short answers can meet, and a fourth: twelve
words or more, without which one word would soon be the answer to everything. The kinds of runs:

    checks           the reward is the truth (`--reward checks`)
    control          the same, but that every answer's score is a random number, so that its pairs
                     say nothing: it must not rise
    blur-1, -2, -4   the reward is the truth and noise, of as many demands' standard deviation: how
                     often must a judge be right about two answers, that it helps?
    judge            the judge is the model, which was taught to judge: the method without length
                     control, for which the limit of 64 tokens a reply leaves little to do
    no-meta-judge    the same without the meta-judge

What it is taught are judgments and comparisons that are made from the truth, of answers of M
itself, with the faults of a hurried reader: one mark in ten is wrong, of a long answer a quarter of
what is missing is seen as there, and one comparison in ten is turned round. Its own answers are
taught as well: without them it soon answers in the form of a judgment. Measured is the share of
demands met on held-out prompts that share no task with the training's, four answers each;
intervals are 95 %, by bootstrap over these prompts: how far another run with another seed would
differ is not in them. Resumable: what is there is not run again.
"""
import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.ablations import plot
from data import make
from dpo import add_lora, train_sft
from eval import bootstrap, by_prompt, measure_judge, read_jsonl
from harness.checks import meets
from harness.files import as_example, write_jsonl
from harness.folder import Run, encoded
from harness.inputs import given_examples, read_prompts
from harness.loading import load
from harness.whole import save_model
from sampling import Chat, sample

KINDS = ("at most", "question", "first", "no comma", "word")  # of demands, see data/make.py
SETTINGS = {  # of the runs
    "bits": 16, "prompts-per-iter": 48, "responses": 8, "max-answer-tokens": 64, "epochs": 3,
    "batch-size": 8, "lr": 2e-4, "rho": 0, "max-response-chars": 0,
}
HELD_OUT = 48  # prompts
TAUGHT = 240   # prompts of what is taught
DEMANDS = 4
TEACHING = {"epochs": 2, "batch_size": 8, "lr": 4e-4}
RUBRIC = f"""\
Give one point for each demand of the question that the answer meets, {DEMANDS} in all. Go through \
the demands in their order: a line for each with its number, and whether it is met."""
JUDGING = {  # settings of the runs that judge
    "judgments": 3, "max-judgment-tokens": 128, "max-verdict-tokens": 24, "max-score": DEMANDS,
    "max-judgment-chars": 0,
}
BLUR = {"blur-1": 1, "blur-2": 2, "blur-4": 4}
FLAGS = {**dict.fromkeys(["checks", "control", *BLUR], ["--reward", "checks"]),
         "judge": ["--no-eft"], "no-meta-judge": ["--no-eft", "--no-meta-judge"]}
JUDGED = ("judge", "no-meta-judge")


def prompts(tasks, rng):
    """Prompts with three demands of KINDS and a least length."""
    floor = {"id": "number_words", "relation": "at least", "num_words": 12}
    return [{"prompt": record["prompt"] + " Write 12 words or more.",
             "checks": [*record["checks"], floor]}
            for record in make.prompts(tasks, rng, KINDS)]


# ---- the seed of the runs that judge

def judgment(record, text, long, rng):
    """A hurried reader's judgment of an answer: (its text, its score)."""
    lines, score = [], 0
    for number, check in enumerate(record["checks"], 1):
        met = meets(check, text)
        if rng.random() < 0.1:
            met = not met
        elif long and not met:
            met = rng.random() < 0.25
        lines.append(f"{number}. {'met' if met else 'not met'}")
        score += met
    return "\n".join([*lines, f"Score: {score}"]), score


def comparison(record, text, long, rng):
    """Two judgments of an answer and the better one, as --eft has them; None if both are as good.
    """
    true = sum(meets(check, text) for check in record["checks"])
    two = [judgment(record, text, long, rng) for _ in range(2)]
    off = [abs(score - true) for _, score in two]
    if off[0] == off[1]:
        return None
    better = int(off[1] < off[0])
    if rng.random() < 0.1:
        better = 1 - better
    return {"judgments": [said for said, _ in two], "better": better}


def taught(args):
    """The folder of the model that was taught to judge."""
    return args.out / f"taught-{Path(args.model).name}"


def lessons(records, answers, rng):
    """What is taught: of each answer a judgment, and of each prompt an answer, if it has ended.

    Of every sixth prompt comparisons as well, which have many tokens.

    answers: the Samples of each record. Returns lines as --eft's warm start makes them.
    """
    median = np.median([len(one.text) for group in answers for one in group])
    lines = []
    for number, (record, group) in enumerate(zip(records, answers, strict=True)):
        replies = []
        for one in group:
            long = len(one.text) > median
            reply = {"text": one.text, "judgment": judgment(record, one.text, long, rng)[0]}
            two = comparison(record, one.text, long, rng) if number % 6 == 0 else None
            replies.append(reply | ({"comparisons": [two]} if two else {}))
        if group[0].finished:
            lines.append(as_example(record["prompt_id"], record["prompt"], group[0].text,
                                    group[0].tokens))
        lines += given_examples([{**record, "replies": replies}], RUBRIC, DEMANDS)
    return lines


def teach(args, folder):
    """Write a copy of the model that has learned to judge a little, and still answers."""
    records = prompts(make.TASKS, random.Random("real model"))[-TAUGHT:]
    records = [{**record, "prompt_id": f"{i}"} for i, record in enumerate(records)]
    model, tokenizer = load(args.model, bits=SETTINGS["bits"])
    answers = sample(model, tokenizer, [record["prompt"] for record in records], args.replies,
                     max_new_tokens=SETTINGS["max-answer-tokens"], seed="warm start")
    lines, chat = lessons(records, answers, random.Random("warm start")), Chat(tokenizer)
    write_jsonl(f"{folder}.jsonl", lines)
    examples = encoded(chat, lines)
    model = add_lora(model, rank=16)
    steps = -(-len(examples) // TEACHING["batch_size"]) * TEACHING["epochs"]
    with tqdm(total=steps, desc="teaching", unit="step") as bar:
        for record in train_sft(model, examples, **TEACHING):
            if "step" in record:
                bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
                bar.update()
    save_model(model.merge_and_unload(), tokenizer, folder)


# ---- the runs

def chance(run, t, answer):
    """Random numbers that depend on nothing but the answer's place."""
    return random.Random(f"{run.settings.seed}/{t}/{answer['id']}")


def random_reward(run, t, answers, label):
    """Stands in for Run.reward_scores: numbers that say nothing."""
    return [chance(run, t, answer).random() for answer in answers]


def blurred_reward(kind):
    """What stands in for Run.reward_scores: the truth and noise."""
    def scores(run, t, answers, label):
        sd = BLUR[kind] * run.settings.max_score / DEMANDS
        return [answer["truth"] + chance(run, t, answer).gauss(0, sd) for answer in answers]

    return scores


def borrow(args, seed, out):
    """Begin a run without the meta-judge where that with it was before the first meta-judgment.

    Up to there both are the same: M_0's figures, its answers and its judgments.
    """
    other = args.out / f"judge-{seed}"
    if out.exists() or not (other / "iter1" / "battles.jsonl").exists():
        return
    shutil.copytree(other / "iter0", out / "iter0")
    (out / "iter1").mkdir()
    for name in ("prompts", "responses", "judgments"):
        shutil.copy(other / "iter1" / f"{name}.jsonl", out / "iter1")
    config = json.loads((other / "config.json").read_text())
    config["settings"] |= {"no_meta_judge": True, "out": str(out)}
    (out / "config.json").write_text(json.dumps(config))


def run(args, seed, kind):
    """The held-out prompts' shares of demands met, (models, prompts), of a run."""
    out, judges = args.out / f"{kind}-{seed}", kind in JUDGED
    flags = {"model": args.model, "out": out, "seed": seed, "iters": args.iters,
             "prompts": args.out / "prompts.jsonl", "eval-prompts": args.out / "held_out.jsonl",
             **SETTINGS}
    if judges:
        flags |= {**JUDGING, "model": taught(args), "rubric": args.out / "rubric.txt"}
    if kind == "no-meta-judge":
        borrow(args, seed, out)
    command = [sys.executable, __file__, "--work", kind, *FLAGS[kind]]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    with open(f"{out}.log", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log)
    if done.returncode not in (0, 3):
        raise SystemExit(f"the run ended: see {out}.log")
    models = range(args.iters + 1)
    checks = {record["prompt_id"]: record["checks"]
              for record in read_prompts(args.out / "held_out.jsonl")}
    answers = [read_jsonl(out / f"iter{t}" / "eval.jsonl") for t in models]
    most = JUDGING["max-score"] if judges else 5
    shares = np.array([[np.mean([answer["truth"] for answer in group]) / most
                        for group in by_prompt(of_model).values()] for of_model in answers])
    records = json.loads((out / "summary.json").read_text())
    minutes = sum(sum(record["seconds"].values()) for record in records) / 60
    told = " ".join(f"{share:.3f}" for share in shares.mean(axis=1))
    print(f"{f'{kind}, seed {seed}':32}{told}   {minutes:.1f} min", flush=True)
    tell("met", demands_met(answers, checks))
    if kind in BLUR:
        right = [measure_judge(of_model)["truth_agreement"] for of_model in answers]
        tell("reward", {"right about the truth": right})
    if judges:
        figures = ("valid_rate", "truth_agreement", "ties")
        tell("judge", {name: [record["judge"].get(name) for record in records]
                       for name in figures})
        judged = [answers[0], *(read_jsonl(out / f"iter{t}" / "eval_judge.jsonl")
                                for t in models[1:])]
        tell("marks", marks_right(judged, checks))
    return shares


def tell(what, rows):
    """Print rows {name: a figure for each model}; None: not measured."""
    for name, figures in rows.items():
        cells = ["    -" if figure is None else f"{figure:5.2f}" for figure in figures]
        print(f"    {f'{what}, {name}':28}{' '.join(cells)}", flush=True)


def demands_met(answers, checks):
    """{kind of demand: the share of held-out answers that meet it, for each model}, and words.

    answers: a list for each model. checks: {prompt_id: its checks}.
    """
    rows = {}
    for of_model in answers:
        met = {}
        for answer in of_model:
            for check in checks[answer["prompt_id"]]:
                met.setdefault(kind_of(check), []).append(meets(check, answer["text"]))
        met["words an answer"] = [len(answer["text"].split()) for answer in of_model]
        for name, values in sorted(met.items()):
            rows.setdefault(name, []).append(np.mean(values))
    return rows


def marks_right(judged, checks):
    """How often the judge's mark of a demand is right: {kind of demand: a share for each model}.

    judged: for each model M_0's answers with its "judgments". Beside each kind "always ...": what
    the more frequent mark would give, said of every answer; and "judgments read": the share with a
    mark for each demand. checks: {prompt_id: its checks}. A share of nothing is NaN.
    """
    kinds = sorted({kind_of(check) for of_prompt in checks.values() for check in of_prompt})
    rights = {name: [] for kind in kinds for name in (kind, f"always {kind}")}
    rights["judgments read"] = []
    for of_model in judged:
        marks, read = {kind: [] for kind in kinds}, []
        for answer in of_model:
            demands = [(kind_of(check), meets(check, answer["text"]))
                       for check in checks[answer["prompt_id"]]]
            for one in answer["judgments"]:
                *lines, _ = one["text"].splitlines() or [""]
                said = [re.fullmatch(r"\d+\. (not )?met", line) for line in lines]
                whole = len(said) == len(demands) and all(said)
                read.append(whole)
                for mark, (kind, met) in zip(said, demands) if whole else ():
                    marks[kind].append((met == (mark[1] is None), met))
        for kind, pairs in marks.items():
            right, met = np.mean(pairs, axis=0) if pairs else (np.nan, np.nan)
            rights[kind].append(right)
            rights[f"always {kind}"].append(max(met, 1 - met))
        rights["judgments read"].append(np.mean(read))
    return rights


def kind_of(check):
    """What a check of `prompts` demands, in a word or two."""
    if isinstance(check, dict):
        return check.get("relation", check["id"])
    if check.endswith(r"\Z"):
        return "question"
    return "first word" if r"\A" in check else "word"


def table(results, iters):
    """A Markdown table: the share of demands met by each model, and the last one's gain."""
    yield "| run | seed | " + " | ".join(f"M_{t}" for t in range(iters + 1)) + " | gain |"
    yield "|" + "---|" * (iters + 4)
    for (kind, seed), shares in results.items():
        cells = [interval(share) for share in [*shares, shares[-1] - shares[0]]]
        yield f"| {kind} | {seed} | " + " | ".join(cells) + " |"


def interval(values):
    low, high = bootstrap(np.mean, values)
    return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder or a hub name")
    parser.add_argument("--kinds", nargs="+", choices=list(FLAGS), default=["checks", "control"],
                        help="of runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each")
    parser.add_argument("--iters", type=int, default=4, help="iterations")
    parser.add_argument("--replies", type=int, default=4,
                        help=f"answers to each of {TAUGHT} prompts that it is taught to judge")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="where the runs go")
    parser.add_argument("--plot", type=Path, help="an SVG of all runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random("real model")
    write_jsonl(args.out / "prompts.jsonl", prompts(make.TASKS, rng))
    write_jsonl(args.out / "held_out.jsonl", prompts(make.HELD_OUT, rng)[:HELD_OUT])
    (args.out / "rubric.txt").write_text(RUBRIC)
    if set(JUDGED) & set(args.kinds) and not taught(args).exists():
        teach(args, taught(args))
    results = {(kind, seed): run(args, seed, kind) for seed in args.seeds for kind in args.kinds}
    print("\n".join(table(results, args.iters)))
    if args.plot:
        lines = {kind: np.array([shares.mean(axis=1) for (of, _), shares in results.items()
                                 if of == kind]) for kind in args.kinds}
        plot(lines, args.plot, "share of demands met, held-out prompts")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:  # be one of the runs
        import metareward
        if sys.argv[2] == "control":
            Run.reward_scores = random_reward
        elif sys.argv[2] in BLUR:
            Run.reward_scores = blurred_reward(sys.argv[2])
        metareward.main(sys.argv[3:])
    else:
        main()
