"""`eval.py show RUN [PROMPT_ID]`: one prompt's journey through an iteration, in the terminal."""
import itertools
import textwrap
from pathlib import Path

from harness.commands.conversation import visible
from harness.files import iterations, read_jsonl


def show(args):
    """Answers, judgments, comparisons, ratings, and the pairs that came of one prompt."""
    run = Path(args.run)
    trained = {t: read_jsonl(folder / "pairs.jsonl") for t, folder in iterations(run).items()
               if (folder / "pairs.jsonl").is_file()}
    if not trained:
        raise ValueError(f"{run} has no iteration with pairs.jsonl: it is no run's folder, or its "
                         "first iteration is under way")
    compared = [t for t, pairs in trained.items() if any(p["kind"] == "judge" for p in pairs)]
    asked = [t for t in trained if args.prompt_id and args.prompt_id in prompts_of(run, t)]
    t = max(asked or compared or trained) if args.iteration is None else args.iteration
    if t not in trained:
        raise ValueError(f"{run} has no pairs of iteration {t}, only of "
                         f"{' '.join(map(str, sorted(trained)))}")
    folder, pairs = run / f"iter{t}", trained[t]
    answers = read_jsonl(folder / "judgments.jsonl")
    ids = list(dict.fromkeys(answer["prompt_id"] for answer in answers))
    if not ids:
        raise ValueError(f"iteration {t} of {run} has no answer that was finished")
    # Without a prompt: one of which a pair of judgments came, or else one of answers.
    wanted = args.prompt_id or next((pair["prompt_id"] for kind in ("judge", "actor")
                                     for pair in pairs if pair["kind"] == kind), ids[0])
    if wanted not in ids:
        there = f"; it is one of iteration {asked[-1]}" if asked else ""
        raise ValueError(f"iteration {t} has no judged answers to a prompt {wanted}{there}; some "
                         f"that it has: {' '.join(ids[:10])}")

    def of_prompt(records):
        return [record for record in records if record["prompt_id"] == wanted]
    battles = of_prompt(read_jsonl(folder / "battles.jsonl"))
    ratings = {rating["id"]: rating for rating in read_jsonl(folder / "ratings.jsonl")}
    print(f"Iteration {t} of {run}, prompt {wanted}, by M_{t - 1}\n\n"
          f"{visible(of_prompt(answers)[0]['prompt'])}\n")
    print("\n".join([*answers_told(of_prompt(answers), of_prompt(pairs)), "",
                     *itertools.chain(*(battle_told(battle, ratings[battle["id"]])
                                        for battle in battles if battle["id"] in ratings)),
                     *pairs_told(of_prompt(pairs))]))


def prompts_of(run, t):
    """The ids of an iteration's prompts."""
    return {record["prompt_id"] for record in read_jsonl(run / f"iter{t}" / "prompts.jsonl")}


def answers_told(answers, pairs):
    """Each answer with its scores, the best first, and one judgment of the best."""
    sides = {pair[side][0]["content"]: side for pair in pairs if pair["kind"] == "actor"
             for side in ("chosen", "rejected")}
    yield f"Answers: score, {'true score, ' if 'truth' in answers[0] else ''}characters"
    yield "(chosen: the shortest of those with good scores; rejected: the longest of the bad) [E1]"
    answers = sorted(answers, key=lambda answer: (answer["score"] is None, -(answer["score"] or 0)))
    for answer in answers:
        score = "none" if answer["score"] is None else f"{answer['score']:.2f}"
        true = f"{answer['truth']:7.2f}" if "truth" in answer else ""
        side = sides.get(answer["text"], "")
        yield f"{score:>7}{true}{len(answer['text']):7}  {answer['id']} {side}".rstrip()
        yield from quoted(answer["text"])
    said = [(answer["id"], one["text"]) for answer in answers
            for one in answer.get("judgments", [])[:1]]
    for name, text in said[:1]:
        yield f"\nA judgment of {name}"
        yield from quoted(text)


def battle_told(battle, rating):
    """The comparisons of an answer's judgments: two verdicts, all battles, the ratings."""
    yield f"Judgments of {battle['id']}, whose scores vary most: what each won against each [E3]"
    N = len(battle["texts"])
    yield " " * 5 + "".join(f"{n:6}" for n in range(N)) + "   rating [E4]   its score"
    for m, row in enumerate(rating["battles"]):
        cells = "".join(f"{won:6.2f}" if m != n else "     ." for n, won in enumerate(row))
        yield f"{m:5}{cells}{rating['ratings'][m]:+14.2f}{battle['scores'][m]:12g}"
    said = {(one["first"], one["second"]): one["text"] for one in battle["said"]}
    places = rating["pair"] or next(iter(said), None)
    for m, n in [places, places[::-1]] if places else []:
        if (m, n) in said:
            winner = {1: m, -1: n, 0: "neither"}[battle["verdicts"][m][n]]
            yield f"\nThe meta-judge of {m}, shown first, and {n}: {winner} wins"
            yield from quoted(said[m, n])
    yield ""


def pairs_told(pairs):
    """What the prompt trains."""
    if not pairs:
        yield "No pair came of this prompt; the report counts what was dropped, and why."
    for pair in pairs:
        by = "score" if pair["kind"] == "actor" else "rating"
        yield (f"Trained on, {pair['kind']} pair: {by} {pair[f'chosen_{by}']:.2f} over "
               f"{pair[f'rejected_{by}']:.2f}")
        for side, mark in (("chosen", "+"), ("rejected", "-")):
            yield from quoted(pair[side][0]["content"], f"  {mark} ")


def quoted(text, mark="    "):
    """A text's lines, each after a mark, no longer than a terminal is wide."""
    for line in visible(text).splitlines():
        yield from textwrap.wrap(line, 96, initial_indent=mark, subsequent_indent=mark) or [mark]
