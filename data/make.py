"""Prompts whose answers a program can check: `python data/make.py`, the same files every time.

Each prompt is an everyday task and three demands on the answer, and carries a check for each (see
harness/checks.py): the true score of an answer is the share of the demands it meets. Writes
verifiable.jsonl (training) and verifiable_eval.jsonl (held out), which share no task, and puts some
of the latter between the open questions of eval.jsonl.
"""
import json
import random
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
EACH = 6          # prompts of each task
IN_EVAL = 48      # verifiable prompts in eval.jsonl, as many as open ones

TASKS = """\
Explain how a bicycle pump works|Describe a walk in the rain|Say why bread dough rises
Say what a lighthouse is for|Give advice on falling asleep|Describe how to paint a door
Explain why leaves fall in autumn|Tell a friend how to boil an egg|Say what makes a good neighbour
Describe a busy market|Explain what a compass does|Write about a cat on a wall
Tell a child why the sky is dark at night|Describe how to wash a wool jumper
Say how to choose a ripe melon|Explain how soap cleans hands|Write a note to a new colleague
Describe the smell of a bakery|Say why people keep diaries|Explain how a kite stays up
Tell someone how to mend a flat tyre|Describe a quiet library|Say what to pack for a hike
Explain why ice floats|Write about the first day of school|Say how to keep a houseplant alive
Describe a train journey by night|Explain what yeast is|Give advice on learning a song by heart
Say why bees matter to farmers|Describe how to fold a letter|Explain how a candle burns
Write about an old pair of shoes|Say how to make peace after a quarrel|Describe a storm at sea
Explain why we shake hands|Tell someone how to sharpen a pencil with a knife
Say what a good holiday needs|Describe the sound of a playground|Explain how a seed becomes a tree
Write an invitation to a picnic|Say how to clean a window|Describe a snowman that melts
Explain what a bridge must carry|Give advice on saving money for a trip|Say why maps have a scale
Describe a cook at work|Explain how to read a thermometer|Write about a lost umbrella
Say how to carry a heavy box|Describe a garden in spring|Explain why boats do not sink
Tell someone how to make tea|Say what a referee does|Describe a street after a parade
Explain how glasses help eyes|Write about a borrowed book|Say why clocks tick
Describe how to plant potatoes|Explain what a harvest is|Give advice on meeting a shy dog
Say how to find north without a compass"""

HELD_OUT = """\
Explain how a mirror is made use of in a car|Describe a harbour at dawn|Say why onions make us cry
Tell someone how to iron a shirt|Write about a tree in a yard|Explain what a recipe is for
Give advice on giving a speech|Describe a fisherman's morning|Say how to wrap a present
Explain why birds sing|Describe a ride on a ferry|Say what a museum guide does
Tell a child where honey comes from|Explain how an anchor holds a ship|Write about a broken cup
Say how to store apples for the winter|Describe a waiting room|Explain why salt melts snow
Give advice on moving house|Say what makes a story exciting|Describe a night under canvas
Explain how a lock keeps a door shut|Write a message to a sick friend|Say how to draw a line
Describe the last leaf on a branch|Explain what a map legend tells"""

WORDS = ["careful", "simple", "morning", "patience", "slowly", "quiet", "bright", "warm", "gentle",
         "useful", "steady", "clear"]
FIRST = ["First", "Sometimes", "Today", "Look", "Once", "Start"]


@dataclass(frozen=True)
class Demand:
    """One demand on an answer. Of each group a prompt has at most one."""
    kind: str
    group: str
    phrases: tuple   # ways to ask for it
    check: object    # see harness/checks.py


