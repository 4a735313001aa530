"""Makes the tiny world from nothing: tokenizer, seed model, prompts, ranked replies, rubric, judge.
`python -m tiny.make [FOLDER]`

The seed model is an ordinary Llama of 0.8 M parameters, pre-trained on what the three roles of
Meta-Rewarding write. First it learns to read: every mark a judge or meta-judge gives is right. Then
it learns the habits that the method has to deal with: - actor: has each of the five elements with
the probability HAS, and pads. - judge: flips marks (NOISE), and sees elements that are not there,
the more so the more an answer is padded (FONDNESS). - meta-judge: goes element by element and is
mostly right (one verdict in ten is flipped), but on a tie says A.

A second, smaller model in judge/ does one thing only: it says which of two answers is better
(`eval.py compare`). It has not seen the seed model and takes no part in a run. It is mostly right
too, and says A on a tie.

Same machine, same versions: same bytes. Another machine: the same recipe, slightly other weights.
15 to 20 minutes on 2 CPU cores.
"""
import argparse
import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prompts import compare_prompt, fill, judge_prompt, meta_judge_prompt
from tiny.world import CHECKS, ELEMENTS, FAMILIES, MARKS, PADDING, QUESTIONS, RUBRICS, WORDING

# how often the seed actor has each element
HAS = {"aim": 0.65, "step": 0.6, "reason": 0.4, "example": 0.35, "check": 0.4}
# how often the seed actor writes 0, 1, 2, 3 padding sentences
PADS = [0.2, 0.3, 0.3, 0.2]
NOISE = [0.02, 0.1, 0.2]                # a judgment flips each mark with one of these probabilities
# chance per padding sentence that a missing element is marked "yes"
FONDNESS = 0.45
FLIPPED_VERDICTS = 0.1
STEPS, HABIT_STEPS, BATCH, LR = 1000, 400, 36, 2e-3
SEED_ROLES, JUDGE_ROLES = ("actor", "judge", "meta_judge"), ("compare",)

