"""The card of an adapter, or of a merged model, as hubs want it: a README.md beside its weights.

The same run writes the same bytes, so nothing is in it that depends on time or place, and nothing
is left to be filled in.
"""
import re
from pathlib import Path

from harness.files import write_whole
from harness.settings import method_of
from harness.views.figures import figure_rows, models

CARD = """\
---
{head}
---

# {title}

{licence} The main settings:

{recipe}

Nobody but its own run has measured this model. M_0 is where the run began, M_t the model after
iteration t; "actor" is the model as it answers held-out prompts, with scores from 0 to {top}, and
"judge" as it scores M_0's answers. A score by its own judgment is an opinion of itself.

{table}

In the folder of this file:

```python
{loading}
ids = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "How do I keep bread fresh?"}}], add_generation_prompt=True,
    return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=200)[0]))
```
"""
ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)"""
MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained(".") for kind in (AutoModelForCausalLM, AutoTokenizer))"""


def write_card(place, settings, records, merged=False):
    """Write README.md in a folder. records: of summary.json, the last one is this model's.

    merged: whether the folder holds a whole model, and not an adapter.
    """
    t, folder, known = records[-1]["iteration"], Path(settings.model).is_dir(), licence(settings)
    method = method_of(vars(settings))
    head = [f"library_name: {'transformers' if merged else 'peft'}",
            "pipeline_tag: text-generation",
            f"tags: [{'' if merged else 'lora, '}{method.lower().replace(' ', '-')}]"]
    if not folder:  # hubs refuse what is no name of theirs
        head += [f"base_model: {settings.model}",
                 f"base_model_relation: {'finetune' if merged else 'adapter'}"]
    if known:
        head.append(f"license: {known}")
    base = Path(settings.model).resolve().name if folder else settings.model
    rows = [["", *models(records)], ["---"] * (len(records) + 1), *figure_rows(records, "glance")]
    write_whole(Path(place, "README.md"), CARD.format(
        loading=MERGED if merged else ADAPTER, top=settings.max_score,
        head="\n".join(head),
        title=f"M_{t} of {method} on {base}" + ", adapter merged in" * merged,
        recipe=recipe(settings, t), table="\n".join(f"| {' | '.join(row)} |" for row in rows),
        licence=f"The base's licence is {known}." if known else "The base's licence is not known."
        if folder else "The base's own page says under which licence it stands."))


def licence(settings):
    """What the card in the base's folder calls its licence, or None."""
    try:
        card = (Path(settings.model) / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):  # there is none, or nobody can read it
        return None
    head = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    found = re.search(r"^license: *([\w.-]+) *$", head[1], re.MULTILINE) if head else None
    return found and found[1]


def recipe(s, t):
    """How M_t was made, in a few lines."""
    lines = [f"- a LoRA adapter of rank {s.lora_rank}, base in {s.bits} bits, seed {s.seed}"]
    if not s.no_eft:
        lines.append(f"- warm start on judgments of ranked replies, epochs: {s.eft_epochs}")
    if t == 0:
        return "\n".join(lines)
    lines.append(f"- iterations: {t}, prompts in each: {s.prompts_per_iter}, answers to each: "
                 f"{s.responses}, temperature {s.temperature:g}, top-p {s.top_p:g}")
    if s.reward == "judge":
        lines.append(f"- judgments of each answer, by the model itself: {s.judgments}")
    else:
        truth = s.reward == "checks"
        lines.append(f"- answers scored by {'their truth' if truth else Path(s.reward).name}")
    if s.judge_iters and not s.no_meta_judge:
        lines.append("- iterations, from the first, with pairs of judgments by the model as "
                     f"meta-judge: {min(t, s.judge_iters)}")
    rho = " ".join(f"{s.at('rho', i):g}" for i in range(1, t + 1))
    lines.append(f"- length control, rho in each iteration: {rho}")
    lines.append(f"- DPO with beta {s.beta:g}, learning rate {s.lr:g}, pairs a batch: "
                 f"{s.batch_size}, epochs, of which the best is kept: {s.epochs}")
    return "\n".join(lines)
