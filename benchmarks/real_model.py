"""Does a real pretrained model improve by its own judgments? It answers, judges and judges those.

    python benchmarks/real_model.py --model M

M is a model folder or a hub name. Each prompt asks for a sentence about a place in one of six
languages, and the seed often answers in English. A program tells in which language an answer is:
that is the truth, which makes what the seed is taught, and then only measures. (langdetect: `pip
install -r requirements-course.txt`.) The kinds of runs:

    judge            the whole method, from a seed that was taught to judge
    no-meta-judge    the same without the meta-judge: only the actor trains
    judge-once       the whole method, but only the first iteration trains the judge
    right-verdicts   the whole method, but the truth gives the verdicts: the most that a meta-judge
                     can bring
    checks           the reward is the truth (`--reward checks`)
    control          every answer's score is a random number, so that its pairs say nothing: what it
                     gains, it gains by chance
    shortness        the shorter answer is the better one, whatever its language: what is gained by
                     answers that get shorter

All start from the same seed. What it is taught are judgments of its own answers, comparisons of two
such judgments, and some of its answers, so that it goes on answering. A judgment names the language
that was asked for, then that of the answer, then the score. It is a careless reader's, who now and
then calls the language asked for English, or another language the one asked for (CARELESS says how
often: so that the judge which comes of it errs about as much in either direction; where all its
errors go one way, so do its pairs, and it breaks). The comparisons are right.

Measured is the share of answers in the language asked for, on held-out prompts about other places,
four answers each, and how far the answers stay sense: the log-probability of their tokens by the
model as it was before all teaching, and by another that never trains (--reader). Intervals are
95 %, by bootstrap over prompts, and "+-" a t-interval over seeds. Resumable: what is there is not
run again.
"""
import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import metareward
from benchmarks.ablations import interval as t_interval
from benchmarks.ablations import plot
from dpo import add_lora, answer_logps, train_sft
from eval import bootstrap, by_prompt
from harness.checks import language_of
from harness.commands.merge import save_model
from harness.files import read_jsonl, write_jsonl
from harness.inputs import given_examples
from harness.loading import load
from harness.run import Run
from harness.training import encode_examples
from sampling import Chat, sample

LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish", "it": "Italian", "pt": "Portuguese",
             "nl": "Dutch"}
NAMES = {**LANGUAGES, "en": "English"}
FORMS = ("What does {place} look like in the morning? One sentence, {language}.",
         "Tell me in one sentence why people like {place}. (Answer in {language}, please.)",
         "{language}, please: one sentence about {place}.",
         'Finish this story in one sentence, in {language}: "We came to {place} in the evening."',
         "A friend asks what you saw in {place}. Reply in {language}, in one sentence.")
PLACES = """\
a harbour|a busy market|a quiet library|a night train|a village square|a kitchen|a mountain path
an old bridge|a school yard|a garden|a ferry|a workshop|a castle|a beach|a hospital|a windmill
a bus stop|a cellar|a theatre|a lighthouse|a camp in the woods|a museum|a crossroads|a farmyard
a tower|a canal|a street after a parade|a waiting room|an attic|a small island|a river bank
a bakery|a lonely inn|a railway station|a playground|a church|a cave|a fair|a roof|a well"""
OTHER_PLACES = """\
a barn|a desert road|a fishing boat|a hotel lobby|a frozen lake|a palace|an orchard|a tent
a classroom|a mill|a prison|a ship's deck|a park bench|a tunnel|a wedding|a vineyard"""
HELD_OUT = 24  # prompts
TAUGHT = 48    # prompts of what is taught
TEACHING = {"epochs": 1, "batch_size": 8, "lr": 4e-4}
CARELESS = {"right": 0.20, "wrong": 0.07}  # the share of what is taught that is judged wrongly
RUBRIC = """\
Write "Asked: " and the language that the question wants, then "Written: " and the language in \
which the answer is written. The score is 1 if the two are the same, else 0."""
SETTINGS = {  # of the runs
    "bits": 16, "prompts-per-iter": 32, "responses": 6, "max-answer-tokens": 48, "epochs": 2,
    "batch-size": 4, "lr": 1e-4, "beta": 0.5, "rho": 0, "max-response-chars": 0, "judgments": 3,
    "max-judgment-tokens": 40, "max-verdict-tokens": 40, "max-score": 1, "max-judgment-chars": 0,
}
FLAGS = {"judge": ["--no-eft"], "no-meta-judge": ["--no-eft", "--no-meta-judge"],
         "judge-once": ["--no-eft", "--judge-iters", "1"],
         "right-verdicts": ["--no-eft"], "checks": ["--reward", "checks"],
         "control": ["--reward", "checks"], "shortness": ["--reward", "checks"]}