PRESET = {  # what `--model tiny` sets; the command line wins
    "prompts": "prompts.jsonl", "eval_prompts": "eval.jsonl", "eft": "ranked.jsonl",
          "ranked": "ranked_eval.jsonl", "rubric": "rubric.txt",
    "max_score": len(ELEMENTS), "prompts_per_iter": 60, "judgments": 7, "max_answer_tokens": 160,
          "max_judgment_tokens": 40,
    "max_verdict_tokens": 100, "lr": 5e-4, "batch_size": 16, "epochs": 4, "bits": 32,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + "
    "message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
# of each family's tasks
SPLITS = {"eval": slice(0, 1), "ranked": slice(1, 2), "train": slice(2, None)}


# ---- what the three roles write

def answer(rng, family, task, has, pads):
    """An answer with the elements in the set `has`, in order, and `pads` padding sentences anywhere
    between them.
    """
    words = {name: rng.choice(family[name]) for name in ELEMENTS[1:]} | {"task": task}
    sentences = [fill(rng.choice(WORDING[name]), **words) for name in ELEMENTS if name in has]
    for padding in rng.sample([s for style in PADDING.values() for s in style], pads):
        sentences.insert(rng.randint(0, len(sentences)), padding)
    return " ".join(sentences)


def judgment(rng, has, pads, noise, fondness, points=1):
    """The judge's marks and sum for an answer, with mistakes: returns (text, {element: its mark, 0
    to `points`}).
    """
    marks = {}
    for name in ELEMENTS:
        present = name in has or rng.random() < fondness * pads
        marks[name] = points * (present != (rng.random() < noise))
        wrong = (marks[name] > 0) != (name in has)
        # a finer scale can say that the judge is in doubt
        if points == 2 and rng.random() < (0.5 if wrong else noise):
            marks[name] = 1
    text = ", ".join(f"{name} {MARKS[points][mark]}" for name, mark in marks.items())
    return f"{text.capitalize()}.\nScore: {sum(marks.values())}", marks


def verdict(rng, has, marks_a, marks_b, flipped, points=1):
    """The meta-judge's reasoning and winner; right up to `flipped`, and A on a tie."""
    lines, lead = [], 0
    for name in ELEMENTS:
        off_a, off_b = (abs(marks[name] - points * (name in has)) for marks in (marks_a, marks_b))
        lead += (off_a < off_b) - (off_a > off_b)
        right = "A" if off_a < off_b else "B" if off_b < off_a else "neither" if off_a else "both"
        says = [MARKS[points][marks[name]] for marks in (marks_a, marks_b)]
        lines.append(f"{name.capitalize()} {'there' if name in has else 'missing'}, A {says[0]}, B "
                     f"{says[1]}: {right} right.")
    winner = "A" if (lead >= 0) != (lead != 0 and rng.random() < flipped) else "B"
    return "\n".join(lines) + f"\nWinner: Judgment {winner}"


def comparison(rng, has_a, has_b, flipped):
    """Which answer has more of the elements, one by one, and the winner; right up to `flipped`, and
    A on a tie.
    """
    who = {(True, True): "both", (True, False): "A", (False, True): "B", (False, False): "neither"}
    lead = len(has_a) - len(has_b)
    winner = "A" if (lead >= 0) != (lead != 0 and rng.random() < flipped) else "B"
    reasons = ", ".join(f"{name} {who[name in has_a, name in has_b]}" for name in ELEMENTS)
    return f"{reasons[0].upper()}{reasons[1:]}.\nWinner: Answer {winner}"


def some_elements(rng, has=None):
    """Each element with its own probability, or, for the judges' training, any number of them
    equally often.
    """
    if has:
        return {name for name in ELEMENTS if rng.random() < has[name]}
    return set(rng.sample(ELEMENTS, rng.randint(0, len(ELEMENTS))))


def example(rng, role, habits, points=1):
    """One training example of a role: (what the user says, what the model should answer)."""
    family = rng.choice(FAMILIES)
    task = rng.choice(family["task"])
    question = fill(rng.choice(QUESTIONS), task=task)
    if role == "actor":
        has = some_elements(rng, HAS)
        pads = max(rng.choices(range(len(PADS)), PADS)[0], not has)
        return question, answer(rng, family, task, has, pads)
    flipped = FLIPPED_VERDICTS if habits else 0
    if role == "compare":
        (has_a, text_a), (has_b, text_b) = (judged_answer(rng, family, task)[::2] for _ in range(2))
        return compare_prompt(question, text_a, text_b), comparison(rng, has_a, has_b, flipped)
    has, pads, response = judged_answer(rng, family, task)
    if role == "judge":
        noise, fondness = (rng.choice(NOISE), FONDNESS) if habits else (0, 0)
        said, _ = judgment(rng, has, pads, noise, fondness, points)
        return judge_prompt(question, response, RUBRICS[points]), said
    (text_a, marks_a), (text_b, marks_b) = (judgment(rng, has, pads, rng.choice([*NOISE, 0.4]),
                                                     FONDNESS, points) for _ in range(2))
    return meta_judge_prompt(question, response, text_a, text_b,
                             RUBRICS[points]), verdict(rng, has, marks_a, marks_b, flipped, points)


def judged_answer(rng, family, task):
    """An answer for a judge's training: (its elements, how many padding sentences, its text)."""
    has = some_elements(rng)
    pads = max(rng.randint(0, 4), not has)
    return has, pads, answer(rng, family, task, has, pads)


# ---- the data of a run

def prompt_records(split):
    """Every question of a split's tasks, each with one check per element: the ground truth of a
    run.
    """
    for family in FAMILIES:
        for task in family["task"][SPLITS[split]]:
            for question in QUESTIONS:
                checks = [fill(CHECKS[name], task=task) for name in ELEMENTS]
                yield family, task, {"prompt": fill(question, task=task), "checks": checks}


def ranked_replies(rng, split):
    """Prompts with four replies ranked as people would, 0 the best: by the number of elements
    alone.
    """
    for family, task, record in prompt_records(split):
        counts = sorted(rng.sample(range(len(ELEMENTS) + 1), 4), reverse=True)
        replies = []
        for rank, count in enumerate(counts):
            has = set(rng.sample(ELEMENTS, count))
            pads = max(rng.choices(range(len(PADS)), PADS)[0], not has)
            replies.append({"text": answer(rng, family, task, has, pads), "rank": rank})
        rng.shuffle(replies)
        yield {**record, "replies": replies}


def write_data(folder, seed, points=1):
    rng = random.Random(seed)
    files = {"prompts.jsonl": [record for *_, record in prompt_records("train")],
             "eval.jsonl": [record for *_, record in prompt_records("eval")],
             "ranked.jsonl": list(ranked_replies(rng, "ranked")),
             "ranked_eval.jsonl": list(ranked_replies(random.Random(seed + 1), "eval"))[::2]}
    rng.shuffle(files["prompts.jsonl"])
    for name, records in files.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "rubric.txt").write_text(RUBRICS[points] + "\n")
    (folder / "preset.json").write_text(json.dumps(PRESET | {"max_score": points * len(ELEMENTS)},
                                                   indent=1) + "\n")