def demands(rng):
    """One demand of each kind, with a number or a word of its own."""
    few, many = rng.choice([20, 30, 40]), rng.choice([40, 50, 60])
    word, avoided = rng.sample(WORDS, 2)
    first, bullets = rng.choice(FIRST), rng.choice([2, 3, 4])
    return [
        Demand("at most", "length", (f"Use at most {few} words.", f"Stay within {few} words."),
               {"id": "number_words", "relation": "less than", "num_words": few + 1}),
        Demand("at least", "length", (f"Use at least {many} words.", f"Write {many} words or "
                                                                     "more."),
               {"id": "number_words", "relation": "at least", "num_words": many}),
        Demand("word", "word", (f'Use the word "{word}".', f'The word "{word}" must be in it.'),
               rf"(?i)\b{word}\b"),
        Demand("avoid", "avoid", (f'Do not use the words "you" and "{avoided}".',
                                  f'Leave out the words "you" and "{avoided}".'),
               {"id": "forbidden_words", "forbidden_words": ["you", avoided]}),
        Demand("no comma", "comma", ("Do not use commas.", "Write without any commas."),
               {"id": "no_comma"}),
        Demand("first", "begin", (f'Begin with the word "{first}".',
                                  f'Let "{first}" be the first word.'), rf"(?i)\A\W*{first}\b"),
        Demand("question", "end", ("End with a question mark.", "Let the last sentence ask "
                                   "something, with a question mark at its end."), r"\?\s*\Z"),
        Demand("ending", "end", ('End with the words "That is all."', 'Close with: That is all.'),
               {"id": "end_checker", "end_phrase": "That is all."}),
        Demand("postscript", "end", ("Add a postscript that starts with P.S.",
                                     "Put a P.S. at the end."),
               {"id": "postscript", "postscript_marker": "P.S."}),
        Demand("quotes", "end", ("Put the whole answer in double quotation marks.",
                                 "Let a double quotation mark stand at the very beginning and at "
                                 "the very end."), {"id": "quotation"}),
        Demand("bullets", "shape", (f"Give {bullets} bullet points, each on a line that starts "
                                    "with a star (*).", f"Make a list of exactly {bullets} lines "
                                    "that start with a dash (-)."),
               {"id": "number_bullet_lists", "num_bullets": bullets}),
        Demand("paragraphs", "shape", ("Write two paragraphs with a line of three stars (***) "
                                       "between them.",), {"id": "number_paragraphs",
                                                           "num_paragraphs": 2}),
        Demand("highlights", "shape", ("Put stars around two words or phrases, *like this*.",),
               {"id": "number_highlighted_sections", "num_highlights": 2}),
        Demand("lower", "case", ("Use lower-case letters only.", "Do not use capital letters."),
               r"\A[^A-Z]+\Z"),
        Demand("capitals", "case", ("Write in capital letters only.",), r"\A[^a-z]+\Z"),
        Demand("digits", "digits", ("Mention two numbers, in digits.",
                                    "Let at least two numbers stand in it, written in digits."),
               r"\d\D+\d"),
        Demand("title", "title", ("Give it a title in double angle brackets, <<so>>.",),
               {"id": "title"}),
        Demand("blanks", "blanks", ("Leave two blanks for names in square brackets, [so].",),
               {"id": "number_placeholders", "num_placeholders": 2}),
    ]


# Kinds that no answer could meet together, or only by a trick.
APART = {frozenset(pair) for pair in [
    ("lower", "postscript"), ("quotes", "bullets"), ("quotes", "first"), ("quotes", "title"),
    ("title", "first"), ("ending", "capitals"), ("first", "bullets"), ("at most", "blanks"),
    ("lower", "ending"), ("postscript", "bullets"), ("capitals", "highlights"), ("lower", "first"),
]}


def together(chosen):
    """Whether demands go together in one prompt."""
    groups = [demand.group for demand in chosen]
    pairs = {frozenset((a.kind, b.kind)) for a in chosen for b in chosen if a is not b}
    return len(set(groups)) == len(groups) and not pairs & APART


def prompts(tasks, rng):
    """EACH prompts of every task, no two with the same kinds of demands."""
    records = []
    for task in tasks.replace("\n", "|").split("|"):
        used = set()
        while len(used) < EACH:
            chosen = rng.sample(demands(rng), 3)
            names = frozenset(demand.kind for demand in chosen)
            if not together(chosen) or names in used:
                continue
            used.add(names)
            asked = " ".join(rng.choice(demand.phrases) for demand in chosen)
            records.append({"prompt": f"{task}. {asked}", "checks": [d.check for d in chosen]})
    rng.shuffle(records)
    return records


def write(file, records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (HERE / file).write_text(lines, encoding="utf-8")


def main():
    rng = random.Random("verifiable")
    training, held_out = prompts(TASKS, rng), prompts(HELD_OUT, rng)
    lines = (HERE / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    open_questions = [record for record in map(json.loads, lines) if "checks" not in record]
    write("verifiable.jsonl", training)
    write("verifiable_eval.jsonl", held_out)
    # In turn, so that the first few of them are of both kinds.
    pairs = zip(open_questions, held_out[:IN_EVAL], strict=True)
    write("eval.jsonl", [record for pair in pairs for record in pair])


if __name__ == "__main__":
    main()
