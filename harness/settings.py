"""The settings of a run: one dataclass, the command line made from it, and a model's own defaults.

No torch in here, so that a wrong flag or `--help` need not wait for it.
"""
import argparse
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

from harness.files import read_json

HERE = Path(os.path.relpath(Path(__file__).parent.parent))  # the project
DIAGNOSED = 20  # answers whose judgments are compared for the figures alone, where no judge trains
GPU_MODEL, CPU_MODEL = "meta-llama/Meta-Llama-3-8B-Instruct", HERE / "tiny"


def option(default, help, **more):
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Settings:
    """Every setting of a run. Schedules hold one value per iteration, or one for all."""

    iters: int = option(4, "iterations", least=1)
    model: str = option(None, f"hub name or folder (default: {GPU_MODEL} on CUDA, "
                              "the tiny world elsewhere)")
    out: str = option(None, "the run's folder; an existing one is resumed "
                            "(default: runs/ and the model's name)")
    seed: int = option(0, "of every random choice", least=0)
    prompts: str = option(None, "JSON lines, a JSON list, CSV, or one prompt a line "
                                "(default: the model invents them from data/seeds.jsonl)")
    prompts_per_iter: int = option(5000, "prompts per iteration, none used twice", least=1)
    hours: float = option(None, "how long the run may take: --prompts-per-iter is chosen for that, "
                                "by trials on a few prompts")
    eval_prompts: str = option(str(HERE / "data" / "eval.jsonl"),
                               "held-out prompts that measure and never train")
    responses: int = option(7, "answers per prompt (K)", least=2)
    judgments: int = option(11, "judgments per answer (N)", least=1)
    comparisons: int = option(None, "of an answer's judgments with each other, by the meta-judge "
                                    "(default: all N(N-1))", least=2)
    rho: tuple = option((0.0, 0.32, 0.32, 0.40), "length control per iteration, 0 = none",
                        type=float)
    judge_iters: int = option(2, "how many iterations, from the first, train the judge too",
                              least=0)
    max_response_chars: tuple = option(
        (2500, 0, 0, 0), "a longer chosen answer drops its pair, per iteration, 0 = no limit",
        type=int)
    max_judgment_chars: tuple = option(
        (1100, 1000, 0, 0), "a longer chosen judgment drops its pair, per iteration, 0 = no limit",
        type=int)
    max_answer_tokens: int = option(1024, "longest answer, in tokens", least=1)
    max_judgment_tokens: int = option(512, "longest judgment, in tokens", least=1)
    max_verdict_tokens: int = option(512, "longest meta-judgment, in tokens", least=1)
    temperature: float = option(0.8, "of all sampling")
    top_p: float = option(0.95, "of all sampling")
    beta: float = option(0.1, "of DPO")
    lr: float = option(5e-5, "peak learning rate of the adapter")
    batch_size: int = option(32, "pairs per optimizer step", least=1)
    epochs: int = option(10, "of DPO; the best one on held-out pairs is kept", least=1)
    eft_epochs: int = option(3, "of the warm start", least=1)
    lora_rank: int = option(16, "rank of the adapter", least=1)
    bits: int = option(None, "4 (NF4), 16 or 32 (default: 4 on CUDA, 32 elsewhere)",
                       choices=[4, 16, 32])
    max_tokens_in_cache: int = option(None, "keys and values that sampling keeps, in tokens "
                                            "(default: what fits into memory)", least=1)
    rubric: str = option(None, "a file with another rubric; needs --max-score")
    max_score: int = option(5, "the rubric's highest score", least=1)
    eft: str = option(None, "human-ranked replies for the warm start "
                            "(default: oasst1 from the hub)")
    ranked: str = option(None, "human-ranked replies that measure the judge and never "
                               "train (default: a quarter of --eft's)")
    reward: str = option("judge", "what scores answers: judge (the method), checks (the truth, "
                                  "of prompts that have \"checks\"), or a reward model's hub name "
                                  "or folder; without a judge nothing but the actor trains")
    no_meta_judge: bool = option(False, "ablation: train the actor only "
                                        "(Self-Rewarding with length control)")
    no_position_weights: bool = option(False, "ablation: a win counts the same "
                                              "shown first or second")
    no_eft: bool = option(False, "ablation: no warm start")

    def __post_init__(self):
        if self.reward != "judge":  # nobody judges, so there is nothing to teach a judge either
            object.__setattr__(self, "no_meta_judge", True)
            object.__setattr__(self, "no_eft", True)

        def check(good, name, must):
            if not good:
                value = getattr(self, name)
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise ValueError(f"{flag(name)} must be {must}, not {shown}")

        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if "least" in field.metadata and value is not None:
                check(value >= field.metadata["least"], name, f"at least {field.metadata['least']}")
            if field.type is tuple:
                check(len(value) in (1, self.iters) or value == field.default, name,
                      f"1 or {self.iters} values, one per iteration")
        check(self.bits in (None, 4, 16, 32), "bits", "4, 16 or 32")
        check(self.reward != "", "reward", "judge, checks, or a model")
        check(self.judgments >= 2 or self.no_meta_judge, "judgments", "at least 2")
        check(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(0 < self.beta < math.inf, "beta", "above 0")
        check(self.hours is None or 0 < self.hours < math.inf, "hours", "above 0")
        check(0 < self.lr < math.inf, "lr", "above 0")
        check(0 < self.temperature < math.inf, "temperature",
              "finite and above 0 (at 0 all answers to a prompt would be the same)")
        check(min(self.max_response_chars) >= 0, "max_response_chars", "0 or more")
        check(min(self.max_judgment_chars) >= 0, "max_judgment_chars", "0 or more")
        check(all(0 <= rho <= 1 for rho in self.rho), "rho", "in [0, 1]")

    def at(self, name, t):
        """The value of a schedule in iteration t = 1, 2, ...; the last value goes on."""
        values = getattr(self, name)
        return values[min(t, len(values)) - 1]


def method_of(settings):
    """What the field calls a run with these settings, a dict; {}: nobody knows them."""
    if settings.get("reward", "judge") != "judge":
        return "Iterative DPO"
    trains_judge = settings.get("judge_iters") and not settings.get("no_meta_judge")
    return "Meta-Rewarding" if trains_judge else "Self-Rewarding" if settings else "A run"


def flag(name):
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are ValueErrors, as all bad input is."""

    def error(self, message):
        raise ValueError(f"{message}; --help shows what there is")


def settings_parser():
    """The parser of the main command: a flag for each setting, and --plan."""
    parser = Parser(
        description="Meta-Rewarding: a model trains itself as actor and as judge.",
        allow_abbrev=False, epilog="Defaults are the paper's; a model folder's preset.json, such "
                                   "as tiny/preset.json, comes before them.")
    for field in dataclasses.fields(Settings):
        about, kind = field.metadata["help"], field.type
        if field.default is not None and kind is not bool:
            shown = " ".join(map(str, field.default)) if kind is tuple else field.default
            about += f" (default: {shown})"
        if kind is bool:
            how = {"action": "store_true", "default": None}
        elif kind is tuple:
            how = {"type": field.metadata["type"], "nargs": "+", "metavar": "X"}
        else:
            how = {"type": kind, "choices": field.metadata.get("choices")}
        parser.add_argument(flag(field.name), help=about, **how)
    parser.add_argument("--plan", action="store_true",
                        help="say what the run will cost on this machine, and stop before it")
    return parser


def parse_settings(argv=None, cuda=False):
    """(Settings, whether only the plan is wanted).

    The command line comes before the model folder's preset.json, and that before the defaults.
    cuda: whether there is a GPU, which decides about the default model and its bits; None: that is
    not known yet, and nothing is said.
    """
    arguments = vars(settings_parser().parse_args(argv))
    given = tupled({name: value for name, value in arguments.items() if value is not None})
    only_plan = given.pop("plan")
    if only_plan and "hours" in given:
        raise ValueError("--plan says what a run costs, --hours chooses one: give one of the two")
    if "model" not in given:
        given["model"] = GPU_MODEL if cuda else str(CPU_MODEL)
        if cuda is False:
            print(f"No CUDA GPU found: running the tiny world ({given['model']}) on the CPU. "
                  "Another model: --model NAME_OR_FOLDER.")
    if "hours" in given and "prompts_per_iter" in given:
        raise ValueError("--hours chooses --prompts-per-iter: give one of the two")
    if "rubric" in given and "max_score" not in given:
        raise ValueError("--rubric needs --max-score, the highest score that the rubric gives")
    defaults = {"out": f"runs/{Path(given['model']).name}", "bits": 4 if cuda else 32}
    return Settings(**defaults | read_preset(given["model"]) | given), only_plan


def read_preset(model):
    """The defaults a model folder wants, its preset.json; the files it names stand beside it."""
    file = Path(model) / "preset.json"
    preset = read_json(file, dict)
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for name, value in preset.items():
        if name not in fields or not fits(value, fields[name]):
            raise ValueError(f"{file}: {name}: no setting, or not of the right type")
    if "rubric" in preset and "max_score" not in preset:
        raise ValueError(f"{file}: rubric needs max_score, the highest score that the rubric gives")
    for name in preset.keys() & {"prompts", "eval_prompts", "eft", "ranked", "rubric"}:
        preset[name] = str(Path(model) / preset[name])
    return tupled(preset)


def tupled(values):
    """Settings whose schedules are lists, as command lines and JSON have them, with tuples."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()}


def fits(value, field):
    """Whether a value from JSON has the type of this setting."""
    def has(value, kind):
        kinds = (int, float) if kind is float else kind
        return isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)

    if field.type is tuple:
        each = field.metadata["type"]
        return isinstance(value, list) and value != [] and all(has(one, each) for one in value)
    return has(value, field.type)