# ---- tokenizer and model

def make_tokenizer(rng, points=1):
    """A byte-level BPE like Llama-3's, trained on what the seed's roles read and write."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for role in SEED_ROLES for _ in range(3000)
             for text in example(rng, role, True, points)]
    trainer = trainers.BpeTrainer(vocab_size=1536, min_frequency=50,
                                  special_tokens=[*SPECIAL.values(), *ROLES],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE,
                                   additional_special_tokens=ROLES, **SPECIAL)


def make_model(tokenizer, seed, width=128):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def encode(tokenizer, user, assistant):
    """(ids, labels) of one exchange; the labels leave the user's turn out."""
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(turns[:1], tokenize=False,
                                                            add_generation_prompt=True),
                              add_special_tokens=False)
    ids = tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False),
                           add_special_tokens=False)
    return ids, [-100] * len(prompt) + ids[len(prompt):]


def train(model, tokenizer, rng, roles=SEED_ROLES, points=1):
    """AdamW over fresh examples, equally many of each role; the last HABIT_STEPS with the habits.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.98))
    total = STEPS + HABIT_STEPS
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer,
                                                 lambda step: min(1, (step + 1) / 100,
                                                                  (total - step) / (0.6 * total)))
    losses = {}
    bar = tqdm(range(total), desc=f"pre-training: {', '.join(roles)}", unit="step")
    for step in bar:
        for role in roles:
            rows = [encode(tokenizer, *example(rng, role, step >= STEPS, points))
                    for _ in range(BATCH // 3)]
            width = max(len(ids) for ids, _ in rows)
            ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids))
                                for ids, _ in rows])
            labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
            loss = model(input_ids=ids, labels=labels).loss
            (loss / len(roles)).backward()
            losses[role] = round(0.95 * losses.get(role, loss.item()) + 0.05 * loss.item(), 3)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(losses, refresh=False)


def make_judge(tokenizer, seed):
    """The model that compares answers; in bfloat16, which halves its file."""
    model = make_model(tokenizer, seed, width=96)
    train(model, tokenizer, random.Random(seed), JUDGE_ROLES)
    return model.bfloat16()


def save(model, tokenizer, folder):
    model.generation_config.max_length = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent,
                        help="where to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--points", type=int, choices=MARKS, default=1,
                        help="of each element: with 2 the scale is finer, 0 to 10 "
                        "(default: %(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_data(args.folder, args.seed, args.points)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer(rng, args.points)
    model = make_model(tokenizer, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens",
          file=sys.stderr)
    train(model, tokenizer, rng, points=args.points)
    save(model, tokenizer, args.folder)
    save(make_judge(tokenizer, args.seed), tokenizer, args.folder / "judge")


if __name__ == "__main__":
    main()
