"""One prompt's journey through an iteration: told once, for the terminal and for the report.

`eval.py show RUN [PROMPT_ID]` prints it; the report has it of some prompts. It is a list of blocks,
which say nothing of how they are shown.
"""
import html
import textwrap
from collections import namedtuple
from pathlib import Path

from harness.files import each_line, iterations, read_jsonl
from harness.lines import visible
from harness.views.drawing import details, html_table, pre

Text = namedtuple("Text", "about text side", defaults=("", ""))  # side: "chosen", "rejected" or ""
Table = namedtuple("Table", "about head rows shaded", defaults=(0,))  # rows of strings; how many
# columns, behind the first, hold shares that a page shades
Fold = namedtuple("Fold", "title blocks")  # details: a terminal shows the first of them

JUDGMENTS = 3  # of an answer that are shown


# ---- what is told

def story(answers, pairs, battle=None, rating=None):
    """The blocks of one prompt, from its lines in an iteration's files.

    answers: of judgments.jsonl. pairs: of pairs.jsonl. battle, rating: of battles.jsonl and
    ratings.jsonl, if an answer's judgments were compared.
    """
    blocks = tell_answers(answers, pairs)
    if battle and rating:
        blocks += tell_battle(battle, rating, pairs)
    if not pairs:
        blocks.append(Text("No pair came of this prompt; the report counts what was dropped, and "
                           "why."))
    for pair in pairs:
        by = "score" if pair["kind"] == "actor" else "rating"
        told = [block.text for block in blocks if isinstance(block, Text)]
        blocks.append(Text(f"Trained on, {pair['kind']} pair: {by} {pair[f'chosen_{by}']:.2f} over "
                           f"{pair[f'rejected_{by}']:.2f}"))
        blocks += [Text(side, text, side) for side in ("chosen", "rejected")
                   if (text := pair[side][0]["content"]) not in told]
    return blocks


def tell_answers(answers, pairs):
    """Each answer with its scores, the best first; of those that train some judgments."""
    sides = {pair[side][0]["content"]: side for pair in pairs if pair["kind"] == "actor"
             for side in ("chosen", "rejected")}
    blocks = [Text("Answers (chosen: the shortest of those with good scores; rejected: the longest "
                   "of the bad) [E1]")]
    answers = sorted(answers, key=lambda answer: (answer["score"] is None, -(answer["score"] or 0)))
    for answer in answers:
        score = "none" if answer["score"] is None else f"{answer['score']:.2f}"
        about = [f"{answer['id']}: score {score}", f"{len(answer['text'])} characters"]
        if "truth" in answer:
            about.insert(1, f"true score {answer['truth']:.2f}")
        side = sides.get(answer["text"], "")
        blocks.append(Text(", ".join(about + [side] * bool(side)), answer["text"], side))
        said = [Text("", one["text"]) for one in answer.get("judgments", [])[:JUDGMENTS]]
        if said and (side or not sides and answer is answers[0]):
            blocks.append(Fold(f"Judgments of {answer['id']}", said))
    return blocks


def tell_battle(battle, rating, pairs=()):
    """An answer's judgments, how they fared against each other, and their ratings."""
    trained = [pair["chosen"][0]["content"] for pair in pairs if pair["kind"] == "judge"]
    texts, ratings, N = battle["texts"], rating["ratings"], len(battle["texts"])
    rows = [[f"{m}", *("." if m == n else f"{won:.2f}" for n, won in enumerate(row)),
             f"{ratings[m]:+.2f}", f"{battle['scores'][m]:g}"]
            for m, row in enumerate(rating["battles"])]
    blocks = [Table(f"Judgments of {battle['id']}, whose scores vary most: what each won against "
                    "each, a win in one order only by its place's weight [E3]",
                    ["", *map(str, range(N)), "rating [E4]", "its score"], rows, shaded=N)]
    order = sorted(range(N), key=lambda i: -ratings[i])
    ends = rating["pair"] or ()
    names = ("chosen", "rejected") if trained else ("rated highest", "rated lowest")
    about = dict(zip(ends, names))
    told = {m: Text(f"judgment {m}, rating {ratings[m]:+.2f}"
                    + (f", {about[m]}" if m in about else ""), texts[m],
                    about.get(m, "") if trained else "") for m in order}
    blocks += [told[m] for m in ends]
    said = {(one["first"], one["second"]): one["text"] for one in battle["said"]}
    m, n = rating["pair"] or next(iter(said), (0, 0))
    verdicts = [Text(f"The meta-judge of {first}, shown first, and {second}: "
                     f"{winner(battle, first, second)} wins", said[first, second])
                for first, second in ((m, n), (n, m)) if (first, second) in said]
    who = [[f"{m}", *(winner(battle, m, n) if (m, n) in said else "" for n in range(N))]
           for m in range(N)]
    everything = [told[m] for m in order if m not in ends]
    return blocks + verdicts + [Fold("Who won, and the other judgments", [
        Table("Who won, with the row shown first and the column second",
              ["", *map(str, range(N))], who), *everything])]