JUDGED = ("judge", "judge-once", "no-meta-judge", "right-verdicts")


def prompts(places, count, rng):
    """Records of different prompts, each with the check of its language."""
    records = {}
    while len(records) < count:
        code = rng.choice(list(LANGUAGES))
        text = rng.choice(FORMS).format(place=rng.choice(re.split(r"[|\n]", places)),
                                        language=LANGUAGES[code])
        records[text] = {"prompt": text, "checks": [{"id": "response_language", "language": code}]}
    return list(records.values())


def asked(record):
    """The language that a prompt asks for."""
    return LANGUAGES[record["checks"][0]["language"]]


def written(text):
    """The language of an answer."""
    return NAMES.get(language_of(text), "another")


# ---- the seed of all runs

def judgment(wanted, seen):
    return f"Asked: {wanted}\nWritten: {seen}\nScore: {int(wanted == seen)}"


def mistaken(wanted, there):
    """What a careless reader sees who is wrong about the score."""
    return "English" if there == wanted else wanted


def careless(wanted, there, rng):
    """A judgment as it is taught, wrong in CARELESS of all cases."""
    wrong = rng.random() < CARELESS["right" if there == wanted else "wrong"]
    return judgment(wanted, mistaken(wanted, there) if wrong else there)


def comparison(wanted, there):
    """A right judgment of an answer and a wrong one, as --eft has them."""
    return {"judgments": [judgment(wanted, seen) for seen in (there, mistaken(wanted, there))],
            "better": 0, "reason": f"The text is in {there}."}


def taught(args):
    """The folder of the model that was taught to judge."""
    return args.out / f"taught-{Path(args.model).name}"


def lessons(records, answers, rng):
    """What is taught, as a file for --eft has it: of each prompt two judgments and two comparisons,
    an answer in the language asked for, if there is one, and, of an answer under the same question
    in another language, one more judgment.

    answers: the four Samples of each record.
    """
    for record, group in zip(records, answers, strict=True):
        wanted, languages = asked(record), [written(one.text) for one in group]
        replies = [{"text": one.text, "score": int(there == wanted)}
                   for one, there in zip(group, languages)]
        for reply, there in zip(replies[:2], languages[:2]):
            reply["judgment"] = careless(wanted, there, rng)
        for reply, there in zip(replies[2:], languages[2:]):
            reply["comparisons"] = [comparison(wanted, there)]
        ended = [reply for reply, one in zip(replies, group) if one.finished]
        if ended:
            max(ended, key=lambda reply: reply["score"])["demonstration"] = True
        yield {**record, "replies": replies}
        other = rng.choice([name for name in LANGUAGES.values() if name != wanted])
        yield {"prompt_id": f"{record['prompt_id']}b",
               "prompt": record["prompt"].replace(wanted, other),
               "replies": [{"text": group[0].text, "score": int(languages[0] == other),
                            "judgment": careless(other, languages[0], rng)}]}