def winner(battle, m, n):
    """Which of two judgments won, m shown first."""
    return {1: f"{m}", -1: f"{n}", 0: "neither"}[battle["verdicts"][m][n]]


def gather(folder, pairs, notes=None):
    """{prompt_id: the arguments of its `story`}, from an iteration's folder.

    pairs: {prompt_id: its lines of pairs.jsonl}, of the prompts that are wanted. notes: as
    `each_line` takes them.
    """
    found = {prompt_id: {"answers": [], "pairs": mine} for prompt_id, mine in pairs.items()}
    for answer in each_line(folder / "judgments.jsonl", notes):
        if answer["prompt_id"] in found:
            found[answer["prompt_id"]]["answers"].append(answer)
    trained = any(pair["kind"] == "judge" for mine in pairs.values() for pair in mine)
    if not trained and not (folder / "battles.jsonl").exists():
        return found
    compared = {}
    for battle in each_line(folder / "battles.jsonl", notes):
        if battle["prompt_id"] in found:
            compared[battle["id"]] = battle
    for rating in each_line(folder / "ratings.jsonl", notes):
        if battle := compared.get(rating["id"]):
            found[battle["prompt_id"]] |= {"battle": battle, "rating": rating}
    return found


# ---- the two printers

def in_terminal(blocks):
    """The lines of blocks, no wider than a terminal."""
    for block in blocks:
        if isinstance(block, Fold):
            yield block.title
            yield from in_terminal(block.blocks[:1])
            continue
        yield from textwrap.wrap(block.about, 100) if block.about else ()
        if isinstance(block, Table):
            widths = [max(map(len, column)) for column in zip(block.head, *block.rows)]
            for row in [block.head, *block.rows]:
                yield "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)).rstrip()
        elif block.text:
            mark = {"chosen": "  + ", "rejected": "  - "}.get(block.side, "    ")
            for line in visible(block.text).splitlines():
                yield from textwrap.wrap(line, 96, initial_indent=mark,
                                         subsequent_indent=mark) or [mark]
        yield ""


def in_page(blocks):
    """The HTML of blocks, which escapes every text."""
    page = ""
    for block in blocks:
        if isinstance(block, Fold):
            page += details(block.title, in_page(block.blocks))
            continue
        page += f"<p>{html.escape(block.about)}</p>" if block.about else ""
        if isinstance(block, Table):
            page += html_table(block.head, block.rows, block.shaded)
        elif block.text:
            page += pre(block.text, {"chosen": "good", "rejected": "bad"}.get(block.side, ""))
    return page


# ---- the command

def command(args):
    """`eval.py show RUN [PROMPT_ID]`."""
    run = Path(args.run)
    trained = {t: read_jsonl(folder / "pairs.jsonl") for t, folder in iterations(run).items()
               if (folder / "pairs.jsonl").is_file()}
    if not trained:
        raise ValueError(f"{run} has no iteration with pairs.jsonl: it is no run's folder, or its "
                         "first iteration is under way")
    compared = [t for t, pairs in trained.items() if any(p["kind"] == "judge" for p in pairs)]
    asked = [t for t in trained for record in each_line(run / f"iter{t}" / "prompts.jsonl")
             if record["prompt_id"] == args.prompt_id]
    t = max(asked or compared or trained) if args.iteration is None else args.iteration
    if t not in trained:
        raise ValueError(f"{run} has no pairs of iteration {t}, only of "
                         f"{' '.join(map(str, sorted(trained)))}")
    folder, pairs = run / f"iter{t}", trained[t]
    answers = each_line(folder / "judgments.jsonl")
    # Without a prompt: one of which a pair of judgments came, or else one of answers.
    wanted = args.prompt_id or next((pair["prompt_id"] for kind in ("judge", "actor")
                                     for pair in pairs if pair["kind"] == kind), None)
    wanted = wanted or next((answer["prompt_id"] for answer in answers), "")
    mine = [pair for pair in pairs if pair["prompt_id"] == wanted]
    told = gather(folder, {wanted: mine})[wanted]
    if not told["answers"]:
        ids = list(dict.fromkeys(answer["prompt_id"] for answer in answers))
        if not ids:
            raise ValueError(f"iteration {t} of {run} has no answer that was finished")
        there = f"; it is one of iteration {asked[-1]}" if asked else ""
        raise ValueError(f"iteration {t} has no judged answers to a prompt {wanted}{there}; some "
                         f"that it has: {' '.join(ids[:10])}")
    print(f"Iteration {t} of {run}, prompt {wanted}, by M_{t - 1}\n\n"
          f"{visible(told['answers'][0]['prompt'])}\n")
    print("\n".join(in_terminal(story(**told))).rstrip())