def teach(model, folder, count=TAUGHT):
    """Write a copy of the model that has learned to judge a little, and still answers.

    model: a folder or a hub name. count: of the prompts of what is taught, which it leaves beside
    the folder, a file for --eft.
    """
    rng = random.Random("warm start")
    records = [{**record, "prompt_id": f"{i}"}
               for i, record in enumerate(prompts(PLACES, count, rng))]
    model, tokenizer = load(model, bits=SETTINGS["bits"])
    answers = sample(model, tokenizer, [record["prompt"] for record in records], 4,
                     max_new_tokens=SETTINGS["max-answer-tokens"], seed="warm start")
    records = list(lessons(records, answers, rng))
    write_jsonl(f"{folder}.jsonl", records)
    examples = encode_examples(Chat(tokenizer), given_examples(records, RUBRIC, 1, Counter()))
    torch.manual_seed(0)
    model = add_lora(model, rank=16)
    steps = -(-len(examples) // TEACHING["batch_size"]) * TEACHING["epochs"]
    with tqdm(total=steps, desc="teaching", unit="step") as bar:
        for record in train_sft(model, examples, **TEACHING):
            if "step" in record:
                bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
                bar.update()
    save_model(model.merge_and_unload(), tokenizer, folder)


# ---- the runs

def chance(run, t, answers, label):
    """Stands in for Run.reward_scores: numbers that depend on nothing but the answer's place."""
    return [random.Random(f"{run.settings.seed}/{t}/{answer['id']}").random()
            for answer in answers]


def shortness(run, t, answers, label):
    """Stands in for Run.reward_scores: the fewer characters, the more."""
    return [-len(answer["text"]) for answer in answers]


def right_verdicts(run, t, varied):
    """Stands in for metareward.meta_judge: of two judgments that whose score is nearer to the truth
    wins, and none if both are as near.
    """
    compared = []
    for item in varied:
        off = np.abs(np.array(item["scores"]) - item["truth"])
        verdicts = np.sign(off[None, :] - off[:, None])
        said = [{"first": int(m), "second": int(n), "text": "the truth"}
                for m, n in np.argwhere(verdicts)]
        compared.append({**item, "verdicts": verdicts.tolist(), "said": said})
    run.save(t, "battles.jsonl", compared)
    return compared


STAND_INS = {"control": (Run, "reward_scores", chance),
             "shortness": (Run, "reward_scores", shortness),
             "right-verdicts": (metareward, "meta_judge", right_verdicts)}


def borrow(args, seed, out, kind):
    """Begin a judged run where that of "judge" was before the two part.

    Before its meta-judge first spoke they are the same: M_0's figures, its answers and judgments;
    and up to M_1 if the second iteration is where they part.
    """
    other, first = args.out / f"judge-{seed}", []
    if (other / "summary.json").exists():
        first = json.loads((other / "summary.json").read_text())
    if kind == "judge" or out.exists() or len(first) < 2:
        return
    shutil.copytree(other / "iter0", out / "iter0")
    if kind == "judge-once":
        shutil.copytree(other / "iter1", out / "iter1")
        (out / "summary.json").write_text(json.dumps(first[:2]))
    else:
        (out / "iter1").mkdir()
        for name in ("prompts", "responses", "judgments"):
            shutil.copy(other / "iter1" / f"{name}.jsonl", out / "iter1")
    config = json.loads((other / "config.json").read_text())
    config["settings"] |= {"no_meta_judge": kind == "no-meta-judge", "out": str(out),
                           "judge_iters": 1 if kind == "judge-once" else 2}
    (out / "config.json").write_text(json.dumps(config))


def run(args, seed, kind):
    """Make a run, if it is not there: its folder."""
    out = args.out / f"{kind}-{seed}"
    flags = {"model": taught(args), "out": out, "seed": seed, "iters": args.iters,
             "prompts": args.out / "prompts.jsonl", "eval-prompts": args.out / "held_out.jsonl",
             "rubric": args.out / "rubric.txt", **SETTINGS}
    if kind in JUDGED:
        borrow(args, seed, out, kind)
    command = [sys.executable, __file__, "--work", kind, *FLAGS[kind]]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    with open(f"{out}.log", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log)
    if done.returncode not in (0, 3):
        raise SystemExit(f"the run ended: see {out}.log")
    return out


# ---- what is measured of a run

def shares(out, models):
    """The held-out prompts' shares of answers in the language asked for, (models, prompts)."""
    return np.array([[np.mean([answer["truth"] for answer in group])
                      for group in by_prompt(read_jsonl(out / f"iter{t}" / "eval.jsonl")).values()]
                     for t in models])


def figures(out, models):
    """{what: a figure for each model} of the answers, the judge and the meta-judge."""
    summary = json.loads((out / "summary.json").read_text())
    rows = {}

    def tell(name, values):
        known = [value for value in values if value is not None]
        rows.setdefault(name, []).append(np.mean(known) if known else np.nan)

    for t in models:
        answers = read_jsonl(out / f"iter{t}" / "eval.jsonl")
        tell("answers: words", [len(one["text"].split()) for one in answers])
        tell("answers: repeated words", [repeated(one["text"]) for one in answers])
        if summary[t]["judge"] is None:
            continue
        for name in ("truth_agreement", "ties", "valid_rate"):
            tell(f"judge: {name}", [summary[t]["judge"][name]])
        # Every judge's judgments of M_0's answers.
        judged = answers if t == 0 else read_jsonl(out / f"iter{t}" / "eval_judge.jsonl")
        said = [(one, said) for one in judged for said in one["judgments"]]
        tell("judge: names the language", [
            f"Written: {there}\n" in of_one["text"] for one in judged
            for there in [written(one["text"])] for of_one in one["judgments"]])
        for met in (1, 0):
            tell(f"judge: right where it is {met}", [
                of_one["score"] == met for one, of_one in said if one["truth"] == met])
        for name, path in (("right", "truth_accuracy"), ("says the first", "first_position_rate"),
                           ("prefers the higher score", "higher_score_rate")):
            tell(f"meta-judge: {name}", [(summary[t]["meta_judge"] or {}).get(path)])
        for name in ("actor", "judge"):
            tell(f"{name} pairs", [summary[t]["pairs"][name]])
    return rows


def repeated(text):
    """The share of a text's words that stood in it before."""
    found = re.findall(r"\w+", text.lower())
    return 1 - len(set(found)) / len(found) if found else 0


@torch.no_grad()
def sense(reader, answers):
    """Nats per token of each answer by a model that never trained: how usual its words are.

    reader: (model, tokenizer). answers: records with a prompt and a text that has ended.
    """
    model, tokenizer = reader
    chat = Chat(tokenizer)
    means = []
    for group in by_prompt(answers).values():
        texts = [chat.answer(one["text"]) for one in group]
        logps = answer_logps(model, [chat.prompt(group[0]["prompt"])], [texts])
        means += (logps / torch.tensor([len(ids) for ids in texts])).tolist()
    return means


# ---- what is told

def table(results, iters):
    """A Markdown table: the share in the right language by each model, and the last one's gain."""
    yield "| run | seed | " + " | ".join(f"M_{t}" for t in range(iters + 1)) + " | gain |"
    yield "|" + "---|" * (iters + 4)
    for (kind, seed), of_run in {**results, **over_seeds(results)}.items():
        cells = [interval(share) for share in [*of_run, of_run[-1] - of_run[0]]]
        yield f"| {kind} | {seed} | " + " | ".join(cells) + " |"


def by_kind(results):
    """{name: its runs, one a seed} of each kind, and of its difference to the control's runs."""
    groups = {}
    for (kind, seed), of_run in results.items():
        groups.setdefault(kind, []).append(of_run)
        if kind != "control" and ("control", seed) in results:
            groups.setdefault(f"{kind} - control", []).append(of_run - results["control", seed])
    return groups


def over_seeds(results):
    """The means of the seeds of each kind, and their differences to the control of these seeds."""
    return {(name, "mean"): np.mean(runs, axis=0) for name, runs in by_kind(results).items()
            if len(runs) > 1 or name not in FLAGS}


def tell_gains(results):
    """Each kind's gain, and what it is more than the control's of the same seeds: means of the
    seeds, with 95 % t-intervals over these.
    """
    for name, runs in by_kind(results).items():
        if len(runs) > 1:
            gains = [np.mean(of_run[-1] - of_run[0]) for of_run in runs]
            print(f"{name}: gain {t_interval(gains, '.3f')} over {len(gains)} seeds")


def interval(values):
    low, high = bootstrap(np.mean, values)
    return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"


def tell_run(kind, seed, out, rows):
    minutes = sum(sum(record["seconds"].values())
                  for record in json.loads((out / "summary.json").read_text())) / 60
    print(f"{kind}, seed {seed}: {minutes:.0f} minutes")
    for name, row in rows.items():
        print(f"    {name:28}{' '.join(f'{figure:6.2f}' for figure in row)}", flush=True)


def tell_sense(args, kinds, models):
    """Nats per token of the held-out answers, by models that never trained."""
    for name in filter(None, (args.model, args.reader)):
        reader = load(name, bits=SETTINGS["bits"])
        for kind, seed in kinds:
            cells = []
            for t in models:
                answers = read_jsonl(args.out / f"{kind}-{seed}" / f"iter{t}" / "eval.jsonl")
                ended = [answer for answer in answers if answer["finished"]]
                cells.append(f"{np.mean(sense(reader, ended)):6.2f}")
            print(f"    {Path(name).name}, {kind}, {seed}: nats a token {' '.join(cells)}",
                  flush=True)


def tell_answers(out, last, count=10):
    """The first answers of M_0 and of the last model to some held-out prompts, side by side."""
    of_models = [by_prompt(read_jsonl(out / f"iter{t}" / "eval.jsonl")) for t in (0, last)]
    for prompt_id, group in list(of_models[0].items())[:count]:
        print(f"{group[0]['prompt']}")
        for t, of_model in zip((0, last), of_models):
            first = of_model[prompt_id][0]
            print(f"    M_{t} ({'right' if first['truth'] else 'wrong'}): {first['text']!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder or a hub name")
    parser.add_argument("--kinds", nargs="+", choices=list(FLAGS), help="of runs",
                        default=["judge", "no-meta-judge", "control"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each")
    parser.add_argument("--iters", type=int, default=3, help="iterations")
    parser.add_argument("--prompts", default="figures",
                        help="a word that the prompts are drawn by; another one for choices")
    parser.add_argument("--reader", help="a larger model that tells how usual the answers are")
    parser.add_argument("--out", type=Path, default=Path("runs/real-model"),
                        help="where the runs go")
    parser.add_argument("--plot", type=Path, help="an SVG of all runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng, models = random.Random(args.prompts), range(args.iters + 1)
    write_jsonl(args.out / "held_out.jsonl", prompts(OTHER_PLACES, HELD_OUT, rng))
    write_jsonl(args.out / "prompts.jsonl",
                prompts(PLACES, args.iters * SETTINGS["prompts-per-iter"], rng))
    (args.out / "rubric.txt").write_text(RUBRIC)
    if not taught(args).exists():
        teach(args.model, taught(args))
    results, told = {}, {}
    for seed in args.seeds:
        for kind in args.kinds:
            out = run(args, seed, kind)
            results[kind, seed] = shares(out, models)
            told[kind, seed] = figures(out, models)
            tell_run(kind, seed, out, told[kind, seed])
    print("\n".join(table(results, args.iters)))
    tell_gains(results)
    tell_sense(args, results, models)
    tell_answers(args.out / f"{args.kinds[0]}-{args.seeds[0]}", args.iters)
    if args.plot:
        upright = {"share in the language asked for": {
            key: of_run.mean(axis=1) for key, of_run in results.items()}}
        upright["share of pairs that the judge gets right"] = {
            key: rows["judge: truth_agreement"] for key, rows in told.items() if key[0] in JUDGED}
        plot({label: {kind: np.array([row for (of, _), row in rows.items() if of == kind])
                      for kind in args.kinds if any(of == kind for of, _ in rows)}
              for label, rows in upright.items() if rows}, args.plot)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:  # be one of the runs
        if sys.argv[2] in STAND_INS:
            setattr(*STAND_INS[sys.argv[2]])
        metareward.main(sys.argv[3:])
    else:
        main()
